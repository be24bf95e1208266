"""What is done to the blocks of a network, one by one, to make a step faster or smaller: the numbers stay.

    compile_blocks    LayerNorm, GELU and the sums between matrix products each in one pass over memory (torch.compile)
    recompute_blocks  a block keeps its input alone, and its forward pass is repeated in the backward pass (Chen et al. 2016)

Blocks of one shape are alike, so one is compiled for all of them, and again for each other shape and for passes without a
gradient: a handful of graphs, in a minute or two at the first step, and none afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mcf.models.vit import Block

BACKEND = "inductor"


def compile_blocks(*networks: nn.Module, backend: Callable | None = None) -> None:
    """Have torch compile every block of these networks at its first call, or a backend. Names and values of tensors stay.

    Sums are added in another order, the same one in every process, and under autocast less of what lies between matrix
    products is rounded to bfloat16.
    """
    # On a GPU inductor would time kernels that add in different orders, and take the fastest of each process: another launch
    # would not go on as this one. What it takes without looking at the clock is a function of the shapes.
    known = not backend and BACKEND == "inductor" and "deterministic" in torch._inductor.list_options()
    options: dict[str, Any] = {"options": {"deterministic": True}} if known else {}
    for block in _blocks(networks):
        # Shapes do not change in training, and a graph for any size would be a slower one.
        block.compile(backend=backend or BACKEND, dynamic=False, **options)


def recompute_blocks(*networks: nn.Module) -> None:
    """Have every block of these networks forget what it computed on the way forward. The same numbers, to the bit."""
    for block in _blocks(networks):
        block.recompute = True


def _blocks(networks: tuple[nn.Module, ...]) -> Iterator[Block]:
    return (module for network in networks for module in network.modules() if isinstance(module, Block))
