"""The backbone of a fine-tuning run: any encoder that the project reads, or one of its shape that has learned nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mcf.downstream.config import FinetuneConfig
from mcf.downstream.network import Backbone, default_taps
from mcf.downstream.saved import is_finetuned
from mcf.errors import UserError
from mcf.models.teacher import vit_of
from mcf.models.vit import VisionTransformer
from mcf.weights.sources import Encoder, read_checkpoint, read_file
from mcf.weights.vit import check_heads

log = logging.getLogger(__name__)


def load_backbone(config: FinetuneConfig) -> Backbone:
    """The encoder that `weights`, `branch`, `heads`, `random` and `taps` describe, for images of `input_size`.

    Raises UserError for weights that are missing, damaged or of another architecture, a fine-tuned model, a number of
    heads that is not stated, taps beyond the depth, and an input size that patches do not divide.
    """
    encoder = read_encoder(config)
    shape = encoder.shape
    heads = config.heads or encoder.heads
    if heads is None:
        raise UserError(
            f"weights={config.weights}: the {encoder.origin} does not state its attention heads; set heads= "
            f"({shape.width // 64 or 1} if each is 64 wide, as mostly)"
        )
    check_heads(shape, heads, key="heads", where=encoder.origin, stated=encoder.heads)
    taps = config.taps or default_taps(shape.depth)
    if max(taps) >= shape.depth:
        raise UserError(f"taps={list(taps)}: the {encoder.origin} has blocks 0 to {shape.depth - 1}; choose among them")
    size, patch = config.input_size, shape.patch_size
    if size % patch or size < 2 * patch:
        raise UserError(
            f"input_size={size}: patches of {patch} pixels do not divide it into at least 2×2; "
            f"use {max(2, round(size / patch)) * patch}"
        )
    if config.random:
        log.warning(
            "the backbone is RANDOM (random=true): of the shape of the %s, it has learned nothing", encoder.origin
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            vit = VisionTransformer(
                image_size=size, patch_size=patch, width=shape.width, depth=shape.depth, heads=heads,
                mlp_ratio=shape.mlp_ratio, attention=config.attention,
            )  # fmt: skip
    else:
        log.info("backbone: %s", encoder.origin)
        vit = vit_of(encoder.tensors, heads=heads, attention=config.attention)
    return Backbone(vit, taps, size)


def read_encoder(config: FinetuneConfig) -> Encoder:
    """The encoder out of a run directory, a checkpoint or a file."""
    path, where = Path(config.weights).expanduser(), f"weights={config.weights}"
    if is_finetuned(path):
        raise UserError(f"{where}: is a fine-tuned model, not an encoder; give the weights that it was trained from")
    if path.is_dir():
        return read_checkpoint(path, config.branch, where=where)
    return read_file(path, "auto", where=where, branch=config.branch)
