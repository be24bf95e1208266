"""Runs on the test cluster as a user starts and sees them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cluster as slurm
import numpy as np
import pytest
import tiny
import yaml

from mcf import checkpoint
from mcf.data.order import Order
from mcf.data.shards import load_manifest
from mcf.track.jsonl import read

PACE = Path(__file__).with_name("pace")
# What differs between two runs of the same numbers: clocks, memory, and where the ranks stood.
VOLATILE = ("time", "rate/", "memory/")


def require_slurm() -> None:
    """Skip the test where Slurm is not installed; fail it where it has to be."""
    if missing := slurm.missing():
        if os.environ.get("MCF_REQUIRE_SLURM"):
            pytest.fail(
                f"{', '.join(missing)}: not installed, and MCF_REQUIRE_SLURM says that nothing may be skipped for it"
            )
        pytest.skip(f"needs {', '.join(missing)} (Debian: apt install slurm-wlm munge)")


# Tuning on twenty drawn faces: 24 steps of a head as small as they come.
TUNING = (
    "task=alignment", "dataset=faces", "batch=4", "warp_size=48", "input_size=32", "head.channels=8", "head.pools=[1,2]",
    "heatmap.size=16", "heatmap.radius=3", "track.mlflow=off", "train.epochs=6", "train.log_every=1", "train.readers=1",
    "pictures=0", "evaluate_every=6", "checkpoint.every=1000",
)  # fmt: skip


class Site:
    """A user's folder on the cluster's file system: shards, a recipe file, runs."""

    def __init__(self, cluster: slurm.Cluster, folder: Path, **overrides):
        self.cluster, self.folder, self.runs, self.data = cluster, folder, folder / "runs", folder / "shards"
        if not self.data.exists():
            tiny.shards(self.data)
        values = tiny.recipe(
            self.runs / "file", self.data, micro_batch=2, train__steps=24, train__zero_stage=1, checkpoint__every=4,
            slurm__cpus_per_task=1, slurm__time=10, slurm__warn_seconds=30, **overrides,
        )  # fmt: skip
        (folder / "tiny.yaml").write_text(yaml.safe_dump(values))

    def environment(self, pace: float, **more: str) -> dict[str, str]:
        """Environment of a user whose steps take `pace` seconds in a job's first start (pace/sitecustomize.py)."""
        return {
            "PYTHONPATH": str(PACE),
            "MCF_TEST_PACE": str(pace),
            "PATH": f"{Path(sys.executable).parent}:{slurm.PATH}",
            **more,
        }

    def launch(self, name: str, *extra: str, pace: float = 0.0, **environment: str):
        """`python -m mcf.launch`, as typed: the finished process."""
        return self.cluster.attempt(
            sys.executable, "-m", "mcf.launch", "recipe=tiny.yaml", f"name={name}", *extra,
            cwd=self.folder, env=self.environment(pace, **environment),
        )  # fmt: skip

    def submit(self, name: str, *extra: str, pace: float = 0.0, **environment: str) -> str:
        """Launch, and the number of the job."""
        done = self.launch(name, *extra, pace=pace, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.job_of(name)

    def job_of(self, name: str) -> str:
        """Number of the Slurm job that owns a run."""
        return json.loads((self.runs / name / "lock.json").read_text())["slurm_job"]

    def said(self, name: str) -> str:
        """Everything that a run's job has printed."""
        logs = sorted((self.runs / name / "jobs").glob("*.out"))
        return "".join(f"--- {log.name}\n{log.read_text()}" for log in logs)

    def wait_for_step(self, name: str, step: int, seconds: float = 240) -> None:
        """Wait until a run has written that step down."""
        metrics = self.runs / name / "metrics.jsonl"
        try:
            slurm.wait_for(lambda: any(r.get("step", 0) >= step for r in read(metrics)), f"step {step}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said(name)}\n{self.cluster.run('squeue')}") from None

    def wait_for_end(self, name: str, job: str, state: str = "COMPLETED", seconds: float = 300) -> None:
        """Wait until a job is over, and for good."""

        def over() -> bool:
            found = self.cluster.job(job).get("JobState")
            assert found not in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} - {state}, found
            return found == state

        try:
            slurm.wait_for(over, f"{state} of job {job}", seconds, poll=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said(name)}\n{self.cluster.job(job)}") from None

    def draw_faces(self, name: str) -> None:
        """A folder of twenty drawn faces."""
        drawn = self.cluster.attempt(
            sys.executable, "-m", "mcf.data.faces", f"out={name}", "count=20", "size=64", "workers=1", cwd=self.folder
        )
        assert drawn.returncode == 0, drawn.stderr

    def warn_and_see_it_done(self, name: str, job: str) -> dict:
        """Warn a run of TUNING, as Slurm does before the time is up; it goes on where it stopped. The event of that."""
        self.wait_for_step(name, 4)
        self.cluster.run("scancel", "--signal=USR2", job)
        self.wait_for_end(name, job)
        assert self.cluster.job(job)["Restarts"] == "1"
        (stopped,), (resumed,) = self.events(name, "stopped"), self.events(name, "resumed")
        assert stopped["step"] == resumed["step"] < 24
        steps = [r["step"] for r in read(self.runs / name / "metrics.jsonl") if "loss/total" in r]
        assert steps == list(range(1, 25))
        return resumed

    def statuses(self, name: str) -> list[dict]:
        """Statuses of a run's ranks, by rank."""
        found = [json.loads(path.read_text()) for path in (self.runs / name / "jobs").glob("*_status.json")]
        return sorted(found, key=lambda status: status["rank"])

    def numbers(self, name: str) -> dict[int, dict[str, float]]:
        """Everything in metrics.jsonl but what is volatile, by step; no step stands there twice."""
        records = [r for r in read(self.runs / name / "metrics.jsonl") if "loss/total" in r]
        assert len({r["step"] for r in records}) == len(records)
        return {r["step"]: {k: v for k, v in r.items() if not k.startswith(VOLATILE)} for r in records}

    def events(self, name: str, kind: str) -> list[dict]:
        """Events of a kind."""
        return [event for event in read(self.runs / name / "events.jsonl") if event["kind"] == kind]

    def starts(self, name: str, ranks: int = 2) -> list[list[int]]:
        """Steps that each start of the run did, after making sure that they were given the right samples.

        Every rank, every step: the keys are those that stand at the step's positions in the order of the seed, which is
        computed here. Steps of a start follow each other, and a start goes on behind a step that the one before had done.
        """
        recipe = yaml.safe_load((self.runs / name / "recipe.yaml").read_text())
        batch, data = recipe["batch"], recipe["data"]
        counts = load_manifest(str(self.data)).counts
        order = Order(counts, batch=batch, streams=data["streams"], window=data["window"], seed=recipe["seed"])
        firsts = np.concatenate([[0], np.cumsum(counts)])
        starts: dict[int, list[int]] = {}
        for rank in range(ranks):
            for record in read(self.runs / name / f"keys-{rank}.jsonl"):
                positions = [
                    p for p in range((record["step"] - 1) * batch, record["step"] * batch) if p % ranks == rank
                ]
                places = [order.locate(position) for position in positions]
                expected = [f"{firsts[place.shard] + place.row:06d}" for place in places]
                assert sorted(record["keys"]) == sorted(expected), (rank, record)
                if rank == 0:
                    starts.setdefault(record["start"], []).append(record["step"])
        found = [starts[number] for number in sorted(starts)]
        done = 0
        for steps in found:
            assert steps == list(range(steps[0], steps[-1] + 1))
            assert steps[0] <= done + 1
            done = steps[-1]
        return found

    def newest(self, name: str) -> int:
        """Step of the newest whole checkpoint."""
        return checkpoint.step_of(checkpoint.latest(self.runs / name))
