"""The benchmark of the step: both programs are the same step, it says so when they are not, and its numbers add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mcf import cli, linear, precision
from mcf.bench import levers, step
from mcf.bench.apart import Apart
from mcf.bench.plain import PlainMCF
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.parity.step import one_ulp

SMALL = [
    "model.image_size=64", "model.width=48", "model.depth=2", "model.heads=3", "model.decoder.width=32",
    "model.decoder.depth=1", "model.decoder.heads=2", "model.projection.hidden=32", "model.projection.dim=16",
    "teacher.width=48", "teacher.depth=3", "teacher.heads=3", "teacher.taps=[0,2]",
]  # fmt: skip


@pytest.fixture
def one_thread():
    """BatchNorm over three samples makes 1e-5 of the last bit of a sum: the numbers were made on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_plain_step_is_the_reference(golden_dir, one_thread):
    """The benchmark's opponent computes the golden numbers, so beating it is beating the reference."""
    numbers = load_file(golden_dir / "rank0.safetensors")
    before = {k.removeprefix("before."): v for k, v in numbers.items() if k.startswith("before.")}
    pairs = {"mim": "feature", "con": "contrast", "loss": "total", "pred": "pred", "q": "q", "k": "k"}
    pairs |= {name: name for name in numbers if name.startswith("grad.")}
    plain, *moved = (_plain_step(state, numbers) for state in (before, *(one_ulp(before, seed) for seed in range(3))))
    for golden, name in pairs.items():
        scale = numbers[golden].abs().max()
        # 1e-5, or what float32 leaves open: the machine that made the numbers may sum in another order, and BatchNorm
        # over three samples multiplies that (mcf.parity). Everything else would be a mistake.
        open_by = max((other[name] - plain[name]).abs().max() for other in moved)
        assert open_by < 1e-3 * scale + 1e-7, name
        assert (plain[name] - numbers[golden]).abs().max() <= max(1e-5 * scale + 1e-7, open_by), name


def _plain_step(state: dict[str, torch.Tensor], numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and gradients (`grad.NAME`) of the plain step from a state in the released names."""
    shapes = {"width": 48, "depth": 2, "heads": 2, "decoder": {"width": 32, "depth": 2, "heads": 2}}
    recipe = Recipe.model_validate({"model": {**shapes, "projection": {"hidden": 96, "dim": 32}}})
    model = PlainMCF(recipe, (196, 16, 32, 12, 2))
    model.load_released(state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (numbers["u8"] / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    found = model(pixels, numbers["noise_online"], numbers["noise_target"])
    found["total"].backward()
    gradients = {f"grad.{n}": p.grad for n, p in model.named_parameters() if f"grad.{n}" in numbers}
    return {name: tensor.detach() for name, tensor in found.items()} | gradients


def _bench(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mcf.bench", "part=step", *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_programs_take_the_same_steps(tmp_path, precision):
    file = tmp_path / "step.json"
    done = _bench("batch=4", "steps=3", "warmup=0", f"precision={precision}", "compare=reference", f"json_file={file}")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(file.read_text())
    ours, theirs = result["rows"]["mcf"], result["rows"]["reference"]
    for name in ("feature", "contrast", "total"):
        assert ours["first_losses"][name] == pytest.approx(
            theirs["first_losses"][name], rel=step.TOLERANCE[precision][name]
        )
    assert 1000 * ours["first_losses"]["feature"] + ours["first_losses"]["contrast"] == pytest.approx(
        ours["first_losses"]["total"], rel=1e-5
    )
    for row in (ours, theirs):
        assert len(row["seconds"]) == 3
        assert row["images_per_second"] == pytest.approx(4 / sorted(row["seconds"])[1], rel=1e-2)
        assert row["best"] >= row["images_per_second"]
        assert row["p50"] == pytest.approx(sorted(row["seconds"])[1], rel=1e-2) and row["p99_to_p50"] >= 1
        # Each process says what itself has held: a Python with torch, and a network of kilobytes.
        assert 1e8 < row["peak_memory"] < 2e9
    assert result["batch"] == 4 and result["precision"] == precision and result["torch"] == torch.__version__
    assert "times as fast" in done.stdout and json.loads(done.stdout.strip().splitlines()[-1])["rows"]


def test_the_reference_in_another_precision(tmp_path):
    file = tmp_path / "step.json"
    keys = ("batch=4", "steps=1", "warmup=0", "precision=bf16", "compare=reference", "reference_precision=fp32")
    done = _bench(*keys, f"json_file={file}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert " times as fast as the reference in fp32 (" in done.stdout
    result = json.loads(file.read_text())
    assert (result["precision"], result["reference_precision"]) == ("bf16", "fp32")
    recipe = step.sized(cli.load_recipe(["recipe=vit_b_20m", *SMALL]), batch=4, precision="fp32")
    reference = Apart("reference", recipe, threads=1)
    expected = reference.step(0).losses
    reference.close()
    assert result["rows"]["reference"]["first_losses"] == expected
    # To float32's last bits the losses would be equal only if ours were in float32, too.
    assert result["rows"]["mcf"]["first_losses"]["total"] != pytest.approx(expected["total"], rel=1e-6)


def test_a_precision_of_no_reference_is_refused():
    done = _bench("reference_precision=fp32")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("give compare=reference too")


def test_a_departure_from_the_reference_is_not_raced_against_it():
    done = _bench("loss.feature_axis=channels", "compare=reference")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "loss.feature_axis" in done.stderr.strip().splitlines()[-1]


def test_a_process_that_is_killed_is_told_of_in_one_line():
    recipe = step.sized(cli.load_recipe(["recipe=vit_b_20m", *SMALL]), batch=4, precision="fp32")
    reference = Apart("reference", recipe, threads=1)
    assert reference.step(0).losses["feature"] > 0
    reference._process.kill()
    with pytest.raises(UserError, match=r"^the process of reference has ended \(status -9\).*smaller batch$"):
        reference.step(1)


def test_unequal_losses_are_told():
    same = {"feature": 0.03, "contrast": 0.8, "total": 30.8}
    ours = step.Contestant("mcf", lambda _: {}, losses=[same])
    for name in same:
        for wrong in (same[name] * 1.001, float("nan")):
            other = step.Contestant("reference", lambda _: {}, losses=[{**same, name: wrong}])
            assert step.unequal([ours, other], "fp32").startswith(f"{name} is")
            assert step.unequal([other, ours], "fp32").startswith(f"{name} is")
    assert step.unequal([ours, ours], "fp32") == "" == step.unequal([ours], "fp32")


def test_each_goes_first_in_turn(monkeypatch, capsys):
    order: list[str] = []
    racers = [
        step.Contestant(name, lambda i, name=name: order.append(f"{name}{i}") or {"total": 1.0}) for name in ("a", "b")
    ]
    monkeypatch.setattr(step, "prepare", lambda *_args, **_keys: racers)
    monkeypatch.setattr(step.distributed, "join", lambda: type("World", (), {"device": torch.device("cpu")}))
    assert step.main(["steps=2", "warmup=1"]) == 0
    assert order == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert [len(r.seconds) for r in racers] == [2, 2], "the first is not on the clock"


@pytest.mark.parametrize("part", [step, levers])
def test_auto_measures_precision_as_a_run_multiplies(part, monkeypatch, capsys):
    def choose(device):
        raise UserError(f"oneDNN: {linear._onednn}")

    monkeypatch.setattr(linear, "_onednn", False)
    monkeypatch.setattr(precision, "choose", choose)
    assert part.main(["precision=auto", "speed.linear=onednn"]) == 2
    assert "oneDNN: True" in capsys.readouterr().err
