"""A fine-tuning run in and out of a checkpoint.

weights.safetensors     what is trained, float32
optimizer.safetensors   AdamW's moments and step count
average.safetensors     the moving average that is evaluated
run.json                step, results so far, keys, identity of the data, MLflow run, versions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import Face
from mcf.errors import UserError
from mcf.keys import flatten, render
from mcf.state import OPTIMIZER, RUN, WEIGHTS, save_tensors, versions

AVERAGE = "average.safetensors"
FORMAT = 1


@dataclass
class Progress:
    """Where a run stands. history: of every evaluation {"epoch", "test": metrics, "validation": headline or None}."""

    step: int = 0
    bad_steps: int = 0
    data: str = ""
    backbone: str = ""
    mlflow_run: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def write(folder: Path, config: FinetuneConfig, progress: Progress, engine: dict[str, Tensor], average: dict) -> None:
    """Write the files of a checkpoint into `folder` (rank 0). `engine` is Engine.state_dict()."""
    save_tensors({k.removeprefix("model."): v for k, v in engine.items() if k.startswith("model.")}, folder / WEIGHTS)
    save_tensors({k: v for k, v in engine.items() if not k.startswith("model.")}, folder / OPTIMIZER)
    save_tensors(average, folder / AVERAGE)
    content = {
        "format": FORMAT, "progress": asdict(progress), "finetune": config.model_dump(mode="json"), "versions": versions(),
    }  # fmt: skip
    (folder / RUN).write_text(json.dumps(content, indent=1))


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint: for Engine.load_state_dict, and of the average."""
    engine = {f"model.{k}": v for k, v in load_file(folder / WEIGHTS).items()} | load_file(folder / OPTIMIZER)
    return engine, load_file(folder / AVERAGE)


def check_same_run(folder: Path, config: FinetuneConfig, data: str) -> Progress:
    """Progress of a checkpoint, after making sure that these keys and faces go on with the same run (else UserError)."""
    content = json.loads((folder / RUN).read_text())
    if "finetune" not in content:
        raise UserError(f"{folder}: a checkpoint of pre-training, not of fine-tuning; give another name=")
    if content["format"] != FORMAT:
        raise UserError(f"{folder}: format {content['format']}, this version reads {FORMAT}; give another name=")
    ours, theirs = flatten(config), flatten(FinetuneConfig.model_validate(content["finetune"]))
    differing = [key for key in ours if ours[key] != theirs[key] and not config.may_differ(key)]
    if differing:
        shown = ", ".join(f"{key}={render(ours[key])} (was {render(theirs[key])})" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"{folder}: checkpoint of another run: {shown}{more}; give the old values, or another name=")
    progress = Progress(**content["progress"])
    if progress.data != data:
        raise UserError(f"{folder}: checkpoint of a run on other faces or labels; give the old data=, or another name=")
    return progress


def fingerprint(*splits: Iterable[Face]) -> str:
    """Identity of faces in order and of what is known of their labels without reading masks, 16 hex digits."""
    digest = hashlib.sha256()
    for faces in splits:
        digest.update(b"split")
        for face in faces:
            digest.update(face.name.encode())
            digest.update(b"" if face.points is None else face.points.tobytes())
    return digest.hexdigest()[:16]
