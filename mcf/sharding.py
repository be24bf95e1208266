"""Parameters without gradient, split over the ranks as ZeRO-3 splits the trained ones.

    between forwards    every rank holds one piece of each parameter: flat, ⌈n / ranks⌉ long, the last one padded
    within a unit       one all-gather makes the unit's parameters whole; after its forward they are pieces again

The cut is DeepSpeed's, so that whatever combines a parameter with the trained one of its name (a moving average) works
piece by piece and needs no communication. What is gathered at a time is one unit, for example a transformer block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcf import distributed


class Shards:
    """The split parameters of a module.

    Args:
        units: (module, its parameters) each: whole while the module's forward runs. Modules may be nested, no parameter
            stands in two units, and none may need a gradient.
        rank, size: this rank among how many.
    """

    def __init__(self, units: Sequence[tuple[nn.Module, Sequence[nn.Parameter]]], rank: int, size: int):
        self.rank, self.size = rank, size
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        for module, parameters in units:
            for parameter in parameters:
                self._shapes[parameter] = parameter.shape
                parameter.data = self.piece_of(parameter, parameter.detach())
            unit = _Unit(self, parameters)
            module.register_forward_pre_hook(unit.gather)
            # Also after a forward that failed: a piece must not be taken for a whole.
            module.register_forward_hook(unit.release, always_call=True)

    def piece_of(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's piece of the whole value of a parameter, a copy, padded with zeros: [⌈n / size⌉].

        Raises:
            RuntimeError: the value is not of the parameter's shape.
        """
        if whole.shape != self._shapes[parameter]:
            raise RuntimeError(f"shape {list(whole.shape)} for a parameter of shape {list(self._shapes[parameter])}")
        length = -(-whole.numel() // self.size)
        piece = whole.flatten()[self.rank * length :][:length]
        return nn.functional.pad(piece, (0, length - piece.numel())).clone()

    def wholes(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Whole tensors of split parameters, on every rank; one all-gather."""
        pieces = [parameter.data for parameter in parameters]
        columns = distributed.gather(torch.cat(pieces)).split([len(piece) for piece in pieces], dim=1)
        shapes = [self._shapes[parameter] for parameter in parameters]
        return [column.flatten()[: shape.numel()].view(shape) for column, shape in zip(columns, shapes)]


class _Unit:
    """Parameters that are whole at the same time."""

    def __init__(self, shards: Shards, parameters: Sequence[nn.Parameter]):
        self.shards, self.parameters = shards, list(parameters)
        self.pieces: list[Tensor] = []

    def gather(self, *_: Any) -> None:
        pieces = [parameter.data for parameter in self.parameters]
        for parameter, whole in zip(self.parameters, self.shards.wholes(self.parameters)):
            parameter.data = whole
        self.pieces = pieces

    def release(self, *_: Any) -> None:
        for parameter, piece in zip(self.parameters, self.pieces):
            parameter.data = piece
        self.pieces = []
