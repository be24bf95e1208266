"""What submitit runs once a rank: the training process, watched.

    submitit's task ──► RANK, WORLD_SIZE, MASTER_ADDR, … ──► python -m mcf.train run=RUN
           └─ passes signals on, writes RUN/jobs/JOB_RANK_status.json, ends it when another local rank has died

On one machine nobody else would notice that a rank is gone while its peers wait for it in a collective; under Slurm
`srun --kill-on-bad-exit` does. No process outlives the one above it, however that one ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcf.errors import missing_package

POLL = 0.2  # seconds between two looks at the child and its peers
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
# Opened here, because a child between fork and exec should not load libraries.
_LIBC = ctypes.CDLL(None)


@dataclass
class Status:
    """One rank of a job: its watching process, its training process, and how that ended.

    code: exit status, −signal if it was killed, None while it runs. ended: seconds since 1970. because: rank whose end
    was the reason to end this one.
    """

    rank: int
    watcher: int
    child: int = 0
    code: int | None = None
    ended: float = 0.0
    because: int | None = None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps(asdict(self)))
        staged.replace(path)


def status_path(jobs: Path, job: str, rank: int) -> Path:
    """Where the status of a rank lies."""
    return jobs / f"{job}_{rank}_status.json"


def read_statuses(jobs: Path, job: str) -> list[Status]:
    """Statuses of the ranks of a job that have written one, by rank."""
    found = (Status(**json.loads(path.read_text())) for path in jobs.glob(f"{job}_*_status.json"))
    return sorted(found, key=lambda status: status.rank)


@dataclass(frozen=True)
class Rank:
    """The callable that is pickled for submitit.

    Args:
        command: the training process, without the rank's environment.
        jobs: folder of submitit's files.
        cuda_devices: CUDA_VISIBLE_DEVICES of the launch, None if it was not set; submitit would number devices anew.
        grace: seconds that a rank has for its own last words after another one has died.
    """

    command: tuple[str, ...]
    jobs: Path
    cuda_devices: str | None = None
    grace: float = 10.0

    def __call__(self) -> None:
        try:
            import submitit
            from submitit.helpers import TorchDistributedEnvironment
        except ImportError:
            raise missing_package("submitit", "launching") from None
        job = submitit.JobEnvironment()
        place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        local = job.cluster == "local"
        environment = dict(os.environ)
        if local:
            # The host's own name may not resolve, and need not.
            environment["MASTER_ADDR"] = "127.0.0.1"
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            if self.cuda_devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self.cuda_devices
        code = self._watch(place.rank, job.job_id, environment, local)
        if code:
            # The exit status of the task is that of the run; nothing for submitit to report beside it.
            sys.exit(code if code > 0 else 128 - code)

    def _watch(self, rank: int, job: str, environment: dict[str, str], local: bool) -> int:
        path = status_path(self.jobs, job, rank)
        status = Status(rank, os.getpid())
        status.write(path)
        if local:
            _die_with_parent(signal.SIGTERM)
        child = subprocess.Popen(
            self.command,
            env=environment,
            # Ctrl-C on the terminal is for the launcher, which stops all ranks in order.
            start_new_session=local,
            preexec_fn=_prepare_child if sys.platform == "linux" else None,
        )
        status.child = child.pid
        status.write(path)
        told: set[int] = set()

        def pass_on(number: int, _frame: Any) -> None:
            if number not in told:
                told.add(number)
                child.send_signal(number)

        for number in _PASSED_ON:
            signal.signal(number, pass_on)
        deadline = None
        while child.poll() is None:
            time.sleep(POLL)
            if local and deadline is None and (dead := self._dead_peer(job, rank)) is not None:
                status.because, deadline = dead, time.monotonic() + self.grace
            if deadline is not None and time.monotonic() > deadline:
                kill_group(child.pid)
        if local:
            kill_group(child.pid)  # what it may have left behind
        status.code, status.ended = child.returncode, time.time()
        status.write(path)
        return status.code

    def _dead_peer(self, job: str, rank: int) -> int | None:
        """A rank that failed, or whose watcher is gone without a word."""
        for peer in read_statuses(self.jobs, job):
            if peer.rank != rank and (peer.code or (peer.code is None and not _lives(peer.watcher))):
                return peer.rank
        return None


def kill_group(leader: int) -> None:
    """Kill a training process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _prepare_child() -> None:
    _die_with_parent(signal.SIGKILL)
    # The launcher ignores ctrl-C for its children; the training process decides anew.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
