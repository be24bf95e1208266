"""How the watcher of a rank learns that it has ended: at once, so that of several ranks the first to end is known."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from mcf.task import _ends_within

LONG = 60.0  # seconds: what a wait for the next look would take


def test_an_end_is_seen_at_once_and_not_at_the_next_look():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not _ends_within(child, 0.05)
    child.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert _ends_within(child, LONG)
    assert time.monotonic() - began < LONG / 4  # a machine may be busy
    assert child.returncode == -signal.SIGKILL
    assert _ends_within(child, LONG)  # one that ended before is not waited for
    assert time.monotonic() - began < LONG / 2
    child.stdin.close()


def test_a_stopped_process_has_not_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(signal.SIGSTOP)
    assert not _ends_within(child, 0.2)
    child.kill()
    assert _ends_within(child, LONG)
    child.stdin.close()
