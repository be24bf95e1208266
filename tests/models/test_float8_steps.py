"""Steps and runs with the teacher's products in float8: as in bfloat16, refused where it cannot be, gone on with alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from mcf import checkpoint, state
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.errors import UserError
from mcf.models import float8
from mcf.models.float8 import Float8Linear, quantise
from mcf.models.vit import Block
from mcf.plan import make_plan
from mcf.step import Outcome, Step
from mcf.track.jsonl import read
from mcf.weights import load_teacher

pytestmark = pytest.mark.float8

CPU = torch.device("cpu")


def build(world, **overrides) -> Step:
    recipe = Recipe.model_validate(tiny.recipe(Path("runs/r"), Path("data"), **overrides))
    teacher = load_teacher(recipe.teacher, image_size=recipe.model.image_size, kernels=recipe.kernels)
    return Step(recipe, make_plan(recipe, 120), teacher, world)


def outcome(step: Step, number: int) -> Outcome:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (8, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8, generator=generator)
    batches = [Batch(half, torch.arange(4) + 8 * number + 4 * i, [""] * 4) for i, half in enumerate(images.split(4))]
    return step(number, iter(batches))


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_steps_go_as_they_do_in_bfloat16(world, stream):
    losses = {}
    for products in ("bfloat16", "float8"):
        step = build(world, train__precision="bf16", teacher__stream=stream, teacher__products=products)
        blocks = [block for block in step.objective.teacher.modules() if isinstance(block, Block)]
        assert all(isinstance(block.mlp.fc1, Float8Linear) == (products == "float8") for block in blocks)
        if products == "float8":
            # Rounded from what the file holds, and not from what is cast of it.
            first = load_teacher(step.recipe.teacher, image_size=tiny.SIZE).vit.blocks[0].mlp.fc1.weight
            assert torch.equal(blocks[0].mlp.fc1.weight.float(), quantise(first)[0].float())
        told = [outcome(step, number) for number in range(6)]
        assert all(one.applied for one in told)
        losses[products] = torch.stack([terms["feature"] for one in told for terms in one.terms]).double()
    # Twelve micro-batches. A feature loss is a squared distance of normalised features, that are 5 % off at most each.
    difference = (losses["float8"] / losses["bfloat16"] - 1).abs()
    assert 0 < difference.max() < 0.05, difference


def test_in_fp32_and_without_a_teacher_it_has_no_meaning(world):
    one, other = (build(world, teacher__products=products) for products in ("float8", "bfloat16"))
    assert outcome(one, 0).grad_norm == outcome(other, 0).grad_norm
    build(world, teacher__source="none", loss__feature=0, teacher__products="float8", train__precision="bf16")


def test_a_pseudo_image_with_nan_is_a_bad_step(world):
    step = build(world, train__precision="bf16", teacher__products="float8")

    def spoil(_module, inputs):
        inputs[1].data[0, 3, 5] = float("nan")

    step.objective.register_forward_pre_hook(spoil)
    told = outcome(step, 0)
    assert not told.applied and all(terms["feature"].isnan() for terms in told.terms)
    assert all(terms["contrast"].isfinite() for terms in told.terms)


def test_a_teacher_or_a_gpu_that_cannot_is_refused_when_the_step_is_built(world, monkeypatch):
    overrides = {"train__precision": "bf16", "teacher__products": "float8"}
    with pytest.raises(UserError, match="a layer from 40 to 120 channels"):
        build(world, teacher__width=40, **overrides)
    assert float8.unavailable(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    why = float8.unavailable(torch.device("cuda"))
    assert why == "NVIDIA A10 has compute capability 8.6, and float8 products need 8.9 or newer"
    monkeypatch.setattr(float8, "unavailable", lambda device: why)
    with pytest.raises(UserError, match=f"^teacher.products=float8: {why}; use teacher.products=bfloat16$"):
        build(world, **overrides)
    build(world, train__precision="fp32", teacher__products="float8")


def test_a_torch_without_such_products_or_with_wrong_ones_is_told(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("no such kernel\nand a trace")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    assert float8.unavailable(CPU) == f"torch {torch.__version__} has no float8 products on cpu: no such kernel"
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, **_: torch.full((16, 16), 15.0))
    assert float8.unavailable(CPU) == "cpu adds up 16 ones to 15"


def test_a_run_goes_on_as_if_it_had_not_stopped_and_no_other_goes_on_with_it(tmp_path):
    data = tmp_path / "shards"
    tiny.shards(data, samples=60)

    values = {"train__steps": 4, "checkpoint__every": 2, "train__precision": "bf16", "teacher__products": "float8"}

    def run(name: str, **overrides) -> tuple[int, Path]:
        run_dir = tmp_path / name
        tiny.write_recipe(run_dir, tiny.recipe(run_dir, data, **{**values, **overrides}))
        return tiny.run(run_dir), run_dir

    def losses(run_dir: Path) -> list[float]:
        return [record["loss/total"] for record in read(run_dir / "metrics.jsonl") if "loss/total" in record]

    status, whole = run("whole")
    assert status == 0, tiny.said(whole)
    status, broken = run("broken", train__stop_after=2)
    assert status == 0 and len(losses(broken)) == 2, tiny.said(broken)
    other = Recipe.model_validate(tiny.recipe(broken, data, **{**values, "teacher__products": "bfloat16"}))
    with pytest.raises(UserError, match=r"teacher.products=bfloat16 \(was float8\)"):
        state.check_same_run(checkpoint.latest(broken), other, "")
    assert run("broken")[0] == 0, tiny.said(broken)
    assert losses(broken) == losses(whole) and len(losses(whole)) == 4
