"""`python -m mcf.bench part=fed data.path=SHARDS`: what a training step loses to the loader that feeds it.

    synthetic   the step of `mcf.train` on images that lie in memory
    loader      the same step on micro-batches of mcf.data.loader, which decodes ahead meanwhile, on the same cores

The two take turns in blocks of `steps` steps, each first in turn. A block begins when nothing is being decoded, and what
lies ready is taken before its clock runs: each step of it pays for a micro-batch that is decoded meanwhile.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from mcf import cli, memory
from mcf.bench import alone
from mcf.bench.files import JsonFile, save
from mcf.bench.meter import now, settle
from mcf.config import NonNegative, Positive, Recipe, Section
from mcf.data.loader import Batch, Loader
from mcf.distributed import World
from mcf.plan import make_plan
from mcf.step import Step
from mcf.weights import load_teacher


class FedConfig(Section):
    """Keys of this benchmark; every key of the recipe (default vit_b_20m) can be given beside them."""

    part: Literal["fed"] = Field("fed", description="which benchmark")
    batch: Positive = Field(8, description="images a step; no accumulation")
    precision: Literal["auto", "bf16", "fp32"] | None = Field(
        None, description="precision of the matrix work; auto: the faster one here; default: the recipe's"
    )
    steps: Positive = Field(5, description="steps of a block")
    rounds: Positive = Field(5, description="blocks of each")
    warmup: NonNegative = Field(2, description="steps before the first block")
    threads: Positive | None = Field(None, description="CPU threads of the step; default: as many as a run takes")
    json_file: JsonFile | None = Field(None, description="file for the numbers; they are printed in any case")


@dataclass
class Way:
    """A way to be fed, and what its blocks took: seconds and CPU seconds a step, and the share of the time it waited."""

    name: str
    batches: Iterator[Batch]
    ahead: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def block(self, step: Callable[[Batch], None], steps: int, device: torch.device) -> None:
        """Take `steps` steps on the clock."""
        settle()
        for _ in range(self.ahead):
            next(self.batches)
        began, cpu, waited = now(device), time.process_time(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            step(batch)
        seconds = now(device) - began
        self.seconds.append(seconds / steps)
        self.cpu_seconds.append((time.process_time() - cpu) / steps)
        self.waits.append(waited / seconds)


@cli.main
def main(argv: list[str]) -> int:
    """The benchmark."""
    recipe, config = alone.load(argv, FedConfig, "fed")
    with alone.world(config.threads) as world:
        chosen = alone.chosen(config.precision, recipe, world.device)
        recipe = alone.sized(recipe, batch=config.batch, precision=chosen)
        result = alone.about("fed", recipe, world.device, argv) | measure(recipe, config, world)
    print(table(result))
    print(json.dumps(result))
    save(config.json_file, result)
    return 0


def measure(recipe: Recipe, config: FedConfig, world: World) -> dict[str, Any]:
    """Numbers of both ways, and the share of its images/s that the step loses to the loader."""
    alone.prepare(recipe, world.device)
    teacher = load_teacher(
        recipe.teacher, image_size=recipe.model.image_size, attention=recipe.attention, kernels=recipe.kernels,
        seed=recipe.seed,
    )  # fmt: skip
    loader = Loader(
        recipe.data, batch=recipe.batch, micro_batch=recipe.batch, seed=recipe.seed, image_size=recipe.model.image_size,
        rank=0, world_size=1, device=world.device, threads=world.cores,
    )  # fmt: skip
    step = Step(recipe, make_plan(recipe, loader.manifest.samples), teacher, world)
    # The queue's, the one in DALI and the one in the thread's hands.
    ways = [Way("synthetic", _synthetic(recipe, world)), Way("loader", iter(loader), recipe.data.prefetch + 2)]
    taken = 0

    def take(batch: Batch) -> None:
        nonlocal taken
        outcome = step(taken, iter([batch]))
        float(outcome.terms[0]["total"])  # wait for it
        if not taken:
            memory.leave_out_of_collections()
        taken += 1

    try:
        for _ in range(config.warmup):
            for way in ways:
                take(next(way.batches))
        for number in range(config.rounds):
            for way in ways[:: 1 if number % 2 else -1]:
                way.block(take, config.steps, world.device)
    finally:
        loader.close()
    plain, fed = ways
    losses = [1 - without / with_it for without, with_it in zip(plain.seconds, fed.seconds)]
    return {
        "steps": config.steps, "rounds": config.rounds, "decoder_threads": loader.threads, "prefetch": recipe.data.prefetch,
        "rows": {
            way.name: {
                "seconds": way.seconds, "cpu_seconds": way.cpu_seconds, "wait_share": statistics.median(way.waits),
                "images_per_second": recipe.batch / statistics.median(way.seconds),
            }
            for way in ways
        },
        "lost": statistics.median(losses), "lost_in_rounds": losses,
        "lost_cpu": statistics.median(1 - a / b for a, b in zip(plain.cpu_seconds, fed.cpu_seconds)),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"{result['recipe']}, batch {result['batch']}, {result['precision']}, {result['device']}, {result['threads']} threads, "
        f"{result['decoder_threads']} of the decoder, {result['prefetch']} micro-batches ahead, torch {result['torch']}",
        f"{'':12}{'images/s':>10}{'s/step':>9}{'CPU s/step':>12}{'waits':>8}",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:12}{row['images_per_second']:10.2f}{result['batch'] / row['images_per_second']:9.3f}"
            f"{statistics.median(row['cpu_seconds']):12.3f}{row['wait_share']:8.2%}"
        )
    rounds = ", ".join(f"{lost:.1%}" for lost in result["lost_in_rounds"])
    lines.append(
        f"with the loader on the step loses {result['lost']:.1%} of its images/s (median; blocks: {rounds}), "
        f"{result['lost_cpu']:.1%} of them per CPU second"
    )
    return "\n".join(lines)


def _synthetic(recipe: Recipe, world: World) -> Iterator[Batch]:
    size, index = recipe.model.image_size, 0
    images = torch.randint(0, 256, (recipe.batch, size, size, 3), dtype=torch.uint8, device=world.device)
    while True:
        positions = index * recipe.batch + torch.arange(recipe.batch, device=world.device)
        yield Batch(images, positions, [str(i) for i in range(recipe.batch)])
        index += 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
