"""Signals that ask a run to save itself and stop."""

from __future__ import annotations

import logging
import signal

log = logging.getLogger(__name__)


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR2 set a flag; the loop saves and ends at the next step. A second SIGINT is obeyed."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True
        log.warning("%s: saving and stopping at the end of this step", signal.Signals(number).name)
