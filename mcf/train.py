"""The training loop: `python -m mcf.train run=RUN_DIR` is what every rank runs, `python -m mcf.launch` starts it.

for every optimiser step, from where the newest whole checkpoint stands
    samples    the next of the run: a pure function of (seed, samples seen)     mcf/data
    step       the paper's algorithm                                            mcf/step.py
    guard      steps that were not finite are counted and written down          mcf/guard.py
    told       metrics, pictures, events                                        mcf/track
    saved      at intervals, and when a signal says that time is up             mcf/state.py, mcf/checkpoint.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import sys
import time
from pathlib import Path

from mcf import atomic, caches, checkpoint, cli, distributed, linear, lock, memory, state
from mcf.beginning import begin
from mcf.config import Recipe
from mcf.data.bad import Tally
from mcf.errors import UserError
from mcf.exits import INTERRUPTED, SAVED, leave_with
from mcf.guard import Guard, memory_suffices
from mcf.meters import Meters
from mcf.rendezvous import launch_name, rendezvous
from mcf.step import Outcome
from mcf.stop import StopSignal
from mcf.track import Tracker, jsonl
from mcf.track.images import reconstruction_grid
from mcf.watchdog import Mark, Watchdog, unwatched

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"

# What costs a step time instead of memory.
RECOMPUTED = "speed.recompute=[encoder,decoder,teacher]"


class Training:
    """One run on one rank: its parts, put together and brought to where the run stands."""

    def __init__(self, recipe: Recipe, run_dir: Path, world: distributed.World, mark: Mark = unwatched):
        self.run_dir, self.world, self.mark = run_dir, world, mark
        begun = begin(recipe, run_dir, world, mark)
        self.recipe, self.plan, self.progress = begun.recipe, begun.plan, begun.progress
        self.step, self.loader, self.probe, self.resumed = begun.step, begun.loader, begun.probe, begun.resumed
        self.interrupted = False
        self.guard = Guard(begun.recipe.guard, run_dir, world.rank)
        self.meters = Meters(world)
        self.tally = Tally(begun.recipe.data.max_bad, begun.manifest.samples)
        # Positions of bad samples that an earlier launch has told of: after a kill, some of them come again.
        events = jsonl.read(run_dir / jsonl.EVENTS) if world.is_main else []
        self.bad_told = {event["position"] for event in events if event.get("kind") == "bad_sample"}

    def run(self, stop: StopSignal) -> bool:
        """Train until the recipe's last step; False if told to stop before it. Saves in both cases. Collective.

        `interrupted` then says whether the run wants to be started again: every rank has the same.
        Raises UserError if that last save fails: it is the outcome of the run.
        """
        recipe, plan, progress = self.recipe, self.plan, self.progress
        first = progress.step + 1
        last = min(plan.steps, progress.step + (recipe.train.stop_after or plan.steps))
        batches = self.meters.timed(iter(self.loader))
        with Tracker(
            recipe,
            self.run_dir,
            rank=self.world.rank,
            plan=plan,
            run_id=progress.mlflow_run,
            start=progress.step,
        ) as tracker:
            tracker.event(
                "resumed" if self.resumed else "started",
                step=progress.step,
                ranks=self.world.size,
                code=str(Path(__file__).parent),
            )
            told, stopping, failure = False, False, None
            while progress.step < last:
                self.mark("loading", progress.step + 1)
                with memory_suffices(recipe.local_batch, first=progress.step + 1 == first, instead=RECOMPUTED):
                    outcome = self.step(progress.step, batches, lambda: stop.received)
                self.mark("logging")
                progress.step += 1
                progress.samples_seen += recipe.batch
                self.meters.add(outcome, samples=recipe.batch)
                if not outcome.applied:
                    progress.bad_steps += 1
                    tracker.event("bad_step", step=progress.step, grad_norm=outcome.grad_norm)
                if progress.step == first:
                    memory.leave_out_of_collections()
                self.guard.observe(progress.step, outcome.applied, outcome.keys, {"grad_norm": outcome.grad_norm})

                told = outcome.stop
                stopping = told or progress.step == last
                probed = self._probed(told)
                logs = stopping or bool(probed) or self._due(recipe.train.log_every)
                saves = stopping or self._due(recipe.checkpoint.every)
                if logs or saves:  # a checkpoint counts all bad samples before it
                    self._note_bad_samples(tracker)
                if logs:
                    self._log(tracker, probed)
                if recipe.track.images_every and (stopping or self._due(recipe.track.images_every)):
                    self._picture(tracker, outcome)
                if saves:
                    failure = self._save(tracker)
                if stopping:
                    break
            if stopping and failure:
                raise UserError(f"{failure}, then launch again: the run goes on from there")
            self.mark("ending")
            done = progress.step >= plan.steps
            self.interrupted = told and not done and not distributed.any_rank(stop.for_good)
            tracker.event("finished" if done else "stopped", step=progress.step, mlflow=tracker.how_to_open or "off")
            tracker.close("finished" if done else "stopped")
        self.loader.close()
        gc.unfreeze()
        return done

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _save(self, tracker: Tracker) -> str | None:
        """Save a checkpoint; a save that fails is told, and the run goes on. Collective; what failed, the same on all."""
        failed: str | None = None
        self.mark("saving")
        tensors, momentum = self.step.engine.state_dict(), self.step.momentum.full_state_dict()
        if self.world.is_main:
            step, keep = self.progress.step, self.recipe.checkpoint
            tracker.sync()
            self.progress.mlflow_run = tracker.run_id
            try:
                with checkpoint.save(self.run_dir, step, keep=keep.keep, keep_every=keep.keep_every) as folder:
                    state.write(folder, self.recipe, self.progress, tensors, momentum)
                tracker.event("checkpoint", step=step)
            except checkpoint.SaveFailed as failure:
                failed = str(failure)
                tracker.event("checkpoint_failed", message=failed, step=step)
        self.mark("waiting")
        # Nobody runs ahead into the next collective's time limit while rank 0 writes.
        return distributed.broadcast(failed)

    def _probed(self, told: bool) -> dict[str, float]:
        """What the probe tells, at its intervals and at the end; nothing where time is up. Collective."""
        if (
            self.probe is None
            or told
            or not (self._due(self.recipe.probe.every) or self.progress.step == self.plan.steps)
        ):
            return {}
        self.mark("probing")
        return self.probe(self.step.encoder(self.recipe.probe.branch), self.recipe.model.heads)

    def _log(self, tracker: Tracker, probed: dict[str, float]) -> None:
        step = self.progress.step
        numbers = self.meters.read() | probed
        numbers["lr"] = self.step.learning_rate_at(step - 1)
        numbers["momentum"] = self.step.momentum_at(step - 1)
        numbers["bad/steps"], numbers["bad/samples"] = self.progress.bad_steps, self.progress.bad_samples
        if warning := self.guard.watch_collapse(numbers["contrast/query_std"]):
            tracker.event("warning", step=step, message=warning)
        tracker.metrics(step, numbers)

    def _note_bad_samples(self, tracker: Tracker) -> None:
        """Record what was bad of the samples seen since the last time, on all ranks. Collective; too many end the run, on all alike."""
        mine = self.loader.take_bad(before=self.progress.samples_seen)
        found = [bad for of_rank in distributed.gather_objects(mine) for bad in of_rank]
        for bad in found:
            self.progress.bad_samples += 1
            if bad.position not in self.bad_told:
                tracker.event("bad_sample", step=self.progress.step, **dataclasses.asdict(bad))
        self.tally.add(found)

    def _picture(self, tracker: Tracker, outcome: Outcome) -> None:
        if self.world.is_main:
            images, mask, pred = (t[: self.recipe.track.images].cpu() for t in outcome.picture)
            arrays = images.numpy(), mask.numpy(), pred.float().numpy()
            grid = reconstruction_grid(*arrays, self.recipe.model.patch_size)
            tracker.image(self.progress.step, "reconstruction", grid)


@cli.main
def main(argv: list[str] | None = None) -> int:
    """Train one rank: `run=RUN_DIR` as mcf.launch writes it, or recipe=… key=value … directly.

    Exit status 0: done, or a launcher's rank that ctrl-C has ended; INTERRUPTED: ended by ctrl-C without a launcher.
    SAVED: told to stop by SIGTERM or SIGUSR2, saved, and to be started again. RANK_LOST: another rank was dead or stuck.
    """
    argv = sys.argv[1:] if argv is None else argv
    if cli.wants_help(argv):
        cli.load_recipe(argv, verb="train")  # prints it and leaves
    stop = StopSignal()
    caches.keep_local()
    place = rendezvous(os.environ)
    with Watchdog(place.rank, place.size, launch_name(os.environ)) as watchdog:
        launched = run_dir_of(argv)
        if launched and (launched / RECIPE).is_file():
            watchdog.open(launched)
        watchdog.mark("joining")
        world = distributed.join(timeout=distributed.PATIENCE)
        recipe, run_dir = distributed.from_main(lambda: read_arguments(argv))
        with contextlib.ExitStack() as owned:
            if launched is None:
                distributed.from_main(lambda: owned.enter_context(lock.held(run_dir)))
            watchdog.open(run_dir)
            watchdog.configure(recipe.watchdog)
            interrupted = train(recipe, run_dir, world, stop, watchdog, launched=launched is not None)
    if interrupted:
        return SAVED
    return INTERRUPTED if stop.for_good and launched is None else 0


def train(
    recipe: Recipe, run_dir: Path, world: distributed.World, stop: StopSignal, watchdog: Watchdog, *, launched: bool
) -> bool:
    """Train from where the run stands until it is done or told to stop; whether it is to be started again. Collective.

    launched: a launcher has written the recipe into the run directory.
    """
    distributed.set_threads(world, recipe.train.threads)
    linear.use(recipe.speed.linear)
    if recipe.speed.keep_memory and world.device.type == "cpu":
        memory.keep_freed_memory()
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if world.size != recipe.world_size:
        raise UserError(
            f"{world.size} ranks were started, the recipe says nodes={recipe.nodes} × gpus_per_node="
            f"{recipe.gpus_per_node} = {recipe.world_size}; start as many, or change the keys"
        )
    started = time.monotonic()
    training = Training(recipe, run_dir, world, watchdog.mark)
    if not launched:  # what a checkpoint refuses is not written
        distributed.from_main(lambda: atomic.write(run_dir / RECIPE, cli.dump(recipe)))
    done = training.run(stop)
    step, steps = training.progress.step, training.plan.steps
    seconds = time.monotonic() - started
    log.info(
        "%s after step %d of %d, %.0f s", "done" if done else "stopped, launch again to go on:", step, steps, seconds
    )
    distributed.leave()
    return training.interrupted


def run_dir_of(argv: list[str]) -> Path | None:
    """The run directory, if the command line names it."""
    runs = [argument.removeprefix("run=") for argument in argv if argument.startswith("run=")]
    return Path(runs[-1]) if runs else None


def read_arguments(argv: list[str]) -> tuple[Recipe, Path]:
    """Recipe and run directory from the command line."""
    run_dir = run_dir_of(argv)
    if run_dir is None:
        recipe = cli.load_recipe(argv, verb="train")
        return recipe, Path(recipe.output) / recipe.name
    file = run_dir / RECIPE
    if not file.exists():
        raise UserError(f"run={run_dir}: no recipe.yaml in it; start runs with python -m mcf.launch recipe=…")
    rest = [argument for argument in argv if not argument.startswith("run=")]
    return cli.load_recipe([f"recipe={file}", *rest], verb="train"), run_dir


if __name__ == "__main__":
    leave_with(main)
