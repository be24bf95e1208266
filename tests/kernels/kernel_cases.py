"""The cases of the benchmark, and one that is sure to be right."""

import pytest
import torch

from mcf.kernels.bench import registry
from mcf.kernels.triton_or_none import HAS_TRITON, INTERPRETED

SMALL = {case.name: case for case in registry.cases("small", torch.float32)}
FULL = {case.name: case for case in registry.cases("full", torch.bfloat16)}
CPU = torch.device("cpu")


def sure(**changes) -> registry.Case:
    """A case of two operations on ten numbers, both right: y = x², z = Σ x."""

    def plain(x):
        return x * x, x.sum()

    made = {
        "op": "square", "shape": "n=10", "dtype": torch.float32,
        "make": lambda generator: (torch.rand(10, generator=generator, device=generator.device) + 1,),
        "truth": plain, "functions": {"triton": plain, "eager": plain},
        "forward": registry.Work(80), "backward": registry.Work(80), "learn": (0,),
    }  # fmt: skip
    return registry.Case(**(made | changes))


def cpu_only():
    """Skips where kernels would be compiled: what follows is about a machine without a GPU."""
    if not (HAS_TRITON and INTERPRETED):
        pytest.skip("kernels are not interpreted here")
