"""The pool: results in order, and one item that kills its process costs only itself."""

from __future__ import annotations

import os
import signal

import pytest

from mcf.pack.workers import ordered


def work(item: int) -> int:
    if item % 50 == 33:
        os.kill(os.getpid(), signal.SIGKILL)  # as the out-of-memory killer does
    if item == 1000:
        raise ValueError("told")
    return item * item


def died(item: int) -> int:
    return -item


def test_items_that_kill_their_process_are_answered_for_and_the_rest_goes_on():
    found = list(ordered(work, range(60), 2, died))
    assert found == [-i if i % 50 == 33 else i * i for i in range(60)]


@pytest.mark.parametrize("workers", [1, 2])
def test_exceptions_are_the_callers(workers):
    with pytest.raises(ValueError, match="told"):
        list(ordered(work, [1, 2, 1000], workers, died))
