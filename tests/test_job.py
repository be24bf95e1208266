"""What a Slurm job does around srun: which ends of a start send it back to the queue, with Slurm's commands stood in for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import tiny

from mcf import job
from mcf.checkpoint import folder_of
from mcf.exits import SAVED
from mcf.task import JOBS, Status, status_path
from mcf.track.jsonl import read

JOB = "7"
DIED, TOLD = -signal.SIGKILL, -signal.SIGUSR2

SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo "JobId=7 JobState=RUNNING Restarts=$SLURM_RESTART_COUNT" || echo "$@" >> {asked}
"""


class Cluster:
    """A job whose ranks end as it is told; `requeued` counts what Slurm was asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.run_dir = folder / "run"
        self.starts, self._asked, self._monkeypatch = 0, folder / "asked", monkeypatch
        tiny.write_recipe(self.run_dir, tiny.recipe(self.run_dir, folder, slurm__max_requeues=20))
        (self.run_dir / JOBS).mkdir()
        (folder / "bin").mkdir()
        (folder / "bin/scontrol").write_text(SCONTROL.format(asked=self._asked))
        (folder / "bin/scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", JOB)
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
        monkeypatch.setattr(time, "sleep", lambda _: None)  # Slurm would end the process within

    def ends(self, code: int, step: int) -> int:
        """One start of the job, whose rank ends with a code after a checkpoint at a step; the batch script's status."""
        self._monkeypatch.setenv("SLURM_RESTART_COUNT", str(self.starts))
        assert job.main([f"run={self.run_dir}"]) == 0
        self.starts += 1
        (folder_of(self.run_dir) / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        status = Status(0, watcher=1, code=code, ended=time.time())
        status.write(status_path(self.run_dir / JOBS, JOB, 0))
        return job.main([f"run={self.run_dir}", f"status={0 if code == SAVED else 1}"])

    @property
    def requeued(self) -> int:
        return self._asked.read_text().split("\n").count(f"requeue {JOB}") if self._asked.exists() else 0


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_three_failures_at_one_step_are_enough(cluster, capsys):
    assert [cluster.ends(DIED, 4) for _ in range(3)] == [0, 0, 2]
    assert cluster.requeued == 2
    assert "it failed 3 times in a row at step 4 without a new checkpoint" in capsys.readouterr().err


def test_failures_with_progress_between_them_are_tried_again(cluster):
    assert [cluster.ends(DIED, step) for step in (4, 8, 12, 16, 16)] == [0] * 5
    assert cluster.requeued == 5


@pytest.mark.parametrize("code", [TOLD, -signal.SIGTERM, SAVED])
def test_to_be_told_to_stop_is_no_failure_even_before_the_run_could_listen(cluster, code):
    assert [cluster.ends(code, 4) for _ in range(5)] == [0] * 5
    assert [event["failed"] for event in read(cluster.run_dir / "events.jsonl")] == [False] * 5


def test_failures_that_are_not_in_a_row_are_tried_again(cluster):
    assert [cluster.ends(code, 4) for code in (DIED, TOLD, DIED, TOLD, DIED)] == [0] * 5


def test_a_start_begins_without_what_the_ranks_of_an_earlier_one_left(cluster):
    cluster.ends(DIED, 4)
    jobs = cluster.run_dir / JOBS
    for name in ("7_0_log.out", "8_0_status.json", "77_0_status.json"):
        (jobs / name).touch()
    assert job.main([f"run={cluster.run_dir}"]) == 0
    assert {path.name for path in jobs.iterdir()} == {"7_0_log.out", "8_0_status.json", "77_0_status.json"}
