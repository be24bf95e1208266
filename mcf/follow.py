"""A job on this machine, followed to its end: what rank 0 says, ctrl-C, and how it ended.

RUN/jobs/JOB_0_log.out ──► a terminal: the newest step line with a bar, everything else as lines above it
                           a file or a pipe: the lines as they are
RUN/jobs/JOB_*_status.json ──► the exit status, and which rank failed first
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mcf.task import Status, kill_group, read_statuses
from mcf.watchdog import RANK_LOST

if TYPE_CHECKING:
    from submitit import Job

    from mcf.track.console import Screen

ERROR = "error: "  # how a verb begins the one line of a user's mistake, with which it ends with status 2
USER_ERROR = 2
POLL = 0.1  # seconds between two looks at a job


def follow(job: Job[None], jobs: Path, run_dir: Path, stop: Stop) -> int:
    """Show rank 0's output until the job ends or has been stopped; the exit status of the run."""
    started = time.monotonic()
    with contextlib.closing(Output(Path(job.paths.stdout))) as output:
        while not job.done():
            try:
                output.show_new()
            except BrokenPipeError:
                # The reader (`| head`) has gone, which means what the closing of a terminal means.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                stop.ask()
            stop.insist(str(job.job_id))
            time.sleep(POLL)
        output.show_new()
    statuses = read_statuses(jobs, str(job.job_id))
    took = f"after {time.monotonic() - started:.0f} s"
    failed = [s for s in statuses if s.code != 0 and s.because is None]
    if stop.asked:
        _say(f"stopped {took}; launch again to go on: {run_dir}")
        return 130
    if not failed and statuses:
        _say(f"ended {took}: {run_dir}")
        return 0
    return _report_failure(sorted(failed, key=lambda s: s.ended or float("inf")), jobs, str(job.job_id), took)


def _report_failure(failed: list[Status], jobs: Path, job: str, took: str) -> int:
    if not failed:
        print(f"error: the ranks did not start ({took}); see {jobs}", file=sys.stderr)
        return 1
    first = failed[0]
    log = jobs / f"{job}_{first.rank}_log.out"
    if first.code in (USER_ERROR, RANK_LOST) and (told := _told(log)):
        # The rank has said in one line what is to be done; what rank 0 said has been printed.
        if told != _told(jobs / f"{job}_0_log.out"):
            print(f"{told} (rank {first.rank})", file=sys.stderr)
        print(f"stopped {took}; log: {log}", flush=True)
        return first.code
    if first.rank and not any(s.rank == 0 and s.code == first.code for s in failed):
        print(f"--- the last lines of rank {first.rank}:")
        with contextlib.suppress(OSError):
            print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    if first.code is None:
        how, code = "vanished without a word (its processes were killed)", 1
    elif first.code < 0:
        name = signal.Signals(-first.code).name
        how, code = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), 128 - first.code
    else:
        how, code = f"ended with status {first.code}", first.code
    print(f"error: rank {first.rank} {how} {took}; its log: {log}", file=sys.stderr, flush=True)
    return code


def _told(log: Path) -> str:
    """The error that a rank ended its log with; empty if it did not."""
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(ERROR)]
        return lines[-1] if lines else ""
    return ""


class Output:
    """Shows the lines that are added to a file which others write; what is an error there goes to stderr.

    An unfinished line waits for its end, or for `close`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._position = 0
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        self._screen = _screen()

    def show_new(self) -> None:
        """Show what is new."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._position)
            new = file.read()
            self._position += len(new)
            *lines, self._rest = (self._rest + self._decode(new)).split("\n")
            for line in lines:
                self._show(line)

    def close(self) -> None:
        """Show the rest, and give the terminal back."""
        if self._rest:
            self._show(self._rest)
            self._rest = ""
        if self._screen:
            with _terminal_may_be_gone():
                self._screen.close()

    def _show(self, line: str) -> None:
        with _terminal_may_be_gone():
            if line.startswith(ERROR):
                if self._screen:
                    # Beside a live line nothing reaches stderr.
                    self._screen.close()
                print(line, file=sys.stderr, flush=True)
            elif self._screen:
                self._screen.show(line)
            else:
                print(line, flush=True)


def _screen() -> Screen | None:
    """The terminal, if there is one to move about on."""
    if not sys.stdout.isatty():
        return None
    from mcf.track.console import Screen, can_move

    return Screen(sys.stdout) if can_move(sys.stdout) else None


@contextlib.contextmanager
def _terminal_may_be_gone() -> Iterator[None]:
    """Its end (SIGHUP) is an order to save and stop, which must not be lost over a line that nobody can read."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _say(line: str) -> None:
    with _terminal_may_be_gone():
        print(line, flush=True)


class Stop:
    """Turns ctrl-C, SIGTERM and SIGHUP into an orderly end of a local job.

    The ranks are told to save and end; a second signal, or `patience` seconds without an end, kills them.
    """

    def __init__(self, jobs: Path, patience: float):
        self.jobs, self.patience = jobs, patience
        self.asked = 0
        self._since = 0.0
        self._killed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """End the job; asked again, at once."""
        self.asked += 1

    def insist(self, job: str) -> None:
        """Carry out what has been asked for; to be called again and again."""
        if not self.asked:
            return
        if not self._since:
            self._since = time.monotonic()
            _say("\nstopping: the run saves a checkpoint and ends; ctrl-C again ends it at once")
        if self.asked > 1 or time.monotonic() - self._since > self.patience:
            if not self._killed:
                _say("killing all ranks; the run goes on from its last checkpoint when it is launched again")
            self._killed = True
            for status in read_statuses(self.jobs, job):
                if status.code is None and status.child:
                    kill_group(status.child)
        # The job's number is its controller's, which passes it on; again and again, since one may come too early.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job), signal.SIGTERM)
