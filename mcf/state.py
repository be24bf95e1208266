"""Everything a training run is, in and out of a checkpoint: the one place that knows which file holds what.

    weights.safetensors     the trained module (encoder, decoder, heads) in float32, its buffers, MCF's own names
    optimizer.safetensors   AdamW's moments and step counts by parameter name
    momentum.safetensors    momentum encoder and projector, with their BatchNorm buffers
    run.json                step, samples seen, recipe, identity of data and teacher, MLflow run, versions

No file knows how many ranks wrote it, nor the ZeRO stage. The teacher is never saved: the recipe says where it is from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mcf.config import Recipe
from mcf.errors import UserError
from mcf.mode import as_umask_asks

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, MOMENTUM, RUN = "weights.safetensors", "optimizer.safetensors", "momentum.safetensors", "run.json"
FORMAT = 1


@dataclass
class Progress:
    """Where a run stands, in plain numbers."""

    step: int = 0
    samples_seen: int = 0
    bad_steps: int = 0
    bad_samples: int = 0
    data: str = ""
    teacher: str = ""
    mlflow_run: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of what computed, for the record."""
    import mcf

    return {"mcf": mcf.__version__, "torch": torch.__version__, "python": platform.python_version()}


def write(folder: Path, recipe: Recipe, progress: Progress, engine: dict[str, torch.Tensor], momentum: dict) -> None:
    """Write the files of a checkpoint into `folder` (rank 0).

    `engine` is Engine.state_dict(), `momentum` MomentumBranch.full_state_dict().
    """
    weights = {k.removeprefix("model."): v for k, v in engine.items() if k.startswith("model.")}
    optimizer = {k: v for k, v in engine.items() if not k.startswith("model.")}
    save_tensors(weights, folder / WEIGHTS)
    save_tensors(optimizer, folder / OPTIMIZER)
    save_tensors(momentum, folder / MOMENTUM)
    progress.versions = versions()
    content = {"format": FORMAT, "progress": asdict(progress), "recipe": recipe.model_dump(mode="json")}
    (folder / RUN).write_text(json.dumps(content, indent=1))


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file of safetensors, readable by whom the umask says; an OSError where the disk is full."""
    try:
        with as_umask_asks(path):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:
        # The library wraps I/O errors in its own type and keeps no errno: write a little to have the real one.
        _raise_real_error(path)
        raise OSError(0, f"{path.name}: {error}") from error


def _raise_real_error(path: Path) -> None:
    with path.with_name(path.name + ".probe").open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
    path.with_name(path.name + ".probe").unlink()


def read_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and recipe (as plain values) of a checkpoint."""
    content = json.loads((folder / RUN).read_text())
    if "recipe" not in content:
        raise UserError(f"{folder}: a checkpoint of fine-tuning, not of pre-training; give another name=")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{folder / RUN}: format {content.get('format')}, this version reads {FORMAT}; go on with the version of mcf "
            "that wrote it, or start under another name=…"
        )
    return Progress(**content["progress"]), content["recipe"]


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a checkpoint: (for Engine.load_state_dict, for MomentumBranch.load_full_state_dict)."""
    engine = {f"model.{k}": v for k, v in load_file(folder / WEIGHTS).items()} | load_file(folder / OPTIMIZER)
    return engine, load_file(folder / MOMENTUM)


def check_same_run(folder: Path, recipe: Recipe, data: str) -> Progress:
    """Progress of a checkpoint, after making sure that `recipe` and the data's fingerprint go on with the same run.

    A key that the checkpoint does not have, since it came later, counts as having had its default: a default leaves
    what was before it.

    Raises UserError, naming the keys that differ, otherwise.
    """
    progress, saved = read_progress(folder)
    theirs = _flat(Recipe().model_dump(mode="json")) | _flat(saved)
    ours = _flat(recipe.model_dump(mode="json"))
    differing = [
        key
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not recipe.may_differ(key)
    ]
    if differing:
        shown = ", ".join(f"{key}={ours.get(key)} (was {theirs.get(key)})" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"{folder}: checkpoint of another recipe: {shown}{more}; "
            "give the old values to go on, or start under another name=…"
        )
    if progress.data != data:
        raise UserError(
            f"{folder}: checkpoint of a run on other data (fingerprint {progress.data}, data.path={recipe.data.path} has "
            f"{data}); give the old data.path to go on, or start under another name=…"
        )
    return progress


def saved_precision(folder: Path) -> str:
    """The precision that a checkpoint's run computes in: what `train.precision: auto` has become."""
    return read_progress(folder)[1]["train"]["precision"]


def check_same_teacher(progress: Progress, teacher: str, recipe: Recipe) -> None:
    """Raise UserError if a run would go on under a teacher with other weights: its file may move, not change."""
    if progress.teacher != teacher:
        raise UserError(
            f"teacher.path={recipe.teacher.path}: other weights than the run began with (fingerprint {teacher or 'none'}, "
            f"was {progress.teacher or 'none'}); give the old file to go on, or start under another name=…"
        )


def fingerprint(module: torch.nn.Module | None) -> str:
    """Identity of a module's parameters and buffers in 16 hex digits; empty for no module."""
    if module is None:
        return ""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
