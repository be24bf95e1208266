"""What the benchmarks of the step have in common: any recipe, on one rank, without accumulation, set up as a run does it.

The teacher is random, of the recipe's shape: numbers do not change the time of a step.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel

from mcf import checks, cli, distributed, linear, memory, precision, sizes
from mcf.bench.meter import machine_name
from mcf.config import Recipe
from mcf.distributed import World
from mcf.errors import UserError
from mcf.track.origin import code_version

DEFAULT_RECIPE = "vit_b_20m"
# Keys of a recipe that a benchmark has other words for: given on its command line they would do nothing.
OTHER_WORDS = {
    "train.precision": "say precision=", "micro_batch": "say batch=: nothing is accumulated",
    "nodes": "one rank is measured", "gpus_per_node": "one rank is measured",
    "train.threads": "say threads=", "train.zero_stage": "one rank trains at stage 0",
}  # fmt: skip

O = TypeVar("O", bound=BaseModel)  # noqa: E741


def load(argv: list[str], options: type[O], part: str) -> tuple[Recipe, O]:
    """Recipe (vit_b_20m if none is given) and keys of a benchmark.

    Raises UserError for what is wrong with them, and for a key of the recipe that would do nothing here.
    """
    for word in argv:
        if instead := OTHER_WORDS.get(word.partition("=")[0]):
            raise UserError(f"{word}: has no effect on a benchmark; {instead}")
    if not any(word.startswith("recipe=") for word in argv):
        argv = [f"recipe={DEFAULT_RECIPE}", *argv]
    return cli.load(argv, options, verb=f"bench part={part}", adapt=with_random_teacher)


def with_random_teacher(recipe: Recipe) -> Recipe:
    """The recipe with a random teacher where it has one; what a checkpoint would bring is as large as the student."""
    teacher, model = recipe.teacher, recipe.model
    if teacher.source == "none":
        return recipe
    found: dict[str, Any] = {"source": "random", "path": None, "allow_random": True}
    if teacher.source == "checkpoint":
        found |= {"width": model.width, "depth": model.depth, "heads": model.heads, "patch_size": model.patch_size}
    return recipe.model_copy(update={"teacher": teacher.model_copy(update=found)})


def sized(recipe: Recipe, *, batch: int, precision: str) -> Recipe:
    """The recipe on one rank at this batch and precision, with a random teacher where it has one.

    Without a warm-up, whose first steps move nothing, and in a data set that is large enough. UserError for what cannot be
    at this batch.
    """
    single = with_random_teacher(recipe).model_copy(
        update={
            "batch": batch, "micro_batch": batch, "nodes": 1, "gpus_per_node": 1,
            "data": recipe.data.model_copy(update={"streams": batch, "samples": max(1_000_000, 100 * batch)}),
            "optimizer": recipe.optimizer.model_copy(update={"warmup_epochs": 0.0}),
        }
    )  # fmt: skip
    checks.check(single)
    return with_precision(single, precision)


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe with its matrix work in a precision."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


@contextlib.contextmanager
def world(threads: int | None) -> Iterator[World]:
    """This process as the only rank, with so many threads of torch (None: a run's share of the cores); left at the end."""
    cores = os.cpu_count() or 1
    if threads and threads > 4 * cores:
        raise UserError(f"threads={threads}: this machine has {cores} cores; give as many or fewer")
    joined = dist.is_initialized()
    try:
        found = distributed.join()
        distributed.set_threads(found, threads)
        yield found
    finally:
        if not joined:  # a group that is still there when Python ends may abort it
            distributed.leave()


def chosen(asked: str | None, recipe: Recipe, device: torch.device) -> str:
    """The precision of the matrix work that was asked for, or the recipe's; auto: the faster one here, as a run finds it."""
    linear.use(recipe.speed.linear)  # auto measures as a run multiplies
    wanted = asked or recipe.train.precision
    return precision.choose(device) if wanted == "auto" else wanted


def prepare(recipe: Recipe, device: torch.device) -> None:
    """Tell this process what a run tells its own."""
    linear.use(recipe.speed.linear)
    if recipe.speed.keep_memory and device.type == "cpu":
        memory.keep_freed_memory()


def about(part: str, recipe: Recipe, device: torch.device, argv: list[str]) -> dict[str, Any]:
    """What was measured, on what, and with which command and code: the beginning of a benchmark's numbers."""
    return {
        "part": part, "recipe": recipe.name, "batch": recipe.batch, "precision": recipe.train.precision,
        "zero_stage": sizes.zero_stage(recipe), "device": machine_name(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "commit": code_version(),
        "command": " ".join(["python -m mcf.bench", f"part={part}", *(word for word in argv if not word.startswith("part="))]),
    }  # fmt: skip
