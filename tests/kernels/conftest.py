"""What the tests of kernels share: the device that kernels run on here, and memory that is never zero by luck."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.trace_rules import get_torch_obj_rule_map


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where kernels run in Triton's interpreter (tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty and its like give NaN, and the largest of an integer: what a kernel forgets to write shows."""

    def poison(make):
        def poisoned_make(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if type(tensor) is not torch.Tensor or tensor.is_meta:  # fake tensors of a trace hold nothing
                return tensor
            value = float("nan") if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else None
            with torch.no_grad():
                return tensor.fill_(torch.iinfo(tensor.dtype).max if value is None else value)

        return poisoned_make

    # torch.compile writes down torch's functions at its first use: it must know the real ones.
    get_torch_obj_rule_map()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poison(getattr(owner, name)))
        yield
