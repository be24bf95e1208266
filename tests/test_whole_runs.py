"""Whole runs as a user starts them: `python -m mcf.launch` with the real trainer, two ranks, an MLflow store, a kill.

tests/test_launch.py has the launcher's own ways, with a stub in place of the trainer; tests/test_train.py the trainer
without the launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mcf import checkpoint
from mcf.config import Recipe
from mcf.data.order import Order
from mcf.data.shards import load_manifest
from mcf.exits import RANK_LOST
from mcf.models.mcf import build_student
from mcf.track.jsonl import read

STEPS = 16


class Place:
    """A folder with shards, a recipe file of two ranks, and runs beside one MLflow store."""

    def __init__(self, folder: Path):
        self.folder, self.runs, self.data = folder, folder / "runs", folder / "shards"
        tiny.shards(self.data)
        # micro_batch=2: two ranks accumulate twice.
        values = tiny.recipe(
            self.runs / "file", self.data, ranks=2, micro_batch=2, train__steps=STEPS, track__mlflow="local",
            track__images_every=8,
        )  # fmt: skip
        (folder / "tiny.yaml").write_text(yaml.safe_dump(values))

    def start(self, name: str, *extra: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
        return subprocess.Popen(
            [sys.executable, "-m", "mcf.launch", "recipe=tiny.yaml", "mode=local", f"name={name}", *extra],
            cwd=self.folder,
            env=env | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, name: str, *extra: str) -> str:
        """Launch to a good end; what was printed."""
        out, err = self.start(name, *extra).communicate(timeout=180)
        assert err == "", out + err
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def unbroken(place) -> tuple[Path, str]:
    """A run that nothing happened to, and what its launcher printed."""
    out = place.launch("unbroken")
    return place.runs / "unbroken", out


def numbers(run_dir: Path) -> dict[int, dict[str, float]]:
    """Everything in metrics.jsonl but clocks and memory, by step."""
    volatile = ("time", "rate/", "memory/")
    records = [r for r in read(run_dir / "metrics.jsonl") if "loss/total" in r]
    assert len({r["step"] for r in records}) == len(records)
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(volatile)} for r in records}


def events(run_dir: Path, kind: str) -> list[dict]:
    return [event for event in read(run_dir / "events.jsonl") if event["kind"] == kind]


def mlflow_runs(place: Place, name: str) -> tuple[object, list]:
    """MLflow's client, and its runs of that name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place.runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mcf")
    return client, client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")


def test_two_ranks_from_a_recipe_file(place, unbroken):
    run_dir, out = unbroken
    assert "effective batch 8 = 2 ranks × micro-batch 2 × accumulation 2" in out
    assert f"step {STEPS}/{STEPS}" in out
    assert sorted(numbers(run_dir)) == list(range(1, STEPS + 1))
    assert [e["ranks"] for e in events(run_dir, "started")] == [2]
    assert checkpoint.step_of(checkpoint.latest(run_dir)) == STEPS
    assert checkpoint.verify(checkpoint.latest(run_dir)) is None
    written = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert written["name"] == "unbroken"
    assert written["data"]["path"] == str(place.data)


def test_the_ranks_ran_the_copy_of_the_code(unbroken):
    assert [e["code"] for e in events(unbroken[0], "started")] == [str(unbroken[0] / "code" / "mcf")]


def test_mlflow_has_the_numbers_the_recipe_and_the_pictures(place, unbroken, tmp_path):
    pytest.importorskip("mlflow")
    run_dir, _ = unbroken
    client, runs = mlflow_runs(place, "unbroken")
    (run,) = runs
    assert run.info.status == "FINISHED"
    assert json.loads((run_dir / "mlflow.json").read_text()) == {
        f"sqlite:///{place.runs / 'mlflow.db'}": run.info.run_id
    }
    assert run.data.params["micro_batch"] == "2"
    assert run.data.params["model.projection.hidden"] == "48"
    told = numbers(run_dir)
    for metric in ("loss/total", "loss/contrast", "lr", "grad_norm"):
        history = client.get_metric_history(run.info.run_id, metric)
        assert {point.step: point.value for point in history} == {step: told[step][metric] for step in told}
        assert len(history) == STEPS

    names = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")]
    assert names == [f"images/step-{step:06d}-reconstruction.png" for step in (8, 16)]
    fetched = client.download_artifacts(run.info.run_id, names[-1], str(tmp_path))
    picture = np.asarray(Image.open(fetched))
    assert np.array_equal(picture, np.asarray(Image.open(run_dir / names[-1])))
    # Two faces (the micro-batch of rank 0), and three pictures of each: more than one colour, and more than one size.
    assert picture.ndim == 3 and min(picture.shape[:2]) >= 2 * tiny.SIZE
    assert len(np.unique(picture)) > 50


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Living processes that name the run in their command: controller, watchers, ranks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run_dir) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_rank_is_killed_and_launched_again_the_run_ends_like_the_unbroken_one(place, unbroken):
    run_dir = place.runs / "killed"
    launcher = place.start("killed")
    try:
        deadline = time.monotonic() + 120
        while not (checkpoint.folder_of(run_dir) / "step-00000004").exists():
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        (status,) = (run_dir / "jobs").glob("*_1_status.json")
        os.kill(json.loads(status.read_text())["child"], signal.SIGKILL)
        out, err = launcher.communicate(timeout=120)
        left = processes_of(run_dir)
    finally:
        for process in [*processes_of(run_dir), launcher]:
            process.kill()
    # Who tells of it first: the one that watched it, as a rule, or rank 0, to which it no longer answers.
    told = {128 + signal.SIGKILL: r"error: rank 1 was killed by SIGKILL", RANK_LOST: r"error: rank 1 \(.*\) has died"}
    assert launcher.returncode in told, out + err
    assert re.search(told[launcher.returncode], err), err
    assert left == []

    assert f"going on with {run_dir}" in place.launch("killed")
    (resumed,) = events(run_dir, "resumed")
    assert 4 <= resumed["step"] < STEPS
    assert numbers(run_dir) == numbers(unbroken[0])
    ours, theirs = (load_file(checkpoint.latest(r) / "weights.safetensors") for r in (run_dir, unbroken[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())

    pytest.importorskip("mlflow")
    client, runs = mlflow_runs(place, "killed")
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "loss/total")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))


def test_training_consumes_the_order_on_any_number_of_ranks_and_no_bad_step_leaves_a_trace(place, tmp_path):
    """A loss beyond float32 makes every step a bad one, and the guard writes down which samples each rank had in it."""
    run_dir = tmp_path / "run"
    endless = {"loss__feature": 1e39, "guard__max_bad_steps": 100, "train__steps": 9, "train__zero_stage": 2}
    values = tiny.recipe(run_dir, place.data, ranks=2, micro_batch=2, train__stop_after=5, **endless)
    tiny.write_recipe(run_dir, values)
    assert tiny.run(run_dir, 2) == 0, tiny.said(run_dir)
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, place.data, micro_batch=8, **endless))
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)

    consumed: dict[int, str] = {}
    for file in (run_dir / "bad_steps").iterdir():
        content = json.loads(file.read_text())
        ranks = 2 if content["step"] <= 5 else 1
        first = (content["step"] - 1) * 8 + content["rank"]
        for i, key in enumerate(content["keys"]):
            assert consumed.setdefault(first + ranks * i, key) == key
    manifest = load_manifest(place.data)
    order = Order(manifest.counts, batch=8, streams=4, window=8, seed=values["seed"])
    starts = [0, *manifest.counts.cumsum()]
    places = [order.locate(position) for position in range(9 * 8)]
    assert [consumed[p] for p in sorted(consumed)] == [f"{starts[at.shard] + at.row:06d}" for at in places]

    # Nine steps that were none: counted, and the weights are those that the seed draws.
    assert numbers(run_dir)[9]["bad/steps"] == 9
    assert checkpoint.step_of(checkpoint.latest(run_dir)) == 9
    after = load_file(checkpoint.latest(run_dir) / "weights.safetensors")
    drawn = build_student(Recipe.model_validate(values)).state_dict()
    assert after.keys() == drawn.keys()
    assert all(torch.equal(after[name], drawn[name]) for name in drawn)
    moments = load_file(checkpoint.latest(run_dir) / "optimizer.safetensors")
    assert not any(tensor.any() for tensor in moments.values())
