"""The momentum branch: a moving average of encoder and projector, which makes the keys (He et al. 2020; METHOD 1, "EMA").

It stands outside the trained module, so that DeepSpeed neither partitions nor casts it: always float32, since in
bfloat16 an average with m = 0.99 loses most of its updates to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mcf.models.mcf import MCF

POSITIONS = "encoder.pos_embed"


class MomentumBranch(nn.Module):
    """Momentum encoder and projector, a copy of the student's at the start.

    It gets no gradient and stays in training mode for good: its BatchNorm takes the statistics of the batch, as the
    reference's does, and its running statistics move on their own. Parameter names are the student's.
    """

    def __init__(self, student: MCF):
        super().__init__()
        self.encoder = copy.deepcopy(student.encoder)
        self.projector = copy.deepcopy(student.projector)
        self.requires_grad_(False)
        self.train()
        self._snapshot = Snapshot(lambda: [*self.parameters(), *self.buffers()])

    def train(self, mode: bool = True) -> MomentumBranch:
        return super().train(True)

    @torch.no_grad()
    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Keys [B, dim], not normalised, of uint8 images [B, H, W, 3] seen through a mask (None: all patches)."""
        return self.projector(self.encoder(images, ids_keep)[:, 0])

    @torch.no_grad()
    def update(self, named_parameters: Mapping[str, Tensor], m: float) -> None:
        """p ← m·p + (1−m)·p_student for every parameter; BatchNorm's buffers are left alone.

        Args:
            named_parameters: the student's full float32 parameters by the names of `MCF`; further ones are ignored.
                If the position table is among them, it is averaged too (the reference does so, which moves it by
                rounding alone).
            m: the average's memory, 0 to 1.

        Raises:
            KeyError: a parameter of this branch is not among them.
        """
        ours: dict[str, Tensor] = dict(self.named_parameters())
        if POSITIONS in named_parameters:
            ours[POSITIONS] = self.encoder.pos_embed
        theirs = [named_parameters[name] for name in ours]
        if self.encoder.pos_embed.is_cuda:
            torch._foreach_lerp_(list(ours.values()), theirs, 1 - m)
            return
        # On a CPU one pass or two cost little, and this form rounds as the reference's does, to the last bit.
        for mine, other in zip(ours.values(), theirs):
            mine.mul_(m).add_(other * (1 - m))

    def snapshot(self) -> None:
        """Remember parameters and buffers as they are now, for `restore`."""
        self._snapshot.take()

    def restore(self) -> None:
        """Go back to the last `snapshot`: a step that was not applied has changed nothing."""
        self._snapshot.restore()


class Snapshot:
    """A copy of some tensors, in memory that is kept from the first `take` on.

    `tensors` is asked each time: a module that moves to another device has other buffers afterwards.
    """

    def __init__(self, tensors: Callable[[], list[Tensor]]):
        self._tensors = tensors
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Remember the tensors as they are now."""
        now = self._tensors()
        self._saved = self._saved or [torch.empty_like(tensor) for tensor in now]
        for saved, tensor in zip(self._saved, now):
            saved.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Write back what was remembered."""
        if not self._saved:
            raise RuntimeError("restore() before anything was remembered")
        for saved, tensor in zip(self._saved, self._tensors()):
            tensor.copy_(saved)
