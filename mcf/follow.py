"""A run, followed to its end: what rank 0 says, ctrl-C, and how it ended. `python -m mcf.follow run=RUN` on Slurm.

RUN/jobs/JOB_0_log.out ──► a terminal: the newest step line with a bar, everything else as lines above it
                           a file or a pipe: the lines as they are
RUN/jobs/JOB_*_status.json ──► the exit status, and which rank failed first
squeue, scontrol ──► where a Slurm job stands, and why it ended if no rank can say
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

from pydantic import Field

from mcf import cli, lock, slurm
from mcf.config import Section
from mcf.errors import UserError
from mcf.exits import INTERRUPTED, SAVED, USER_ERROR
from mcf.task import JOBS, Status, kill_group, read_statuses

if TYPE_CHECKING:
    from submitit import Job

    from mcf.track.console import Screen

ERROR = "error: "  # how a verb begins the one line of a user's mistake, with which it ends with status 2
POLL = 0.1  # seconds between two looks at a job's output
ASK = 5.0  # seconds between two questions to Slurm's controller, which is everybody's


class FollowConfig(Section):
    """Show what a run on Slurm prints until it has ended, through all its starts; ctrl-C ends only the looking on."""

    run: str = Field(description="run directory")


@cli.main
def main(argv: list[str]) -> int:
    """Follow; exit status of the run."""
    run_dir = Path(cli.parse(FollowConfig, argv, verb="follow").run)
    if not run_dir.is_dir():
        raise UserError(f"run={run_dir}: no such folder; give the run directory that mcf.launch named")
    job = lock.owning_job(run_dir)
    if job is None:
        raise UserError(f"run={run_dir}: no Slurm job has this run; what its ranks printed is in {run_dir / JOBS}")
    return follow_slurm(job, run_dir)


# --- here -----------------------------------------------------------------------------------------------------------


def follow(job: Job[None], run_dir: Path, stop: Stop) -> int:
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
    return _report(run_dir, str(job.job_id), f"after {time.monotonic() - started:.0f} s", stop.asked > 0)


# --- Slurm ----------------------------------------------------------------------------------------------------------


def follow_slurm(job: str, run_dir: Path) -> int:
    """Show rank 0's output and the job's way through the queue until it ends; the exit status of the run."""
    started = time.monotonic()
    shown, asked = "", 0.0
    with contextlib.closing(Output(run_dir / JOBS / f"{job}_0_log.out")) as output:
        try:
            while True:
                output.show_new()
                if time.monotonic() - asked > ASK:
                    asked = time.monotonic()
                    try:
                        now = slurm.state(job)
                    except slurm.NoAnswer as error:
                        now = f"not known, Slurm does not answer: {error}"
                    if now != shown:
                        _say(f"job {job}: {now or 'over'}")
                    shown = now
                    if not now:
                        break
                time.sleep(POLL)
        except KeyboardInterrupt:
            _say(f"\nthe job goes on; to end it: scancel --signal=INT {job}")
            return INTERRUPTED
        output.show_new()
    return _report_slurm(job, run_dir, f"after {time.monotonic() - started:.0f} s")


def _report_slurm(job: str, run_dir: Path, took: str) -> int:
    try:
        found = slurm.show(job)
    except slurm.NoAnswer:
        found = {}
    ending = found.get("JobState", "")
    if ending in ("", "COMPLETED", "FAILED") and read_statuses(run_dir / JOBS, job):
        return _report(run_dir, job, took, False)
    log = run_dir / JOBS / f"{job}_0_log.out"
    words = {
        "": "is over, and nothing tells how",
        "CANCELLED": "was cancelled",
        "TIMEOUT": "came to its time limit without a save; use more slurm.warn_seconds",
    }
    how = words.get(ending, f"ended as {ending}, {found.get('Reason')}, exit code {found.get('ExitCode')}")
    if found.get("Reason") == "JobLaunchFailure" or not log.exists():
        where = found.get("BatchHost") or "its node"
        how += f": {where} does not see {run_dir}; output= must lie on a file system that every node mounts"
    elif told(log):
        # The batch script has said it, and it has been shown.
        return USER_ERROR
    print(f"error: job {job} {how} ({took}); log: {log}", file=sys.stderr, flush=True)
    return 1


# --- how it ended ---------------------------------------------------------------------------------------------------


def _report(run_dir: Path, job: str, took: str, asked: bool) -> int:
    statuses = read_statuses(run_dir / JOBS, job)
    if asked or (statuses and all(s.code == SAVED for s in statuses)):
        _say(f"stopped {took}; launch again to go on: {run_dir}")
        return INTERRUPTED
    first = first_to_fail(statuses)
    if first is None and statuses:
        _say(f"ended {took}: {run_dir}")
        return 0
    return _report_failure(first, statuses, run_dir / JOBS, job, took)


def first_to_fail(statuses: list[Status]) -> Status | None:
    """The rank whose end was the reason of all others'; None if none failed."""
    failed = [s for s in statuses if s.code not in (0, SAVED) and s.because is None]
    return min(failed, key=lambda s: s.ended or float("inf"), default=None)


def describe_end(status: Status) -> tuple[str, int]:
    """How a rank that failed ended, in words, and the exit status that a shell would give it."""
    if status.code is None:
        how, code = "vanished without a word (its processes were killed)", 1
    elif status.code < 0:
        name = signal.Signals(-status.code).name
        how, code = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), 128 - status.code
    else:
        how, code = f"ended with status {status.code}", status.code
    return f"rank {status.rank} {how}", code


def _report_failure(first: Status | None, statuses: list[Status], jobs: Path, job: str, took: str) -> int:
    if first is None:
        print(f"error: the ranks did not start ({took}); see {jobs}", file=sys.stderr)
        return 1
    log = jobs / f"{job}_{first.rank}_log.out"
    if first.code == USER_ERROR and (said := told(log)):
        # The rank has said in one line what is to be done; what rank 0 said has been printed.
        if said != told(jobs / f"{job}_0_log.out"):
            print(f"{said} (rank {first.rank})", file=sys.stderr)
        print(f"stopped {took}; log: {log}", flush=True)
        return USER_ERROR
    if first.rank and not any(s.rank == 0 and s.code == first.code and s.because is None for s in statuses):
        print(f"--- the last lines of rank {first.rank}:")
        with contextlib.suppress(OSError):
            print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    how, code = describe_end(first)
    print(f"error: {how} {took}; its log: {log}", file=sys.stderr, flush=True)
    return code


def told(log: Path) -> str:
    """The error line that a rank ended its log with; empty if it did not."""
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(ERROR)]
        return lines[-1] if lines else ""
    return ""


# --- what is shown --------------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    sys.exit(main())
