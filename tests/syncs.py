"""A watch over a step for what a GPU would make the host wait for, without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mcf import distributed


class Syncs(TorchDispatchMode):
    """Where tensors and the host meet: on a GPU the host would wait there for all that was queued.

    Of two kinds: a tensor's values decide what the host does next, or numbers of the host's become a tensor, since memory
    that is not pinned is copied while the host stands still. Operations are seen where they are dispatched. A tensor on a
    CPU is read and taken to the CPU without any, so what Python calls for that is watched by name. Only the thread that
    began is watched: the loader's may wait.

    What is on the host and what is not is one memory here. `there` gives the step a device with a number, so that
    `to(device)` is told from `to("cpu")`, and what is made there from what is made without saying where.
    """

    # linalg_check_errors looks at what LAPACK answered; lift_fresh makes a tensor of what Python holds.
    WAITING = (
        "_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "_unique", "unique",
        "bincount", "_linalg_check_errors", "lift_fresh",
    )  # fmt: skip
    BY_MASK = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
    CALLED = ("tolist", "cpu", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._of_host: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._patches = pytest.MonkeyPatch()

    def __enter__(self):
        thread = threading.get_ident()

        def watch(name: str, waits: Callable[..., bool]) -> None:
            call = getattr(Tensor, name)

            @functools.wraps(call)
            def watched(tensor: Tensor, *arguments, **named):
                if threading.get_ident() == thread and waits(*arguments, **named):
                    self.found.append(name)
                return call(tensor, *arguments, **named)

            self._patches.setattr(Tensor, name, watched)

        for name in self.CALLED:
            watch(name, lambda *_, **__: True)
        watch("to", lambda *arguments, **named: any(map(_is_host, [*arguments, named.get("device")])))
        # A tensor on a CPU forgets the number, and `to(other.device)` would be told the host.
        own = Tensor.device.__get__
        self._patches.setattr(Tensor, "device", property(lambda t: own(t) if t in self._of_host else numbered(own(t))))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name, device = function.overloadpacket.__name__, named.get("device")
        if (
            name.startswith(self.WAITING)
            or (name in self.BY_MASK and any(_is_mask(index) for index in arguments[1]))
            or (name == "repeat_interleave" and named.get("output_size") is None)
        ):
            self.found.append(name)
        out = function(*arguments, **named)
        # What has no number in its device was made on the host, and so was what has come of nothing else.
        taken = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        if all(tensor in self._of_host for tensor in taken) and (taken or device is not None):
            if device is None or _is_host(device):
                self._of_host.update({leaf: True for leaf in tree_leaves(out) if isinstance(leaf, Tensor)})
            elif taken:
                self.found.append("carried over")
        return out


def _is_host(place: object) -> bool:
    """Whether what `Tensor.to` is told is the host, and not `there`."""
    return place == "cpu" or (isinstance(place, torch.device) and place.type == "cpu" and place.index is None)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def numbered(device: torch.device) -> torch.device:
    return torch.device("cpu", 0) if _is_host(device) else device


def there(world: distributed.World) -> distributed.World:
    """The same rank on a device that has a number, as a GPU has: what is `cpu` without one is the host."""
    return dataclasses.replace(world, device=numbered(world.device))
