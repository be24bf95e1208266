"""A fine-tuned model as one file, RUN/model.safetensors: backbone, decoder, and what they are and were trained for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from mcf.downstream.config import FinetuneConfig, HeadConfig
from mcf.downstream.datasets import FaceSet
from mcf.downstream.network import Backbone, Decoder, Network
from mcf.errors import UserError
from mcf.models.vit import VisionTransformer
from mcf.weights import files

FILE = "model.safetensors"
KEY = "mcf_finetuned"  # of the file's metadata


@dataclass(frozen=True)
class Description:
    """What a fine-tuned model is: enough to build it, to cut faces as it saw them, and to name its outputs.

    epoch: that its weights are of. outputs: number of points or classes. clip: whether its ViT is CLIP's variant.
    """

    task: Literal["alignment", "parsing"]
    dataset: str
    outputs: int
    classes: tuple[str, ...]
    crop: str
    scale: float
    warp: float
    warp_size: int
    input_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    taps: tuple[int, ...]
    head: dict[str, Any]
    epoch: int
    clip: bool = False


def describe(network: Network, config: FinetuneConfig, faces: FaceSet, epoch: int) -> Description:
    """The description of a network of a run."""
    vit = network.backbone.vit
    block: Any = vit.blocks[0]
    warp_size, input_size = config.sides
    return Description(
        task=config.task, dataset=config.dataset, outputs=faces.channels, classes=faces.classes, crop=faces.crop,
        scale=faces.scale, warp=faces.warp, warp_size=warp_size, input_size=input_size,
        patch_size=vit.patch_size, width=vit.width, depth=len(vit.blocks), heads=block.attn.heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.width, taps=network.backbone.taps,
        head=config.head.model_dump(mode="json"), epoch=epoch,
        clip=network.backbone.vit.clip,
    )  # fmt: skip


def write(path: Path, network: Network, description: Description) -> None:
    """Write the file, whole or not at all. Raises UserError if it cannot be written."""
    files.write(path, dict(network.state_dict()), {KEY: json.dumps(asdict(description))})


def is_finetuned(path: Path) -> bool:
    """Whether a path means a fine-tuned model: its file, its run directory, or a checkpoint of such a run."""
    if path.is_dir():
        # A folder for transformers has a file of the same name.
        return (path / "average.safetensors").is_file() or is_finetuned(path / FILE)
    return path.is_file() and _metadata(path) is not None


def load(weights: str, task: str | None = None, *, key: str = "weights") -> tuple[Network, Description]:
    """A fine-tuned model of a run directory or file, in evaluation mode.

    Raises UserError for a path without one, a damaged file, weights of something else, and a model of another task.
    """
    where, path = f"{key}={weights}", Path(weights).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        what = f"no {FILE} in it" if path.is_dir() else "no such file"
        raise UserError(f"{where}: {what}; give the run directory of python -m mcf.finetune, once it has evaluated")
    opened = files.read(file, where=where)
    if KEY not in opened.metadata:
        raise UserError(
            f"{where}: weights, but of no fine-tuned model; train one with python -m mcf.finetune weights={weights}"
        )
    try:
        found = json.loads(opened.metadata[KEY])
        for name in ("classes", "taps"):
            found[name] = tuple(found[name])
        description = Description(**found)
        network = build(description)
        network.load_state_dict(opened.content)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: damaged, or of another version of mcf ({first}); train it again") from None
    if task is not None and description.task != task:
        raise UserError(f"{where}: a model of task={description.task}, not of task={task}; give one of that task")
    return network.eval().requires_grad_(False), description


def build(description: Description) -> Network:
    """The network of a description, its weights not yet loaded."""
    d = description
    vit = VisionTransformer(
        image_size=d.input_size,
        patch_size=d.patch_size,
        width=d.width,
        depth=d.depth,
        heads=d.heads,
        mlp_ratio=d.mlp_ratio,
        clip=d.clip,
    )
    return Network(Backbone(vit, d.taps, d.input_size), Decoder(d.width, d.outputs, HeadConfig(**d.head)))


def _metadata(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get(KEY)
    except (SafetensorError, OSError, ValueError):
        return None
