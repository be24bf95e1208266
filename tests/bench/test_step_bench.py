"""The benchmark of the step: both programs are the same step, it says so when they are not, and its numbers add up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mcf import cli, linear, precision
from mcf.bench import alone, fed, levers, programs, step
from mcf.bench.apart import Apart
from mcf.bench.plain import PlainMCF
from mcf.bench.work import Done, unlike
from mcf.config import Recipe
from mcf.engine import StepResult
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
    recipe = alone.sized(cli.load_recipe(["recipe=vit_b_20m", *SMALL]), batch=4, precision="fp32")
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


@pytest.mark.parametrize(
    "key",
    [
        "loss.feature_axis=channels", "loss.feature=0", "loss.contrast=0", "loss.pixel=1", "mask.momentum=same",
        "model.variant=clip", "contrast.scope=step", "momentum.update=step", "momentum.schedule=cosine",
    ],
)  # fmt: skip
def test_a_departure_from_the_reference_is_not_raced_against_it(key, capsys):
    assert step.main([*SMALL, key, "compare=reference"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: compare=reference: recipe vit_b_20m departs from the reference in {key.partition('=')[0]};"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize("batch", [2, 3])
def test_too_few_images_to_compare_are_refused(batch, capsys):
    assert step.main([*SMALL, f"batch={batch}", "compare=reference"]) == 2
    assert "give batch=4 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.precision=fp32"], "train.precision=fp32: has no effect on a benchmark; say precision="),
        (["micro_batch=2"], "micro_batch=2: has no effect on a benchmark; say batch="),
        (["nodes=2"], "nodes=2: has no effect on a benchmark; one rank is measured"),
        (["threads=100000"], "threads=100000: this machine has "),
        (["recipe=vit_b_negatives_512", "batch=2"], "contrast.group_size=512 "),
        (["profile=/nowhere/trace.json"], "/nowhere/trace.json"),
        (["profile=one.json", "json_file=one.json"], "profile=one.json: json_file is the same file; give two"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_built(words, said, monkeypatch, capsys):
    for part in (step, levers, fed):
        if part is not step and words[0].startswith("profile"):
            continue
        monkeypatch.setattr("mcf.step.build_student", lambda recipe: pytest.fail("a network was built"))
        argv = words if words[0].startswith("recipe") else [*SMALL, *words]
        assert part.main([*argv, *(["data.path=."] if part is fed else [])]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "name", ["demo", "faces_small", "faces_small_mae", "vit_s_20m", "vit_b_negatives_512", "vit_l_20m"]
)
def test_every_recipe_can_be_measured(name):
    """The teacher that a run has to be given, and the length of a run, are nothing to a benchmark."""
    recipe, _ = alone.load([f"recipe={name}"], step.StepConfig, "step")
    batch = 2 * (recipe.contrast.group_size or 4)
    found = alone.sized(recipe, batch=batch, precision="fp32")
    assert found.batch == found.micro_batch == batch and found.world_size == 1 and found.model == recipe.model
    plan = programs._plan(found)
    assert plan.accumulation == 1 and plan.warmup_steps == 0
    if recipe.teacher.source not in ("none", "checkpoint"):
        assert (found.teacher.width, found.teacher.depth) == (recipe.teacher.width, recipe.teacher.depth)


def test_a_recipe_without_a_teacher_is_measured_in_its_own_precision(tmp_path, capsys):
    file, pieces = tmp_path / "step.json", [key for key in SMALL if not key.startswith("teacher")]
    argv = ["recipe=faces_small_mae", *pieces, "batch=4", "steps=2", "warmup=1", "threads=1", f"json_file={file}"]
    assert step.main([*argv, f"profile={tmp_path / 'trace.json'}"]) == 0, capsys.readouterr().err
    result = json.loads(file.read_text())
    recipe = cli.load_recipe(["recipe=faces_small_mae"])
    assert recipe.train.precision in ("auto", result["precision"])
    assert result["zero_stage"] == 0 and "launches" in result
    assert result["command"].startswith("python -m mcf.bench part=step recipe=faces_small_mae model.image_size=64 ")
    assert re.fullmatch(r"[0-9a-f]{7,40}(\+changes)?|", result["commit"])
    # Of what large products reach, by the median step.
    reached = result["flops"] / result["rows"]["mcf"]["p50"] / result["matmul_rate"]
    assert result["mfu"] == pytest.approx(reached) and 0 < result["mfu"] < 1.5


def test_a_process_that_is_killed_is_told_of_in_one_line():
    recipe = alone.sized(cli.load_recipe(["recipe=vit_b_20m", *SMALL]), batch=4, precision="fp32")
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


def test_unequal_work_is_told():
    names = {"a": 3.0, "target_encoder.a": 0.03}
    one = Done({"a": 4.0}, names)
    assert unlike(one, one, "fp32") == ""
    for wrong, said in (
        (Done({"a": 4.01}, names), "gradients differ by 2.5e-03 of their norm"),
        (Done({}, names), "gradients are of other parameters (a and 0 more)"),
        (Done({"a": 4.0}, {**names, "a": 2.0}), "steps differ by 3.3e-01"),
        (Done({"a": 4.0}, {**names, "target_encoder.a": 0.0}), "averages differ by 1.0e+00"),
        (Done({"a": float("nan")}, names), "gradients differ by nan"),
    ):
        assert unlike(wrong, one, "fp32").startswith(said)


@pytest.mark.parametrize("left_out", ["backward", "step", "average", "learning rate"])
def test_a_step_that_does_not_do_its_work_is_no_fast_one(left_out, monkeypatch, capsys):
    """Its losses are the reference's all the same."""
    if left_out == "backward":
        monkeypatch.setattr(
            "mcf.engine.Engine.backward", lambda self, loss: setattr(self, "_micro_step", self._micro_step + 1)
        )
    elif left_out == "step":
        monkeypatch.setattr("mcf.engine.Engine.step", lambda self, *_, **__: (self.discard(), StepResult(True, 1.0))[1])
    elif left_out == "average":
        monkeypatch.setattr("mcf.step.Step.update_momentum", lambda *_: None)
    else:
        monkeypatch.setattr("mcf.step.Step.learning_rate_at", lambda *_: 1e-9)
    argv = [*SMALL, "batch=4", "steps=1", "warmup=1", "precision=fp32", "compare=reference", "threads=1"]
    assert step.main(argv) == 1
    what = {"backward": "gradients", "step": "steps", "average": "averages", "learning rate": "steps"}[left_out]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {what} ") and error.endswith(": not the same step, its times mean nothing")


def test_ctrl_c_ends_both_processes_without_a_word():
    command = [sys.executable, "-m", "mcf.bench", "part=step", *SMALL, "batch=4", "steps=100000", "compare=reference"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_child(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error and "KeyboardInterrupt" not in error, error


def wait_for_child(parent: int) -> None:
    """Until the other process races, too: it has used a second of CPU time beyond what its imports take."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        children = [c for c in psutil.Process(parent).children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
        if children and psutil.Process(parent).cpu_times().user > 12:
            return
        time.sleep(0.1)
    pytest.fail("no race began")


def test_each_goes_first_in_turn(monkeypatch, capsys):
    order: list[str] = []
    racers = [
        step.Contestant(name, lambda i, name=name: order.append(f"{name}{i}") or {"total": 1.0}) for name in ("a", "b")
    ]
    monkeypatch.setattr(step, "prepare", lambda *_args, **_keys: racers)
    assert step.main(["steps=2", "warmup=1", "threads=1"]) == 0
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
