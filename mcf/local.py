"""A run on this machine: its ranks are processes of submitit's local executor, followed until the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from mcf.config import Recipe
from mcf.errors import UserError
from mcf.follow import Stop, follow
from mcf.lock import RunLock
from mcf.submit import need_submitit, python_path
from mcf.task import JOBS, PORTS, Rank

YEAR = 366 * 24 * 60  # minutes: a local job has no time limit, but submitit wants one


def run_here(recipe: Recipe, run_dir: Path, task: Rank, lock: RunLock) -> int:
    """Run all ranks on this machine and follow rank 0; the exit status of the run."""
    submitit = need_submitit()
    jobs = run_dir / JOBS
    # A job's number is its controller's, and a container gives the same ones again: what stands there would be believed
    # of this job's ranks.
    for old in jobs.glob("*_status.json"):
        old.unlink()
    executor = submitit.LocalExecutor(jobs)
    executor.update_parameters(tasks_per_node=recipe.gpus_per_node, timeout_min=YEAR, stderr_to_stdout=True)
    variables = {
        "PYTHONPATH": python_path(run_dir),
        "MASTER_PORT": str(_free_port()),
        "SUBMITIT_LOG_LEVEL": "ERROR",
    }
    with Stop(jobs, patience=recipe.slurm.warn_seconds) as stop:
        # In the run directory no `mcf` of the current directory hides the copy; SIGINT is the launcher's alone.
        with submitit.helpers.clean_env(), _environment(variables), directory(run_dir), _ignoring(signal.SIGINT):
            job = executor.submit(task)
        lock.add(pid=int(job.job_id))
        return follow(job, run_dir, stop)


def _free_port() -> int:
    """A port to meet at, below Linux's dynamic ports (32768 on) so that no outgoing connection takes it."""
    for _ in range(100):
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no free port between 20000 and 32000 on this machine; stop what holds them")


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def directory(path: Path) -> Iterator[None]:
    """Within the context the current directory is another one."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    """Children that start here ignore the signal."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
