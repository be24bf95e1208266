"""The step on one rank, in this process: what a step that was not finite leaves behind, and which keys queries meet.

The network is the tiny one of training's tests; pictures are noise, since nothing here is about learning.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from mcf import distributed
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.data.order import Order
from mcf.errors import UserError
from mcf.kernels import dispatch
from mcf.models.patches import normalise, patchify
from mcf.plan import make_plan
from mcf.step import Outcome, Step
from mcf.track.images import to_pixels, unpatchify
from mcf.train import Training
from mcf.weights import load_teacher

BATCH, MICRO, SAMPLES = 8, 4, 120


def build(world: distributed.World, **overrides) -> Step:
    recipe = Recipe.model_validate(tiny.recipe(Path("runs/r"), Path("data"), **overrides))
    teacher = load_teacher(
        recipe.teacher, image_size=recipe.model.image_size, attention=recipe.attention, kernels=recipe.kernels
    )
    return Step(recipe, make_plan(recipe, SAMPLES), teacher, world)


def batches(step: int) -> Iterator[Batch]:
    """The micro-batches of a step: a function of its number, like the loader's."""
    generator = torch.Generator().manual_seed(step)
    for first in range(step * BATCH, (step + 1) * BATCH, MICRO):
        images = torch.randint(0, 256, (MICRO, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8, generator=generator)
        yield Batch(images, torch.arange(first, first + MICRO), [f"{p:06d}" for p in range(first, first + MICRO)])


def state(step: Step) -> dict[str, Tensor]:
    """All that a step could change: weights, moments, step counts, momentum branch, teacher, buffers of each."""
    parts = {"engine": step.engine.state_dict(), "momentum": step.momentum.state_dict()}
    parts |= {"objective": step.objective.state_dict(), "buffers": dict(step.engine.module.named_buffers())}
    return {f"{part}.{name}": t.detach().clone() for part, tensors in parts.items() for name, t in tensors.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal to the bit; NaN equals nothing."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def numbers(outcome: Outcome) -> list[dict[str, float]]:
    return [{name: value.item() for name, value in terms.items()} for terms in outcome.terms]


# ------------------------------------------------------------------------------------------- steps that are not finite


class _InfiniteGradient(torch.autograd.Function):
    """Passes a value on; the gradient that comes back is infinite."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


# What goes wrong: the module whose output is spoilt, and how.
POISONS: dict[str, tuple[Callable[[Step], nn.Module], Callable]] = {
    # NaN passes through the heads' BatchNorm, whose running statistics would keep it for ever.
    "encoder": (lambda s: s.engine.module.encoder, lambda out: out * torch.nan),
    "keys": (lambda s: s.momentum.encoder, lambda out: out * torch.nan),
    "teacher": (lambda s: s.objective.teacher, lambda out: [taps * torch.inf for taps in out]),
    # The gradient is finite, so the loss alone has to veto.
    "loss alone": (lambda s: s.objective, lambda out: out | {"total": out["total"] + torch.nan}),
    # The loss is finite, so the gradient alone has to veto.
    "gradient alone": (lambda s: s.objective, lambda out: out | {"total": _InfiniteGradient.apply(out["total"])}),
}


def poison(step: Step, name: str, micro_batch: int) -> None:
    """Spoil one micro-batch of the next step."""
    find, spoil = POISONS[name]
    if name == "teacher":
        # Its features of the images come from a method, not from the module, once a micro-batch.
        plain, calls = step.objective.teacher.features, itertools.count()
        step.objective.teacher.features = lambda x: spoil(plain(x)) if next(calls) == micro_batch else plain(x)
        return
    calls = itertools.count()
    module = find(step)
    module.register_forward_hook(lambda _m, _i, out: spoil(out) if next(calls) == micro_batch else None)


@pytest.mark.parametrize(
    ("name", "micro_batch", "overrides"),
    [
        ("encoder", 0, {}),
        ("encoder", 1, {"contrast__scope": "step", "momentum__update": "step"}),
        ("keys", 1, {}),
        ("keys", 0, {"contrast__scope": "group", "contrast__group_size": 8}),
        ("teacher", 1, {"contrast__scope": "group", "contrast__group_size": 2, "momentum__update": "step"}),
        ("loss alone", 0, {}),
        ("loss alone", 1, {"contrast__scope": "step", "train__zero_stage": 0}),
        ("gradient alone", 0, {"momentum__update": "step", "train__zero_stage": 2}),
        ("gradient alone", 1, {}),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(world, name, micro_batch, overrides):
    step, twin = build(world, **overrides), build(world, **overrides)
    assert numbers(step(0, batches(0))) == numbers(twin(0, batches(0)))
    before = state(step)
    poison(step, name, micro_batch)
    outcome = step(1, batches(1))
    assert not outcome.applied
    assert outcome.keys == [f"{p:06d}" for p in range(BATCH, 2 * BATCH)]
    finite = [terms["total"].isfinite().item() for terms in outcome.terms]
    assert all(finite) == (name == "gradient alone")
    assert differing(state(step), before) == []

    # The twin never sees step 1. From here both are the same, and both move; the average after the weights, which the
    # first step, at a rate of 0, has left where they were.
    for number in (2, 3):
        after, expected = step(number, batches(number)), twin(number, batches(number))
        assert after.applied and expected.applied
        assert numbers(after) == numbers(expected)
        assert after.grad_norm == expected.grad_norm
    assert differing(state(step), state(twin)) == []
    moved = differing(state(step), before)
    for part in ("engine.model.encoder", "engine.exp_avg.decoder", "momentum.encoder.blocks", "buffers.projector"):
        assert any(tensor.startswith(part) for tensor in moved), part


# ------------------------------------------------------------------------------------------ which keys a query meets


def run(step: Step, steps: int = 3) -> list[dict[str, float]]:
    outcomes = [step(number, batches(number)) for number in range(steps)]
    assert all(outcome.applied for outcome in outcomes)
    return [terms for outcome in outcomes for terms in numbers(outcome)]


@pytest.mark.parametrize("update", ["micro_batch", "step"])
def test_a_group_of_the_whole_batch_is_the_scope_of_the_step(world, update):
    overrides = {"momentum__update": update}
    group = build(world, contrast__scope="group", contrast__group_size=BATCH, **overrides)
    whole = build(world, contrast__scope="step", **overrides)
    assert run(group) == run(whole)
    assert differing(state(group), state(whole)) == []


@pytest.mark.parametrize("update", ["micro_batch", "step"])
def test_a_group_of_one_micro_batch_is_the_scope_of_the_micro_batch(world, update):
    overrides = {"momentum__update": update}
    group = run(build(world, contrast__scope="group", contrast__group_size=MICRO, **overrides))
    plain = run(build(world, **overrides))
    assert len(group) == len(plain) == 6
    for one, other in zip(group, plain):
        # Only the order of sums differs (one matrix product, or one of a stack): 1e-5 is a hundred roundings of
        # float32; one wrong negative in four changes the loss in the first digits.
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    other_scope = run(build(world, contrast__scope="step", **overrides))
    assert abs(other_scope[0]["contrast"] - plain[0]["contrast"]) > 0.1


@pytest.mark.parametrize(("scope", "group"), [("micro_batch", None), ("step", None), ("group", 2), ("group", 8)])
def test_every_query_meets_the_keys_of_its_neighbours_and_its_own(world, scope, group):
    """Against keys that are made here, one micro-batch at a time, by the momentum branch as it stands."""
    step = build(world, contrast__scope=scope, contrast__group_size=group, momentum__update="step")
    chunk = list(batches(0))
    with torch.no_grad():
        made = [step.momentum(batch.images, step.masks.of_momentum(batch)) for batch in chunk]
    keys = nn.functional.normalize(torch.cat(made), dim=-1)
    met: list[tuple[Tensor, Tensor]] = []
    step.objective.register_forward_pre_hook(lambda _m, args: met.append((args[3], args[4])))
    step(0, iter(chunk))

    size = {"micro_batch": MICRO, "step": BATCH, "group": group}[scope]
    found = []
    for given, labels in met:
        groups = given if given.dim() == 3 else given[None]
        a_group = MICRO // len(groups)
        found += [(groups[i // a_group], int(label)) for i, label in enumerate(labels)]
    assert len(found) == BATCH
    for position, (given, label) in enumerate(found):
        first = position // size * size
        assert torch.equal(given, keys[first : first + size])
        assert torch.equal(given[label], keys[position])


def test_keys_are_gathered_behind_the_way_forward(world, monkeypatch):
    """They are asked for when the queries are there, and not before: other ranks have that long to send theirs."""
    told: list[str] = []

    class Told(distributed.Gathering):
        def __init__(self, tensor):
            told.append("gather")
            super().__init__(tensor)

        def result(self):
            told.append("ask")
            return super().result()

    monkeypatch.setattr(distributed, "Gathering", Told)
    step = build(world)
    step.engine.module.register_forward_pre_hook(lambda *_: told.append("forward"))
    step.objective.register_forward_pre_hook(lambda *_: told.append("loss"))
    assert step(0, batches(0)).applied
    assert told == ["gather", "forward", "ask", "loss"] * (BATCH // MICRO)


# ------------------------------------------------------------------------------------------------------ its picture


def test_a_prediction_that_is_the_target_is_drawn_as_the_image(world):
    """Where the pixel loss holds it against normalised patches; beside a teacher it is drawn as the teacher sees it."""
    pixels = {"loss__pixel": 1, "loss__pixel_normalise": True}
    step = build(world, teacher__source="none", loss__feature=0, loss__contrast=0, **pixels)
    chunk = list(batches(0))
    made = iter(chunk)

    def target(_module, _inputs, out):
        patches = patchify(normalise(next(made).images), step.objective.patch_size)
        normalised = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return out[0] * 0 + normalised, out[1]

    step.engine.module.register_forward_hook(target)
    outcome = step(0, iter(chunk))
    assert [terms["pixel"] for terms in numbers(outcome)] == pytest.approx([0, 0], abs=1e-10)
    images, mask, pred = outcome.picture
    assert torch.equal(images, chunk[-1].images)
    assert mask.shape == pred.shape[:2]
    drawn = to_pixels(unpatchify(pred.numpy(), step.objective.patch_size, tiny.SIZE, tiny.SIZE))
    assert np.array_equal(drawn, images.numpy())  # rounding to whole pixels absorbs the error of float32

    taught, seen = build(world, **pixels), []
    taught.engine.module.register_forward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
    assert torch.equal(taught(0, batches(0)).picture[2], seen[-1])


def test_the_picture_is_of_the_last_micro_batch_and_marks_what_the_encoder_did_not_see(world):
    step = build(world, contrast__scope="step")
    chunk = list(batches(0))
    images, mask, pred = step(0, iter(chunk)).picture
    assert torch.equal(images, chunk[-1].images)
    ids_keep, _ = step.masks.of_encoder(chunk[-1])
    dropped = [[patch not in kept for patch in range(16)] for kept in ids_keep.tolist()]
    assert mask.tolist() == dropped
    assert pred.shape == (MICRO, 16, 8 * 8 * 3)


# --------------------------------------------------------------------------------------------------- in a whole run


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_samples(world, tmp_path):
    manifest = tiny.shards(tmp_path / "shards")
    run_dir = tmp_path / "run"
    values = tiny.recipe(run_dir, tmp_path / "shards", guard__max_bad_steps=3, checkpoint__every=2)
    recipe = Recipe.model_validate(values)
    training = Training(recipe, run_dir, world)
    calls = itertools.count()

    def spoil(_module, _inputs, out):
        # Steps 2, and 4 onwards: one alone is survived, and the count begins anew after it.
        step = next(calls) // 2 + 1
        return out | {"total": out["total"] * torch.nan} if step == 2 or step >= 4 else None

    training.step.objective.register_forward_hook(spoil)
    folder = run_dir / "bad_steps"
    with pytest.raises(UserError, match=rf"step 6: 3 non-finite steps in a row .*max_bad_steps=3.* {folder};"):
        training.run(SimpleNamespace(received=False))
    training.loader.close()

    # The order by its own arithmetic: tiny's keys are numbers in the order of the shards.
    order = Order(manifest.counts, batch=BATCH, streams=4, window=8, seed=recipe.seed)
    starts = [0, *manifest.counts.cumsum()]
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"step-{number:08d}.rank0.json" for number in (2, 4, 5, 6)]
    for file, number in zip(files, (2, 4, 5, 6)):
        places = [order.locate(position) for position in range((number - 1) * BATCH, number * BATCH)]
        assert json.loads(file.read_text())["keys"] == [f"{starts[place.shard] + place.row:06d}" for place in places]


# ------------------------------------------------------------------------------------------- kernels


def test_triton_where_it_cannot_compute_is_refused_before_anything_is_built(world, monkeypatch):
    # As without the interpreter, which the tests set.
    monkeypatch.setattr("mcf.kernels.dispatch.INTERPRETED", False)
    words = "kernels=triton: Triton computes on CUDA devices only, this is cpu; use kernels=auto"
    if world.device.type == "cuda":
        monkeypatch.setattr("mcf.kernels.dispatch.HAS_TRITON", False)
        words = "kernels=triton: Triton is not installed; use kernels=auto"
    with pytest.raises(UserError, match=words):
        build(world, kernels="triton")


@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_attention_that_is_not_there_is_refused_before_anything_is_built(world, compiled, monkeypatch):
    if world.device.type == "cuda":
        pytest.skip("cuDNN may compute it here")
    monkeypatch.setattr("mcf.step.build_student", lambda recipe: pytest.fail("a network was built"))
    with pytest.raises(UserError, match=r"^attention=cudnn: .*; use attention=auto$"):
        build(world, attention="cudnn", speed__compile=compiled)


def test_kernels_and_reference_give_the_same_loss_curve(world, caplog):
    """Ten steps of the same run, every operation by Triton (its interpreter, without a GPU) and by the reference."""

    def curve(kernels: str, nudge: float = 0.0) -> Tensor:
        """The loss terms of each micro-batch, float64 [steps, micro-batches, terms]."""
        step = build(world, kernels=kernels)
        with torch.no_grad():
            for parameter in step.engine.module.parameters():
                parameter.mul_(1 + nudge)
        outcomes = [step(index, batches(index)) for index in range(10)]
        assert all(outcome.applied for outcome in outcomes)
        values = [[[o[name] for name in ("feature", "contrast", "total")] for o in numbers(out)] for out in outcomes]
        return torch.tensor(values, dtype=torch.float64)

    def apart(curve: Tensor) -> Tensor:
        return ((curve - reference) / reference).abs().amax((0, 1))

    said = {}
    for kernels in ("reference", "triton"):
        # What was said in other tests is said again.
        dispatch._resolve.cache_clear()
        dispatch._say.cache_clear()
        caplog.clear()
        with caplog.at_level("INFO", logger="mcf.kernels.dispatch"):
            said[kernels] = (
                curve(kernels),
                sorted(r.getMessage() for r in caplog.records if r.name == "mcf.kernels.dispatch"),
            )
    operations = ("feature_tap", "info_nce", "mask", "patch_gather", "token_restore")
    for kernels, (_, lines) in said.items():
        assert [line.split()[0] for line in lines] == list(operations)
        assert all(line.endswith(f": {kernels} (as asked)") for line in lines), lines

    reference, ours = said["reference"][0], said["triton"][0]
    steps = reference[..., 2].mean(dim=1)
    assert steps[-4:].mean() < 0.93 * steps[:4].mean(), "a curve that does not move shows nothing"
    # Each operation is held against float64 elsewhere, to a few roundings; here they may go on through ten steps. What
    # roundings come to in this run shows where all weights start off by one bit: the reference's own curve then moves by
    # 2e-7 (total) and 5e-6 (contrast). Kernels may differ by as much, and a few times that where processors round
    # differently.
    assert (apart(curve("reference", nudge=2**-23)) < torch.tensor([2e-6, 2e-5, 2e-6])).all()
    assert (apart(ours) < torch.tensor([2e-6, 2e-5, 2e-6])).all(), apart(ours)
