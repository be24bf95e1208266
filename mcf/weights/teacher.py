"""The teacher of the feature loss: its weights from wherever the recipe says, refused unless they are whole.

A wrong teacher does not stop a run, it only makes it worthless; so a file in which anything but the head is missing,
of another shape, or not finite, ends the run before it starts (METHOD 1 and 2).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from mcf.config import TeacherConfig
from mcf.errors import UserError
from mcf.models.teacher import Teacher
from mcf.models.vit import VisionTransformer
from mcf.weights.sources import Encoder, read_checkpoint, read_file
from mcf.weights.vit import check_heads, check_taps, check_width

log = logging.getLogger(__name__)


def load_teacher(
    config: TeacherConfig, *, image_size: int, attention: str = "auto", kernels: str = "auto", seed: int = 0
) -> Teacher | None:
    """The frozen teacher of a recipe, or None for `source=none`: `read_teacher`, then `build_teacher`."""
    # What the modules draw before they are given their weights is nobody's business.
    with torch.random.fork_rng(devices=[]):
        state = read_teacher(config, image_size=image_size, seed=seed)
        if state is None:
            return None
        return build_teacher(state, config, image_size=image_size, attention=attention, kernels=kernels)


def build_teacher(
    state: Mapping[str, Tensor], config: TeacherConfig, *, image_size: int, attention: str, kernels: str
) -> Teacher:
    """The teacher that has these tensors; it copies them.

    `attention` is one of `mcf.attention.IMPLEMENTATIONS`, `kernels` one of `mcf.kernels.dispatch.IMPLEMENTATIONS`.
    """
    return Teacher(
        state, heads=config.heads, taps=config.taps, image_size=image_size, attention=attention, kernels=kernels
    )


def read_teacher(config: TeacherConfig, *, image_size: int, seed: int = 0) -> dict[str, Tensor] | None:
    """The tensors of a recipe's teacher under timm's names, or None for `source=none`.

    Args:
        config: the recipe's teacher section; shapes come from the file, heads and taps from here.
        image_size: side of the images it will see, pixels; where it was trained at another, Teacher interpolates its
            position table.
        seed: of the weights of `source=random`.

    Raises UserError, one line, for every way in which the source is missing, damaged, of another kind, or does not
    fit heads, taps or image size.
    """
    if config.source == "none":
        return None
    if config.source == "random":
        return _random(config, image_size, seed)
    encoder = _from_path(config)
    shape = encoder.shape
    check_heads(shape, config.heads, key="teacher.heads", where=encoder.origin, stated=encoder.heads)
    check_taps(shape.depth, config.taps, encoder.origin)
    log.info(
        "teacher: %s: width %d, depth %d, %d heads, patches of %d pixels, trained at %d pixels%s",
        encoder.origin, shape.width, shape.depth, config.heads, shape.patch_size, shape.image_size,
        "" if shape.image_size == image_size else f", its position table interpolated to {image_size}",
    )  # fmt: skip
    return encoder.tensors


def _from_path(config: TeacherConfig) -> Encoder:
    where = f"teacher.path={config.path}"
    if not config.path:
        raise UserError(f"teacher.path is not set, and teacher.source={config.source} reads from there; set it")
    if config.source == "checkpoint":
        of_file = "; a file of weights is read with teacher.source=timm, or what else it is (mae, moco_v3, mcf, farl)"
        return read_checkpoint(config.path, config.branch, where=where, of_file=of_file)
    return read_file(config.path, config.source, where=where, key="teacher.source", branch=config.branch)


def _random(config: TeacherConfig, image_size: int, seed: int) -> dict[str, Tensor]:
    """The tensors of a ViT as it is initialised (METHOD 1, "Init"): equal for equal seeds, on every rank."""
    if image_size % config.patch_size:
        raise UserError(
            f"teacher.patch_size={config.patch_size} does not divide model.image_size={image_size}; set one that does"
        )
    check_width(config.width, config.heads, key="teacher.heads", where="teacher.width")
    check_taps(config.depth, config.taps, "the random teacher")
    log.warning(
        "TEACHER IS RANDOM (teacher.source=random): drawn from seed %d, it has learned nothing; for demos and tests only",
        seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = VisionTransformer(
            image_size=image_size,
            patch_size=config.patch_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
        )
    return vit.state_dict()
