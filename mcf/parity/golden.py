"""Golden numbers: what one step of the reference was given, computed and left behind, a file a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcf.config import Recipe
from mcf.errors import UserError

INPUTS = ("u8", "noise_online", "noise_target")
OUTPUTS = ("pred", "mask", "q", "k", "mim", "con", "loss")


@dataclass(frozen=True)
class Golden:
    """What one rank of the reference left behind: its configuration, and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


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
