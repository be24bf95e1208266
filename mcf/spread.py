"""Tensors of files that every rank needs and one rank reads: 128 ranks that open one checkpoint would stop its server.

Rank 0 maps the file, and sends each tensor when it is asked for: no rank holds more than one of them in memory beside
its own state, and none but rank 0 opens anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mcf import distributed


class Spread(Mapping[str, Tensor]):
    """Tensors on the CPU by name, out of rank 0's hands; `spread[name]` is collective.

    All ranks must ask for the same names in the same order. `shapes` is known without asking for any.

    Args:
        make: gives the tensors (any dtype, CPU); called on rank 0 alone. A UserError there is raised on all ranks.
        device: where the group's collectives want their tensors (`World.device`).
    """

    def __init__(self, make: Callable[[], Mapping[str, Tensor]], device: torch.device):
        self._tensors: Mapping[str, Tensor] = {}
        self._device = device

        def layout() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
            self._tensors = make()
            return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

        self._layout = distributed.from_main(layout)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor; not collective."""
        return {name: shape for name, (shape, _) in self._layout.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._layout[name]
        if dist.get_world_size() == 1:
            return self._tensors[name]
        count = math.prod(shape)
        if dist.get_rank() == 0:
            flat = self._tensors[name].to(self._device).reshape(-1)
        else:
            flat = torch.empty(count, dtype=dtype, device=self._device)
        if count:
            # As bytes, which every backend knows.
            dist.broadcast(flat.view(torch.uint8), src=0)
        return flat.view(shape).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)
