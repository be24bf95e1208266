"""From the names of each known file to timm's: which tensors are the encoder, and what they are called there.

moco_v3    {'state_dict': {'module.base_encoder.*': …}}; momentum encoder and heads beside it (METHOD 2)
timm       a ViT's own names, flat or under 'model' or 'state_dict'; with or without its classification head
mae        timm's names under 'model'; the full file has the decoder beside them
mcf        the released checkpoint of MCF: online_encoder, target_encoder, and the teacher inside the loss
farl       CLIP's image encoder in OpenAI's names, `visual.*`, with the text encoder beside it; also one of ours, converted
checkpoint a checkpoint of our own, or its weights.safetensors
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcf import checkpoint
from mcf.errors import UserError
from mcf.models.patches import MEAN, STD
from mcf.weights import files
from mcf.weights.reference import from_reference, theirs
from mcf.weights.vit import ViTShape, check

NESTS = ("state_dict", "model", "module")
HEAD = ("head.", "head_dist.")
VARIANT, CLIP = "variant", "clip"  # of a file's metadata: what its tensors cannot say
CLIP_HEAD = 64  # width of a head in CLIP's ViT-B and L (Radford et al. 2021, table 20), and in FaRL's
CLIP_LARGE = 1024  # width of the L; beyond it, heads are of other widths
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
        kind: `moco_v3`, `timm`, `mae`, `mcf`, `farl`, or `auto` to find out.
        where: how messages open, for example `teacher.path=FILE`.
        branch: which encoder of the released MCF checkpoint: encoder, momentum or teacher.
        trust: whether a pickle that runs code may be opened.
        key: name of the key that `kind` came from, for messages.

    Raises UserError for anything that is not one whole, finite ViT of that kind.
    """
    opened = files.read(path, where=where, trust=trust)
    names = _weights(opened.content, where)
    found = "farl" if opened.metadata.get(VARIANT) == CLIP else kind_of(names)
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
    return _encoder(tensors, opened.metadata, where, f"{kind} file {path}", clip=kind == "farl")


def read_checkpoint(path: str | Path, branch: str, *, where: str, of_file: str = "") -> Encoder:
    """Read a branch (`encoder` or `momentum`) of an own checkpoint: a run directory (its latest), or one checkpoint.

    Raises UserError if there is no whole checkpoint, or no such branch in it.
    """
    folder = find_checkpoint(path, where=where, of_file=of_file)
    _refuse_finetuned(folder, where)
    file = folder / ("weights.safetensors" if branch == "encoder" else "momentum.safetensors")
    opened = files.read(file, where=f"{where}: {file.name} of {folder.name}")
    tensors = _only(opened.content, "encoder.")
    model = recipe_of(folder, where).get("model", {})
    return _encoder(
        tensors, {"heads": str(model.get("heads"))}, f"{where}: {file.name} of {folder.name}",
        f"{BRANCHES[branch]} of {folder}", clip=model.get("variant") == CLIP,
    )  # fmt: skip


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


def find_checkpoint(path: str | Path, *, where: str, of_file: str = "") -> Path:
    """The checkpoint that a path means: itself, or the latest whole one of a run directory.

    of_file: for messages, what else to do with a file.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{where}: no such directory; give a run directory or a checkpoint in it")
    if not folder.is_dir():
        raise UserError(
            f"{where}: is a file; give the run directory, or the folder of one checkpoint (step-…){of_file}"
        )
    if (folder / "weights.safetensors").exists():
        if damage := checkpoint.verify(folder):
            raise UserError(
                f"{where}: damaged ({damage.reason}); give the run directory to use the newest whole checkpoint"
            )
        return folder
    if (newest := checkpoint.latest(folder)) is None:
        raise UserError(f"{where}: no whole checkpoint in it; give a run directory that has saved one")
    return newest


def _refuse_finetuned(folder: Path, where: str) -> None:
    """Raise UserError for a checkpoint of mcf.finetune; other faults of run.json are told by who needs it."""
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return
    if isinstance(run, dict) and "recipe" not in run and isinstance(run.get("finetune"), dict):
        raise UserError(
            f"{where}: a fine-tuned model, not a run of pre-training; give the one that it began from "
            f"({run['finetune'].get('weights')})"
        )


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
    if any(name.startswith("visual.") for name in names):
        return "farl"
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


_CLIP_NAMES = {
    "ln_1": "norm1", "ln_2": "norm2", "attn.in_proj": "attn.qkv", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_FARL_MASKED = ("lm_transformer.", "lm_head.", "ln_lm.")
_CLIP_OUTSIDE = {
    "class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight", "ln_pre.bias": "norm_pre.bias", "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}  # fmt: skip


def _farl(names: Mapping[str, Any], _: str) -> dict[str, Any]:
    """CLIP's image encoder under timm's names, for input in ImageNet's units.

    Left out are its projection to the text's space, and what FaRL's masked image modelling stands on top of it.

    Raises KeyError for a name that it does not have.
    """
    inside = _only(names, "visual.")
    if not inside:  # converted before
        return dict(names)
    found: dict[str, Any] = {}
    for name, value in inside.items():
        if name in ("proj", "mask_token") or name.startswith(_FARL_MASKED):
            continue
        if (block := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)) is None:
            if name not in _CLIP_OUTSIDE:
                raise KeyError(f"visual.{name}")
            found[_CLIP_OUTSIDE[name]] = value
        elif block[2] in _CLIP_NAMES:
            found[f"blocks.{block[1]}.{_CLIP_NAMES[block[2]]}.{block[3]}"] = value
        else:
            raise KeyError(f"visual.{name}")
    for name, dimensions in (("cls_token", 1), ("pos_embed", 2)):
        if isinstance(tensor := found.get(name), Tensor) and tensor.dim() == dimensions:
            found[name] = tensor.view(*(3 - dimensions) * [1], *tensor.shape)
    weight = found.get("patch_embed.proj.weight")
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == len(CLIP_MEAN):
        found["patch_embed.proj.weight"], found["patch_embed.proj.bias"] = _in_our_units(weight)
    return found


def _in_our_units(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A patch projection [width, 3, P, P] without bias, of pixels in CLIP's units, as one of pixels in ImageNet's.

    A pixel v is (v − m)/s in either; CLIP's is ours times s_ours/s_clip, plus (m_ours − m_clip)/s_clip: the factor goes into
    the weight, and the sum over a patch of the constant is a bias. Equal up to rounding, for every image.
    """
    ours, theirs = (torch.tensor(pair, dtype=torch.float64) for pair in ((MEAN, STD), (CLIP_MEAN, CLIP_STD)))
    (mean, std), (clip_mean, clip_std) = ours, theirs
    wide = weight.double()
    bias = torch.einsum("ocij,c->o", wide, (mean - clip_mean) / clip_std)
    return wide * (std / clip_std)[:, None, None], bias


_EXTRACT: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "moco_v3": _moco_v3,
    "timm": _timm,
    "mae": _timm,
    "mcf": _mcf,
    "farl": _farl,
}


def _encoder(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], where: str, origin: str, *, clip: bool = False
) -> Encoder:
    if not tensors:
        raise UserError(f"{where}: no such encoder in it; give another file or branch")
    body = {name: value for name, value in tensors.items() if not name.startswith(HEAD)}
    state, shape = check(body, where, clip=clip)
    stated = metadata.get("heads", "")
    heads = int(stated) if stated.isdecimal() else None
    if heads is None and clip and shape.width <= CLIP_LARGE and shape.width % CLIP_HEAD == 0:
        heads = shape.width // CLIP_HEAD
    return Encoder(state, shape, heads, origin)


def metadata_of(encoder: Encoder, heads: int | None) -> dict[str, str]:
    """What a file of an encoder has to state beside its tensors, to be read again by `read_file`."""
    stated = {"heads": str(heads)} if heads is not None else {}
    return stated | ({VARIANT: CLIP} if encoder.shape.clip else {})


def _wrong_kind(found: str | None, kind: str, names: Mapping[str, Any], where: str, key: str) -> str:
    if found is None:
        known = f"a file of that kind ({key}={kind})" if kind != "auto" else f"one of {', '.join(_EXTRACT)}"
        return f"{where}: of no known kind (its first names are {', '.join(list(names)[:3])}); give {known}"
    remedies = {
        "checkpoint": "give its run directory as a checkpoint, or export it with python -m mcf.export",
    }
    return f"{where}: is a {found} file, not {kind}; {remedies.get(found, f'set {key}={found}')}"
