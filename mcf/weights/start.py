"""Weights that a run starts from: an encoder of any known file, held against the encoder that the recipe trains."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from mcf.config import Recipe
from mcf.errors import UserError
from mcf.models.vit import resized_table
from mcf.weights.sources import CLIP, read_checkpoint, read_file

log = logging.getLogger(__name__)


def read_start(recipe: Recipe) -> dict[str, Tensor] | None:
    """The tensors that the recipe's encoder starts from, by timm's names; None for a random start.

    The position table is the file's own, interpolated (bicubic, align_corners=False) where model.image_size is another.

    Raises UserError for a file that `mcf.weights.sources` refuses, and for an encoder of another shape than the recipe's,
    naming every key that would have to change.
    """
    start, model = recipe.start, recipe.model
    if start.path is None:
        return None
    where, path = f"start.path={start.path}", Path(start.path).expanduser()
    if path.is_dir():
        encoder = read_checkpoint(path, start.branch, where=where)
    else:
        encoder = read_file(path, start.source, where=where, branch=start.branch, key="start.source")
    shape = encoder.shape
    differing = [
        f"{key}={theirs} (not {ours})"
        for key, ours, theirs in (
            ("model.width", model.width, shape.width),
            ("model.depth", model.depth, shape.depth),
            ("model.patch_size", model.patch_size, shape.patch_size),
            ("model.heads", model.heads, encoder.heads if encoder.heads is not None else model.heads),
            ("model.variant", model.variant, CLIP if shape.clip else "plain"),
            ("model.mlp_ratio", round(model.width * model.mlp_ratio) / model.width, shape.mlp_ratio),
        )
        if ours != theirs
    ]
    if differing:
        raise UserError(
            f"{where}: the {encoder.origin} has another shape; set {', '.join(differing)}, or give another file"
        )
    tensors = dict(encoder.tensors)
    tensors["pos_embed"] = resized_table(tensors["pos_embed"], model.image_size // model.patch_size)
    log.info(
        "the encoder starts from the %s%s", encoder.origin,
        "" if shape.image_size == model.image_size else f", its position table interpolated to {model.image_size}",
    )  # fmt: skip
    return tensors
