"""The training loop: `python -m mcf.train run=RUN_DIR` is what every rank runs, `python -m mcf.launch` starts it.

for every optimiser step, from where the newest whole checkpoint stands
    samples    the next of the run: a pure function of (seed, samples seen)     mcf/data
    step       the paper's algorithm                                            mcf/step.py
    guard      steps that were not finite are counted and written down          mcf/guard.py
    told       metrics, pictures, events                                        mcf/track
    saved      at intervals, and when a signal says that time is up             mcf/state.py, mcf/checkpoint.py
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
from pathlib import Path

from mcf import checkpoint, cli, distributed, state
from mcf.config import Recipe
from mcf.data.loader import Loader
from mcf.data.shards import load_manifest
from mcf.errors import UserError
from mcf.guard import Guard
from mcf.meters import Meters
from mcf.plan import make_plan
from mcf.step import Outcome, Step
from mcf.track import Tracker
from mcf.track.images import reconstruction_grid
from mcf.weights import load_teacher

log = logging.getLogger(__name__)


class Training:
    """One run on one rank: its parts, put together and brought to where the run stands."""

    def __init__(self, recipe: Recipe, run_dir: Path, world: distributed.World):
        self.recipe, self.run_dir, self.world = recipe, run_dir, world
        self.manifest = load_manifest(recipe.data.path or "")
        self.plan = make_plan(recipe, self.manifest.samples)
        self.progress = state.Progress(data=self.manifest.fingerprint)
        found = self._newest_checkpoint()
        if found is not None:
            # Before anything is built: a checkpoint of another run is refused at once.
            self.progress = state.check_same_run(found, recipe, self.manifest.fingerprint)

        teacher = load_teacher(
            recipe.teacher, image_size=recipe.model.image_size, attention=recipe.attention, seed=recipe.seed
        )
        identity = state.fingerprint(teacher)
        if found is not None:
            state.check_same_teacher(self.progress, identity, recipe)
        self.progress.teacher = identity
        self.step = Step(recipe, self.plan, teacher, world)
        self.resumed = found is not None
        if found is not None:
            tensors, momentum = state.read(found)
            self.step.engine.load_state_dict(tensors)
            self.step.momentum.load_full_state_dict(momentum)
            log.info("going on from %s: %d samples seen", found, self.progress.samples_seen)
        self.guard = Guard(recipe.guard, run_dir, world.rank)
        self.meters = Meters(world)
        self.loader = Loader(
            recipe.data,
            batch=recipe.batch,
            micro_batch=recipe.local_batch,
            seed=recipe.seed,
            image_size=recipe.model.image_size,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            start=self.progress.samples_seen,
            threads=world.cores,
        )

    def run(self, stop: StopSignal) -> bool:
        """Train until the recipe's last step; False if told to stop before it. Saves in both cases. Collective.

        Raises UserError if that last save fails: it is the outcome of the run.
        """
        recipe, plan, progress = self.recipe, self.plan, self.progress
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
            tracker.event("resumed" if self.resumed else "started", step=progress.step, ranks=self.world.size)
            stopping, failure = False, None
            while progress.step < last:
                outcome = self.step(progress.step, batches)
                progress.step += 1
                progress.samples_seen += recipe.batch
                self.meters.add(outcome, samples=recipe.batch)
                if not outcome.applied:
                    progress.bad_steps += 1
                    tracker.event("bad_step", step=progress.step, grad_norm=outcome.grad_norm)
                self.guard.observe(progress.step, outcome.applied, outcome.keys, {"grad_norm": outcome.grad_norm})

                stopping = distributed.any_rank(stop.received) or progress.step == last
                if stopping or self._due(recipe.train.log_every):
                    self._note_bad_samples(tracker)
                    self._log(tracker)
                if stopping or self._due(recipe.track.images_every):
                    self._picture(tracker, outcome)
                if stopping or self._due(recipe.checkpoint.every):
                    failure = self._save(tracker)
                if stopping:
                    break
            if stopping and failure:
                raise UserError(f"{failure}, then launch again: the run goes on from there")
            done = progress.step >= plan.steps
            tracker.event("finished" if done else "stopped", step=progress.step, mlflow=tracker.how_to_open or "off")
            tracker.close("finished" if done else "stopped")
        self.loader.close()
        return done

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint as rank 0 sees it; damaged ones are set aside."""
        path: Path | None = None
        if self.world.is_main:
            path, damaged = checkpoint.newest(self.run_dir)
            checkpoint.set_aside(damaged)
            if damaged and path is None:
                log.warning("no whole checkpoint is left in %s: the run starts again", self.run_dir)
        return distributed.broadcast(path)

    def _save(self, tracker: Tracker) -> str | None:
        """Save a checkpoint; a save that fails is told, and the run goes on. Collective; what failed, the same on all."""
        failed: str | None = None
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
        # Nobody runs ahead into the next collective's time limit while rank 0 writes.
        return distributed.broadcast(failed)

    def _log(self, tracker: Tracker) -> None:
        step = self.progress.step
        numbers = self.meters.read()
        numbers["lr"] = self.step.learning_rate_at(step - 1)
        numbers["momentum"] = self.step.momentum_at(step - 1)
        numbers["bad/steps"], numbers["bad/samples"] = self.progress.bad_steps, self.progress.bad_samples
        self.guard.watch_collapse(step, numbers["contrast/query_std"])
        tracker.metrics(step, numbers)

    def _note_bad_samples(self, tracker: Tracker) -> None:
        """Record what the loaders of all ranks left out since the last time."""
        for found in distributed.gather_objects(self.loader.take_bad()):
            for bad in found:
                self.progress.bad_samples += 1
                tracker.event("bad_sample", step=self.progress.step, **dataclasses.asdict(bad))

    def _picture(self, tracker: Tracker, outcome: Outcome) -> None:
        if self.world.is_main:
            images, mask, pred = (t[: self.recipe.track.images].cpu() for t in outcome.picture)
            arrays = images.numpy(), mask.numpy(), pred.float().numpy()
            grid = reconstruction_grid(*arrays, self.recipe.model.patch_size)
            tracker.image(self.progress.step, "reconstruction", grid)


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR2 set a flag; the loop saves and ends at the next step. A second SIGINT is obeyed."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True
        log.warning("%s: saving and stopping at the end of this step", signal.Signals(number).name)


@cli.main
def main(argv: list[str] | None = None) -> int:
    """Train one rank: `run=RUN_DIR` as mcf.launch writes it, or recipe=… key=value … directly."""
    recipe, run_dir = read_arguments(sys.argv[1:] if argv is None else argv)
    stop = StopSignal()
    world = distributed.join()
    distributed.set_threads(world, recipe.train.threads)
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if world.size != recipe.world_size:
        raise UserError(
            f"{world.size} ranks were started, the recipe says nodes={recipe.nodes} × gpus_per_node="
            f"{recipe.gpus_per_node} = {recipe.world_size}; start as many, or change the keys"
        )
    started = time.monotonic()
    training = Training(recipe, run_dir, world)
    done = training.run(stop)
    step, steps = training.progress.step, training.plan.steps
    seconds = time.monotonic() - started
    log.info(
        "%s after step %d of %d, %.0f s", "done" if done else "stopped, launch again to go on:", step, steps, seconds
    )
    distributed.leave()
    return 0


def read_arguments(argv: list[str]) -> tuple[Recipe, Path]:
    """Recipe and run directory from the command line."""
    runs = [argument.removeprefix("run=") for argument in argv if argument.startswith("run=")]
    if not runs:
        recipe = cli.load_recipe(argv, verb="train")
        return recipe, Path(recipe.output) / recipe.name
    run_dir = Path(runs[-1])
    file = run_dir / "recipe.yaml"
    if not file.exists():
        raise UserError(f"run={run_dir}: no recipe.yaml in it; start runs with python -m mcf.launch recipe=…")
    rest = [argument for argument in argv if not argument.startswith("run=")]
    return cli.load_recipe([f"recipe={file}", *rest], verb="train"), run_dir


if __name__ == "__main__":
    sys.exit(main())
