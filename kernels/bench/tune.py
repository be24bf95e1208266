"""Searches configurations on the GPU at hand and prints rows for `mcf.kernels.tuning`: `python -m mcf.kernels.bench.tune`.

From a row of the table it walks to neighbours (a block halved or doubled, warps, stages) as long as one is faster on all
shapes that the row serves, taken together. A neighbour that is wrong, or does not fit the chip, is passed over.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from mcf.kernels import tuning
from mcf.kernels.arguments import ArgumentError, chosen, number, parse, said
from mcf.kernels.bench import gate, registry, timing
from mcf.kernels.bench.registry import Case
from mcf.kernels.bench.table import here
from mcf.kernels.tuning import Config

KEYS = {
    "op": ("all", f"operations, by commas: {', '.join(registry.OPERATIONS)}"),
    "seconds": ("500", "start nothing new after so long; rows found by then are printed"),
}
PER_CANDIDATE_S = 0.2
WARPS = (1, 2, 4, 8, 16)
BETTER = 0.98
"""A neighbour must take this share of the time at most: less is noise."""

Key = tuple[str, str, str]


class Asked(dict[Key, Config]):
    """The table, which keeps the keys that launchers asked for first: a class of shapes, rather than "any"."""

    def __init__(self, table: dict[Key, Config]):
        super().__init__(table)
        self.keys_asked: list[Key] = []

    def get(self, key: Key, default: Config | None = None) -> Config | None:  # type: ignore[override]
        """As a dictionary's; the key is kept."""
        if key not in self.keys_asked:
            self.keys_asked.append(key)
        return super().get(key, default)


def neighbours(config: Config) -> Iterator[Config]:
    """All configurations one step away."""
    for name, size in config.blocks.items():
        for other in (size // 2, size * 2):
            if other:
                yield replace(config, blocks={**config.blocks, name: other})
    place = WARPS.index(config.num_warps)
    for warps in WARPS[max(place - 1, 0) : place] + WARPS[place + 1 : place + 2]:
        yield replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 5:
            yield replace(config, num_stages=stages)


def descend(start: Config, cost: Callable[[Config], float], until: float) -> tuple[Config, float, float]:
    """The best configuration on a walk downhill from `start`.

    Args:
        start: where from.
        cost: what a configuration costs; infinity where it cannot be used. Asked once for each.
        until: `time.monotonic()` after which no new configuration is tried.

    Returns:
        The configuration, its cost, and the start's.
    """
    tried = {_name(start): cost(start)}
    best, first = start, tried[_name(start)]
    moved = True
    while moved:
        moved = False
        for candidate in neighbours(best):
            if _name(candidate) in tried:
                continue
            if time.monotonic() > until:
                return best, tried[_name(best)], first
            tried[_name(candidate)] = cost(candidate)
            if tried[_name(candidate)] < BETTER * tried[_name(best)]:
                best, moved = candidate, True
                break
    return best, tried[_name(best)], first


def _name(config: Config) -> str:
    return f"Config({dict(config.blocks)}, num_warps={config.num_warps}, num_stages={config.num_stages})"


def row(key: Key, config: Config, comment: str) -> str:
    """A line for the table in the house's format."""
    kernel, shape, chip = key
    blocks = ", ".join(f'"{name}": {size}' for name, size in config.blocks.items())
    warps = f"num_warps={config.num_warps}, num_stages={config.num_stages}"
    return f'    ("{kernel}", "{shape}", "{chip}"): Config({{{blocks}}}, {warps}),  # {comment}'


def main(argv: list[str]) -> int:
    """Tune all rows that the operations' shapes ask for, and print them."""
    try:
        values = parse("mcf.kernels.bench.tune", "searches configurations of the kernels on this GPU", KEYS, argv)
        ops = chosen("op", values["op"], list(registry.OPERATIONS))
        until = time.monotonic() + number("seconds", values["seconds"], 0)
        if not torch.cuda.is_available():
            raise ArgumentError("there is no CUDA device: configurations are measured, and cannot be guessed here")
    except ArgumentError as error:
        return said(error)
    device = torch.device("cuda")
    machine = here(device)
    print(
        f"# {machine.device}, torch {machine.torch}, triton {machine.triton}, commit {machine.commit}, {machine.date}"
    )
    # Launchers look rows up in the module: what is written into this one holds from then on.
    table = Asked(tuning.TABLE)
    tuning.TABLE = table
    for key, cases in _served(
        [case for case in registry.cases("full", torch.bfloat16) if case.op in ops], table, device
    ).items():
        start = tuning.config(*key)

        def cost(config: Config, key: Key = key, cases: tuple[Case, ...] = tuple(cases)) -> float:
            table[key] = config
            return math.exp(sum(math.log(_both_us(case, device)) for case in cases) / len(cases))

        best, after, before = descend(start, cost, until)
        table[key] = best
        shapes = "; ".join(case.shape for case in cases)
        print(row(key, best, f"{after:.4g} µs, was {before:.4g}: {shapes}"), flush=True)
        if time.monotonic() > until:
            print("# out of time: give more seconds=…")
            break
    return 0


def _served(cases: list[Case], table: Asked, device: torch.device) -> dict[Key, list[Case]]:
    """Which cases each key serves, by running each once."""
    served: dict[Key, list[Case]] = {}
    for case in cases:
        table.keys_asked.clear()
        gate.check(case, case.functions["triton"], device)
        for key in table.keys_asked:
            served.setdefault(key, []).append(case)
    return served


def _both_us(case: Case, device: torch.device) -> float:
    """Median of forward and backward; infinity if the kernel is wrong so, or cannot be launched."""
    function = case.functions["triton"]
    try:
        if gate.check(case, function, device).why:
            return math.inf
        times = timing.measure(case, function, device, PER_CANDIDATE_S)
    except Exception:  # what a configuration can break is the compiler's business: no memory, no layout, no launch
        return math.inf
    return times["both" if case.learn else "forward"].p50


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
