"""One rank of a run: the training process, watched. submitit runs it, or `srun python -m mcf.task run=RUN` does.

    task ──► RANK, WORLD_SIZE, MASTER_ADDR, … ──► python -m mcf.train run=RUN
      └─ passes signals on, writes RUN/jobs/JOB_RANK_status.json
         here: ends it when another rank of this machine has died
         under Slurm: ends it when a later start of the job has begun elsewhere (lock.py)

On one machine nobody else would notice that a rank is gone while its peers wait for it in a collective; under Slurm
`srun --kill-on-bad-exit` does. No process outlives the one above it, however that one ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from mcf import cli, lock
from mcf.config import Section
from mcf.errors import UserError
from mcf.exits import SAVED, USER_ERROR

TRAIN = (sys.executable, "-u", "-m", "mcf.train")
JOBS = "jobs"  # folder of a run for what its ranks print and how they end
POLL = 0.2  # seconds between two looks at the child and its peers
FIRST = 60.0  # seconds after which a rank without a status is taken for dead: all of a machine start together
FENCE = 1.0  # seconds between two looks at whether this start of a Slurm job still is the newest
PORTS = (20_000, 32_000)  # below Linux's dynamic ports (32768 on), so that no outgoing connection takes it
_WIDTH = 512  # bytes of a status, padded
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
# Opened here, because a child between fork and exec should not load libraries.
_LIBC = ctypes.CDLL(None)


class TaskConfig(Section):
    """What every task of a Slurm step runs, in a batch script of one's own: one rank of a run, watched."""

    run: str = Field(description="run directory")


@cli.main
def main(argv: list[str]) -> int:
    """Run this step's rank; its exit status."""
    config = cli.parse(TaskConfig, argv, verb="task")
    run_dir = Path(config.run)
    return Rank((*TRAIN, f"run={run_dir}"), run_dir)()


@dataclass
class Status:
    """One rank of a job: its watching process, its training process, and how that ended.

    code: exit status, −signal if it was killed, None while it runs. began, ended: seconds since 1970, by the clock of
    the rank's machine. because: rank whose end was the reason to end this one.
    """

    rank: int
    watcher: int
    child: int = 0
    code: int | None = None
    began: float = field(default_factory=time.time)
    ended: float = 0.0
    because: int | None = None

    def write(self, path: Path) -> None:
        """Write the file over the one before, as long as that one: a full disk has room for what it holds already."""
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, json.dumps(asdict(self)).encode().ljust(_WIDTH - 1) + b"\n", 0)
        finally:
            os.close(file)

    def tell(self, path: Path) -> None:
        """Write the file if that is possible: how a rank ended gets out by its exit status, too."""
        with contextlib.suppress(OSError):
            self.write(path)


def status_path(jobs: Path, job: str, rank: int) -> Path:
    """Where the status of a rank lies."""
    return jobs / f"{job}_{rank}_status.json"


def read_statuses(jobs: Path, job: str) -> list[Status]:
    """Statuses of the ranks of a job that have written one, by rank; without a code where it cannot be read."""
    return sorted(map(_read_status, jobs.glob(f"{job}_*_status.json")), key=lambda status: status.rank)


def _read_status(path: Path) -> Status:
    try:
        return Status(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        # A node that died before what it wrote was on the server. Nothing is known of it, not even whether it lives.
        return Status(int(path.name.split("_")[-2]), watcher=0, began=float("inf"))


@dataclass(frozen=True)
class Place:
    """Where this process stands: job, number of the job's start, rank of how many, and what the training process has to know."""

    job: str
    start: int
    rank: int
    size: int
    local: bool
    environment: dict[str, str]


def place(env: Mapping[str, str]) -> Place:
    """Read submitit's variables of a local job, or those of a Slurm step.

    Raises UserError where neither are set.
    """
    local = env.get("SUBMITIT_EXECUTOR") == "local"
    names = ("SUBMITIT_LOCAL_JOB_ID", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
    if not local:
        names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for name in names:
        if name not in env:
            raise UserError(f"{name} is not set: this is no task of a Slurm step; start runs with python -m mcf.launch")
    job, rank, size, local_rank = (env[name] for name in names)
    start = restarts(env)
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    if local:
        # The host's own name may not resolve, and need not.
        return Place(job, start, int(rank), int(size), True, {**found, "MASTER_ADDR": "127.0.0.1"})
    if address := env.get("SLURM_LAUNCH_NODE_IPADDR"):
        # srun runs on the first node, where rank 0 is; names of nodes need not resolve.
        found["MASTER_ADDR"] = address
    # One port for all ranks of a start, and another at every start: what the former one left behind may hold its own.
    which = (env.get("SLURM_WORKING_CLUSTER"), job, env.get("SLURM_STEP_ID"), start)
    port = random.Random(repr(which)).randrange(*PORTS)
    return Place(job, start, int(rank), int(size), False, {**found, "MASTER_PORT": str(port)})


def restarts(env: Mapping[str, str]) -> int:
    """How often Slurm has started this job before."""
    return int(env.get("SLURM_RESTART_COUNT") or 0)


@dataclass(frozen=True)
class Rank:
    """The callable that is pickled for submitit.

    Args:
        command: the training process, without the rank's environment.
        run_dir: the run directory.
        cuda_devices: CUDA_VISIBLE_DEVICES of a local launch, None if it was not set; submitit would number devices anew.
        grace: seconds that a rank has for its own last words after another one has died.
    """

    command: tuple[str, ...]
    run_dir: Path
    cuda_devices: str | None = None
    grace: float = 10.0

    def __call__(self) -> int:
        """Run the rank; leave with its exit status, but with 0 if it was told to stop and saved.

        Then the others are about to do the same, and srun is not to kill them for it.
        """
        here = place(os.environ)
        environment = {**os.environ, **here.environment}
        if here.local:
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            if self.cuda_devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self.cuda_devices
        elif here.rank == 0:
            try:
                lock.claim(self.run_dir, here.job, here.start)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                sys.exit(USER_ERROR)
        code = self._watch(here, environment)
        if code not in (0, SAVED):
            # The exit status of the task is that of the run; nothing for submitit to report beside it.
            sys.exit(code if code > 0 else 128 - code)
        return 0

    def _watch(self, here: Place, environment: dict[str, str]) -> int:
        rank, local = here.rank, here.local
        path = status_path(self.run_dir / JOBS, here.job, rank)
        status = Status(rank, os.getpid())
        status.tell(path)
        child: subprocess.Popen[bytes] | None = None
        told: list[int] = []

        def pass_on(number: int, _frame: Any) -> None:
            if number not in told:
                told.append(number)
                if child is not None:
                    child.send_signal(number)

        # Before anything is started: submitit has handlers of its own. Ctrl-C on a terminal is for the launcher alone;
        # Slurm sends SIGINT when a user asks for the end (scancel).
        passed_on = _PASSED_ON if local else (*_PASSED_ON, signal.SIGINT)
        for number in passed_on:
            signal.signal(number, pass_on)
        if local:
            _die_with_parent(signal.SIGTERM)
        child = subprocess.Popen(
            self.command,
            env=environment,
            # A group of its own: it is ended with all that it has started.
            start_new_session=True,
            preexec_fn=_prepare_child if sys.platform == "linux" else None,
        )
        for early in told:
            child.send_signal(early)
        status.child = child.pid
        status.tell(path)
        if local:
            with contextlib.suppress(OSError, UserError):
                lock.join(self.run_dir)
        deadline = None
        began = time.monotonic()
        fence = began + FENCE
        while not _ends_within(child, POLL):
            if local and deadline is None and (dead := self._dead_peer(here, time.monotonic() - began)) is not None:
                status.because, deadline = dead, time.monotonic() + self.grace
            if deadline is not None and time.monotonic() > deadline:
                kill_group(child.pid)
            if not local and rank == 0 and time.monotonic() > fence:
                fence = time.monotonic() + FENCE
                if not lock.holds(self.run_dir, here.job, here.start):
                    print("error: this run has been started elsewhere; its newest start goes on", flush=True)
                    kill_group(child.pid)
                    # Not a word into files that are the newest start's.
                    sys.exit(USER_ERROR)
        kill_group(child.pid)  # what it may have left behind
        # Nobody is left to tell, and Python gives signals back to the system when it ends: one would kill this process.
        for number in passed_on:
            signal.signal(number, signal.SIG_IGN)
        status.code, status.ended = child.returncode, time.time()
        status.tell(path)
        return status.code

    def _dead_peer(self, here: Place, since: float) -> int | None:
        """A rank that failed, or whose watcher is gone without a word, or has never said one."""
        peers = {peer.rank: peer for peer in read_statuses(self.run_dir / JOBS, here.job) if peer.rank != here.rank}
        for rank, peer in peers.items():
            if peer.code not in (None, 0, SAVED) or (peer.code is None and not _lives(peer.watcher)):
                return rank
        if since > FIRST:
            return next((rank for rank in range(here.size) if rank not in peers and rank != here.rank), None)
        return None


def _ends_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process has ended, waiting for it; seen at once, so that of two ranks the first to end is known."""
    if child.poll() is not None:
        return True
    try:
        handle = os.pidfd_open(child.pid)  # Linux 5.3
    except (AttributeError, OSError):
        time.sleep(seconds)
        return child.poll() is not None
    try:
        select.select([handle], [], [], seconds)
    finally:
        os.close(handle)
    return child.poll() is not None


def kill_group(leader: int) -> None:
    """Kill a training process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether a process lives; 0, of a status that could not be read, is taken for one that does."""
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


if __name__ == "__main__":
    sys.exit(main())
