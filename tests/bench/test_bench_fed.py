"""What a step loses to its loader: the benchmark tells a loader that keeps up from one that does not."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mcf.bench.__main__ import main
from mcf.data.dali import Decoder
from mcf.data.shards import ShardWriter, write_manifest
from mcf.step import Step

SMALL = [
    "recipe=demo", "model.image_size=32", "model.patch_size=8", "model.width=24", "model.depth=1", "model.heads=3",
    "model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2", "model.projection.hidden=16",
    "model.projection.dim=8", "teacher.width=24", "teacher.depth=2", "teacher.heads=3", "precision=fp32",
    # Two threads of a small network wait for each other at every operation, on a busy machine for longer than the loader.
    "threads=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def threads():
    """As many as before for what comes after."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    file = tmp_path / "face.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    with ShardWriter(tmp_path / "shard-00000.tar") as writer:
        for i in range(64):
            writer.add(f"face{i}", file.read_bytes())
        write_manifest(tmp_path, [writer.close()], {})
    return tmp_path


def lost(folder, capsys) -> dict:
    out = folder / "numbers.json"
    argv = ["part=fed", *SMALL, f"data.path={folder}", "batch=8", "steps=4", "rounds=3", "warmup=1", f"json_file={out}"]
    assert main(argv) == 0
    assert "loses" in capsys.readouterr().out
    return json.loads(out.read_text())


def test_a_loader_slower_than_the_step_costs_what_it_is_slower(folder, monkeypatch, capsys):
    wait, step = Decoder.wait, Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a: (time.sleep(0.05), step(*a))[1])
    monkeypatch.setattr(Decoder, "wait", lambda self: (time.sleep(0.4), wait(self))[1])
    found = lost(folder, capsys)
    # A step of 50 ms and what the small network takes, or 0.4 s for the micro-batch: where the network takes 50 ms
    # too, 3/4 is lost; a machine four times as slow still loses a quarter.
    assert found["lost"] > 0.25 and found["rows"]["loader"]["wait_share"] > 0.25
    assert found["rows"]["loader"]["seconds"][0] > 0.38  # each step pays for its own micro-batch
    assert found["rows"]["synthetic"]["wait_share"] < 0.1


def test_a_loader_that_is_faster_than_the_step_is_not_waited_for(folder, monkeypatch, capsys):
    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a: (time.sleep(0.3), step(*a))[1])
    found = lost(folder, capsys)
    assert found["rows"]["loader"]["wait_share"] < 0.1
    assert all(seconds > 0.3 for row in found["rows"].values() for seconds in row["seconds"])


def test_no_data_is_one_line(tmp_path, capsys):
    assert main(["part=fed", f"data.path={tmp_path / 'x'}"]) == 2
    assert "no such folder" in capsys.readouterr().err
