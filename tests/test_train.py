"""Training through the real parts, in processes that are killed, starved and lied to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from mcf import checkpoint, cli
from mcf.data.order import Order
from mcf.exits import INTERRUPTED, SAVED
from mcf.track.jsonl import read

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    tiny.shards(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    """A run of STEPS steps on one rank that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=STEPS))
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)
    return run_dir


def numbers(run_dir: Path) -> dict[int, dict[str, float]]:
    """What must be equal between two runs: everything but clocks and memory."""
    records = [r for r in read(run_dir / "metrics.jsonl") if "loss/total" in r]
    assert len({r["step"] for r in records}) == len(records), "a step stands twice in metrics.jsonl"
    volatile = ("time", "rate/", "memory/")
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(volatile)} for r in records}


def events(run_dir: Path, kind: str) -> list[dict]:
    return [e for e in read(run_dir / "events.jsonl") if e["kind"] == kind]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def kill_after_checkpoint(run_dir: Path, step: int, ranks: int = 1) -> None:
    """Start a run and SIGKILL every rank once the checkpoint of `step` is there."""
    processes = tiny.start(run_dir, ranks)
    deadline = time.monotonic() + 180
    while not (checkpoint.folder_of(run_dir) / f"step-{step:08d}").exists():
        assert all(p.poll() is None for p in processes), tiny.said(run_dir)
        assert time.monotonic() < deadline, tiny.said(run_dir)
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


def test_the_losses_fall(unbroken):
    told = numbers(unbroken)
    assert sorted(told) == list(range(1, STEPS + 1))
    for term in ("loss/feature", "loss/contrast"):
        first, last = (sum(told[s][term] for s in steps) / 8 for steps in (range(1, 9), range(STEPS - 7, STEPS + 1)))
        assert last < first, f"{term} went from {first} to {last}"


def test_killed_twice_and_launched_again_every_loss_is_the_unbroken_runs(unbroken, data, tmp_path):
    """DESIGN, promise 2: bitwise on the CPU with the same ranks."""
    run_dir = tmp_path / "killed"
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=STEPS))
    kill_after_checkpoint(run_dir, 8)
    kill_after_checkpoint(run_dir, 24)
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)

    assert len(events(run_dir, "resumed")) == 2
    assert all(e["step"] < STEPS for e in events(run_dir, "resumed")), "killed too late to prove anything"
    assert numbers(run_dir) == numbers(unbroken)
    ours, theirs = (tensors(checkpoint.latest(r)) for r in (run_dir, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_two_ranks_killed_and_launched_again(data, tmp_path):
    """The same on two ranks, accumulation and the momentum's updates included; one rank alone then ends the run."""
    runs = {}
    for name in ("unbroken", "killed"):
        runs[name] = tmp_path / name
        values = tiny.recipe(
            runs[name], data, ranks=2, train__steps=24, micro_batch=2, contrast__scope="step",
            model__projection__batch_norm="synchronised", momentum__update="step", train__zero_stage=2,
        )  # fmt: skip
        tiny.write_recipe(runs[name], values)
    assert tiny.run(runs["unbroken"], 2) == 0, tiny.said(runs["unbroken"])
    kill_after_checkpoint(runs["killed"], 8, ranks=2)
    assert tiny.run(runs["killed"], 2) == 0, tiny.said(runs["killed"])
    assert numbers(runs["killed"]) == numbers(runs["unbroken"])

    # From two ranks to one, and from ZeRO-2 to ZeRO-0: the same samples and masks, the same losses up to the order of
    # float32 sums. 1e-4 relative is what issue 4 promises; a single misplaced sample changes the third digit.
    alone = tmp_path / "alone"
    values |= {"name": "alone", "gpus_per_node": 1, "micro_batch": 4}
    values["train"] = {**values["train"], "zero_stage": 0}
    tiny.write_recipe(alone, values)
    kill_after_checkpoint(alone, 8)
    values |= {"gpus_per_node": 2, "micro_batch": 2}
    tiny.write_recipe(alone, values)
    assert tiny.run(alone, 2) == 0, tiny.said(alone)
    assert [e["ranks"] for e in events(alone, "resumed")] == [2]
    ours, theirs = numbers(alone), numbers(runs["unbroken"])
    assert ours.keys() == theirs.keys()
    for step in ours:
        for term in ("loss/total", "loss/feature", "loss/contrast"):
            assert ours[step][term] == pytest.approx(theirs[step][term], rel=1e-4), (step, term)


def test_told_to_stop_it_saves_and_goes_on_later(unbroken, data, tmp_path):
    run_dir = tmp_path / "stopped"
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=STEPS, checkpoint__every=1000))
    (process,) = tiny.start(run_dir)
    deadline = time.monotonic() + 120
    while len(numbers(run_dir) if (run_dir / "metrics.jsonl").exists() else ()) < 5:
        assert process.poll() is None, tiny.said(run_dir)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == SAVED, tiny.said(run_dir)
    (stopped,) = events(run_dir, "stopped")
    assert 5 <= stopped["step"] < STEPS
    assert checkpoint.step_of(checkpoint.latest(run_dir)) == stopped["step"]
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)
    assert numbers(run_dir) == numbers(unbroken)


def test_without_a_launcher_a_run_is_owned_too_and_ctrl_c_is_said(data, tmp_path):
    run_dir = tmp_path / "interrupted"
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=10_000, checkpoint__every=100_000))
    (run_dir / "recipe.yaml").rename(tmp_path / "mine.yaml")
    command = [sys.executable, "-m", "mcf.train", f"recipe={tmp_path / 'mine.yaml'}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or not numbers(run_dir):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2
    assert f"being trained by process {process.pid} on this machine" in second.stderr.splitlines()[-1]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == INTERRUPTED, (tmp_path / "log").read_text()
    assert checkpoint.step_of(checkpoint.latest(run_dir)) == max(numbers(run_dir))
    assert not (run_dir / "images").exists()  # track.images_every=0
    # The recipe is where a launcher writes it; one that the checkpoint refuses is not written.
    written = (run_dir / "recipe.yaml").read_text()
    assert cli.load_recipe([f"recipe={run_dir / 'recipe.yaml'}"]) == cli.load_recipe(
        [f"recipe={tmp_path / 'mine.yaml'}"]
    )
    refused = subprocess.run([*command, "seed=9"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "checkpoint of another recipe: seed=9" in refused.stderr
    assert (run_dir / "recipe.yaml").read_text() == written


def test_a_damaged_checkpoint_falls_back_and_another_recipe_is_refused(unbroken, data, tmp_path):
    run_dir = tmp_path / "damaged"
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=STEPS, train__stop_after=12))
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)
    newest = checkpoint.latest(run_dir)
    assert checkpoint.step_of(newest) == 12
    weights = bytearray((newest / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (newest / "weights.safetensors").write_bytes(weights)

    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=STEPS, loss__feature=10.0))
    assert tiny.run(run_dir) == 2
    last = tiny.said(run_dir).strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "loss.feature=10.0 (was 1000.0)" in last
    assert "Traceback" not in tiny.said(run_dir)

    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=STEPS))
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)
    assert "weights.safetensors does not have the checksum" in tiny.said(run_dir)
    assert [e["step"] for e in events(run_dir, "resumed")] == [8]
    assert numbers(run_dir) == numbers(unbroken)


def test_an_image_that_breaks_after_packing_is_named_and_the_run_goes_on(data, tmp_path):
    shards = tmp_path / "shards"
    tiny.shards(shards, bad={17: tiny.jpeg(17)[:200], 70: b"no JPEG at all"})
    run_dir = tmp_path / "run"
    values = tiny.recipe(run_dir, shards, train__steps=30, data__max_bad=0.1)
    tiny.write_recipe(run_dir, values)
    assert tiny.run(run_dir) == 0, tiny.said(run_dir)
    bad = events(run_dir, "bad_sample")
    assert {e["key"] for e in bad} == {"000017", "000070"}
    assert {e["shard"] for e in bad} == {"shard-00000.tar", "shard-00001.tar"}
    assert len(numbers(run_dir)) == 30
    assert numbers(run_dir)[30]["bad/samples"] == len(bad)


def test_images_that_break_on_any_rank_are_named(tmp_path):
    """One whose position is even, which rank 0 reads, and one of rank 1."""
    order = Order(np.array([45, 45, 30]), batch=8, streams=4, window=8, seed=3)
    places = {position: order.locate(position) for position in (10, 25)}
    keys = {position: f"{45 * place.shard + place.row:06d}" for position, place in places.items()}
    tiny.shards(tmp_path / "shards", bad={int(key): b"no JPEG at all" for key in keys.values()})
    run_dir = tmp_path / "run"
    values = tiny.recipe(run_dir, tmp_path / "shards", ranks=2, micro_batch=2, train__steps=6, data__max_bad=0.1)
    tiny.write_recipe(run_dir, values)
    assert tiny.run(run_dir, 2) == 0, tiny.said(run_dir)
    bad = events(run_dir, "bad_sample")
    # No other epoch comes within the six steps, nor within what is decoded ahead of them.
    assert {e["position"]: e["key"] for e in bad} == keys
    assert numbers(run_dir)[6]["bad/samples"] == len(bad) == 2


def test_a_full_disk_loses_only_the_save(data, tmp_path):
    """A real file system that is full: steps go on, the last whole checkpoint stands. The result is not there, and the
    exit says so; with space, the same launch ends the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        run_dir = disk / "run"
        tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, train__steps=12, checkpoint__keep=10))
        assert tiny.run(run_dir, logs=tmp_path) == 2, tiny.said(tmp_path)
        out = tiny.said(tmp_path)
        assert "Traceback" not in out
        assert [line for line in out.splitlines() if line.startswith("error: ")] == [out.splitlines()[-1]]
        assert not events(run_dir, "finished")
        assert "No space left on device" in out
        assert "the last whole one stands, free some space" in out
        assert "step 12/12" in out
        whole = [p for p in checkpoint.steps(run_dir) if checkpoint.verify(p) is None]
        assert whole
        assert whole == checkpoint.steps(run_dir)
        assert 0 < len(whole) < 3
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert tiny.run(run_dir, logs=tmp_path) == 0, tiny.said(tmp_path)
        assert checkpoint.latest(run_dir).name == "step-00000012"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data__path": "/nowhere"}, "data.path=/nowhere: no such folder"),
        ({"gpus_per_node": 2, "micro_batch": 2}, "1 ranks were started"),
        ({"micro_batch": 3}, "micro_batch"),
        ({"teacher__source": "moco_v3", "teacher__path": "/nowhere.pth"}, "/nowhere.pth"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, change, said):
    run_dir = tmp_path / "run"
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, **change))
    result = subprocess.run(
        [sys.executable, "-m", "mcf.train", f"run={run_dir}"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in result.stderr


def test_a_run_directory_that_cannot_be_made_is_refused_before_the_first_step(data, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(tmp_path / "run", data)))
    result = subprocess.run(
        [sys.executable, "-m", "mcf.train", f"recipe={recipe}", "output=/dev/null"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "output=/dev/null: /dev/null/run cannot be made (Not a directory)" in result.stderr
    assert "step" not in result.stdout + result.stderr


def test_no_run_directory(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mcf.train", f"run={tmp_path}/none"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert "no recipe.yaml" in result.stderr
    assert not (tmp_path / "none").exists()


def test_the_checkpoint_holds_everything_but_the_teacher(unbroken):
    folder = checkpoint.latest(unbroken)
    run = json.loads((folder / "run.json").read_text())
    assert run["progress"]["samples_seen"] == STEPS * 8
    assert run["recipe"]["teacher"]["source"] == "random"
    held = tensors(folder)
    weights = {k.split(":")[1] for k in held if k.startswith("weights")}
    assert {k.split(".")[0] for k in weights} == {"encoder", "decoder", "projector", "predictor"}
    moments = {k.split(":exp_avg.")[1] for k in held if ":exp_avg." in k}
    buffers = {k for k in weights if "running_" in k or "num_batches" in k}
    assert buffers
    assert moments == weights - buffers - {k for k in weights if k.endswith("pos_embed")}
    momentum = {k.split(":")[1] for k in held if k.startswith("momentum")}
    assert momentum == {k for k in weights if k.split(".")[0] in ("encoder", "projector")}
    assert not any("teacher" in k for k in held)
