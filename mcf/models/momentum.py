"""The momentum branch: a moving average of encoder and projector, which makes the keys (He et al. 2020; METHOD 1, "EMA").

It stands outside the trained module, so that DeepSpeed neither saves nor casts it: always float32, since in bfloat16 an
average with m = 0.99 loses most of its updates to rounding. Where the trained parameters are split over the ranks (ZeRO-3),
it is split in the same way, and its average moves piece by piece.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mcf.models.mcf import MCF
from mcf.sharding import Shards

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
        self._shards: Shards | None = None
        self._spare: list[Tensor] = []
        self._moved = True  # since the last snapshot
        self._saved_buffers: list[Tensor] = []

    def train(self, mode: bool = True) -> MomentumBranch:
        return super().train(True)

    def split(self, rank: int, size: int) -> None:
        """Keep only this rank's piece of every parameter, as ZeRO-3 does; `forward` is collective from here on.

        `update`, `snapshot` and `restore` then work on pieces, without communication.
        """
        blocks = list(self.encoder.blocks)
        inside = {parameter for block in blocks for parameter in block.parameters()}
        outside = [parameter for parameter in self.encoder.parameters() if parameter not in inside]
        units = [(self.encoder, outside), *((m, list(m.parameters())) for m in (*blocks, self.projector))]
        self._shards = Shards(units, rank, size)

    @torch.no_grad()
    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Keys [B, dim], not normalised, of uint8 images [B, H, W, 3] seen through a mask (None: all patches)."""
        return self.projector(self.encoder(images, ids_keep)[:, 0])

    @torch.no_grad()
    def update(self, named_parameters: Mapping[str, Tensor], m: float) -> None:
        """p ← m·p + (1−m)·p_student for every parameter; BatchNorm's buffers are left alone.

        Args:
            named_parameters: the student's float32 parameters by the names of `MCF`, whole, or this rank's pieces
                after `split`; further ones are ignored. If the position table is among them, it is averaged too (the
                reference does so, which moves it by rounding alone).
            m: the average's memory, 0 to 1.

        Raises:
            KeyError: a parameter of this branch is not among them.
        """
        ours: dict[str, Tensor] = dict(self.named_parameters())
        theirs = [named_parameters[name] for name in ours]
        old, new = [p.data for p in ours.values()], [p.data for p in ours.values()]
        if not self._moved:
            # The first move since the snapshot goes into memory of its own: the old values stay, and no copy is made.
            new = self._spare or [torch.empty_like(tensor) for tensor in old]
            for parameter, tensor in zip(ours.values(), new):
                parameter.data = tensor
            self._spare, self._moved = old, True
        _average(old, theirs, m, out=new)
        if POSITIONS in named_parameters:
            table = [self.encoder.pos_embed]
            _average(table, [named_parameters[POSITIONS]], m, out=table)

    @torch.no_grad()
    def whole_encoder(self) -> dict[str, Tensor]:
        """Whole tensors of the encoder by timm's names, on every rank, to be read only. Collective after `split`."""
        state = dict(self.encoder.state_dict())
        if self._shards is not None:
            state |= {name: self._shards.wholes([p])[0] for name, p in self.encoder.named_parameters()}
        return state

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """`state_dict` with whole parameters. After `split`: collective, on the CPU on rank 0, and empty elsewhere."""
        if self._shards is None:
            return self.state_dict()
        wholes = {name: self._shards.wholes([p])[0].cpu() for name, p in self.named_parameters()}
        return self.state_dict() | wholes if self._shards.rank == 0 else {}

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `full_state_dict` gave on rank 0, under any number of ranks; every rank passes all of it.

        Raises:
            RuntimeError: a name is missing or too many, or a shape differs.
        """
        if self._shards is not None:
            state = dict(state)
            for name, parameter in self.named_parameters():
                if name in state:
                    state[name] = self._shards.piece_of(parameter, state[name])
        self.load_state_dict(state)

    def snapshot(self) -> None:
        """Remember parameters and buffers as they are now, for `restore`."""
        self._saved_buffers = [buffer.clone() for buffer in self.buffers()]
        self._moved = False

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last `snapshot`: a step that was not applied has changed nothing."""
        if self._moved:
            if not self._spare:
                raise RuntimeError("restore() before any snapshot()")
            given_up = [parameter.data for parameter in self.parameters()]
            for parameter, tensor in zip(self.parameters(), self._spare):
                parameter.data = tensor
            self._spare, self._moved = given_up, False
        for buffer, saved in zip(self.buffers(), self._saved_buffers):
            buffer.copy_(saved)


def _average(old: Sequence[Tensor], other: Sequence[Tensor], m: float, *, out: Sequence[Tensor]) -> None:
    """out ← m·old + (1−m)·other, where `out` may be `old` itself."""
    if old[0].is_cuda:
        if out[0].data_ptr() != old[0].data_ptr():
            torch._foreach_copy_(list(out), list(old))
        torch._foreach_lerp_(list(out), list(other), 1 - m)
        return
    # In one pass, where m·old + (1−m)·other would be three; an ulp of it apart.
    for before, towards, after in zip(old, other, out):
        torch.lerp(before, towards, 1 - m, out=after)
