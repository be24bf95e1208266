"""`python -m mcf.parity golden=DIR`: the comparison of all ranks, each in a process of its own if there are several."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mcf import cli
from mcf.errors import UserError
from mcf.models import MCF, MomentumBranch
from mcf.parity.comparing import Row, compare, table
from mcf.parity.golden import Golden, read, recipe_of
from mcf.parity.step import build, one_ulp, step
from mcf.weights.reference import theirs

# Draws of last places: on the golden step each draw moves a gradient by about three times what another processor does.
DRAWS = 4


class Options(BaseModel):
    """What parity can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    golden: str = Field(
        description="folder with rank0.safetensors (and rank1.safetensors, … of a run on several ranks)"
    )
    tolerance: float = Field(1e-5, gt=0, description="largest relative error that passes")


@cli.main
def main(argv: list[str]) -> int:
    """Compare one step with golden numbers; status 1 if a relative error is over the tolerance."""
    options = cli.parse(Options, argv, verb="parity")
    rows = run(options.golden, options.tolerance)
    print(table(rows, options.tolerance))
    return int(any(row.over(options.tolerance) for row in rows))


def run(folder: str | Path, tolerance: float = 1e-5) -> list[Row]:
    """The comparison of all ranks of a golden folder, each rank in a process of its own if there are several.

    Rows say what float32 leaves open where, without it, one of them would be over the tolerance.
    """
    goldens = read(folder)
    _check_whole(goldens)
    rows = _all_rows(folder, goldens, draws=0)
    return _all_rows(folder, goldens, DRAWS) if any(row.over(tolerance) for row in rows) else rows


def _all_rows(folder: str | Path, goldens: list[Golden], draws: int) -> list[Row]:
    if len(goldens) == 1:
        return _rank_rows(goldens, 0, draws)
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank_process, (str(folder), scratch, len(goldens), draws), nprocs=len(goldens))
        return [Row(**row) for r in range(len(goldens)) for row in json.loads(_rows_file(scratch, r).read_text())]


def _check_whole(goldens: list[Golden]) -> None:
    """Everything can be built, and nothing that METHOD 3 promises is missing: said before any process is started."""
    first = goldens[0]
    for golden in goldens:
        build(golden, recipe_of(golden), _before(goldens, golden))
    network = MCF(recipe_of(first).model)
    promised = ["grad." + theirs("student." + name) for name, _ in network.named_parameters()]
    promised += ["after." + theirs("momentum." + name) for name in MomentumBranch(network).state_dict()]
    if missing := [name for name in promised if name not in first.tensors]:
        raise UserError(f"{first.path}: has no {', '.join(missing[:3])} ({len(missing)} missing); restore the file")


def _before(goldens: list[Golden], golden: Golden) -> dict[str, Tensor]:
    """The state before the step: the rank's own where its file has one, else rank 0's."""
    return golden.under("before.") or goldens[0].under("before.")


def _rank_rows(goldens: list[Golden], rank: int, draws: int) -> list[Row]:
    # One thread: the reference's order of sums, as far as the processor has it too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        golden, world = goldens[rank], len(goldens)
        before = _before(goldens, golden)
        ours = step(golden, before, rank, world)
        rows = compare(ours, golden, rank)
        exact = dataclasses.replace(golden, tensors=golden.tensors | ours)
        for draw in range(draws):
            moved = compare(step(golden, one_ulp(before, draw), rank, world), exact, rank)
            rows = [dataclasses.replace(r, rounding=max(r.rounding, m.error)) for r, m in zip(rows, moved)]
        return rows
    finally:
        torch.set_num_threads(threads)


def _rank_process(rank: int, folder: str, scratch: str, world: int, draws: int) -> None:
    # All ranks are on this machine, whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world)
    rows = _rank_rows(read(folder), rank, draws)
    _rows_file(scratch, rank).write_text(json.dumps([vars(row) for row in rows]))
    dist.destroy_process_group()


def _rows_file(scratch: str, rank: int) -> Path:
    return Path(scratch) / f"rows{rank}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
