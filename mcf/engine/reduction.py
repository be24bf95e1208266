"""Gradients averaged over the ranks while the backward pass goes on: under ZeRO stage 0, where all ranks keep all of them.

    backward pass      … ─ block 11 ─────► block 10 ─────► block 9 ─ …
                              gradients filed └► bucket full: all-reduce, under way
    after it           the stream waits for what is still under way, and the host for nothing

DeepSpeed's own begins when the backward pass is over. Buckets are those of PyTorch's DistributedDataParallel (Li et al., VLDB
2020): parameters in the order opposite to the model's, some 25 MB at once, sent in the same order on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcf.zero import overlapped


class _Bucket:
    """Parameters that are reduced together, and what has come of their gradients."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.missing = len(parameters)
        self.flat: Tensor | None = None
        self.work: Any = None

    def send(self, ranks: int) -> None:
        """Start the all-reduce. The gradients move into its buffer, and become views of it."""
        # A part of the model that a step did not use has no gradient here, and may have one elsewhere.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        for parameter in self.parameters:
            parameter.grad = None
        self.flat.div_(ranks)
        self.work = dist.all_reduce(self.flat, async_op=True)

    def take(self) -> None:
        """Have the stream wait for the mean, and give it to the parameters."""
        assert self.flat is not None
        self.work.wait()
        for parameter, piece in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            parameter.grad = piece.view_as(parameter)
        self.flat = self.work = None
        self.missing = len(self.parameters)


class Reduction:
    """Averages the gradients of parameters over all ranks of the default group, in the backward pass that `begin` announces.

    Before it and after it gradients are as ever: what micro-batches have accumulated is averaged with the last one's.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: int):
        self.ranks = ranks
        self._buckets = [
            _Bucket(group) for group in _grouped(parameters[::-1], overlapped(sum(p.numel() for p in parameters)))
        ]
        self._of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._sent = len(self._buckets)  # of this pass; all of them: no pass is announced
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """The next backward pass is the last one of its step."""
        self._sent = 0

    def finish(self) -> None:
        """The backward pass is over: send what is left, and have gradients be the means. Collective; the host waits for nothing."""
        while self._sent < len(self._buckets):
            self._send_next()
        for bucket in self._buckets:
            bucket.take()

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._sent == len(self._buckets):
            return
        self._of[parameter].missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send_next()

    def _send_next(self) -> None:
        self._buckets[self._sent].send(self.ranks)
        self._sent += 1


def _grouped(parameters: list[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Parameters cut into runs of at most so many elements, or of one that is larger."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not groups or parameter.numel() > room:
            groups.append([])
            room = most
        groups[-1].append(parameter)
        room -= parameter.numel()
    return groups
