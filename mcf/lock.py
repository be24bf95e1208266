"""One job a run directory: RUN/lock.json names the processes (or the Slurm job) that own it.

The file stays when the run ends; who is named in it and no longer lives owns nothing. So a killed launcher blocks
nobody, and two launches at the same moment cannot both win: the file is read and written under flock. Ranks on this
machine add themselves: they still save when launcher and controller have been killed.

Process numbers say something where they were given: in this boot of this machine, in this container. Of owners on a host
of the same name, but not from there, only heartbeats tell whether they live.

A Slurm job may start several times. A node that Slurm has lost may still run the job's former start while the next one
begins elsewhere: `claim` makes the newest start the owner, and who is not it any more (`holds`) must end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from mcf import heartbeat, slurm
from mcf.checkpoint import make_run_dir
from mcf.errors import UserError

LOCK = "lock.json"
BEATS = 25.0  # seconds in which a living rank has beaten twice
START = 90.0  # seconds in which a launch comes to its first heartbeat
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Ownership of a run directory, as a context manager.

    Raises UserError on entry if somebody who lives owns it. `add` names further processes, or the Slurm job, that own
    it together with this process; a Slurm job goes on owning it after exit. Inside of `job`, that job owns it already.
    """

    def __init__(self, run_dir: Path, job: str | None = None):
        self.path = run_dir / LOCK
        self._job = job
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> RunLock:
        with _open(self.path) as file:
            _refuse_if_owned(_read(file), self.path, self._job)
            self._owner = {**_here(), "processes": [_identity(os.getpid())]}
            _write(file, self._owner)
        return self

    def add(self, *, pid: int | None = None, slurm_job: str | None = None) -> None:
        """Name a process of this host, or a Slurm job, as an owner too."""
        if pid is not None:
            self._owner["processes"].append(_identity(pid))
        if slurm_job is not None:
            self._owner["slurm_job"] = slurm_job
        with _open(self.path) as file:
            _write(file, {**self._owner, "ranks": _read(file).get("ranks", [])})

    def __exit__(self, *_: object) -> None:
        left = {k: v for k, v in self._owner.items() if k != "processes"} if "slurm_job" in self._owner else {}
        with contextlib.suppress(OSError, UserError), _open(self.path) as file:
            # An error may have ended this process, and not yet its ranks.
            if not left and (ranks := [rank for rank in _read(file).get("ranks", []) if _same(rank)]):
                left = {**self._owner, "processes": [], "ranks": ranks}
            _write(file, left)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Make and own a run directory without a launcher: as this process, and as its Slurm job if it is in one.

    Raises UserError if it cannot be made, or somebody who lives owns it.
    """
    make_run_dir(run_dir)
    job = os.environ.get("SLURM_JOB_ID")
    with RunLock(run_dir, job) as lock:
        if job:
            lock.add(slurm_job=job)
        yield


def join(run_dir: Path) -> None:
    """Name this process, a rank on this machine, as an owner beside the launch that has started it."""
    with _open(run_dir / LOCK) as file:
        owner = _read(file) or {**_here(), "processes": []}
        _write(file, {**owner, "ranks": [*owner.get("ranks", []), _identity(os.getpid())]})


def claim(run_dir: Path, job: str, start: int, patience: float = 60.0) -> None:
    """Make start number `start` of a Slurm job the owner, in place of the job's former starts.

    A launch that has submitted the job may not have named it yet; it is given `patience` seconds for that. Raises
    UserError if another job, or a launch on some machine, owns the directory.
    """
    path = run_dir / LOCK
    deadline = time.monotonic() + patience
    while True:
        with _open(path) as file:
            owner = _read(file)
            if not owner.get("processes") or "slurm_job" in owner or time.monotonic() > deadline:
                _refuse_if_owned(owner, path, job)
                _write(file, {"host": socket.gethostname(), "since": time.time(), "slurm_job": job, "start": start})
                return
        time.sleep(0.2)


def holds(run_dir: Path, job: str, start: int) -> bool:
    """Whether that start still is the owner; True where the file cannot be read just now."""
    try:
        owner = json.loads((run_dir / LOCK).read_text())
        return owner["slurm_job"] == job and owner.get("start", start) == start
    except KeyError:
        return False
    except (OSError, ValueError):
        return True  # being written at this moment, or a file system that pauses


def owning_job(run_dir: Path) -> str | None:
    """The Slurm job that owned the directory last; None if that was no Slurm job."""
    try:
        return json.loads((run_dir / LOCK).read_text()).get("slurm_job")
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+") as file:
        _lock(file, path)
        yield file


def _lock(file: TextIO, path: Path) -> None:
    """Wait until no other process has the file open here; by record locks where a file system knows no others."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path}: its file system has no locks ({error.strerror}), without which two launches of a run would not "
                "see each other; mount it with them (Lustre: -o flock), or set output= to another one"
            ) from None


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read() or "{}")
    except ValueError:
        # Only a crash of the machine in mid-write leaves half a line, and then nobody lives.
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(file: TextIO, owner: dict[str, Any]) -> None:
    # Padded to what stands there, in one write: readers without the lock find the one or the other, a full disk has room.
    text = json.dumps(owner).encode().ljust(os.fstat(file.fileno()).st_size)
    os.pwrite(file.fileno(), text, 0)
    os.fsync(file.fileno())


def _refuse_if_owned(owner: dict[str, Any], path: Path, job: str | None) -> None:
    if reason := _alive(owner, path, job):
        raise UserError(f"{path.parent}: {reason}; wait, stop it, or launch under another name=…")


def _alive(owner: dict[str, Any], path: Path, job: str | None) -> str:
    """Who owns the directory, in words; empty if nobody who lives, or `job`."""
    if other := owner.get("slurm_job"):
        if other == job:
            return ""
        try:
            state = slurm.state(other)
        except slurm.NoAnswer as error:
            return f"whether Slurm job {other} of this run lives is not known ({error})"
        return f"Slurm job {other} of this run is {state}" if state else ""
    processes, ranks = owner.get("processes", []), owner.get("ranks", [])
    if not processes and not ranks:
        return ""
    host = owner.get("host")
    machine = owner.get("machine", heartbeat.machine())
    if host != socket.gethostname():
        return f"being trained on {host} (if that is long over, delete {path})"
    if machine != heartbeat.machine():
        return f"being trained in another container of {host}" if _beats(path.parent, owner) else ""
    # What may be told to end comes first; a rank is left where they have been killed.
    living = [p["pid"] for p in (*processes[::-1], *ranks) if _same(p)]
    return f"being trained by process {living[0]} on this machine" if living else ""


def _beats(run_dir: Path, owner: dict[str, Any]) -> bool:
    """Whether ranks of the owner give signs of life, which takes a while to see."""
    found = _heartbeats(run_dir)
    young = min(START, max(0.0, owner.get("since", 0.0) + START - time.time()))
    patience = max(BEATS if found else 0.0, young)
    if not patience:
        return False
    print("a launch elsewhere on this host had this run; looking whether it still lives …", file=sys.stderr, flush=True)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if _heartbeats(run_dir) != found:
            return True
    return False


def _heartbeats(run_dir: Path) -> dict[str, bytes]:
    """Heartbeats of ranks that have not said that they ended."""
    found = {}
    for path in (run_dir / heartbeat.FOLDER).glob("rank-*.json"):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if b'"state": "running"' in content:
                found[path.name] = content
    return found


def _here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": heartbeat.machine(), "since": time.time()}


def _identity(pid: int) -> dict[str, Any]:
    """A process, told from later ones of the same number by its start: by the clock, and in ticks since the boot."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time(), "ticks": _ticks(pid)}
    except psutil.Error:
        return {"pid": pid, "started": 0.0}


def _same(process: dict[str, Any]) -> bool:
    try:
        found = psutil.Process(process["pid"])
        if found.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.get("ticks") is not None:
            return _ticks(found.pid) == process["ticks"]
        # By the clock, whose corrections move the start by fractions of a second.
        return abs(found.create_time() - process["started"]) < 2
    except psutil.Error:
        return False


def _ticks(pid: int) -> int | None:
    """When a process started, as the kernel counts, which no clock that is set moves; None if that is not to be had."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # field 22
    except (OSError, ValueError, IndexError):
        return None
