"""`python -m mcf.bench part=step recipe=vit_b_20m`: images/s of the whole training step, and against the plain way.

    images uint8 ──► masks ──► momentum branch ──► student ──► teacher twice ──► losses ──► backward ──► AdamW ──► EMA

The step is the one that `mcf.train` runs, on one rank, through DeepSpeed, and without accumulation. Images are noise and
the teacher of the recipe's shape is random: numbers do not change the time of a step. With `compare=reference` both
programs start from the same weights, see the same images and masks, and take turns step by step, so that a machine that
slows down slows both. The reference's is in a process of its own, which is as its user has it: nothing that ours tells
its process (`speed.keep_memory`) is told there. The losses of their first step must be equal, or the times mean nothing
and the status is 1.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from mcf import cli
from mcf.bench import alone, parts, programs, trace
from mcf.bench.apart import Apart, Taken, take
from mcf.bench.files import JsonFile, save
from mcf.bench.meter import peak_memory, reset_peak
from mcf.bench.programs import Program
from mcf.bench.work import Done, Work, unlike
from mcf.config import NonNegative, Positive, Recipe, Section
from mcf.costs import count_flops
from mcf.distributed import World
from mcf.errors import UserError

# Largest relative difference of the first losses. In float32 the two programs sum in other orders: 1e-7 was seen for
# ViT-B, and a wrong mask, weight or normalisation moves a loss by more than 1e-2. In bf16 every matrix product rounds
# to 2⁻⁹ relative, at other places in the two programs: that averages out over the many features, but the heads'
# BatchNorm divides the few queries by their spread over images, which is small at the start, so rounding is multiplied.
TOLERANCE = {
    "fp32": {"feature": 2e-5, "contrast": 2e-5, "total": 2e-5},
    "bf16": {"feature": 5e-3, "contrast": 3e-2, "total": 5e-3},
}
LEAST = 4  # images of a step that is compared


class StepConfig(Section):
    """Keys of this benchmark; every key of the recipe (default vit_b_20m) can be given beside them."""

    part: Literal["step"] = Field("step", description="which benchmark")
    batch: Positive = Field(8, description="images a step; no accumulation")
    precision: Literal["auto", "bf16", "fp32"] | None = Field(
        None, description="precision of the matrix work; auto: the faster one here; default: the recipe's"
    )
    steps: Positive = Field(5, description="timed steps")
    warmup: NonNegative = Field(1, description="steps before the clock starts")
    threads: Positive | None = Field(None, description="CPU threads; default: as many as a run takes")
    compare: Literal["none", "reference"] = Field("none", description="take turns with the reference's plain step")
    reference_precision: Literal["same", "bf16", "fp32"] = Field(
        "same", description="precision of the reference's step"
    )
    parts: bool = Field(False, description="time each part of our step, and its share of the machine's matmul rate")
    profile: JsonFile | None = Field(None, description="file for a trace of one more step (chrome://tracing, Perfetto)")
    json_file: JsonFile | None = Field(None, description="file for the numbers; they are printed in any case")


@dataclass
class Contestant:
    """A program of the step, here or in a process of its own, and the timed steps that it took.

    losses: of all its steps. clock: its stopwatch if its parts are timed; parts: what that showed at each timed step.
    work: who looks on, for a program that is here.
    """

    name: str
    program: Program | Apart
    taken: list[Taken] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)
    clock: parts.Stopwatch | None = None
    work: Work | None = None
    parts: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of the timed steps."""
        return [taken.seconds for taken in self.taken]

    def run(self, index: int, device: torch.device, *, timed: bool) -> None:
        """One step, on the clock or not."""
        if self.clock:
            self.clock.start()
        taken = self.step(index, device)
        if self.clock and timed:
            self.parts.append(self.clock.stop())
        self.losses.append(taken.losses)
        if timed:
            self.taken.append(taken)

    def step(self, index: int, device: torch.device) -> Taken:
        """The step of a number, and what it took."""
        return self.program.step(index) if isinstance(self.program, Apart) else take(self.program, index, device)

    def done(self) -> Done:
        """What its steps have done."""
        if isinstance(self.program, Apart):
            return self.program.done()
        return self.work.done() if self.work else Done()

    def peak(self, device: torch.device) -> int:
        """The most bytes that it held since its first step."""
        return self.program.peak() if isinstance(self.program, Apart) else peak_memory(device)

    def close(self) -> None:
        """End its process, if it has one."""
        if isinstance(self.program, Apart):
            self.program.close()


@cli.main
def main(argv: list[str]) -> int:
    """The benchmark. Returns 0, or 1 if the two programs' steps differ."""
    recipe, config = alone.load(argv, StepConfig, "step")
    if config.compare == "reference":
        _comparable(recipe, config.batch)
    elif config.reference_precision != "same":
        raise UserError(
            f"reference_precision={config.reference_precision} without a reference; give compare=reference too"
        )
    if config.profile and config.profile == config.json_file:
        raise UserError(f"profile={config.profile}: json_file is the same file; give two")
    with alone.world(config.threads) as world:
        return measure(recipe, config, world, argv)


def measure(recipe: Recipe, config: StepConfig, world: World, argv: list[str]) -> int:
    """Race, tell and keep the numbers; the exit status."""
    ours = alone.chosen(config.precision, recipe, world.device)
    recipe = alone.sized(recipe, batch=config.batch, precision=ours)
    theirs = ours if config.reference_precision == "same" else config.reference_precision
    reference = alone.with_precision(recipe, theirs) if config.compare == "reference" else None
    contestants = prepare(recipe, world, reference, watched=config.parts or config.profile is not None)
    try:
        race(contestants, world.device, warmup=config.warmup, steps=config.steps)
        result = alone.about("step", recipe, world.device, argv) | report(contestants, recipe, config, world.device)
        difference = unequal(contestants, "bf16" if "bf16" in (ours, theirs) else "fp32")
    finally:
        for contestant in contestants:
            contestant.close()
    print(table(result))
    if config.parts:
        print(parts.table(result["parts"], result["rates"], result["matmul_rate"]))
    save(config.json_file, result)
    if config.profile:
        found = trace.record(lambda: contestants[0].step(config.warmup + config.steps, world.device), config.profile)
        result["launches"] = sum(found["launches"].values())
        print(trace.table(found))
        print(f"trace: {config.profile}")
        save(config.json_file, result)
    print(json.dumps(result))
    if difference:
        print(f"error: {difference}: not the same step, its times mean nothing", file=sys.stderr)
        return 1
    return 0


def prepare(
    recipe: Recipe, world: World, reference: Recipe | None = None, *, watched: bool = False
) -> list[Contestant]:
    """Build the contestants: ours, then the reference's by its recipe, in a process of its own.

    reference: the recipe, or a variant of it that differs in precision alone; None for no comparison.
    watched: ours has a stopwatch for its parts.
    """
    step, program = programs.ours(recipe, world)
    reset_peak(world.device)
    contestants = [Contestant("mcf", program, clock=parts.watch(step) if watched else None)]
    if reference is not None:
        contestants[0].work = programs.watch(step)
        contestants.append(Contestant("reference", Apart("reference", reference, torch.get_num_threads())))
    return contestants


def race(contestants: list[Contestant], device: torch.device, *, warmup: int, steps: int) -> None:
    """Have them take turns, step by step; the first `warmup` are not on the clock."""
    for index in range(warmup + steps):
        # Each goes first in turn: what the first leaves in the caches helps or harms the other.
        for contestant in contestants[:: 1 if index % 2 else -1]:
            contestant.run(index, device, timed=index >= warmup)


def unequal(contestants: list[Contestant], precision: str) -> str:
    """How the steps differ beyond rounding: the first one's losses and gradients, and what all have moved.

    Empty if they do not, or there is nothing to compare.
    """
    if len(contestants) < 2:
        return ""
    ours, theirs = (c.losses[0] for c in contestants)
    if odd := sorted(ours.keys() ^ theirs.keys()):
        return f"only one has {odd[0]} among its losses"
    for name, value in ours.items():
        if not abs(value - theirs[name]) <= TOLERANCE[precision][name] * abs(theirs[name]):
            return f"{name} is {value:.7g}, the reference's {theirs[name]:.7g}"
    return unlike(contestants[0].done(), contestants[1].done(), precision, len(contestants[0].losses))


def report(contestants: list[Contestant], recipe: Recipe, config: StepConfig, device: torch.device) -> dict[str, Any]:
    """Numbers of the run: images/s from the median step of each, the ratio, machine and versions."""
    rows: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        median, slow = (float(np.percentile(contestant.seconds, p)) for p in (50, 99))
        rows[contestant.name] = {
            "images_per_second": config.batch / median,
            "p50": median, "p99": slow, "p99_to_p50": slow / median,
            "best": config.batch / min(contestant.seconds),
            "seconds": [round(s, 4) for s in contestant.seconds],
            "cpu_seconds": statistics.median(taken.cpu_seconds for taken in contestant.taken),
            "peak_memory": contestant.peak(device),
            "first_losses": contestant.losses[0],
        }  # fmt: skip
    ratio = None
    if len(contestants) == 2:
        # Of neighbours in time, which a machine shared with others slows alike.
        ratio = statistics.median(b / a for a, b in zip(contestants[0].seconds, contestants[1].seconds))
    flops = count_flops(recipe)
    peak = parts.matmul_rate(device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    result: dict[str, Any] = {
        "reference_precision": config.reference_precision, "steps": config.steps, "rows": rows, "ratio": ratio,
        "flops": recipe.batch * flops.total, "matmul_rate": peak,
        # MFU, of the rate that this machine reaches in large products rather than of a data sheet's.
        "mfu": recipe.batch * flops.total / rows[contestants[0].name]["p50"] / peak,
    }  # fmt: skip
    if config.parts:
        seconds = parts.medians(contestants[0].parts)
        result |= {"parts": seconds, "rates": parts.rates(seconds, flops, recipe.batch)}
    return result


def table(result: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"{result['recipe']}, batch {result['batch']}, {result['precision']}, {result['device']}, "
        f"{result['threads']} threads, torch {result['torch']}, Python {result['python']}",
        f"{'':12}{'images/s':>10}{'best':>8}{'s/step':>9}{'p99':>9}{'p99/p50':>9}{'CPU s/step':>12}{'MiB':>8}{'first loss':>12}",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:12}{row['images_per_second']:10.2f}{row['best']:8.2f}{row['p50']:9.3f}{row['p99']:9.3f}"
            f"{row['p99_to_p50']:9.2f}{row['cpu_seconds']:12.3f}{row['peak_memory'] / 2**20:8.0f}"
            f"{row['first_losses']['total']:12.5f}"
        )
    lines.append(
        f"{result['flops'] / result['batch'] / 1e9:.4g} GFLOP an image: {result['mfu']:.0%} of the "
        f"{result['matmul_rate'] / 1e12:.3g} TFLOP/s that large matrix products reach here"
    )
    if result["ratio"] is not None:
        ours, theirs = (row["peak_memory"] for row in result["rows"].values())
        other = result["reference_precision"]
        against = "" if other == "same" else f" as the reference in {other}"
        lines.append(
            f"mcf is {result['ratio']:.2f} times as fast{against} (median over pairs of neighbouring steps), and holds "
            f"{ours / theirs:.2f} times the memory"
        )
    return "\n".join(lines)


def _comparable(recipe: Recipe, batch: int) -> None:
    """Refuse what the reference cannot do: it has no other choices than its own."""
    faithful = {
        "teacher.source": (recipe.teacher.source != "none", True), "loss.feature": (recipe.loss.feature > 0, True),
        "loss.contrast": (recipe.loss.contrast > 0, True), "loss.pixel": (recipe.loss.pixel, 0),
        "loss.feature_axis": (recipe.loss.feature_axis, "tokens"), "mask.momentum": (recipe.mask.momentum, "independent"),
        "model.variant": (recipe.model.variant, "plain"), "contrast.scope": (recipe.contrast.scope, "micro_batch"),
        "momentum.update": (recipe.momentum.update, "micro_batch"), "momentum.schedule": (recipe.momentum.schedule, "constant"),
    }  # fmt: skip
    for key, (value, only) in faithful.items():
        if value != only:
            raise UserError(
                f"compare=reference: recipe {recipe.name} departs from the reference in {key}; use compare=none"
            )
    if batch < LEAST:
        raise UserError(
            f"compare=reference batch={batch}: BatchNorm over so few images makes other losses of roundings; give batch={LEAST} "
            "or more"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
