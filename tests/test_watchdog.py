"""Ranks that die, stop and sleep, and those that are only slow: real processes, and the watchdog's verdict on them.

The ranks of most tests are small (no torch): they meet at a hub of the test that never answers once one of them stays
away, as NCCL's collectives do. gloo's, which fail instead, and the whole trainer have tests of their own below.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny

from mcf import heartbeat
from mcf.config import WatchdogConfig
from mcf.data.order import Order
from mcf.data.shards import index_path
from mcf.exits import RANK_LOST
from mcf.track.jsonl import read
from mcf.watchdog import EVENT, Watchdog

WATCHED = """
import json, socket, sys, time
from pathlib import Path
from mcf import watchdog as module
from mcf.config import WatchdogConfig
from mcf.watchdog import Watchdog

told = json.loads(sys.argv[1])
module.JUDGES = told["judges"]
rank, size, run_dir = told["rank"], told["size"], Path(told["run_dir"])
hub = socket.create_connection(("127.0.0.1", told["port"]))
hub.sendall(bytes([rank]))

def meet():
    hub.sendall(b".")
    if not hub.recv(1):
        time.sleep(3600)

def act(phase, step):
    for fault in told["faults"]:
        if (fault["rank"] in (rank, "all"), fault["phase"], fault["step"]) == (True, phase, step):
            exec(fault["do"])

with Watchdog(rank, size, told["launch"]) as watchdog:
    watchdog.open(run_dir)
    watchdog.configure(WatchdogConfig(**told["limits"]))
    for step in range(1, told["steps"] + 1):
        for phase in ("loading", "forward", *(("saving", "waiting") if step in told["saves"] else ()), "step"):
            watchdog.mark(phase, step)
            act(phase, step)
            if phase in ("waiting", "step"):
                meet()
        print(step, flush=True)
"""
# Short, but the machine may be four times slower than alone, and then a rank that works must not look dead: heartbeats
# come every 0.5 s, and three of them have to fail.
LIMITS = {"timeout": 4.0, "slow_timeout": 60.0}


class Hub:
    """Where ranks meet: answers all of them when all are there, in every round, and nobody when one is missing."""

    def __init__(self, size: int):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.size = size
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.connections = [self.server.accept()[0] for _ in range(self.size)]
        try:
            for connection in self.connections:
                connection.recv(1)
            while all(connection.recv(1) for connection in self.connections):
                for connection in self.connections:
                    connection.sendall(b".")
        except OSError:
            pass  # one is gone: the others wait for ever


class Ranks:
    """Running ranks: their processes and logs."""

    def __init__(self, run_dir: Path, commands: list[list[str]], env: list[dict[str, str]] | None = None):
        self.run_dir = run_dir
        self.logs = [run_dir.parent / f"rank-{rank}.txt" for rank in range(len(commands))]
        self.processes = []
        for rank, command in enumerate(commands):
            with self.logs[rank].open("w") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, env={**os.environ, **(env[rank] if env else {})}
                )
                self.processes.append(process)

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait_for(self, reached: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, [self.said(r) for r in range(len(self.logs))]
            assert any(process.poll() is None for process in self.processes), [log.read_text() for log in self.logs]
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: all(f"{step}\n" in log.read_text() for log in self.logs))

    def statuses(self, seconds: float = 60) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []
    hubs: list[Hub] = []  # kept, so that no connection is closed

    def hub(size: int) -> Hub:
        hubs.append(Hub(size))
        return hubs[-1]

    def start(
        size: int, *faults: tuple[int | str, str, int, str], steps=10**6, saves=(), judges=8, **limits: float
    ) -> Ranks:
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        told = {
            "size": size,
            "run_dir": str(run_dir),
            "launch": f"launch {len(started)}",
            "port": hub(size).server.getsockname()[1],
            "faults": [dict(zip(("rank", "phase", "step", "do"), fault)) for fault in faults],
            "steps": steps,
            "saves": saves,
            "judges": judges,
            "limits": LIMITS | limits,
        }
        commands = [[sys.executable, "-c", WATCHED, json.dumps(told | {"rank": rank})] for rank in range(size)]
        started.append(Ranks(run_dir, commands))
        return started[-1]

    yield start
    for running in started:
        running.kill()


def lost(run_dir: Path) -> dict:
    """The one event there has to be about a lost rank."""
    (event,) = [e for e in read(run_dir / "events.jsonl") if e["kind"] == EVENT]
    return event


def waiting(event: dict) -> int:
    """The step in which the rank stands that tells of the loss, whatever the age of the last heartbeat."""
    match = re.search(r"and rank \d+ stands in \w+ of step (\d+)", event["message"])
    assert match, event
    return int(match[1])


def test_a_rank_that_sleeps_in_its_loader_is_named(ranks):
    running = ranks(4, (1, "loading", 5, "time.sleep(3600)"))
    running.wait_for(lambda: "5\n" not in running.said(0) and "4\n" in running.said(0))
    began = time.monotonic()
    assert running.statuses() == [RANK_LOST] * 4
    took = time.monotonic() - began
    # The limit, three heartbeats of 0.5 s and a look at the clock each 0.25 s; the rest is for a machine that is busy.
    assert 4.0 < took < 30
    event = lost(running.run_dir)
    assert (event["ranks"], event["reason"], event["phase"], event["step"]) == ([1], "stuck", "loading", 5)
    for rank in range(4):
        (line,) = [line for line in running.said(rank).splitlines() if line.startswith("error: ")]
        assert "rank 1 (" in line
        assert "has been in loading of step 5 for" in line
        assert "goes on from its last checkpoint when it is launched again" in line
    # Its log shows where it sleeps, and only its own does.
    assert "in act" in running.said(1)
    assert "Thread" not in running.said(0)


def test_a_rank_that_is_stopped_is_named(ranks):
    running = ranks(2)
    running.wait_for_step(10)
    running.processes[1].send_signal(signal.SIGSTOP)
    assert running.processes[0].wait(60) == RANK_LOST
    event = lost(running.run_dir)
    assert (event["ranks"], event["reason"]) == ([1], "silent")
    assert f"process {running.processes[1].pid}) is stopped (SIGSTOP)" in running.said(0)
    assert waiting(event) >= 10


def test_a_rank_that_is_killed_is_named_though_nobody_hears_of_it(ranks):
    running = ranks(4)
    running.wait_for_step(10)
    running.processes[2].kill()
    assert running.statuses() == [RANK_LOST, RANK_LOST, -signal.SIGKILL, RANK_LOST]
    event = lost(running.run_dir)
    assert (event["ranks"], event["reason"]) == ([2], "dead")
    assert waiting(event) >= 10


def test_rank_0_is_watched_like_the_others(ranks):
    running = ranks(2)
    running.wait_for_step(10)
    running.processes[0].kill()
    assert running.processes[1].wait(60) == RANK_LOST
    assert lost(running.run_dir)["ranks"] == [0]


def test_where_those_who_look_first_are_gone_the_others_look(ranks):
    """Of many ranks only a few look at all the others: 128 that each open 128 files would be a stampede of their own."""
    running = ranks(3, judges=1)
    running.wait_for_step(10)
    running.processes[0].send_signal(signal.SIGSTOP)
    assert [process.wait(60) for process in running.processes[1:]] == [RANK_LOST] * 2
    assert (lost(running.run_dir)["ranks"], lost(running.run_dir)["reason"]) == ([0], "silent")


def test_the_others_take_the_verdict_of_those_who_look_first(ranks):
    running = ranks(3, (1, "loading", 5, "time.sleep(3600)"), judges=1)
    assert running.statuses() == [RANK_LOST] * 3
    assert (lost(running.run_dir)["ranks"], lost(running.run_dir)["reason"]) == ([1], "stuck")
    assert len({line for r in range(3) for line in running.said(r).splitlines() if line.startswith("error: ")}) == 1


def test_a_rank_that_fails_is_named_by_those_it_leaves_behind(ranks):
    running = ranks(2, (1, "forward", 5, "raise ValueError('a bug')"))
    assert running.statuses() == [RANK_LOST, 1]
    event = lost(running.run_dir)
    assert (event["ranks"], event["reason"], event["phase"], event["step"]) == ([1], "failed", "forward", 5)
    assert "ValueError: a bug" in running.said(1)


def test_a_connection_that_breaks_while_all_live_is_the_ranks_own_error(ranks):
    running = ranks(2, (1, "forward", 5, "raise RuntimeError('gloo: Connection reset by peer')"))
    assert running.statuses() == [RANK_LOST, 1]
    assert "looking which rank is lost" in running.said(1)
    assert "RuntimeError: gloo: Connection reset by peer" in running.said(1).splitlines()[-1]
    assert (lost(running.run_dir)["ranks"], lost(running.run_dir)["reason"]) == ([1], "failed")


def test_a_rank_that_never_starts_is_named(ranks):
    running = ranks(2, (1, "loading", 1, "pass"), slow_timeout=4.0)
    running.processes[1].kill()
    assert running.processes[0].wait(60) == RANK_LOST
    # Killed while Python started, unless this machine was quicker than that.
    assert lost(running.run_dir)["reason"] in ("missing", "dead")


def test_what_is_slow_for_a_reason_is_left_alone(ranks):
    """A first step and a checkpoint that take twice the limit, and a job that Slurm suspends for twice the limit."""
    running = ranks(
        2,
        ("all", "forward", 1, "time.sleep(6)"),
        (0, "saving", 3, "time.sleep(6)"),
        ("all", "loading", 5, "time.sleep(2)"),
        steps=6,
        saves=[3],
        timeout=3.0,
    )
    running.wait_for_step(4)
    for process in running.processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for process in running.processes:
        process.send_signal(signal.SIGCONT)
    assert running.statuses() == [0, 0]
    assert read(running.run_dir / "events.jsonl") == []
    assert heartbeat.settled(running.run_dir, "launch 0") is None
    beats = heartbeat.read(running.run_dir, range(2), "launch 0")
    assert {(beat.state, beat.step, beat.marks) for beat in beats.values()} == {("done", 6, 20)}


def test_storage_that_goes_away_ends_no_run_and_saves_no_stuck_one(ranks):
    running = ranks(2, (1, "loading", 50_000, "time.sleep(3600)"), steps=60_000)
    running.wait_for_step(10)
    shutil.rmtree(running.run_dir)
    assert running.statuses(120) == [RANK_LOST] * 2
    assert "\n49999\n" in running.said(0)
    assert "\n50000\n" not in running.said(0)
    assert "rank 0 (" in running.said(0)
    assert "rank 1 (" in running.said(1)
    assert not running.run_dir.exists()


def test_a_heartbeat_is_a_small_write_every_few_seconds(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(heartbeat, "write", lambda run_dir, beat: written.append(beat))
    with Watchdog(0, 128, "now", WatchdogConfig(timeout=60)) as watchdog:
        watchdog.open(tmp_path)
        deadline = time.monotonic() + 3.5
        marks = 0
        while time.monotonic() < deadline:
            watchdog.mark("forward", 1)
            marks += 1
    # The first, one a second, and the last; marks themselves write nothing.
    assert 3 <= len(written) <= 6
    assert written[-1].marks == marks > 10_000
    assert [beat.beats for beat in written] == list(range(1, len(written) + 1))


# --- gloo: a collective fails when a peer is gone ------------------------------------------------------------------

GLOO = """
import os, sys, torch
from pathlib import Path
from mcf import distributed
from mcf.rendezvous import launch_name
from mcf.watchdog import Watchdog
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
with Watchdog(rank, size, launch_name(os.environ)) as watchdog:
    watchdog.open(Path(sys.argv[1]))
    world = distributed.join()
    watchdog.open(Path(sys.argv[1]))
    for step in range(1, 10**9):
        watchdog.mark("backward", step)
        distributed.mean(torch.ones(1000))
        if step == 3:
            print("3", flush=True)
"""


@pytest.mark.parametrize("size", [2, 4])
def test_gloo_ranks_name_the_one_that_was_killed(tmp_path, size):
    """At once, although the default limit is ten minutes: the collective fails, and the process is seen to be gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(size)}
    env = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(size)]
    running = Ranks(tmp_path / "run", [[sys.executable, "-c", GLOO, str(tmp_path / "run")]] * size, env)
    try:
        running.wait_for_step(3)
        running.processes[1].kill()
        assert running.statuses() == [RANK_LOST if rank != 1 else -signal.SIGKILL for rank in range(size)]
        event = lost(running.run_dir)
        assert (event["ranks"], event["reason"]) == ([1], "dead")
        assert f"process {running.processes[1].pid}) has died" in running.said(0)
        assert waiting(event) >= 3
        assert "Traceback" not in running.said(0)
    finally:
        running.kill()


# --- the trainer ----------------------------------------------------------------------------------------------------


def living(run_dir: Path) -> list[psutil.Process]:
    """Processes that name the run in their command."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run_dir) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def steps_of(run_dir: Path) -> int:
    return max((record["step"] for record in read(run_dir / "metrics.jsonl")), default=0)


def test_a_stopped_rank_ends_a_launched_run_and_leaves_no_process(tmp_path):
    tiny.shards(tmp_path / "shards")
    run_dir = tmp_path / "run"
    values = tiny.recipe(run_dir, tmp_path / "shards", ranks=2, micro_batch=2, train__steps=20_000)
    values |= {"watchdog": {"timeout": 5.0, "slow_timeout": 120.0}, "checkpoint": {"every": 10_000}}
    tiny.write_recipe(tmp_path / "recipe", values)
    command = [sys.executable, "-m", "mcf.launch", f"recipe={tmp_path / 'recipe' / 'recipe.yaml'}", "mode=local"]
    launcher = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while steps_of(run_dir) < 5:
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (status,) = (run_dir / "jobs").glob("*_1_status.json")
        os.kill(json.loads(status.read_text())["child"], signal.SIGSTOP)
        out, err = launcher.communicate(timeout=120)
        left = living(run_dir)
    finally:
        for process in [*living(run_dir), launcher]:
            process.kill()
    assert launcher.returncode == RANK_LOST, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: rank 1 (")]
    assert "is stopped (SIGSTOP); its last heartbeat came from" in line
    assert left == []
    assert lost(run_dir)["ranks"] == [1]


@pytest.mark.slow
def test_a_rank_whose_storage_hangs_is_named_and_slow_saves_are_not(tmp_path):
    """A FIFO in the place of an index is a file whose opening never returns, as on a file server that went away.

    With these numbers stream c reads one shard in the first epoch, so that only rank 1 comes to the shard of stream 1.
    Every checkpoint takes twice the limit to write, on rank 0 alone.
    """
    manifest = tiny.shards(tmp_path / "shards", samples=480, per_shard=120)
    run_dir = tmp_path / "run"
    values = tiny.recipe(run_dir, tmp_path / "shards", ranks=2, micro_batch=4, checkpoint__every=5)
    values |= {"watchdog": {"timeout": 5.0, "slow_timeout": 120.0}}
    values["train"]["steps"] = 60
    tiny.write_recipe(run_dir, values)
    order = Order(manifest.counts, batch=8, streams=4, window=8, seed=values["seed"])
    (shard,) = {segment.shard for index in range(16) for segment in order.window(0, 1, index).segments}
    # The loader has read ahead: some steps and a checkpoint later it needs the file again.
    slow = (
        "import sys, time; from mcf import state, train; write = state.write; "
        "state.write = lambda *a: (time.sleep(9), write(*a)); sys.exit(train.main())"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    env = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2)]
    running = Ranks(run_dir, [[sys.executable, "-c", slow, f"run={run_dir}"]] * 2, env)
    index = index_path(tmp_path / "shards" / manifest.shards[shard].name)
    try:
        running.wait_for(lambda: steps_of(run_dir) >= 1, 200)
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "fifo").replace(index)
        assert running.statuses(240) == [RANK_LOST] * 2, running.said(0)
    finally:
        running.kill()
    event = lost(run_dir)
    assert (event["ranks"], event["reason"], event["phase"]) == ([1], "stuck", "loading")
    saved = [e["step"] for e in read(run_dir / "events.jsonl") if e["kind"] == "checkpoint"]
    assert saved == list(np.arange(5, event["step"], 5))
    assert len(saved) >= 1
