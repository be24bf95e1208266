"""The networks alone: what is measured is the step's, and it runs where torch is all there is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mcf import attention
from mcf.bench import blocks
from mcf.config import Recipe
from mcf.costs import count_flops
from mcf.kernels.bench import gpu_check
from mcf.kernels.bench.table import here
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
        "teacher's stream bf16", "teacher float8", "teacher recomputed", "all recomputed", "teacher float8 + compiled + stream"
    ]  # fmt: skip
    assert all(row["failed"] == "left out: 0 s were over" for row in rows)
    assert {(row["device"], row["torch"]) for row in rows} == {(f"{here(CPU).device}, threads: 1", torch.__version__)}
    assert "GFLOP an image" in done.stdout


@pytest.mark.float8
def test_a_row_says_what_a_lever_does_and_one_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    chosen = {
        "no": {"attention": "fastest"},
        "stream": {"stream": True},
        "recomputed": {"recompute": ("teacher", "decoder")},
        "float8": {"float8": True},
        "auto": {"attention": "auto"},
    }
    assert blocks.measure(SMALL, CPU, chosen, batch=2, rounds=3, seconds=60, out=tmp_path) == 1
    no, stream, recomputed, float8s, auto = csv.DictReader((tmp_path / "levers.csv").open())
    assert no["failed"].startswith("UserError: attention=fastest: unknown") and not no["images_per_second"]
    for row in (stream, recomputed, float8s, auto):
        assert float(row["images_per_second"]) > 0 and float(row["times"]) > 0 and not row["failed"]
    assert float(recomputed["gradient_difference"]) == float(recomputed["loss_difference"]) == 0
    assert 0 < float(stream["gradient_difference"]) < 0.1
    # Features of pseudo images hardly differ among tokens here, and the loss leaves out what they share: errors of a twentieth
    # (tests/models/test_float8.py) become a few times as much of the rest.
    assert 2 * float(stream["gradient_difference"]) < float(float8s["gradient_difference"]) < 0.5
    for row in (no, stream, auto):
        assert row["device"].startswith(here(CPU).device) and row["torch"] == torch.__version__
    taken = blocks.attention_of(SMALL, CPU, "auto")
    assert (no["attention"], stream["attention"], auto["attention"]) == ("", "math", taken)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 7 and shown[3].endswith("  math") and shown[6].endswith(f"  {taken}")


def test_attention_is_named_by_what_a_step_asks_for(monkeypatch):
    """The shapes are those of a step; and where they come to different choices, each is named."""
    asked = set()

    def resolve(implementation, *call):
        asked.add(call)
        return "math"

    monkeypatch.setattr(attention, "resolve", resolve)
    # Heads as wide as nothing else is: 16 of the encoder and teacher, 32 of the decoder.
    shape = {**SMALL, "decoder": (64, 1, 2)}
    networks = blocks.build(shape, CPU, {**blocks.NONE, "attention": "auto"})
    networks.step(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), 16)
    of_a_step, asked = asked, set()
    assert blocks.attention_of(shape, CPU, "auto") == "math"
    assert asked == of_a_step and len(asked) == 5
    monkeypatch.setattr(attention, "resolve", lambda *call: "flash" if call[-1] else "sdpa" if call[3] == 5 else "math")
    assert blocks.attention_of(shape, CPU, "auto") == "encoder math/flash, decoder flash, teacher sdpa/flash"
    assert blocks.attention_of(shape, CPU, "xformers") == "xformers", "a name is its own"


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


def test_what_is_compiled_comes_last():
    """Compiling takes minutes: where time is short, all else is known."""
    compiled = [bool(keys.get("compile")) for keys in blocks.LEVERS.values()]
    assert compiled == sorted(compiled)
    assert list(blocks.LEVERS)[-3:] == ["compiled blocks", "all", "teacher float8 + compiled + stream"]


@pytest.mark.parametrize(
    "word, said",
    [
        ("rounds", "'rounds' is not key=value; keys: out, "),
        ("speed=1", "unknown key 'speed'"),
        ("batch=", "batch=: must be a number ≥ 1"),
        ("batch=x", "batch=x: must be a number ≥ 1"),
        ("batch=0", "batch=0: must be a number ≥ 1"),
        ("batch=1.5", "batch=1.5: must be a whole number"),
        ("rounds=0", "rounds=0: must be a number ≥ 1"),
        ("depth=0", "depth=0: must be a number ≥ 1"),
        ("seconds=x", "seconds=x: must be a number ≥ 0"),
        ("size=33", "size=33: must be a multiple of 16, the patch size, from 32 on"),
        ("size=16", "size=16: must be a multiple of 16, the patch size, from 32 on"),
        (
            "out=/dev/null/x",
            "out=/dev/null/x: levers.csv cannot be written there (Not a directory); give another folder",
        ),
        ("only=nonsense", "only=nonsense: no lever of this device has it in its name; there are attention: sdpa, "),
        ("only=compiled block", None),
        (
            "only=compiled box",
            "only=compiled box: no lever of this device has it in its name; did you mean compiled blocks?",
        ),
    ],
)
def test_what_is_mistyped_is_one_line_before_anything_is_measured(word, said, tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(blocks, "measure", lambda *_, **__: measured.append(1) or 0)
    monkeypatch.chdir(tmp_path)
    assert blocks.main([word]) == (2 if said else 0)
    shown = capsys.readouterr()
    assert bool(measured) == (said is None)
    if said:
        assert shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1 and not shown.out


def test_help_tells_the_keys(capsys):
    with pytest.raises(SystemExit) as left:
        blocks.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr()
    assert all(f"  {key}=" in shown.out for key in blocks.KEYS) and not shown.err


def test_a_folder_that_is_missing_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "measure", lambda *_, **__: 0)
    assert blocks.main([f"out={tmp_path / 'a' / 'b'}"]) == 0 and (tmp_path / "a/b").is_dir()


@pytest.mark.parametrize("batch", ["1e12", "1e30"])
def test_images_that_memory_does_not_hold_are_one_line(batch, tmp_path, capsys):
    assert blocks.main([f"batch={batch}", "size=32", "depth=1", f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: batch={int(float(batch))}: images of 32 pixels cannot be allocated (")
    assert error.count("\n") == 1
