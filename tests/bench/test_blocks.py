"""The networks alone: what is measured is the step's, and it runs where torch is all there is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mcf.bench import blocks
from mcf.config import Recipe
from mcf.costs import count_flops
from mcf.kernels.bench import gpu_check
from mcf.models import float8

CPU = torch.device("cpu")
SMALL = {**blocks.SHAPE, "size": 32, "depth": 2, "width": 48, "heads": 3, "decoder": (32, 1, 2), "taps": (0, 1)}

# Packages that a machine for `make gpu-check` lacks are refused, wherever they are.
BARE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "deepspeed", "yaml", "psutil", "safetensors", "xformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["blocks", *sys.argv[1:]]
runpy.run_module("mcf.bench.blocks", run_name="__main__")
"""


def test_it_runs_where_torch_is_all_there_is(tmp_path):
    package = tmp_path / "path" / "mcf"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kernels").symlink_to(gpu_check.KERNELS, target_is_directory=True)
    gpu_check.lend(package)
    command = [
        sys.executable,
        "-c",
        BARE,
        f"out={tmp_path}",
        "only=r",
        "size=32",
        "depth=1",
        "batch=2",
        "rounds=1",
        "seconds=0",
    ]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "levers.csv").open()))
    assert [row["lever"] for row in rows] == [
        "teacher's stream bf16", "teacher float8", "teacher float8 + compiled + stream", "teacher recomputed", "all recomputed"
    ]  # fmt: skip
    assert all(row["failed"] == "left out: 0 s were over" for row in rows)
    assert "GFLOP an image" in done.stdout


@pytest.mark.float8
def test_a_row_says_what_a_lever_does_and_one_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    chosen = {
        "no": {"attention": "fastest"},
        "stream": {"stream": True},
        "recomputed": {"recompute": ("teacher", "decoder")},
        "float8": {"float8": True},
    }
    assert blocks.measure(SMALL, CPU, chosen, batch=2, rounds=3, seconds=60, out=tmp_path) == 1
    no, stream, recomputed, float8s = csv.DictReader((tmp_path / "levers.csv").open())
    assert no["failed"].startswith("UserError: attention=fastest: unknown") and not no["images_per_second"]
    for row in (stream, recomputed, float8s):
        assert float(row["images_per_second"]) > 0 and float(row["times"]) > 0 and not row["failed"]
    assert float(recomputed["gradient_difference"]) == float(recomputed["loss_difference"]) == 0
    assert 0 < float(stream["gradient_difference"]) < 0.1
    # Features of pseudo images hardly differ among tokens here, and the loss leaves out what they share: errors of a twentieth
    # (tests/models/test_float8.py) become a few times as much of the rest.
    assert 2 * float(stream["gradient_difference"]) < float(float8s["gradient_difference"]) < 0.5
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_float8_is_left_out_with_a_reason_where_a_device_lacks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(float8, "unavailable", lambda device: f"{device} is too old")
    assert blocks.measure(SMALL, CPU, {"float8": {"float8": True}}, batch=2, rounds=1, seconds=60, out=tmp_path) == 0
    (row,) = csv.DictReader((tmp_path / "levers.csv").open())
    assert row["failed"] == "left out: cpu is too old"


def test_its_operations_are_nearly_all_of_a_steps():
    recipe = Recipe()
    counted = FlopCounterMode(display=False)
    networks = blocks.build(SMALL, CPU, blocks.NONE)
    with counted:
        networks.step(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), 16)
    small = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={
                    "image_size": 32, "width": 48, "depth": 2, "heads": 3,
                    "decoder": recipe.model.decoder.model_copy(update={"width": 32, "depth": 1, "heads": 2}),
                }
            ),
            "teacher": recipe.teacher.model_copy(update={"width": 48, "depth": 2, "taps": (0, 1)}),
        }
    )  # fmt: skip
    expected = count_flops(small)
    # Of the momentum branch the encoder's forward pass alone, a third of the encoder's both: but for patches, whose
    # embedding has no gradient to hand on.
    networks_alone = expected.encoder + expected.decoder + expected.teacher + expected.encoder / 3
    assert counted.get_total_flops() == pytest.approx(networks_alone, rel=0.02)


def test_levers_of_a_device():
    names = blocks.levers(CPU, "")
    assert "compiled blocks" in names and "kernels" not in names and "attention: xformers" not in names
    assert list(blocks.levers(CPU, "recomputed")) == ["teacher recomputed", "all recomputed"]


@pytest.mark.parametrize("word", ["rounds", "speed=1", "batch="])
def test_words_that_are_unknown_are_refused(word, capsys):
    assert blocks.main([word]) == 2
    assert capsys.readouterr().err.startswith(f"error: {word}: unknown; there are out=.")
