"""The fine-tuning loop of one rank; `mcf.finetune` starts it.

for every step, from where the newest whole checkpoint stands
    samples    the next of the run, a pure function of (seed, samples seen)      mcf/downstream/loader.py
    step       backbone (frozen, or trained), pyramid, head, the task's loss     mcf/downstream, mcf/engine
    average    of the weights, after a step that was applied
    judged     the average, on the test set, at the ends of epochs               mcf/downstream/alignment.py, parsing.py
    told       metrics, pictures, and in the end metrics.json and a table
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mcf import atomic, checkpoint, distributed
from mcf.downstream import report, saved, state
from mcf.downstream.alignment import Alignment
from mcf.downstream.backbone import load_backbone
from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import Face, open_faces
from mcf.downstream.datasets.splits import chosen_faces
from mcf.downstream.loader import Batch, Loader
from mcf.downstream.network import Average, Network, build_decoder
from mcf.downstream.parsing import Parsing
from mcf.downstream.scores import Scores, choose, is_better
from mcf.engine import Engine, StepResult
from mcf.errors import UserError
from mcf.guard import Guard, memory_suffices
from mcf.state import fingerprint
from mcf.stop import StopSignal
from mcf.track import Tracker
from mcf.watchdog import Mark, unwatched

log = logging.getLogger(__name__)

METRICS = "metrics.json"
TASKS: dict[str, type[Alignment] | type[Parsing]] = {"alignment": Alignment, "parsing": Parsing}


class Finetuning:
    """One run on one rank: its parts, put together and brought to where the run stands."""

    def __init__(self, config: FinetuneConfig, run_dir: Path, world: distributed.World, mark: Mark = unwatched):
        self.config, self.run_dir, self.world, self.mark = config, run_dir, world, mark
        self.interrupted = False
        distributed.from_main(lambda: checkpoint.make_run_dir(run_dir))
        mark("reading data")
        self.set = open_faces(config.task, config.dataset, config.data)
        self.train, self.validation = chosen_faces(self.set.train, config)
        self.epochs = config.train.epochs or self.set.epochs
        self.local_batch, self.accumulation = config.shares(world.size)
        if len(self.train) < config.batch:
            raise UserError(
                f"batch={config.batch}, but there are {len(self.train)} faces to train on; use a smaller batch"
            )
        self.per_epoch = len(self.train) // config.batch
        self.steps = self.epochs * self.per_epoch

        mark("reading weights")
        backbone = load_backbone(config).to(world.device)
        self.config = config = config.sized(backbone.vit.image_size)
        identity = fingerprint(backbone)
        mark("reading checkpoint")
        self.progress = state.Progress(data=state.fingerprint(self.train, self.validation, self.set.test))
        found = distributed.from_main(lambda: checkpoint.take_up(run_dir))
        if found is not None:
            self.progress = state.check_same_run(found, config, self.progress.data)
        if found is not None and self.progress.backbone != identity:
            raise UserError(
                f"weights={config.weights}: other weights than the run began with; give the old ones, or another name="
            )
        self.progress.backbone = identity
        mark("building")
        self.task = TASKS[config.task](self.set, config)
        decoder = build_decoder(config.seed, backbone.vit.width, self.set.channels, config.head)
        self.backbone = backbone.eval().requires_grad_(False) if config.freeze else None
        trained: nn.Module = decoder if config.freeze else Network(backbone, decoder)
        trained.to(world.device)
        self.average = Average(trained, config.ema)
        groups = [{"params": list(decoder.parameters()), "weight_decay": config.optimizer.weight_decay}]
        if not config.freeze:
            slower = config.optimizer.backbone_lr / config.lr
            groups.append({**groups[0], "params": list(backbone.parameters()), "lr_scale": slower})
        self.engine = Engine(
            trained, config.recipe(world.size), accumulation=self.accumulation, world=world, groups=groups
        )
        self.resumed = found is not None
        if found is not None:
            tensors, average = state.read(found)
            self.engine.load_state_dict(tensors)
            self.average.module.load_state_dict(average)
            log.info("going on from %s: %d steps done", found, self.progress.step)
        self.guard = Guard(config.guard, run_dir, world.rank)

    def run(self, stop: StopSignal) -> bool:
        """Train to the end, evaluate, report; False if told to stop before. Saves in both cases. Collective."""
        config, progress = self.config, self.progress
        readers = config.train.readers or self.world.cores
        with (
            Loader(self.set, config, self.world.device, readers) as self.loader,
            Tracker(
                config, self.run_dir, rank=self.world.rank, plan={"steps": self.steps}, run_id=progress.mlflow_run,
                start=progress.step, description=report.description(config, self.set, len(self.train)),
            ) as tracker,
        ):  # fmt: skip
            tracker.event("resumed" if self.resumed else "started", step=progress.step, ranks=self.world.size)
            for note in self.set.notes:
                tracker.event("note", message=note)
            self.loop(stop, tracker)
            self.mark("ending")
            finished = progress.step >= self.steps
            if finished:
                self.finish(tracker)
            tracker.event(
                "finished" if finished else "stopped", step=progress.step, mlflow=tracker.how_to_open or "off"
            )
            tracker.close("finished" if finished else "stopped")
        asked = not finished and distributed.any_rank(stop.received)
        self.interrupted = asked and not distributed.any_rank(stop.for_good)
        return finished

    def loop(self, stop: StopSignal, tracker: Tracker) -> None:
        """Steps, numbers, evaluations and checkpoints, to the end, for `train.stop_after` steps, or until told to stop."""
        config, progress = self.config, self.progress
        begun, last = progress.step, min(self.steps, progress.step + (config.train.stop_after or self.steps))
        batches = self.loader.training(
            self.train, begun * config.batch, self.world.rank, self.world.size, self.local_batch
        )
        since, counted, stopping = time.monotonic(), begun, False
        while progress.step < last and not stopping:
            terms, result = self.advance(batches, tracker, stop, first=progress.step == begun)
            stopping = result.stop or progress.step == last
            told: dict[str, float] = {}
            if stopping or progress.step % config.train.log_every == 0:
                told = {f"loss/{name}": float(distributed.mean(value)) for name, value in terms.items()}
                told |= {"lr": self.lr_at(progress.step - 1), "grad_norm": result.grad_norm}
                told["rate/images_per_s"] = (progress.step - counted) * config.batch / (time.monotonic() - since)
                told["bad/steps"] = progress.bad_steps
                since, counted = time.monotonic(), progress.step
            if self.evaluation_is_due():
                judging = time.monotonic()
                told |= self.judge(tracker)
                since += time.monotonic() - judging
                headline = f"test/{self.task.headline}"
                tracker.event("evaluated", step=progress.step, epoch=told["epoch"], **{headline: told[headline]})
            if told:
                tracker.metrics(progress.step, told)
            if stopping or progress.step % config.checkpoint.every == 0:
                self.save(tracker, raises=stopping)

    def advance(
        self, batches: Iterator[Batch], tracker: Tracker, stop: StopSignal, *, first: bool
    ) -> tuple[dict[str, torch.Tensor], StepResult]:
        """One step: its mean loss terms on this rank, and what became of it. A bad one changes nothing, and is told."""
        config, progress = self.config, self.progress
        smaller = f"head.channels below {config.head.channels}" if config.freeze else "freeze=true"
        self.mark("loading", progress.step + 1)
        with memory_suffices(self.local_batch, first=first, instead=smaller):
            terms, keys = self.step(batches)
            self.mark("step")
            result = self.engine.step(self.lr_at(progress.step), finite=terms["total"].isfinite(), stop=stop.received)
        self.mark("logging")
        progress.step += 1
        if result.applied:
            self.average.update(self.engine.module)
        else:
            progress.bad_steps += 1
            tracker.event("bad_step", step=progress.step, grad_norm=result.grad_norm)
        self.guard.observe(progress.step, result.applied, keys, {"grad_norm": result.grad_norm})
        return terms, result

    def step(self, batches: Iterator[Batch]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Forward and backward over a step's micro-batches: mean loss terms of this rank, and the names of its faces."""
        # What dropout draws is a function of the step, so that a run that was cut off goes on as it would have.
        seeds = np.random.SeedSequence((self.config.seed, self.progress.step, self.world.rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        self.engine.module.train()
        sums: dict[str, torch.Tensor] = {}
        keys: list[str] = []
        for _ in range(self.accumulation):
            self.mark("loading")
            batch = next(batches)
            self.mark("forward")
            if self.backbone is None:
                logits = self.engine(batch.images)
            else:
                with torch.no_grad(), self.autocast():
                    maps = self.backbone(batch.images)
                logits = self.engine(*maps)
            terms = self.task.terms(logits, batch)
            self.mark("backward")
            self.engine.backward(terms["total"])
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(value.detach())) + value.detach() / self.accumulation
            keys += [prepared.face.name for prepared in batch.faces]
        return sums, keys

    def autocast(self) -> torch.autocast:
        """Matrix work in bfloat16 if the recipe says so; the engine does the same to what is trained."""
        bf16 = self.config.train.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16)

    def lr_at(self, step: int) -> float:
        """Learning rate of pyramid and head at a step."""
        optimizer = self.config.optimizer
        return self.config.lr * (optimizer.drop if step // self.per_epoch >= optimizer.drop_epoch else 1.0)

    def evaluation_is_due(self) -> bool:
        """Whether an epoch has just ended after which the test set is looked at."""
        epoch, rest = divmod(self.progress.step, self.per_epoch)
        return rest == 0 and (epoch % self.config.evaluate_every == 0 or epoch == self.epochs)

    def network(self) -> Network:
        """What is evaluated: the average, with its backbone."""
        module = self.average.module
        if self.backbone is None:
            assert isinstance(module, Network)
            return module
        return Network(self.backbone, module)  # type: ignore[arg-type]

    def judge(self, tracker: Tracker) -> dict[str, float]:
        """Evaluate the average, and keep its weights if this is the epoch to choose; the numbers to tell. Collective."""
        network, epoch = self.network(), self.progress.step // self.per_epoch
        test = self.evaluate(network, self.set.test).metrics
        told = {"epoch": epoch, **{f"test/{name}": value for name, value in test.items()}}
        held, chosen = None, True
        if self.validation:
            earlier = [e["validation"] for e in self.progress.history if e["validation"] is not None]
            held = self.evaluate(network, self.validation).metrics[self.task.headline]
            chosen = is_better(
                held, (min if self.task.better == "lower" else max)(earlier, default=None), self.task.better
            )
            told[f"validation/{self.task.headline}"] = held
        if chosen and not self.keep(tracker, network, epoch):
            held = None  # an epoch whose weights are lost is not to be chosen
        self.progress.history.append({"epoch": epoch, "test": test, "validation": held})
        return told

    def keep(self, tracker: Tracker, network: Network, epoch: int) -> bool:
        """Write the weights to RUN/model.safetensors; whether they are there now. Collective.

        A write that fails is told, and ends the run only at the last evaluation, of which it is the outcome.
        """
        failed: str | None = None
        self.mark("saving")
        if self.world.is_main:
            try:
                saved.write(self.run_dir / saved.FILE, network, saved.describe(network, self.config, self.set, epoch))
            except UserError as failure:
                failed = str(failure)
                tracker.event("model_failed", message=failed, step=self.progress.step)
        self.mark("waiting")
        failed = distributed.broadcast(failed)
        if failed and self.progress.step >= self.steps:
            raise UserError(f"{failed}, then start again: the run goes on from its last checkpoint")
        return not failed

    @torch.no_grad()
    def evaluate(self, network: Network, faces: list[Face]) -> Scores:
        """Scores of a network on faces that all ranks share. Collective."""
        mine = range(self.world.rank, len(faces), self.world.size)
        judged: list[tuple[int, np.ndarray]] = []
        batches = self.loader.plain([faces[i] for i in mine], self.local_batch)
        # As many marks on every rank, although some have a batch less.
        for _ in range(-(-len(faces) // (self.local_batch * self.world.size))):
            self.mark("evaluating")
            if (batch := next(batches, None)) is None:
                continue
            predictions = self.task.predict(network(batch.images), batch.faces)
            for prediction, prepared in zip(predictions, batch.faces):
                judged.append((mine[len(judged)], self.task.judge(prediction, prepared)))
        everything = sorted((pair for part in distributed.gather_objects(judged) for pair in part), key=lambda p: p[0])
        return self.task.score(faces, [result for _, result in everything])

    def finish(self, tracker: Tracker) -> None:
        """Evaluate the chosen weights once more, for the report and the pictures. Collective.

        UserError where metrics.json cannot be written: a later start has only this to do again.
        """
        distributed.barrier()
        network, _ = saved.load(str(self.run_dir), self.config.task)
        scores = self.evaluate(network.to(self.world.device), self.set.test)
        failed: str | None = None
        if self.world.is_main:
            results = choose(self.progress.history, self.task.headline, self.task.better, bool(self.validation))
            results |= {"task": self.config.task, "dataset": self.config.dataset, "history": self.progress.history}
            try:
                atomic.write(self.run_dir / METRICS, json.dumps(results, indent=1) + "\n")
            except OSError as error:
                failed = f"{self.run_dir / METRICS}: cannot be written ({error.strerror})"
            else:
                self.show(results, scores, network, tracker)
        if failed := distributed.broadcast(failed):
            raise UserError(f"{failed}; free some space, then start again: nothing is trained anew")

    def show(self, results: dict[str, Any], scores: Scores, network: Network, tracker: Tracker) -> None:
        """The outcome as pictures and as a table."""
        if self.config.pictures:
            drawn = report.pictures(self.set, self.task, scores, network, self.loader, self.config.pictures)
            for name, picture in drawn.items():
                tracker.image(self.progress.step, name, picture)
        print(f"\n{report.table(results)}\n")
        print(f"metrics    {self.run_dir / METRICS}\nmodel      {self.run_dir / saved.FILE}")
        print(f"pictures   {self.run_dir / 'images'}", flush=True)

    def save(self, tracker: Tracker, *, raises: bool) -> None:
        """Save a checkpoint. One that fails is told, and ends the run only where it is its outcome. Collective."""
        failed: str | None = None
        self.mark("saving")
        tensors = self.engine.state_dict()
        if self.world.is_main:
            tracker.sync()
            self.progress.mlflow_run = tracker.run_id
            keep = self.config.checkpoint
            try:
                with checkpoint.save(
                    self.run_dir, self.progress.step, keep=keep.keep, keep_every=keep.keep_every
                ) as folder:
                    state.write(folder, self.config, self.progress, tensors, self.average.module.state_dict())
                tracker.event("checkpoint", step=self.progress.step)
            except checkpoint.SaveFailed as failure:
                failed = str(failure)
                tracker.event("checkpoint_failed", message=failed, step=self.progress.step)
        self.mark("waiting")
        failed = distributed.broadcast(failed)
        if failed and raises:
            raise UserError(f"{failed}, then start again: the run goes on from there")
