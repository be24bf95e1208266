"""`train.precision: auto`: the faster one of the machine, chosen once in a run's life."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import tiny
import torch

from mcf import checkpoint, linear, precision, state
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.step import Step
from mcf.train import Training

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "chosen", "words"),
    [(0.5, "bf16", "2.00 times"), (0.95, "fp32", "1.05 times"), (1.6, "fp32", "0.62 times")],
)
def test_the_faster_one_is_chosen_and_said(monkeypatch, caplog, bf16, chosen, words):
    monkeypatch.setattr(precision, "product_seconds", lambda: {torch.float32: 1.0, torch.bfloat16: bf16})
    with caplog.at_level(logging.INFO, "mcf.precision"):
        assert precision.choose(CPU) == chosen
    (record,) = caplog.records
    assert record.getMessage().startswith(f"precision: {chosen} ") and words in record.getMessage()


def test_what_is_measured_is_a_product_in_each(monkeypatch):
    """Against a machine whose bfloat16 is known to be slow: each of its products waits."""
    linear = torch.nn.functional.linear
    seen = []

    def slow(x, weight, bias=None):
        seen.append((x.dtype, tuple(x.shape), tuple(weight.shape)))
        if x.dtype == torch.bfloat16:
            for _ in range(20):
                linear(x, weight)
        return linear(x, weight)

    monkeypatch.setattr(precision, "SHAPE", (64, 64, 128))
    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    seconds = precision.product_seconds()
    assert seconds[torch.bfloat16] > 2 * seconds[torch.float32] > 0
    assert [dtype for dtype, *_ in seen] == [torch.float32, torch.bfloat16] * precision.REPEATS
    assert {tuple(shapes) for _, *shapes in seen} == {((64, 64), (128, 64))}


@pytest.mark.parametrize(("implementation", "convolutions"), [("torch", 0), ("onednn", precision.REPEATS)])
def test_float32_is_measured_as_the_run_multiplies_in_it(monkeypatch, implementation, convolutions):
    convolution, seen = torch.nn.functional.conv2d, []
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *inputs: seen.append(inputs) or convolution(*inputs))
    linear.use(implementation)
    try:
        precision.product_seconds()
    finally:
        linear.use("torch")
    assert len(seen) == convolutions and all(x.dtype == torch.float32 for x, *_ in seen)


def test_a_run_keeps_what_it_began_with(world, tmp_path, monkeypatch):
    """Chosen at the start, in the checkpoint, and no longer asked for when the run goes on."""
    tiny.shards(tmp_path / "shards")
    values = tiny.recipe(
        tmp_path / "run", tmp_path / "shards", train__precision="auto", train__steps=4, optimizer__warmup_epochs=0
    )
    answers = iter(["bf16"])
    monkeypatch.setattr(precision, "choose", lambda device: next(answers))

    def train(**train) -> Training:
        recipe = Recipe.model_validate({**values, "train": {**values["train"], **train}})
        training = Training(recipe, tmp_path / "run", world)
        training.run(SimpleNamespace(received=False, for_good=False))
        return training

    first = train(stop_after=2)
    assert first.recipe.train.precision == "bf16" and first.step.recipe.train.precision == "bf16"
    folder, _ = checkpoint.newest(tmp_path / "run")
    assert state.saved_precision(folder) == "bf16"
    again = train()
    assert again.resumed and again.progress.step == 4 and again.recipe.train.precision == "bf16"
    with pytest.raises(UserError, match=r"another recipe: train\.precision=fp32 \(was bf16\)"):
        train(precision="fp32")


def test_a_step_insists_on_one_or_the_other(world, tmp_path):
    recipe = Recipe.model_validate(tiny.recipe(tmp_path, tmp_path, train__precision="auto"))
    with pytest.raises(ValueError, match=r"train\.precision=auto"):
        Step(recipe, None, None, world)
