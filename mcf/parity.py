"""One training step against golden numbers of the reference: `python -m mcf.parity golden=DIR`.

    DIR/rank0.safetensors …  inputs, state before, everything the reference computed, state after (METHOD 3)
        ──► our network, momentum branch and objective with those weights, images and mask noise, in float32
        ──► a table of relative errors; status 1 if one is over the tolerance

The heads' BatchNorm divides by the spread over a handful of samples, and so multiplies the last bit of the sums before it:
some gradients of a golden step are not determined to 1e-5 by float32, and another processor, which adds in another order,
finds others. Where an error is over the tolerance, the step is therefore repeated with every weight moved by one unit in its
last place, up or down at random. What that moves in a number is what float32 leaves open in it, and no error.

Widths, depths and heads come from the file. As many `rankN.safetensors` as there are, so many processes run (gloo):
keys are gathered over ranks, gradients averaged, BatchNorm stays per rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcf import cli
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.kernels import rank as rank_noise
from mcf.models import MCF, MomentumBranch, Objective, Teacher, dropped
from mcf.models.momentum import POSITIONS
from mcf.weights.reference import from_reference, theirs

INPUTS = ("u8", "noise_online", "noise_target")
OUTPUTS = ("pred", "mask", "q", "k", "mim", "con", "loss")
GRADIENT_FLOOR = 1e-3
# Draws of last places: on the golden step each draw moves a gradient by about three times what another processor does.
DRAWS = 4
# A number that rounding moves by more than this cannot be judged: it does not pass.
MOST_ROUNDING = 1e-3


class Options(BaseModel):
    """What parity can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    golden: str = Field(
        description="folder with rank0.safetensors (and rank1.safetensors, … of a run on several ranks)"
    )
    tolerance: float = Field(1e-5, gt=0, description="largest relative error that passes")


@dataclass(frozen=True)
class Golden:
    """What one rank of the reference left behind: its configuration, and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class Row:
    """One compared tensor: rank, name in the file, relative error, and what float32 leaves open (0: not asked)."""

    rank: int
    name: str
    error: float
    rounding: float = 0.0

    def over(self, tolerance: float) -> bool:
        """Whether neither the tolerance nor rounding explains the error; rounding explains up to MOST_ROUNDING."""
        return self.error > max(tolerance, min(self.rounding, MOST_ROUNDING))


# ---------------------------------------------------------------------------------------------------------- reading


def read(folder: str | Path) -> list[Golden]:
    """The golden files of a folder, by rank. Raises UserError: none there, one is missing, damaged or not whole."""
    folder = Path(folder)
    first = folder / "rank0.safetensors"
    if not first.is_file():
        raise UserError(f"golden={folder}: no rank0.safetensors there; name a folder of golden numbers")
    count = len(list(folder.glob("rank*.safetensors")))
    ranks = [_read(folder / f"rank{rank}.safetensors") for rank in range(count)]
    stated = ranks[0].config.get("world", count)
    if stated != count:
        raise UserError(
            f"golden={folder}: {count} rank files, but {first.name} is of {stated} ranks; restore the others"
        )
    return ranks


def _read(path: Path) -> Golden:
    remedy = "restore the file"
    if not path.is_file():
        raise UserError(f"{path}: missing, though files of other ranks are there; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        config = json.loads(metadata["config"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, or no golden file ({error!r}); {remedy}") from None
    missing = [name for name in (*INPUTS, *OUTPUTS) if name not in tensors]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; {remedy}")
    return Golden(path, config, tensors)


def recipe_of(golden: Golden) -> Recipe:
    """The recipe that a golden file was made with: the faithful one at the file's sizes, in float32."""
    config, images = golden.config, golden.tensors["u8"]
    try:
        width = config["embed_dim"]
        hidden = golden.tensors["before.online_encoder.blocks.0.mlp.fc1.weight"].shape[0]
        sizes = {
            "image_size": images.shape[-1],
            "patch_size": config["patch_size"],
            "width": width,
            "depth": config["depth"],
            "heads": config["num_heads"],
            "mlp_ratio": hidden / width,
            "decoder": {
                "width": config["decoder_embed_dim"],
                "depth": config["decoder_depth"],
                "heads": config["decoder_num_heads"],
            },
            "projection": {"hidden": config["proj_hidden"], "dim": config["proj_dim"]},
        }
        teacher = {"heads": config["teacher"]["num_heads"]}
        return Recipe.model_validate(
            {
                "model": sizes,
                "teacher": teacher,
                "micro_batch": len(images),
                "attention": "math",
                "train": {"precision": "fp32"},
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{golden.path}: its configuration is not usable ({reason}); restore the file") from None


# ---------------------------------------------------------------------------------------------------------- the step


def step(golden: Golden, before: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """Our step from the golden state `before` (released names), in the names of the golden file.

    Images and noise are those of this rank; with several ranks the process group must be up.
    """
    recipe = recipe_of(golden)
    network, branch, objective = _build(golden, recipe, before)
    images = golden.tensors["u8"].permute(0, 2, 3, 1).contiguous()
    keep = recipe.visible_patches
    ids_keep, ids_restore = rank_noise(golden.tensors["noise_online"], keep)
    mask = dropped(ids_restore, keep)

    branch.update({**dict(network.named_parameters()), POSITIONS: network.encoder.pos_embed}, recipe.momentum.value)
    k = branch(images, rank_noise(golden.tensors["noise_target"], keep)[0])
    keys = _gather(F.normalize(k, dim=1), world)
    pred, q = network(images, ids_keep, ids_restore)
    terms = objective(images, pred, q, keys, rank * len(q) + torch.arange(len(q)), mask)
    terms["total"].backward()

    result = {"pred": pred, "mask": mask.float(), "q": q, "k": k}
    result |= {"mim": terms["feature"], "con": terms["contrast"], "loss": terms["total"]}
    for name, parameter in network.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if world > 1:
            dist.all_reduce(gradient)
        result["grad." + theirs("student." + name)] = gradient / world
    for name, tensor in branch.state_dict().items():
        result["after." + theirs("momentum." + name)] = tensor
    return {name: tensor.detach() for name, tensor in result.items()}


def _build(golden: Golden, recipe: Recipe, before: dict[str, Tensor]) -> tuple[MCF, MomentumBranch, Objective]:
    """The parts of training, with the golden weights in them."""
    try:
        state = from_reference(before)
        network = MCF(recipe.model, attention=recipe.attention)
        branch = MomentumBranch(network)
        network.load_state_dict(state.student)
        branch.load_state_dict(state.momentum)
        teacher = Teacher(
            state.teacher,
            heads=recipe.teacher.heads,
            taps=recipe.teacher.taps,
            image_size=recipe.model.image_size,
            attention=recipe.attention,
        )
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{golden.path}: the state before the step does not fit its configuration: {reason}") from None
    return network, branch, Objective(recipe, teacher)


def _gather(keys: Tensor, world: int) -> Tensor:
    if world == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(world)]
    dist.all_gather(parts, keys)
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------- comparing


def compare(ours: dict[str, Tensor], golden: Golden, rank: int) -> list[Row]:
    """Relative errors of everything that the golden file holds and we compute: max |ours − golden| / max |golden|.

    A gradient that is zero but for rounding (weights before a BatchNorm over two samples, say) has no relative error
    to speak of: the divisor is at least GRADIENT_FLOOR of the largest gradient of all, so that what passes is below a
    sixth of float32's resolution of that.
    """
    gradients = golden.under("grad.").values()
    largest = max((float(g.abs().max()) for g in gradients), default=0.0)
    rows = []
    for name, tensor in ours.items():
        if name in golden.tensors:
            floor = GRADIENT_FLOOR * largest if name.startswith("grad.") else 0.0
            rows.append(Row(rank, name, relative_error(tensor, golden.tensors[name], floor)))
    return rows


def relative_error(ours: Tensor, golden: Tensor, floor: float = 0.0) -> float:
    """max |ours − golden| / max(max |golden|, floor); infinite for another shape or where one of them is not finite."""
    if ours.shape != golden.shape:
        return math.inf
    ours, golden = ours.double(), golden.double()
    difference = float((ours - golden).abs().max())
    if not math.isfinite(difference):
        return math.inf
    scale = max(float(golden.abs().max()), floor)
    return difference / scale if scale else math.inf if difference else 0.0


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
        _build(golden, recipe_of(golden), _before(goldens, golden))
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


def one_ulp(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every number of the state but zeros moved to the next that its type can hold, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(state)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            up = torch.rand(tensor.shape, generator=generator) < 0.5
            towards = torch.where(up, math.inf, -math.inf).to(tensor.dtype)
            moved[name] = torch.where(tensor == 0, tensor, torch.nextafter(tensor, towards))
    return moved


def _rank_process(rank: int, folder: str, scratch: str, world: int, draws: int) -> None:
    # All ranks are on this machine, whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world)
    rows = _rank_rows(read(folder), rank, draws)
    _rows_file(scratch, rank).write_text(json.dumps([vars(row) for row in rows]))
    dist.destroy_process_group()


def _rows_file(scratch: str, rank: int) -> Path:
    return Path(scratch) / f"rows{rank}.json"


def table(rows: list[Row], tolerance: float) -> str:
    """The rows as text, what is over the tolerance marked, and the worst of all in the last line."""
    width = max(len(row.name) for row in rows)
    asked = any(row.rounding for row in rows)
    lines = [f"rank  {'tensor':{width}}  relative error" + ("  left open by float32" if asked else "")]
    for row in rows:
        mark = "OVER" if row.over(tolerance) else "rounding" if row.error > tolerance else ""
        open_by = f"         {row.rounding:.1e}" if asked else ""
        lines.append(f"{row.rank:4}  {row.name:{width}}  {row.error:.1e}{open_by}  {mark}".rstrip())
    worst = max(rows, key=lambda row: row.error)
    over = sum(row.over(tolerance) for row in rows)
    rounded = sum(row.error > tolerance for row in rows) - over
    verdict = f"{len(rows) - over - rounded} within the tolerance of {tolerance:g}"
    if rounded:
        verdict += f", {rounded} within what float32 leaves open on this processor"
    lines.append(f"{len(rows)} tensors, worst {worst.error:.1e} ({worst.name}): {verdict}, {over} over")
    return "\n".join(lines)


@cli.main
def main(argv: list[str]) -> int:
    """Compare one step with golden numbers; status 1 if a relative error is over the tolerance."""
    options = cli.parse(Options, argv, verb="parity")
    rows = run(options.golden, options.tolerance)
    print(table(rows, options.tolerance))
    return int(any(row.over(options.tolerance) for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
