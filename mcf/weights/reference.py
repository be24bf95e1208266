"""Names of the released MCF checkpoint, to ours and back (METHOD 2).

The released code calls the trained encoder with its projector `online_encoder` and the momentum branch
`target_encoder`; its decoder has no prefix of its own, and the teacher hangs in it as `perceptual_loss.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# Pairs of (theirs, ours), the longest prefix first where one begins another. Ours starts with the part it belongs to.
_PREFIXES = (
    ("online_encoder.fc.", "student.projector."),
    ("online_encoder.", "student.encoder."),
    ("predictor.", "student.predictor."),
    ("decoder_embed.", "student.decoder.embed."),
    ("decoder_blocks.", "student.decoder.blocks."),
    ("decoder_norm.", "student.decoder.norm."),
    ("decoder_pred.", "student.decoder.pred."),
    ("decoder_pos_embed", "student.decoder.pos_embed"),
    ("mask_token", "student.decoder.mask_token"),
    ("target_encoder.fc.", "momentum.projector."),
    ("target_encoder.", "momentum.encoder."),
    ("perceptual_loss.model.", "teacher."),
)
_HEAD = "perceptual_loss.model.head."


@dataclass(frozen=True)
class ReferenceState:
    """A released state dict in our names: of `MCF`, of `MomentumBranch`, and of the teacher's ViT (without its head)."""

    student: dict[str, Tensor]
    momentum: dict[str, Tensor]
    teacher: dict[str, Tensor]


def ours(name: str) -> str | None:
    """Our name ("student.…", "momentum.…" or "teacher.…") of a released one; None if it is the teacher's head.

    Raises:
        KeyError: no such name in a released checkpoint.
    """
    if name.startswith(_HEAD):
        return None
    for theirs_prefix, ours_prefix in _PREFIXES:
        if name.startswith(theirs_prefix):
            return ours_prefix + name.removeprefix(theirs_prefix)
    raise KeyError(name)


def theirs(name: str) -> str:
    """The released name of one of ours ("student.…", "momentum.…" or "teacher.…").

    Raises:
        KeyError: ours has no such part.
    """
    for theirs_prefix, ours_prefix in _PREFIXES:
        if name.startswith(ours_prefix):
            return theirs_prefix + name.removeprefix(ours_prefix)
    raise KeyError(name)


def from_reference(state: Mapping[str, Tensor]) -> ReferenceState:
    """Sort a released state dict into our three parts; the teacher's classification head is left out.

    Raises:
        KeyError: a name that a released checkpoint does not have.
    """
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "momentum": {}, "teacher": {}}
    for name, tensor in state.items():
        if found := ours(name):
            part, _, rest = found.partition(".")
            parts[part][rest] = tensor
    return ReferenceState(**parts)


def to_reference(
    student: Mapping[str, Tensor], momentum: Mapping[str, Tensor], teacher: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state dict in released names, of state dicts of `MCF`, `MomentumBranch` and (optionally) the teacher's ViT."""
    parts = {"student": student, "momentum": momentum, "teacher": teacher or {}}
    return {theirs(f"{part}.{name}"): tensor for part, state in parts.items() for name, tensor in state.items()}
