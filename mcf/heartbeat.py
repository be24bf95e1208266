"""Heartbeats: where every rank of a run stands, as files, and who among them holds the others up.

    RUN/heartbeats/rank-00007.json     one line: host, process, phase, step, marks made so far, beats so far
    RUN/heartbeats/verdict.json        who was found dead or stuck: written once a launch, by whoever found out first

All ranks make the same marks in the same order, so of ranks that stand still the one with the fewest marks is the one
that the others wait for. No clock of one host is held against that of another: a rank that has died is one whose file
does not change while somebody looks. A file is opened, written in place and closed at each beat: closing is what makes
a network file system show it to others, and a full disk has room for what it holds already.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

FOLDER = "heartbeats"
VERDICT = "verdict.json"
_WIDTH = 512  # bytes of a file, padded: a shorter line leaves nothing of a longer one
_NAMED = 8  # ranks that a message lists
_DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

Reason = Literal["failed", "missing", "dead", "silent", "stuck"]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    launch: name of this start of the run, the same on all ranks. machine: what process numbers are unique in. beats:
    files written so far. state: running, failed (its own error ended it) or done. step: optimiser step that is worked
    on, from 1 (0 before the first). marks: phases entered so far. seconds: since the last of them.
    """

    rank: int
    launch: str
    host: str
    machine: str
    process: int
    beats: int = 0
    state: str = "running"
    phase: str = "starting"
    step: int = 0
    marks: int = 0
    seconds: float = 0.0

    @property
    def where(self) -> str:
        """`backward of step 12`."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


@dataclass(frozen=True)
class Verdict:
    """Which ranks hold the run up: failed with an error, missing (never started), dead, silent, or stuck.

    phase, step: where the first of them stands. message: all of it in one sentence.
    """

    ranks: list[int]
    reason: Reason
    phase: str
    step: int
    message: str


@cache
def machine() -> str:
    """What process numbers are unique in: this boot of this machine, and the container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def path_of(run_dir: Path, rank: int) -> Path:
    """Where the heartbeat of a rank lies."""
    return run_dir / FOLDER / f"rank-{rank:05d}.json"


def write(run_dir: Path, beat: Beat) -> None:
    """Write a beat over the one before; OSError where the run directory is not to be reached."""
    path = path_of(run_dir, beat.rank)
    with contextlib.suppress(FileExistsError):
        # Not its parents: a node that does not see the run directory must not make one of its own.
        path.parent.mkdir()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(file, json.dumps(asdict(beat)).encode().ljust(_WIDTH - 1) + b"\n", 0)
    finally:
        os.close(file)


def read(run_dir: Path, ranks: Iterable[int], launch: str) -> dict[int, Beat]:
    """Those ranks' beats of a launch; a rank is missing that has not begun, or whose file cannot be read."""
    found = {}
    for rank in ranks:
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path_of(run_dir, rank).read_bytes()))
            if beat.launch == launch:
                found[rank] = beat
    return found


def gone(beats: Mapping[int, Beat], own: Beat) -> Verdict | None:
    """Ranks that an error of their own ended, or whose process is known to be gone, which only its machine can tell."""
    if failed := [rank for rank, beat in beats.items() if beat.state == "failed"]:
        return _verdict(failed, "failed", beats, "ended with an error in {where}; its log says which")
    if dead := [rank for rank, beat in beats.items() if beat.state == "running" and _status(beat) in _DEAD]:
        return _verdict(dead, "dead", beats, f"has died; {_last_seen(own)}")
    return None


def judge(before: Mapping[int, Beat], after: Mapping[int, Beat], own: Beat, ranks: Iterable[int]) -> Verdict:
    """Who among `ranks` holds the run up, from what `read` found twice, a few beats apart, and this rank's own beat.

    Those that are `gone`; else those that never began; else those whose beats have stopped; else those that have made
    fewer marks than others; and if all stand at the same mark, all of them.
    """
    after = {**after, own.rank: own}
    if verdict := gone(after, own):
        return verdict
    if missing := [rank for rank in ranks if rank not in after]:
        return _verdict(missing, "missing", after, "has not started")
    still = [rank for rank, beat in after.items() if rank in before and beat.beats == before[rank].beats]
    if silent := [rank for rank in still if rank != own.rank]:
        stopped = _status(after[min(silent)]) == psutil.STATUS_STOPPED
        how = "is stopped (SIGSTOP)" if stopped else "gives no sign of life"
        return _verdict(silent, "silent", after, f"{how}; {_last_seen(own)}")
    fewest = min(beat.marks for beat in after.values())
    behind = [rank for rank, beat in after.items() if beat.marks == fewest]
    others = ", which the others have passed" if len(behind) < len(after) else ""
    return _verdict(behind, "stuck", after, f"has been in {{where}} for {{seconds:.0f}} s{others}")


def _last_seen(own: Beat) -> str:
    # Its last beat may be some steps old; where those that are left wait for it is not.
    return f"its last heartbeat came from {{where}}, and rank {own.rank} stands in {own.where}"


def _status(beat: Beat) -> str | None:
    """psutil's word for the state of a rank's process; None where that is another machine's to tell."""
    if beat.machine != machine():
        return None
    try:
        return str(psutil.Process(beat.process).status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)
    except psutil.Error:
        return None


def _verdict(ranks: list[int], reason: Reason, beats: Mapping[int, Beat], said: str) -> Verdict:
    ranks = sorted(ranks)
    first = beats.get(ranks[0])
    who = f"rank {ranks[0]}" + (f" ({first.host}, process {first.process})" if first else "")
    message = f"{who} {said.format(where=first.where, seconds=first.seconds) if first else said}"
    if further := ranks[1:]:
        listed = ", ".join(map(str, further[:_NAMED])) + (
            f" and {len(further) - _NAMED} more" if further[_NAMED:] else ""
        )
        message += f"; likewise rank{'s' if further[1:] else ''} {listed}"
    return Verdict(ranks, reason, first.phase if first else "", first.step if first else 0, message)


def settle(run_dir: Path, verdict: Verdict, beat: Beat) -> tuple[Verdict, bool]:
    """Make the verdict of a rank (`beat` is its own) that of its launch, unless there is one: (what holds, whether new).

    OSError where the run directory is not to be reached.
    """
    path = run_dir / FOLDER / VERDICT
    staged = path.with_suffix(f".{beat.rank}.tmp")
    staged.write_text(json.dumps({"launch": beat.launch, **asdict(verdict)}))
    try:
        # Whole or not there, and the first of many wins, also on a network file system.
        os.link(staged, path)
    except FileExistsError:
        if (standing := settled(run_dir, beat.launch)) is not None:
            return standing, False
        staged.replace(path)  # of an earlier launch
    except OSError:  # a file system without hard links
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return verdict, True


def settled(run_dir: Path, launch: str) -> Verdict | None:
    """The verdict of this launch, if there is one."""
    try:
        content = json.loads((run_dir / FOLDER / VERDICT).read_bytes())
        return Verdict(**content) if content.pop("launch") == launch else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
