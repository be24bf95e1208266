"""What a run will do and need, said before it starts: the arithmetic of a recipe.

Effective batch, learning rate, length, negatives and pace of the momentum encoder (METHOD section 1, end); parameters,
memory of a rank and size of the checkpoints (`mcf.sizes`), operations, bytes on the network and time of a step
(`mcf.costs`), all from shapes alone. Nothing here needs torch, data or a device.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from mcf.checks import fitting, keys_per_query, peak_lr
from mcf.config import Recipe
from mcf.costs import Flops, Times, Traffic, count_flops, count_traffic, estimate_times
from mcf.errors import UserError
from mcf.machine import Machine
from mcf.sizes import (
    Memory,
    Parameters,
    checkpoint_bytes,
    count_parameters,
    estimate_memory,
    largest_micro_batch,
    zero_stage,
)

GIB = 2**30
SPARED = 0.9  # of a GPU's memory: an allocator and libraries take the rest


@dataclass(frozen=True)
class Plan:
    """All numbers of a run that follow from its recipe and the size of its data set.

    samples: in the data set. steps_per_epoch: whole batches in it (the remainder is left out, order.py). steps: length
    of the run. epochs: the same in passes over the data. lr: after the warm-up. warmup_steps: need not be whole.
    keys: a query is compared with, its own included. momentum_updates: of the average, a step. momentum_per_step: what
    they amount to, m^updates. zero_stage: that runs; asked_stage: that the recipe names. flops: of an image. traffic:
    of a step. machine and times: where the recipe names one. checkpoint_bytes: of one. checkpoints: on disk at the end
    of the run, at most.
    """

    name: str
    run_dir: Path
    world_size: int
    nodes: int
    gpus_per_node: int
    batch: int
    micro_batch: int
    accumulation: int
    samples: int
    steps_per_epoch: int
    steps: int
    epochs: float
    lr: float
    min_lr: float
    warmup_steps: float
    keys: int
    momentum: float
    momentum_schedule: str
    momentum_updates: int
    parameters: Parameters
    zero_stage: int
    asked_stage: int
    precision: str
    memory: Memory
    flops: Flops
    traffic: Traffic
    machine: str | None
    times: Times | None
    checkpoint_bytes: int
    checkpoints: int
    checkpoint_every: int
    metric_records: int
    pictures: int
    notes: tuple[str, ...] = ()

    @property
    def negatives(self) -> int:
        """Negatives of a query."""
        return self.keys - 1

    @property
    def momentum_per_step(self) -> float:
        """m of a whole optimiser step, at the start of the run."""
        return self.momentum**self.momentum_updates

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int = 1000) -> list[str]:
        """The plan as a table for people, at most `width` letters wide."""
        p, m = self.parameters, self.memory
        peak = f"{self.lr:.3g}"
        updates = "once a step" if self.momentum_updates == 1 else f"{self.momentum_updates} times a step"
        moving = f"{self.momentum:g} {updates} = {self.momentum_per_step:.4g} a step"
        rows = [
            ("run", f"{self.name} in {self.run_dir}"),
            ("ranks", f"{self.world_size} = {_count(self.nodes, 'node')} × {self.gpus_per_node}"),
            (
                "effective batch",
                f"{self.batch:,} = {_count(self.world_size, 'rank')} × micro-batch {self.micro_batch} "
                f"× accumulation {self.accumulation}",
            ),
            (
                "length",
                f"{self.steps:,} steps = {self.epochs:.4g} epochs of {self.steps_per_epoch:,} steps "
                f"({self.samples:,} samples)",
            ),
            (
                "learning rate",
                f"0 → {peak} over {self.warmup_steps:,.0f} steps, then half-cosine → {self.min_lr:g}",
            ),
            ("negatives", f"{self.negatives:,} a query ({self.keys:,} keys with its own)"),
            ("momentum", moving + (", rising to 1" if self.momentum_schedule == "cosine" else "")),
            (
                "parameters",
                f"{_millions(p.trained)} trained (encoder {_millions(p.encoder)}, decoder {_millions(p.decoder)}, heads "
                f"{_millions(p.projector + p.predictor)}); momentum branch {_millions(p.momentum)}, "
                f"teacher {_millions(p.teacher) if p.teacher else 'none'}",
            ),
            (
                "memory a rank",
                f"≈ {_size(m.total)}: weights and gradients {_size(m.weights)}, optimiser {_size(m.optimizer)}, momentum "
                f"{_size(m.momentum)}, teacher {_size(m.teacher)}, activations {_size(m.activations)}, "
                f"images {_size(m.images)}, buffers {_size(m.buffers)} ({self._zero()}, {self.precision})",
            ),
            (
                "work",
                f"{_flops(self.flops.total)} an image, {_flops(self.flops.total * self.batch)} a step: teacher "
                f"{self.flops.teacher / self.flops.total:.0%}, encoder {self.flops.encoder / self.flops.total:.0%}, "
                f"decoder {self.flops.decoder / self.flops.total:.0%}",
            ),
            ("communication", self._communication()),
            *([("time", self._time(self.times))] if self.times else []),
            (
                "checkpoints",
                f"{_size(self.checkpoint_bytes)} each, every {self.checkpoint_every:,} steps; at most "
                f"{_size(self.checkpoint_bytes * (self.checkpoints + 1))} on disk "
                f"({self.checkpoints} kept, one being written)",
            ),
            ("tracking", f"{self.metric_records:,} records of metrics, {self.pictures:,} pictures"),
        ]
        rows += [("NOTE", note) for note in self.notes]
        wrap = textwrap.TextWrapper(width, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False)
        return [line for name, text in rows for line in wrap.wrap(f"{name:<16}{text}")]

    def _zero(self) -> str:
        if self.asked_stage == self.zero_stage:
            return f"ZeRO {self.zero_stage}"
        return f"ZeRO 0: one rank has nothing to split, stage {self.asked_stage} is for several"

    def _communication(self) -> str:
        t = self.traffic
        if not t.total:
            return "none: one rank"
        named = {"gradients": t.gradients, "parameters": t.parameters, "momentum branch": t.momentum}
        named |= {"keys": t.keys, "BatchNorm": t.statistics}
        parts = ", ".join(f"{name} {_size(part)}" for name, part in named.items() if part)
        return f"≈ {_size(t.total)} that a rank sends a step: {parts}"

    def _time(self, times: Times) -> str:
        return (
            f"≈ {_span(times.step)} a step on {self.machine}: compute {_span(times.compute)}, update "
            f"{_span(times.update)}, communication {_span(times.communication)}, one after the other; "
            f"{self.batch / times.step:,.0f} images/s, {_span(self.steps * times.step)} for the run (an estimate: "
            "docs/scaling.md)"
        )


def make_plan(recipe: Recipe, samples: int | None = None, machine: Machine | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: as `mcf.cli.load_recipe` gives it, its checks passed.
        samples: in the data set, if it could be counted; else data.samples is believed.
        machine: what the recipe's `machine` names (`mcf.machine.load_machine`); without it no times are estimated.

    Raises:
        UserError: the size of the data set is not known, or under one batch; or the warm-up is as long as the run.
    """
    samples = _samples(recipe, samples)
    steps_per_epoch = samples // recipe.batch
    steps = recipe.train.steps or max(1, round(recipe.train.epochs * steps_per_epoch))
    warmup_steps = recipe.optimizer.warmup_epochs * steps_per_epoch
    if warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_epochs={recipe.optimizer.warmup_epochs:g} are {warmup_steps:,.0f} steps, and the run has "
            f"only {steps:,}; use less, for example optimizer.warmup_epochs={steps / steps_per_epoch / 16:.3g}"
        )
    accumulation = recipe.batch // (recipe.world_size * recipe.local_batch)
    parameters = count_parameters(recipe)
    memory = estimate_memory(recipe, parameters)
    check = recipe.checkpoint
    saves = -(-steps // check.every)
    kept = min(saves, check.keep) + (max(0, steps // check.keep_every) if check.keep_every else 0)
    return Plan(
        name=recipe.name,
        run_dir=Path(recipe.output) / recipe.name,
        world_size=recipe.world_size,
        nodes=recipe.nodes,
        gpus_per_node=recipe.gpus_per_node,
        batch=recipe.batch,
        micro_batch=recipe.local_batch,
        accumulation=accumulation,
        samples=samples,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch,
        lr=peak_lr(recipe),
        min_lr=recipe.optimizer.min_lr,
        warmup_steps=warmup_steps,
        keys=keys_per_query(recipe),
        momentum=recipe.momentum.value,
        momentum_schedule=recipe.momentum.schedule,
        momentum_updates=accumulation if recipe.momentum.update == "micro_batch" else 1,
        parameters=parameters,
        zero_stage=zero_stage(recipe),
        asked_stage=recipe.train.zero_stage,
        precision=recipe.train.precision,
        memory=memory,
        flops=count_flops(recipe),
        traffic=count_traffic(recipe),
        machine=recipe.machine,
        times=estimate_times(recipe, machine) if machine else None,
        checkpoint_bytes=checkpoint_bytes(recipe, parameters),
        checkpoints=min(kept, saves),
        checkpoint_every=check.every,
        metric_records=-(-steps // recipe.train.log_every),
        pictures=-(-steps // recipe.track.images_every) if recipe.track.images_every else 0,
        notes=tuple(_notes(recipe, samples, memory, machine)),
    )


def _samples(recipe: Recipe, counted: int | None) -> int:
    samples = counted if counted is not None else recipe.data.samples
    if samples is None:
        where = f" (no manifest.json in data.path={recipe.data.path})" if recipe.data.path else ""
        raise UserError(
            f"the size of the data set is not known{where}; give data.path=FOLDER that mcf.pack wrote, or "
            "data.samples=NUMBER to plan without it"
        )
    if samples < recipe.batch:
        raise UserError(
            f"the data set has {samples} samples, fewer than batch={recipe.batch}; "
            f"use {fitting(recipe, samples) or 'fewer ranks and a smaller batch'}, or more data"
        )
    return samples


def _notes(recipe: Recipe, samples: int, memory: Memory, machine: Machine | None) -> list[str]:
    notes = []
    if recipe.data.samples not in (None, samples):
        notes.append(f"the data folder has {samples:,} samples, the recipe speaks of {recipe.data.samples:,}")
    if recipe.local_batch < recipe.micro_batch:
        notes.append(
            f"{recipe.world_size} ranks of micro_batch={recipe.micro_batch} would be more than the batch: "
            f"each handles its share, {recipe.local_batch}"
        )
    if machine:
        notes += _fitting(recipe, memory, machine)
    if recipe.loss.feature and recipe.teacher.source == "random":
        notes.append("the teacher's weights are RANDOM: this shows that a run works, its encoder is worth nothing")
    return notes


def _fitting(recipe: Recipe, memory: Memory, machine: Machine) -> list[str]:
    """Whether the memory suffices, and which micro-batch fills it."""
    fits = largest_micro_batch(recipe, SPARED * machine.memory, count_parameters(recipe))
    if memory.total > machine.memory:
        smaller = f"micro_batch={fits}, which fits" if fits else "a higher train.zero_stage"
        return [
            f"the memory of a rank is estimated at {_size(memory.total)}, a GPU of machine={recipe.machine} has "
            f"{_size(machine.memory)}: use {smaller}, or more ranks"
        ]
    if fits is None or fits <= recipe.local_batch:
        return []
    return [
        f"micro_batch={fits} would still fit a GPU of machine={recipe.machine}: larger products, but BatchNorm sees other "
        "batches, and so does what the recipe counts by micro-batches (negatives, the moving average)"
    ]


# --- words ----------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _span(seconds: float) -> str:
    """A time for people."""
    for unit, scale in (("days", 86_400), ("hours", 3_600), ("minutes", 60), ("s", 1)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _flops(number: float) -> str:
    """Operations for people."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number / 1e6:.4g} MFLOP"


def _size(number: float) -> str:
    """Bytes for people, in binary units."""
    for unit, scale, digits in (("TiB", 2**40, 1), ("GiB", GIB, 1), ("MiB", 2**20, 0)):
        if number >= scale:
            return f"{number / scale:.{digits}f} {unit}"
    return f"{number / 2**10:.0f} KiB"
