"""Starts daemons for a test, and leaves none of their processes behind: run as a script by cluster.py.

Standard input brings a line of JSON a daemon ({"argv", "env", "log", "cwd"}), standard output answers with its process
number. When the input ends, which a killed test brings about as well, everything that has been started is ended, with
whatever it started in turn, and the folder named on the command line is removed. As a subreaper this process is the
parent of all that have lost their own.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36


def reap(*_: object) -> None:
    """Take the dead away."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_all() -> None:
    """End all descendants, first politely; new ones may appear while others go."""
    deadline = time.monotonic() + 3
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(0.2)
        reap()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, reap)
    # The end comes through the input alone: ctrl-C on the terminal of the tests is for them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        asked = json.loads(line)
        with open(asked["log"], "ab") as log:  # noqa: PTH123
            started = subprocess.Popen(
                asked["argv"], env=asked["env"], cwd=asked["cwd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
                preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
            )  # fmt: skip
        print(started.pid, flush=True)
    end_all()
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
