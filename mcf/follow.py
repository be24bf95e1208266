"""A run, followed to its end: what rank 0 says, ctrl-C, and how it ended. `python -m mcf.follow run=RUN` on Slurm.

RUN/jobs/JOB_0_log.out ──► a terminal: the newest step line with a bar, everything else as lines above it
                           a file or a pipe: the lines as they are
RUN/jobs/JOB_*_status.json ──► the exit status, and which rank failed first
squeue, scontrol ──► where a Slurm job stands, and why it ended if no rank can say
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mcf import cli, lock, slurm
from mcf.config import Section
from mcf.ending import report, told
from mcf.errors import UserError
from mcf.exits import INTERRUPTED, USER_ERROR
from mcf.output import Output, say
from mcf.task import JOBS, kill_group, read_statuses

if TYPE_CHECKING:
    from submitit import Job

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
    return report(run_dir, str(job.job_id), f"after {time.monotonic() - started:.0f} s", stop.asked > 0)


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
                        now = slurm.standing(job)
                    except slurm.NoAnswer as error:
                        now = f"not known, Slurm does not answer: {error}"
                    if now != shown:
                        say(f"job {job}: {now or 'over'}")
                    shown = now
                    if not now:
                        break
                time.sleep(POLL)
        except KeyboardInterrupt:
            say(f"\nthe job goes on; to end it: scancel --signal=INT {job}")
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
        return report(run_dir, job, took, False)
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


# --- ctrl-C -------------------------------------------------------------------------------------------------------


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
            say("\nstopping: the run saves a checkpoint and ends; ctrl-C again ends it at once")
        if self.asked > 1 or time.monotonic() - self._since > self.patience:
            if not self._killed:
                say("killing all ranks; the run goes on from its last checkpoint when it is launched again")
            self._killed = True
            for status in read_statuses(self.jobs, job):
                if status.code is None and status.child:
                    kill_group(status.child)
        # The job's number is its controller's, which passes it on; again and again, since one may come too early.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
