"""The wish that a run stop: signals become a flag, which the training loop reads at the end of a step."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

log = logging.getLogger(__name__)

AGAIN = 1.0  # seconds after which another SIGINT is a second one


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR2 set `received`; the loop saves and ends at the next step. A second SIGINT is obeyed.

    SIGINT is somebody's wish to end the run `for_good`; the others come from a system that wants its machine back.
    """

    def __init__(self) -> None:
        self.received = self.for_good = False
        self._since = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Slurm signals a task and what it started, which is passed the same once more: that is no second ctrl-C.
        if number == signal.SIGINT and self.for_good and time.monotonic() - self._since > AGAIN:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not self.for_good:
            self.for_good, self._since = True, time.monotonic()
        if self.received:
            return
        self.received = True
        log.warning("%s: saving and stopping at the end of this step", signal.Signals(number).name)
