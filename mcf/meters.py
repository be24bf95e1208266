"""Meters: the loss terms of a step, and the rates since the last line of metrics, without stopping the device.

Loss terms stay tensors where they were computed; only `read`, at a logging step, brings them to the host.
They are those of the last step alone, so that a line of metrics is a function of its step, wherever a run was broken
off and went on; rates and waits are over all steps since the line before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import torch

from mcf import distributed
from mcf.data.loader import Batch
from mcf.step import Outcome

LOSSES = ("total", "feature", "contrast", "pixel")


class Meters:
    """One rank's counts; every rank must call `read` at the same steps."""

    def __init__(self, world: distributed.World):
        self.world = world
        self._process = psutil.Process()
        self._outcome = Outcome()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._samples = 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass micro-batches through, and count how long each was waited for."""
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - asked
            yield batch

    def add(self, outcome: Outcome, *, samples: int) -> None:
        """Take a step that all ranks made together on `samples` samples."""
        self._outcome = outcome
        self._samples += samples

    def read(self) -> dict[str, float]:
        """Loss terms of the last step (means over micro-batches and ranks), gradient norm, and rates since the last call.

        Names: loss/TERM, contrast/STATISTIC, grad_norm, rate/images_per_s over all ranks,
        rate/data_wait (share of the time) of this rank, memory/gib (peak of the device, or of the process) of this rank.
        """
        terms = self._outcome.terms
        names = sorted(terms[0])
        own = torch.stack([torch.stack([t[name].float() for t in terms]).mean() for name in names])
        means = distributed.mean(own).tolist()
        numbers = {f"loss/{n}" if n in LOSSES else f"contrast/{n}": v for n, v in zip(names, means)}
        elapsed = time.perf_counter() - self._started
        numbers["grad_norm"] = self._outcome.grad_norm
        numbers["rate/images_per_s"] = self._samples / elapsed
        numbers["rate/data_wait"] = self._waited / elapsed
        on_gpu = self.world.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.world.device) if on_gpu else self._process.memory_info().rss
        numbers["memory/gib"] = memory / 2**30
        self._restart_clock()
        return numbers
