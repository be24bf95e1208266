"""One job a run directory: RUN/lock.json names the processes (or the Slurm job) that own it.

The file stays when the run ends; who is named in it and no longer lives owns nothing. So a killed launcher blocks
nobody, and two launches at the same moment cannot both win: the file is read and written under flock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from mcf.errors import UserError

LOCK = "lock.json"


class RunLock:
    """Ownership of a run directory, as a context manager.

    Raises UserError on entry if somebody who lives owns it. `add` names further processes, or the Slurm job, that own
    it together with this process; a Slurm job goes on owning it after exit.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / LOCK
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> RunLock:
        with self._open() as file:
            owner = _read(file)
            if reason := _alive(owner, self.path):
                raise UserError(f"{self.path.parent}: {reason}; wait, stop it, or launch under another name=…")
            self._owner = {"host": socket.gethostname(), "since": time.time(), "processes": [_identity(os.getpid())]}
            _write(file, self._owner)
        return self

    def add(self, *, pid: int | None = None, slurm_job: str | None = None) -> None:
        """Name a process of this host, or a Slurm job, as an owner too."""
        if pid is not None:
            self._owner["processes"].append(_identity(pid))
        if slurm_job is not None:
            self._owner["slurm_job"] = slurm_job
        with self._open() as file:
            _write(file, self._owner)

    def __exit__(self, *_: object) -> None:
        left = {k: v for k, v in self._owner.items() if k != "processes"} if "slurm_job" in self._owner else {}
        with contextlib.suppress(OSError), self._open() as file:
            _write(file, left)

    @contextlib.contextmanager
    def _open(self) -> Iterator[TextIO]:
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read() or "{}")
    except ValueError:
        # Only a crash of the machine in mid-write leaves half a line, and then nobody lives.
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(file: TextIO, owner: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    json.dump(owner, file)
    file.flush()
    os.fsync(file.fileno())


def _alive(owner: dict[str, Any], path: Path) -> str:
    """Who owns the directory, in words; empty if nobody who lives."""
    if job := owner.get("slurm_job"):
        state = _slurm_state(str(job))
        return f"Slurm job {job} of this run is {state}" if state else ""
    if not owner.get("processes"):
        return ""
    host = owner.get("host")
    if host != socket.gethostname():
        return f"being trained on {host} (if that is long over, delete {path})"
    living = [p["pid"] for p in owner["processes"] if _same(p)]
    return f"being trained by process {living[-1]} on this machine" if living else ""


def _identity(pid: int) -> dict[str, Any]:
    """A process, told from later ones of the same number by its start."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.Error:
        return {"pid": pid, "started": 0.0}


def _same(process: dict[str, Any]) -> bool:
    try:
        found = psutil.Process(process["pid"])
        # The clock's corrections move the start by fractions of a second.
        return abs(found.create_time() - process["started"]) < 2 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _slurm_state(job: str) -> str:
    """State of a job that is queued or runs; empty if it is over or unknown to Slurm."""
    if shutil.which("squeue") is None:
        return "of unknown state, since squeue is not on this machine"
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    return done.stdout.strip().lower()
