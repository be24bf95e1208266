"""How a job's end is read from what its ranks have left: done, though something went wrong behind the end, or not done."""

from __future__ import annotations

import json
import signal
import time

import pytest

from mcf.ending import finished, report
from mcf.task import JOBS, Status, status_path

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


def statuses(run_dir):
    return [Status(**json.loads(path.read_text())) for path in sorted((run_dir / JOBS).glob("*_status.json"))]
