"""How a job of a run ended, from the statuses that its ranks have left: which rank was the first to fail, and why.

RUN/jobs/JOB_*_status.json, RUN/jobs/JOB_*_log.out ──► one line, and the exit status
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

from mcf import checkpoint
from mcf.exits import INTERRUPTED, RANK_LOST, SAVED, UNAVAILABLE, USER_ERROR
from mcf.output import ERROR, say
from mcf.task import JOBS, Status, read_statuses
from mcf.track.jsonl import EVENTS, read

TOLD = (USER_ERROR, UNAVAILABLE, RANK_LOST)  # statuses of ranks that have said why in their last error line


def report(run_dir: Path, job: str, took: str, asked: bool) -> int:
    """Say how a job ended, `took` ("after 7 s"); the exit status of the run. asked: somebody has ended it."""
    statuses = read_statuses(run_dir / JOBS, job)
    if asked or (statuses and all(s.code == SAVED for s in statuses)):
        say(f"stopped {took}; launch again to go on: {run_dir}")
        return INTERRUPTED
    first = first_to_fail(statuses)
    if statuses and (first is None or finished(run_dir, statuses)):
        say(f"ended {took}: {run_dir}")
        return 0
    return _report_failure(first, statuses, run_dir / JOBS, job, took)


def first_to_fail(statuses: list[Status]) -> Status | None:
    """The rank whose end was the reason of all others'; None if none failed."""
    failed = [s for s in statuses if s.code not in (0, SAVED)]
    # The clocks of nodes differ: a user's mistake is nobody's consequence, whatever the time it is told at.
    return min(
        failed, key=lambda s: (s.because is not None, s.code != USER_ERROR, s.ended or float("inf")), default=None
    )


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint by name, whole or not; 0 without one."""
    return max(map(checkpoint.step_of, checkpoint.steps(run_dir)), default=0)


def finished(run_dir: Path, statuses: list[Status]) -> int:
    """The last step of a run that this start of the job has brought to its end and saved; else 0.

    Something can still go wrong then: a library aborts while it tidies up, or the time limit comes.
    """
    # Both are told by the clock of rank 0's machine. An end before this start is of fewer epochs, perhaps.
    began = next((status.began for status in statuses if status.rank == 0), float("inf"))
    ends = [e["step"] for e in read(run_dir / EVENTS) if e["kind"] == "finished" and e["time"] >= began]
    return ends[-1] if ends and ends[-1] == newest_step(run_dir) else 0


def describe_end(status: Status) -> tuple[str, int]:
    """How a rank that failed ended, in words, and the exit status that a shell would give it."""
    if status.because is not None:
        how, code = f"was ended, because rank {status.because} was gone", 1
    elif status.code is None:
        how, code = "vanished without a word (its processes were killed)", 1
    elif status.code < 0:
        name = signal.Signals(-status.code).name
        how, code = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), 128 - status.code
    elif status.code == RANK_LOST:
        how, code = "ended because another rank was dead or stuck", RANK_LOST
    else:
        how, code = f"ended with status {status.code}", status.code
    return f"rank {status.rank} {how}", code


def _report_failure(first: Status | None, statuses: list[Status], jobs: Path, job: str, took: str) -> int:
    if first is None:
        print(f"error: the ranks did not start ({took}); see {jobs}", file=sys.stderr)
        return 1
    log = jobs / f"{job}_{first.rank}_log.out"
    if first.code in (USER_ERROR, UNAVAILABLE, RANK_LOST) and (said := told(log)):
        # The rank has said in one line what is to be done, or which rank was lost; what rank 0 said has been printed.
        if not has_told(jobs / f"{job}_0_log.out", said):
            print(f"{said} (rank {first.rank})", file=sys.stderr)
        print(f"stopped {took}; log: {log}", flush=True)
        return first.code
    if first.rank and not any(s.rank == 0 and s.code == first.code and s.because is None for s in statuses):
        print(f"--- the last lines of rank {first.rank}:")
        with contextlib.suppress(OSError):
            print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    how, code = describe_end(first)
    print(f"error: {how} {took}; its log: {log}", file=sys.stderr, flush=True)
    return code


def told(log: Path) -> str:
    """The error line that a rank ended its log with; empty if it did not."""
    lines = _errors(log)
    return lines[-1] if lines else ""


def has_told(log: Path, said: str) -> bool:
    """Whether an error line stands in a log, with or without the rank behind it."""
    return any(line.startswith(said) for line in _errors(log))


def _errors(log: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [line for line in log.read_text(errors="replace").splitlines() if line.startswith(ERROR)]
    return []
