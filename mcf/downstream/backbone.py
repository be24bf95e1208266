"""The backbone of a fine-tuning run: any encoder that the project reads, or one of its shape that has learned nothing."""

from __future__ import annotations

import dataclasses
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
from mcf.weights.vit import ViTShape, check_heads

log = logging.getLogger(__name__)


def load_backbone(config: FinetuneConfig) -> Backbone:
    """The encoder that `weights`, `branch`, `heads`, `random` and `taps` describe, for images of `input_size` or its default.

    Raises UserError for weights that are missing, damaged or of another architecture, a fine-tuned model, a number of
    heads that is not stated, taps beyond the depth, and an input size that patches do not divide.
    """
    encoder = read_encoder(config.weights, config.branch)
    shape, heads = encoder.shape, heads_of(encoder, config.heads, config.weights)
    taps = config.taps or default_taps(shape.depth)
    if max(taps) >= shape.depth:
        raise UserError(f"taps={list(taps)}: the {encoder.origin} has blocks 0 to {shape.depth - 1}; choose among them")
    size, patch = config.input_size or 2 * shape.image_size, shape.patch_size
    if size % patch or size < 2 * patch:
        raise UserError(
            f"input_size={size}: patches of {patch} pixels do not divide it into at least 2×2; "
            f"use {max(2, round(size / patch)) * patch}"
        )
    if config.random:
        log.warning(
            "the backbone is RANDOM (random=true): of the shape of the %s, it has learned nothing", encoder.origin
        )
        vit = untrained(shape, heads, size, config.seed, config.attention)
    else:
        log.info("backbone: %s, for images of %d pixels", encoder.origin, size)
        vit = vit_of(encoder.tensors, heads=heads, attention=config.attention)
    return Backbone(vit, taps, size)


def encoder_of(weights: str, branch: str, heads: int | None, seed: int | None = None) -> tuple[Encoder, int]:
    """The encoder out of a run directory, a checkpoint or a file, and its heads; with a seed, an untrained one of its shape.

    Raises UserError as `load_backbone` does.
    """
    encoder = read_encoder(weights, branch)
    count = heads_of(encoder, heads, weights)
    if seed is not None:
        vit = untrained(encoder.shape, count, encoder.shape.image_size, seed)
        encoder = dataclasses.replace(encoder, tensors=dict(vit.state_dict()))
    return encoder, count


def read_encoder(weights: str, branch: str) -> Encoder:
    """The encoder out of a run directory, a checkpoint or a file."""
    path, where = Path(weights).expanduser(), f"weights={weights}"
    if is_finetuned(path):
        raise UserError(f"{where}: is a fine-tuned model, not an encoder; give the weights that it was trained from")
    if path.is_dir():
        return read_checkpoint(path, branch, where=where)
    return read_file(path, "auto", where=where, branch=branch)


def heads_of(encoder: Encoder, heads: int | None, weights: str) -> int:
    """The attention heads: those of the key, held against the file's, or the file's own."""
    shape = encoder.shape
    found = heads or encoder.heads
    if found is None:
        raise UserError(
            f"weights={weights}: the {encoder.origin} does not state its attention heads; set heads= "
            f"({shape.width // 64 or 1} if each is 64 wide, as mostly)"
        )
    check_heads(shape, found, key="heads", where=encoder.origin, stated=encoder.heads)
    return found


def untrained(shape: ViTShape, heads: int, image_size: int, seed: int, attention: str = "auto") -> VisionTransformer:
    """A ViT of a shape that has learned nothing: a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(
            image_size=image_size, patch_size=shape.patch_size, width=shape.width, depth=shape.depth, heads=heads,
            mlp_ratio=shape.mlp_ratio, attention=attention, clip=shape.clip,
        )  # fmt: skip
