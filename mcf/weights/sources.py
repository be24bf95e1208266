"""From the names of each known file to timm's: which tensors are the encoder, and what they are called there.

moco_v3    {'state_dict': {'module.base_encoder.*': …}}; momentum encoder and heads beside it (METHOD 2)
timm       a ViT's own names, flat or under 'model' or 'state_dict'; with or without its classification head
mae        timm's names under 'model'; the full file has the decoder beside them
mcf        the released checkpoint of MCF: online_encoder, target_encoder, and the teacher inside the loss
checkpoint a checkpoint of our own, or its weights.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcf import checkpoint
from mcf.errors import UserError
from mcf.weights import files
from mcf.weights.reference import from_reference, theirs
from mcf.weights.vit import ViTShape, check

NESTS = ("state_dict", "model", "module")
HEAD = ("head.", "head_dist.")
BRANCHES = {"encoder": "encoder", "momentum": "momentum encoder"}


@dataclass(frozen=True)
class Encoder:
    """A ViT out of a file: float32 tensors under timm's names, their shape, heads where the file states them, origin."""

    tensors: dict[str, Tensor]
    shape: ViTShape
    heads: int | None
    origin: str


def read_file(
    path: str | Path, kind: str, *, where: str, branch: str = "encoder", trust: bool = False, key: str = "kind"
) -> Encoder:
    """Read the encoder out of a file of weights.

    Args:
        path: the file.
        kind: `moco_v3`, `timm`, `mae`, `mcf`, or `auto` to find out.
        where: how messages open, for example `teacher.path=FILE`.
        branch: which encoder of the released MCF checkpoint: encoder, momentum or teacher.
        trust: whether a pickle that runs code may be opened.
        key: name of the key that `kind` came from, for messages.

    Raises UserError for anything that is not one whole, finite ViT of that kind.
    """
    opened = files.read(path, where=where, trust=trust)
    names = _weights(opened.content, where)
    found = kind_of(names)
    if kind == "auto" and found in _EXTRACT:
        kind = found
    # MAE's encoder file is a ViT with timm's names, so either word opens it.
    if found != kind and {found, kind} != {"mae", "timm"}:
        raise UserError(_wrong_kind(found, kind, names, where, key))
    if kind != "mcf" and branch != "encoder":
        raise UserError(f"branch={branch}: {where} is a {kind} file, which has one encoder; leave branch out")
    try:
        tensors = _EXTRACT[kind](names, branch)
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is not part of a {kind} file; give an unchanged one") from None
    return _encoder(tensors, opened.metadata, where, f"{kind} file {path}")


def read_checkpoint(path: str | Path, branch: str, *, where: str) -> Encoder:
    """Read a branch (`encoder` or `momentum`) of an own checkpoint: a run directory (its latest), or one checkpoint.

    Raises UserError if there is no whole checkpoint, or no such branch in it.
    """
    folder = find_checkpoint(path, where=where)
    file = folder / ("weights.safetensors" if branch == "encoder" else "momentum.safetensors")
    opened = files.read(file, where=f"{where}: {file.name} of {folder.name}")
    tensors = _only(opened.content, "encoder.")
    heads = recipe_of(folder, where).get("model", {}).get("heads")
    return _encoder(
        tensors, {"heads": str(heads)}, f"{where}: {file.name} of {folder.name}", f"{BRANCHES[branch]} of {folder}"
    )


def read_decoder(folder: Path, *, where: str) -> dict[str, Tensor]:
    """The decoder of an own checkpoint under the names that MAE and the released MCF give it (`decoder_*`, `mask_token`).

    Raises UserError if the file is damaged, has no decoder, or holds numbers that are not finite.
    """
    where = f"{where}: weights.safetensors of {folder.name}"
    inside = _only(files.read(folder / "weights.safetensors", where=where).content, "decoder.")
    if not inside:
        raise UserError(f"{where}: no decoder in it; give a checkpoint of mcf's pre-training")
    for name, tensor in inside.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: decoder.{name} holds NaN or infinite values; give an earlier checkpoint")
    return {theirs(f"student.decoder.{name}"): tensor for name, tensor in inside.items()}


def find_checkpoint(path: str | Path, *, where: str) -> Path:
    """The checkpoint that a path means: itself, or the latest whole one of a run directory."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{where}: no such directory; give a run directory or a checkpoint in it")
    if not folder.is_dir():
        raise UserError(f"{where}: is a file; give the run directory, or the folder of one checkpoint (step-…)")
    if (folder / "weights.safetensors").exists():
        if damage := checkpoint.verify(folder):
            raise UserError(
                f"{where}: damaged ({damage.reason}); give the run directory to use the newest whole checkpoint"
            )
        return folder
    if (newest := checkpoint.latest(folder)) is None:
        raise UserError(f"{where}: no whole checkpoint in it; give a run directory that has saved one")
    return newest


def recipe_of(folder: Path, where: str) -> dict[str, Any]:
    """The recipe a checkpoint was trained with, as plain values, out of its run.json."""
    try:
        return dict(json.loads((folder / "run.json").read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: run.json of {folder.name} is missing or damaged ({error!r}); give another checkpoint"
        ) from None


def kind_of(names: Mapping[str, Any]) -> str | None:
    """Which kind of file has such names; None for an unknown one."""
    if any(name.startswith(("module.base_encoder.", "base_encoder.")) for name in names):
        return "moco_v3"
    if any(name.startswith(("online_encoder.", "target_encoder.", "module.online_encoder.")) for name in names):
        return "mcf"
    if any(name.startswith("encoder.patch_embed.") for name in names):
        return "checkpoint"
    if "patch_embed.proj.weight" in names or any(name.startswith("blocks.") for name in names):
        return "mae" if "mask_token" in names or "decoder_embed.weight" in names else "timm"
    return None


def _weights(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The names of a file, out of the dict they are nested in, without DistributedDataParallel's prefix."""
    for nest in NESTS:
        if isinstance(inner := content.get(nest), Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            content = dict(inner)
            break
    names = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not names:
        inside = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(
            f"{where}: no weights in it (it holds {inside}); give a state dict, or one under {', '.join(NESTS)}"
        )
    if all(name.startswith("module.") for name in names) and kind_of(names) is None:
        names = {name.removeprefix("module."): value for name, value in names.items()}
    return names


def _only(names: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}


def _moco_v3(names: Mapping[str, Any], _: str) -> dict[str, Any]:
    wrapped = any(name.startswith("module.base_encoder.") for name in names)
    return _only(names, "module.base_encoder." if wrapped else "base_encoder.")


def _timm(names: Mapping[str, Any], _: str) -> dict[str, Any]:
    return {name: value for name, value in names.items() if not name.startswith(("decoder_", "mask_token"))}


def _mcf(names: Mapping[str, Any], branch: str) -> dict[str, Any]:
    parts = from_reference({name.removeprefix("module."): value for name, value in names.items()})
    if branch == "teacher":
        return parts.teacher
    return _only(parts.student if branch == "encoder" else parts.momentum, "encoder.")


_EXTRACT: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "moco_v3": _moco_v3,
    "timm": _timm,
    "mae": _timm,
    "mcf": _mcf,
}


def _encoder(tensors: Mapping[str, Any], metadata: Mapping[str, str], where: str, origin: str) -> Encoder:
    if not tensors:
        raise UserError(f"{where}: no such encoder in it; give another file or branch")
    body = {name: value for name, value in tensors.items() if not name.startswith(HEAD)}
    state, shape = check(body, where)
    stated = metadata.get("heads", "")
    return Encoder(state, shape, int(stated) if stated.isdecimal() else None, origin)


def _wrong_kind(found: str | None, kind: str, names: Mapping[str, Any], where: str, key: str) -> str:
    if found is None:
        known = f"a file of that kind ({key}={kind})" if kind != "auto" else f"one of {', '.join(_EXTRACT)}"
        return f"{where}: of no known kind (its first names are {', '.join(list(names)[:3])}); give {known}"
    remedies = {
        "mae": f"set {key}=timm, which reads it",
        "mcf": "convert it once with python -m mcf.convert",
        "checkpoint": "give its run directory as a checkpoint, or export it with python -m mcf.export",
    }
    return f"{where}: is a {found} file, not {kind}; {remedies.get(found, f'set {key}={found}')}"
