"""Probes of real encoders: beside the losses of a run, after it, over ranks, and of one that has collapsed."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from mcf import checkpoint, probe
from mcf.config import ProbeKeys, Recipe
from mcf.models.vit import VisionTransformer
from mcf.track import Tracker
from mcf.track.jsonl import read
from mcf.weights import files

NAMES = {f"probe/{name}" for name in ("knn", "linear", "landmark_nme", "landmark_r2", "rank", "uniformity")}
STEPS = 6
VOLATILE = ("time", "rate/", "memory/", "probe/")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Six people, three videos of two frames each: a disc of the person's colour, whose edge the points lie on."""
    root, rng = tmp_path_factory.mktemp("probe") / "faces", np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for person in range(6):
        colour = rng.integers(60, 255, 3)
        for video in range(3):
            ground = rng.integers(0, 120, 3)
            for frame in range(2):
                image = np.tile(ground, (48, 48, 1)).astype(float)
                centre, radius = rng.uniform(18, 30, 2), rng.uniform(8, 14)
                rows_, columns = np.mgrid[:48, :48]
                image[np.hypot(columns - centre[0], rows_ - centre[1]) < radius] = colour
                image = (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
                name = f"P{person}_{video}{frame}.png"
                Image.fromarray(image).save(root / "images" / name)
                points = [centre + radius * np.array(d) for d in ((-1, 0), (1, 0), (0, 1))]
                # A fourth that no box around the others fixes.
                points.append(centre + np.array([rng.uniform(-1, 1) * radius, 0]))
                rows.append(f"{name},P{person}," + ",".join(f"{v:.2f}" for p in points for v in p))
    heading = "file,person," + ",".join(f"{a}{i}" for i in range(4) for a in "xy")
    (root / "faces.csv").write_text("\n".join([heading, *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def runs(faces, tmp_path_factory) -> dict[str, Path]:
    """The same run with and without probes, on one rank, and on two under ZeRO-3."""
    root = tmp_path_factory.mktemp("runs")
    tiny.shards(root / "shards")
    asked = {"probe__data": str(faces), "probe__every": 4, "probe__neighbours": 2}
    two = {"ranks": 2, "micro_batch": 2, "train__zero_stage": 3}
    made, started = {}, []
    for name, keys in {
        "plain": {}, "probed": asked, "plain-2": two, "probed-2": two | asked | {"probe__branch": "momentum"},
    }.items():  # fmt: skip
        made[name] = root / name
        values = tiny.recipe(made[name], root / "shards", train__steps=STEPS, train__log_every=2, **keys)
        tiny.write_recipe(made[name], values)
        started.append((made[name], tiny.start(made[name], keys.get("ranks", 1))))
    try:
        for run_dir, processes in started:
            assert [p.wait(500) for p in processes] == [0] * len(processes), tiny.said(run_dir)
    finally:
        for process in (p for _, processes in started for p in processes):
            process.kill()
    return made


def numbers(run_dir: Path) -> dict[int, dict[str, float]]:
    """Lines of metrics without clocks and probes."""
    lines = read(run_dir / "metrics.jsonl")
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith(VOLATILE)} for line in lines}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What the verb tells its process, this one is not to keep."""
    monkeypatch.setattr("mcf.linear._onednn", False)
    monkeypatch.setattr("mcf.memory.keep_freed_memory", lambda: True)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.latest(run_dir)
    assert checkpoint.step_of(folder) == STEPS
    return {
        f"{path.stem}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in files.read(path, where="").content.items()
    }


def after(weights: Path, faces: Path, *keys: str) -> dict[str, float]:
    """What the verb writes."""
    out = faces.parent / f"{weights.name}.json"
    assert probe.main([f"weights={weights}", f"data={faces}", f"out={out}", "threads=1", *keys]) == 0
    return {name: float(value) for name, value in json.loads(out.read_text()).items() if name in NAMES}


@pytest.mark.parametrize("ranks", ["", "-2"])
def test_a_run_with_probes_is_the_run_without_to_the_bit(runs, ranks):
    plain, probed = runs[f"plain{ranks}"], runs[f"probed{ranks}"]
    assert list(numbers(plain)) == [2, 4, 6]
    assert numbers(probed) == numbers(plain)
    ours, theirs = tensors(probed), tensors(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_probes_are_in_mlflow_beside_the_losses(runs, monkeypatch):
    """The run's own metrics, sent as a start of the same run sends what MLflow does not have yet."""
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setattr("mcf.track.mlflow.sink.PATIENCE", 120)
    lines = [line for line in read(runs["probed"] / "metrics.jsonl") if line.keys() >= NAMES]
    values = yaml.safe_load((runs["probed"] / "recipe.yaml").read_text())
    values["track"]["mlflow"] = "local"
    tracker = Tracker(Recipe.model_validate(values), runs["probed"], start=STEPS)
    tracker.close()
    there = client(tracking_uri=f"sqlite:///{runs['probed'].parent / 'mlflow.db'}")
    for name in (*NAMES, "loss/total"):
        history = {metric.step: metric.value for metric in there.get_metric_history(tracker.run_id, name)}
        assert {line["step"]: history[line["step"]] for line in lines} == {line["step"]: line[name] for line in lines}
    assert list(history) == [2, 4, 6]  # losses come more often


@pytest.mark.parametrize(("name", "branch"), [("probed", "encoder"), ("probed-2", "momentum")])
def test_probes_stand_beside_the_losses_and_are_those_of_the_checkpoint(runs, faces, name, branch):
    lines = {line["step"]: line for line in read(runs[name] / "metrics.jsonl")}
    asked = {step for step, line in lines.items() if line.keys() >= NAMES}
    assert asked == {4, 6}, "every fourth step, and at the end"
    assert not any("probe" in key for key in lines[2])
    assert lines[6]["time/probe_s"] > 0
    verb = after(runs[name], faces, "neighbours=2", f"branch={branch}")
    assert verb.keys() == NAMES
    # One rank here, two there: batches of other sizes, whose sums differ in the last bit; shares of 36 faces do not.
    assert {k: lines[6][k] for k in NAMES} == pytest.approx(verb, rel=1e-4, abs=1e-6)
    other = after(runs[name], faces, "neighbours=2", f"branch={'encoder' if branch == 'momentum' else 'momentum'}")
    assert other["probe/uniformity"] != pytest.approx(verb["probe/uniformity"], rel=1e-4)


def test_ranks_share_the_work_and_tell_the_same(runs, faces):
    """Three: no number of theirs divides the faces' embedding and the four kinds of numbers evenly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = faces.parent / "three.json"
    command = [
        sys.executable, "-m", "mcf.probe", f"weights={runs['plain']}", f"data={faces}", f"out={out}", "threads=1",
        "features=mean", "faces=35",
    ]  # fmt: skip
    environment = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(3)
    ]
    said = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * 3
    assert "landmark_nme" in said[0] and not any(said[1:])
    one = after(runs["plain"], faces, "features=mean", "faces=35")
    three = json.loads(out.read_text())
    # Batches of other sizes add up in another order.
    assert {name: three[name] for name in NAMES} == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_collapsed_encoder_shows_and_one_that_has_diverged_stops_nothing(faces, tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, width=32, depth=2, heads=2)
    files.write(tmp_path / "whole.safetensors", vit.state_dict(), {"heads": "2"})
    whole = after(tmp_path / "whole.safetensors", faces)
    with torch.no_grad():
        vit.norm.weight.zero_()
        vit.norm.bias.uniform_(-1, 1)
    files.write(tmp_path / "fallen.safetensors", vit.state_dict(), {"heads": "2"})
    fallen = after(tmp_path / "fallen.safetensors", faces)
    assert fallen["probe/rank"] == pytest.approx(1, abs=1e-4)
    assert fallen["probe/uniformity"] == pytest.approx(0, abs=1e-6)
    assert fallen["probe/landmark_r2"] <= 0.0
    assert whole["probe/rank"] > 3 and whole["probe/uniformity"] < -0.1
    # The colour of a disc is told, and the point that moves is seen, by patches of an untrained encoder even.
    assert whole["probe/knn"] > fallen["probe/knn"] and whole["probe/landmark_r2"] > 0.1

    from mcf import distributed
    from mcf.probing.probe import Probe

    keys = ProbeKeys(data=str(faces))
    asked = Probe(keys, distributed.join(), 32)
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    state["cls_token"][0, 0, 3] = math.nan
    told = asked(state, 2)
    assert told.keys() - {"time/probe_s"} == NAMES
    assert all(math.isnan(told[name]) for name in NAMES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and (np.random.get_state()[1] == before[2]).all()


def test_an_untrained_encoder_of_the_same_shape(runs, faces, capsys):
    first, again = (after(runs["plain"], faces, "random=true") for _ in range(2))
    assert first == again
    assert "an untrained encoder shaped as the encoder of" in capsys.readouterr().out
    assert after(runs["plain"], faces, "random=true", "seed=1") != first
    assert after(runs["plain"], faces) != first


def test_the_verb_s_process_is_told_to_be_fast(runs, faces, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("mcf.memory.keep_freed_memory", lambda: told.append("memory"))
    monkeypatch.setattr("mcf.linear.use", told.append)
    after(runs["plain"], faces, "neighbours=2")
    # On a GPU there is no such memory.
    assert told == (["auto"] if torch.cuda.is_available() else ["auto", "memory"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "data is not set; give data=FOLDER"),
        (["data=/nowhere"], "data=/nowhere: no such folder"),
        (["data=x", "group=["], "group=[: no regular expression"),
        (["data=x", "group=abc"], "group=abc: captures nothing"),
        (["data=x", "out=/nowhere/x.json"], "out=/nowhere/x.json: its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(keys, said, tmp_path, capsys):
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, width=32, depth=1, heads=2)
    files.write(tmp_path / "vit.safetensors", vit.state_dict(), {"heads": "2"})
    assert probe.main([f"weights={tmp_path}/vit.safetensors", *keys]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_recipe_that_cannot_probe_is_refused_before_it_starts(faces, tmp_path):
    tiny.shards(tmp_path / "shards", samples=20)
    for keys, said in (
        ({"probe__every": 5}, "probe.every=5 needs probe.data"),
        ({"probe__every": 5, "probe__data": "/nowhere"}, "probe.data=/nowhere: no such folder"),
    ):
        values = tiny.recipe(tmp_path / "run", tmp_path / "shards", **keys)
        tiny.write_recipe(tmp_path / "run", values)
        assert tiny.run(tmp_path / "run") == 2
        assert said in tiny.said(tmp_path / "run").strip().splitlines()[-1]
