"""`python -m mcf.bench part=levers recipe=vit_b_20m`: what each lever of the step's speed is worth, alone and together.

    none   every lever off: attention written out, plain operations, nothing compiled
    each   one lever on, then all that are for speed, beside `none`: turn by turn, each in a process of its own

A row is written as soon as it is known; a lever that fails here says why and costs no other its row.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from mcf import cli
from mcf.bench import alone
from mcf.bench.apart import Apart
from mcf.bench.files import JsonFile, save
from mcf.bench.step import Contestant, race
from mcf.config import NonNegative, Positive, Recipe, Section
from mcf.errors import UserError
from mcf.models import float8

NONE: dict[str, Any] = {
    "kernels": "reference", "attention": "math", "teacher.stream": "float32", "speed.compile": "none", "speed.recompute": (),
    "teacher.products": "bfloat16", "speed.keep_memory": False, "speed.linear": "torch",
}  # fmt: skip


@dataclass(frozen=True)
class Lever:
    """Keys of a recipe that make a lever, and where it is one.

    together: whether it is among `all`: not where another one excludes it, or memory is what it is for.
    """

    keys: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    precisions: tuple[str, ...] = ("bf16", "fp32")
    together: bool = True


LEVERS: dict[str, Lever] = {
    "memory kept": Lever({"speed.keep_memory": True}, devices=("cpu",)),
    "products by oneDNN": Lever({"speed.linear": "onednn"}, devices=("cpu",), precisions=("fp32",)),
    "attention: sdpa": Lever({"attention": "sdpa"}, together=False),
    "attention: xformers": Lever({"attention": "xformers"}, devices=("cuda",), together=False),
    "attention: auto": Lever({"attention": "auto"}),
    "kernels": Lever({"kernels": "triton"}, devices=("cuda",)),
    "compiled blocks": Lever({"speed.compile": "blocks"}),
    "teacher's stream bf16": Lever({"teacher.stream": "bfloat16"}, precisions=("bf16",)),
    # Another rounding than a run is asked to have by default: not among `all`.
    "teacher float8": Lever({"teacher.products": "float8"}, precisions=("bf16",), together=False),
    "teacher float8 + compiled + stream": Lever(
        {"teacher.products": "float8", "teacher.stream": "bfloat16", "speed.compile": "blocks"},
        precisions=("bf16",),
        together=False,
    ),
    "teacher recomputed": Lever({"speed.recompute": ("teacher",)}, together=False),
    "all recomputed": Lever({"speed.recompute": ("encoder", "decoder", "teacher")}, together=False),
}


class LeversConfig(Section):
    """Keys of this benchmark; every key of the recipe (default vit_b_20m) can be given beside them."""

    part: Literal["levers"] = Field("levers", description="which benchmark")
    batch: Positive = Field(8, description="images a step; no accumulation")
    precision: Literal["auto", "bf16", "fp32"] | None = Field(
        None, description="precision of the matrix work; auto: the faster one here; default: the recipe's"
    )
    steps: Positive = Field(5, description="timed steps of each")
    warmup: NonNegative = Field(2, description="steps before the clock starts; the first one compiles")
    threads: Positive | None = Field(None, description="CPU threads; default: as many as a run takes")
    only: str | None = Field(
        None, description="levers to try, by a part of their names (`compiled`); default: all of them"
    )
    seconds: Positive | None = Field(None, description="begin with no further lever after so long")
    json_file: JsonFile | None = Field(None, description="file for the numbers, written after each lever")


@cli.main
def main(argv: list[str]) -> int:
    """The benchmark. Returns 0, or 1 if a lever failed."""
    recipe, config = alone.load(argv, LeversConfig, "levers")
    with alone.world(config.threads) as world:
        return measure(recipe, config, world.device, argv)


def measure(recipe: Recipe, config: LeversConfig, device: torch.device, argv: list[str]) -> int:
    """Try the levers, and tell and keep their rows; the exit status."""
    chosen = alone.chosen(config.precision, recipe, device)
    recipe = alone.sized(recipe, batch=config.batch, precision=chosen)
    result: dict[str, Any] = alone.about("levers", recipe, device, argv) | {"steps": config.steps, "rows": {}}
    tried = levers(device.type, chosen, config.only)  # refuses before a process is started
    print(heading(result), flush=True)
    began, plain = time.monotonic(), with_keys(recipe, NONE)
    none = Contestant("none", Apart("mcf", plain, torch.get_num_threads()))
    try:
        for name, keys in tried.items():
            if config.seconds and time.monotonic() - began > config.seconds:
                row: dict[str, Any] = {"left out": f"{config.seconds} s were over"}
            elif keys.get("teacher.products") == "float8" and (why := float8.unavailable(device)):
                row = {"left out": why}
            else:
                row = beside(none, name, with_keys(plain, keys), device, warmup=config.warmup, steps=config.steps)
            result["rows"][name] = {"keys": {key: str(value) for key, value in keys.items()}, **row}
            print(line(name, row), flush=True)
            save(config.json_file, result)
    finally:
        none.close()
    print(json.dumps(result))
    return 1 if any("failed" in row for row in result["rows"].values()) else 0


def levers(device: str, chosen: str, only: str | None = None) -> dict[str, dict[str, Any]]:
    """The levers of a kind of device and a precision: name → keys of the recipe. `all` is the last."""
    here = {n: lever for n, lever in LEVERS.items() if device in lever.devices and chosen in lever.precisions}
    found = {name: lever.keys for name, lever in here.items()}
    found["all"] = {key: value for lever in here.values() if lever.together for key, value in lever.keys.items()}
    if only is not None:
        found = {name: keys for name, keys in found.items() if only in name}
    if not found:
        raise UserError(f"only={only}: no lever has that in its name; there are {', '.join([*here, 'all'])}")
    return found


def with_keys(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """The recipe with some (dotted) keys set."""
    for key, value in keys.items():
        recipe = _with(recipe, key.split("."), value)
    return recipe


def _with(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    assert isinstance(section, BaseModel)
    return section.model_copy(update={first: _with(getattr(section, first), rest, value) if rest else value})


def beside(
    none: Contestant, name: str, recipe: Recipe, device: torch.device, *, warmup: int, steps: int
) -> dict[str, Any]:
    """A lever's row: it and `none` take turns. What failed, if it does."""
    began, lever = len(none.taken), None
    try:
        lever = Contestant(name, Apart("mcf", recipe, torch.get_num_threads()))
        race([none, lever], device, warmup=warmup, steps=steps)
        ratios = [a / b for a, b in zip(none.seconds[began:], lever.seconds)]
        return {
            "images_per_second": recipe.batch / statistics.median(lever.seconds),
            "none_images_per_second": recipe.batch / statistics.median(none.seconds[began:]),
            "ratio": statistics.median(ratios), "ratios": ratios,
            "peak_memory": lever.peak(device), "memory_ratio": lever.peak(device) / none.peak(device),
            "loss_difference": max(
                abs(value / none.losses[0][term] - 1) for term, value in lever.losses[0].items() if none.losses[0][term]
            ),
            "gradient_difference": _apart(lever.program, none.program),
        }  # fmt: skip
    except UserError as error:
        return {"failed": str(error)}
    finally:
        if lever:
            lever.close()


def _apart(ours: Any, theirs: Any) -> float:
    """‖g − g₀‖ / ‖g₀‖ of the first step's gradients."""
    one, other = (np.frombuffer(program.gradients(), dtype=np.float32).astype(np.float64) for program in (ours, theirs))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def heading(result: dict[str, Any]) -> str:
    """What was measured on what, and the names of the columns."""
    return (
        f"{result['recipe']}, batch {result['batch']}, {result['precision']}, {result['device']}, {result['threads']} "
        f"threads, torch {result['torch']}, Python {result['python']}\n"
        f"{'lever':36}{'images/s':>10}{'none':>8}{'times':>8}{'MiB':>9}{'of none':>9}{'loss ±':>10}{'gradient ±':>12}"
    )


def line(name: str, row: dict[str, Any]) -> str:
    """A row for a person."""
    for why in ("failed", "left out"):
        if why in row:
            return f"{name:36}{why}: {row[why]}"
    return (
        f"{name:36}{row['images_per_second']:10.2f}{row['none_images_per_second']:8.2f}{row['ratio']:8.2f}"
        f"{row['peak_memory'] / 2**20:9.0f}{row['memory_ratio']:9.2f}{row['loss_difference']:10.1e}"
        f"{row['gradient_difference']:12.1e}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
