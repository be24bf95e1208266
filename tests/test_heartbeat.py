"""Heartbeat files, and who is named from them."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from mcf import heartbeat
from mcf.heartbeat import Beat, Verdict, judge

ELSEWHERE = "another/machine"


def beat(rank: int, marks: int = 10, machine: str = ELSEWHERE, process: int = 1, **values) -> Beat:
    defaults = {"beats": 5, "phase": "keys", "step": 12, "seconds": 61.0}
    return Beat(rank, "now", f"n{rank}", machine, process, marks=marks, **(defaults | values))


def later(beats: dict[int, Beat], silent: tuple[int, ...] = ()) -> dict[int, Beat]:
    return {r: b if r in silent else dataclasses.replace(b, beats=b.beats + 3) for r, b in beats.items()}


def test_the_rank_with_the_fewest_marks_holds_the_others_up():
    beats = {0: beat(0), 1: beat(1, marks=9, phase="loading"), 2: beat(2)}
    verdict = judge(beats, later(beats), beats[0], range(3))
    assert (verdict.ranks, verdict.reason, verdict.phase, verdict.step) == ([1], "stuck", "loading", 12)
    assert verdict.message == (
        "rank 1 (n1, process 1) has been in loading of step 12 for 61 s, which the others have passed"
    )


def test_when_all_stand_at_one_mark_all_are_named():
    beats = {rank: beat(rank) for rank in range(12)}
    verdict = judge(beats, later(beats), beats[0], range(12))
    assert (verdict.ranks, verdict.reason) == (list(range(12)), "stuck")
    assert verdict.message.endswith("keys of step 12 for 61 s; likewise ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more")


def test_silence_counts_more_than_being_behind():
    beats = {0: beat(0, marks=3), 1: beat(1), 2: beat(2)}
    verdict = judge(beats, later(beats, silent=(2,)), beats[0], range(3))
    assert (verdict.ranks, verdict.reason) == ([2], "silent")
    assert verdict.message == (
        "rank 2 (n2, process 1) gives no sign of life; its last heartbeat came from keys of step 12, and rank 0 stands "
        "in keys of step 12"
    )


def test_a_rank_that_never_began():
    beats = {0: beat(0, phase="joining", step=0), 2: beat(2, phase="joining", step=0)}
    verdict = judge(beats, later(beats), beats[0], range(4))
    assert (verdict.ranks, verdict.reason) == ([1, 3], "missing")
    assert verdict.message == "rank 1 has not started; likewise rank 3"


def test_a_rank_that_failed_is_named_before_those_it_leaves_silent():
    beats = {0: beat(0), 1: beat(1, state="failed", phase="backward"), 2: beat(2)}
    verdict = judge(beats, later(beats, silent=(1, 2)), beats[0], range(3))
    assert (verdict.ranks, verdict.reason) == ([1], "failed")
    assert "ended with an error in backward of step 12; its log says which" in verdict.message


def test_processes_of_this_machine_are_looked_at():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    beats = {0: beat(0), 1: beat(1, machine=heartbeat.machine(), process=child.pid)}
    try:
        assert judge(beats, later(beats), beats[0], range(2)).reason == "stuck"
        child.send_signal(signal.SIGSTOP)
        # waitpid tells when it has stopped.
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        verdict = judge(beats, later(beats, silent=(1,)), beats[0], range(2))
        assert (verdict.ranks, verdict.reason) == ([1], "silent")
        assert "is stopped (SIGSTOP)" in verdict.message
    finally:
        child.kill()
    while heartbeat.gone(beats, beats[0]) is None:  # a zombie, since nobody has waited for it yet
        time.sleep(0.01)
    child.wait()
    # However recent its last beat is.
    verdict = judge(beats, later(beats), beats[0], range(2))
    assert (verdict.ranks, verdict.reason) == ([1], "dead")
    assert "has died; its last heartbeat came from keys of step 12" in verdict.message
    # One that ended as it should is not dead, and of a process of another machine nothing is known.
    done = {1: dataclasses.replace(beats[1], state="done")}
    assert heartbeat.gone(done, beats[0]) is None
    assert heartbeat.gone({1: dataclasses.replace(beats[1], machine=ELSEWHERE)}, beats[0]) is None


def test_files_of_another_launch_and_damaged_ones_count_as_missing(tmp_path):
    for rank in range(4):
        heartbeat.write(tmp_path, beat(rank, phase="a long name of a phase"))
    # A shorter line leaves nothing of the longer one, and no file grows.
    heartbeat.write(tmp_path, beat(0, phase="keys"))
    assert {heartbeat.path_of(tmp_path, rank).stat().st_size for rank in range(4)} == {512}
    heartbeat.write(tmp_path, dataclasses.replace(beat(1), launch="before"))
    heartbeat.path_of(tmp_path, 2).write_bytes(b'{"rank": 2, "lau')
    found = heartbeat.read(tmp_path, range(5), "now")
    assert sorted(found) == [0, 3]
    assert found[0] == beat(0, phase="keys")


def test_a_node_without_the_run_directory_does_not_make_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        heartbeat.write(tmp_path / "run", beat(0))
    assert not (tmp_path / "run").exists()


def test_the_first_verdict_of_a_launch_holds(tmp_path):
    (tmp_path / heartbeat.FOLDER).mkdir()
    verdicts = [Verdict([rank], "stuck", "keys", 3, f"rank {rank}") for rank in range(3)]
    assert heartbeat.settled(tmp_path, "now") is None
    before = dataclasses.replace(beat(0), launch="before")
    assert heartbeat.settle(tmp_path, verdicts[0], before) == (verdicts[0], True)
    assert heartbeat.settled(tmp_path, "now") is None
    assert heartbeat.settle(tmp_path, verdicts[1], beat(1)) == (verdicts[1], True)
    assert heartbeat.settle(tmp_path, verdicts[2], beat(2)) == (verdicts[1], False)
    assert heartbeat.settled(tmp_path, "now") == verdicts[1]
    assert [file.name for file in (tmp_path / heartbeat.FOLDER).iterdir()] == [heartbeat.VERDICT]
