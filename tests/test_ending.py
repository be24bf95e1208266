"""How a job's end is read from what its ranks have left: done, though something went wrong behind the end, or not done."""

from __future__ import annotations

import json
import signal
import time

import pytest
import tiny

from mcf import job, slurm
from mcf.ending import finished, report
from mcf.errors import UserError
from mcf.exits import RANK_LOST, USER_ERROR
from mcf.task import JOBS, Status, read_statuses, status_path

STEP = 24
BEFORE, NOW, AFTER = 100.0, 200.0, 300.0  # the start's beginning is NOW


@pytest.fixture
def run_dir(tmp_path):
    """A run of two ranks: saved at its last step, and one rank aborted while it tidied up."""
    (tmp_path / JOBS).mkdir()
    for rank, code in ((0, 0), (1, -signal.SIGABRT)):
        Status(rank, watcher=1, code=code, began=NOW, ended=AFTER + 1).write(status_path(tmp_path / JOBS, "7", rank))
    (tmp_path / "checkpoints" / f"step-{STEP:08d}").mkdir(parents=True)
    return tmp_path


def tell(run_dir, *events: tuple[str, float]) -> None:
    (run_dir / "events.jsonl").write_text(
        "".join(json.dumps({"kind": kind, "time": told, "step": STEP}) + "\n" for kind, told in events)
    )


def test_a_run_that_is_saved_to_its_end_is_done(run_dir, capsys):
    tell(run_dir, ("started", NOW), ("checkpoint", AFTER), ("finished", AFTER))
    assert finished(run_dir, statuses(run_dir)) == STEP
    assert report(run_dir, "7", "after 9 s", asked=False) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "events",
    [
        [("started", NOW), ("checkpoint", AFTER)],
        [("started", NOW), ("stopped", AFTER)],
        [("started", BEFORE), ("finished", BEFORE)],
        [("started", BEFORE), ("finished", BEFORE), ("resumed", NOW)],
    ],
    ids=["died", "stopped", "done-before-and-now-longer", "done-before-and-resumed"],
)
def test_what_is_not_done(run_dir, capsys, events):
    tell(run_dir, *events)
    assert finished(run_dir, statuses(run_dir)) == 0
    assert report(run_dir, "7", "after 9 s", asked=False) == 128 + signal.SIGABRT
    assert "rank 1 was killed by SIGABRT" in capsys.readouterr().err


def test_an_end_whose_checkpoint_is_not_there_is_not_done(run_dir):
    tell(run_dir, ("started", NOW), ("finished", AFTER))
    (run_dir / "checkpoints" / f"step-{STEP:08d}").rename(run_dir / "checkpoints" / "step-00000020")
    assert finished(run_dir, statuses(run_dir)) == 0


def test_a_rank_s_status_says_when_it_began():
    assert abs(Status(0, watcher=1).began - time.time()) < 60


# --- which rank it was ----------------------------------------------------------------------------------------------


@pytest.fixture
def requeued(monkeypatch):
    """Numbers of jobs that went back to the queue, of a Slurm that says that they run."""
    found: list[str] = []
    monkeypatch.setattr(slurm, "show", lambda _job: {"JobState": "RUNNING"})
    monkeypatch.setattr(slurm, "requeue", found.append)
    monkeypatch.setattr(job.time, "sleep", lambda _seconds: None)
    return found


def test_a_mistake_told_by_a_clock_that_is_ahead_is_not_tried_again(tmp_path, requeued, capsys):
    """Rank 1 refuses and rank 0 hears of it a second later, but the clock of rank 1's node is 5 s ahead."""
    end(tmp_path, Status(0, 1, code=RANK_LOST, ended=NOW + 1), Status(1, 1, code=USER_ERROR, ended=NOW + 5))
    (tmp_path / JOBS / "7_1_log.out").write_text("error: what is wrong\n")
    assert job.end(tmp_path, 1, {"SLURM_JOB_ID": "7"}) == USER_ERROR
    assert requeued == []
    assert "error: what is wrong (rank 1)" in capsys.readouterr().out
    assert report(tmp_path, "7", "after 9 s", asked=False) == USER_ERROR


@pytest.mark.parametrize("content", ["", '{"rank": 1, "watch', "[1]"])
def test_a_status_that_cannot_be_read_is_of_a_rank_that_said_nothing(tmp_path, requeued, content):
    end(tmp_path, Status(0, 1, code=RANK_LOST, ended=NOW))
    status_path(tmp_path / JOBS, "7", 1).write_text(content)
    assert [(s.rank, s.code) for s in read_statuses(tmp_path / JOBS, "7")] == [(0, RANK_LOST), (1, None)]
    assert job.end(tmp_path, 1, {"SLURM_JOB_ID": "7"}) == 0
    assert requeued == ["7"]
    assert report(tmp_path, "7", "after 9 s", asked=False) == RANK_LOST


def test_ranks_that_were_all_ended_for_another_s_sake_are_not_done(tmp_path, capsys):
    """Of the rank that they name nothing is left."""
    end(tmp_path, Status(0, 1, code=-signal.SIGKILL, because=2), Status(1, 1, code=-signal.SIGKILL, because=2))
    assert report(tmp_path, "7", "after 9 s", asked=False) == 1
    assert "rank 0 was ended, because rank 2 was gone" in capsys.readouterr().err


def test_a_job_answers_for_its_own_failures(tmp_path, requeued):
    """What the job before could not do (a broken node, a setting that has been mended) is no failure of this one."""
    end(tmp_path, Status(0, 1, code=1, ended=NOW))
    before = {"kind": "requeued", "time": BEFORE, "job": "6", "failed": True, "step": 0}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({**before, "start": start}) + "\n" for start in (0, 1)))
    for start in (0, 1):
        assert job.end(tmp_path, 1, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start)}) == 0
    assert requeued == ["7", "7"]
    with pytest.raises(UserError, match="it failed 3 times in a row at step 0"):
        job.end(tmp_path, 1, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"})


def end(run_dir, *ended: Status) -> None:
    """Leave a run whose job 7 has ended so."""
    (run_dir / JOBS).mkdir()
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, run_dir / "shards"))
    for status in ended:
        status.write(status_path(run_dir / JOBS, "7", status.rank))


def statuses(run_dir):
    return [Status(**json.loads(path.read_text())) for path in sorted((run_dir / JOBS).glob("*_status.json"))]
