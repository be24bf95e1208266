"""The parts of a step's time: each is where its work is done, forward and backward, and they add up to the step."""

from __future__ import annotations

import json

import pytest
import torch

from mcf import distributed
from mcf.bench import parts, step, trace
from mcf.config import Recipe
from mcf.costs import Flops, count_flops
from mcf.errors import UserError


def _recipe(**loss: float) -> Recipe:
    return Recipe.model_validate(
        {
            "batch": 4,
            "model": {
                "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 2, "projection": {"hidden": 16, "dim": 8},
                "decoder": {"width": 16, "depth": 1, "heads": 2},
            },
            "teacher": {
                "source": "random" if not loss else "none", "allow_random": True, "width": 24, "depth": 2, "heads": 2,
                "patch_size": 8, "taps": [0, 1],
            },
            "loss": loss,
            "data": {"streams": 4},
            "optimizer": {"warmup_epochs": 0},
            "train": {"steps": 10, "precision": "fp32"},
            "micro_batch": 4,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return distributed.join()


def _watched(world, watched: bool = True, **loss: float) -> step.Contestant:
    (contestant,) = step.prepare(_recipe(**loss), world, watched=watched)
    for index in range(2):
        contestant.run(index, world.device, timed=index > 0)
    return contestant


def test_the_parts_add_up_and_change_no_loss(world):
    contestant = _watched(world)
    (seconds,) = contestant.parts
    # All but what lies between two calls of a clock, on a machine that may be busy.
    assert sum(seconds.values()) == pytest.approx(contestant.seconds[0], rel=0.05, abs=0.1)
    assert list(seconds) == [part for part in parts.PARTS if part in seconds]
    assert set(parts.PARTS) - set(seconds) == {"losses backward"}
    assert contestant.losses == _watched(world, watched=False).losses


def test_without_a_teacher_it_has_no_part(world):
    (seconds,) = _watched(world, feature=0.0, pixel=1.0).parts
    assert not [part for part in seconds if "teacher" in part]
    assert seconds["losses backward"] > 0


@pytest.fixture
def watched(world, monkeypatch):
    """A watched step, its contestant, and a function that makes the clock show one second more; else it stands still."""
    now = [0.0]
    made = []
    watch = parts.watch
    monkeypatch.setattr(parts, "watch", lambda ours: (made.append(ours), watch(ours))[1])
    monkeypatch.setattr(parts.Stopwatch, "_now", lambda self: now[0])

    def slow(*_: object) -> None:
        now[0] += 1.0

    contestant = _watched(world)
    return made[0], contestant, slow


@pytest.mark.parametrize(
    "module, forward, backward",
    [
        ("encoder.blocks.0", "encoder", "encoder backward"),
        ("decoder.blocks.0", "decoder", "decoder backward"),
        ("predictor.0", "heads", "heads backward"),
        ("projector.0", "heads", "heads backward"),
    ],
)
def test_slow_work_shows_where_it_is(world, watched, module, forward, backward):
    """A module that takes a second, forward or backward, makes its own part longer and no other."""
    ours, contestant, slow = watched
    module = ours.engine.module.get_submodule(module)
    for part, hook in ((forward, module.register_forward_pre_hook), (backward, module.register_full_backward_hook)):
        handle = hook(slow)
        contestant.run(2, world.device, timed=True)
        handle.remove()
        assert {part: s for part, s in contestant.parts[-1].items() if s} == {part: 1.0}


def test_slow_work_without_a_backward_pass(world, watched):
    ours, contestant, slow = watched
    handle = ours.momentum.encoder.blocks[0].register_forward_pre_hook(slow)
    contestant.run(2, world.device, timed=True)
    handle.remove()
    assert {part: s for part, s in contestant.parts[-1].items() if s} == {"momentum branch": 1.0}


def test_the_teachers_passes_are_told_apart(world, watched):
    ours, contestant, slow = watched
    block = ours.objective.teacher.vit.blocks[0]
    block.register_forward_pre_hook(slow)
    block.register_full_backward_hook(lambda *_: [slow() for _ in range(5)] and None)
    contestant.run(2, world.device, timed=True)
    found = {part: s for part, s in contestant.parts[-1].items() if s}
    assert found == {"teacher on the image": 1.0, "teacher on the pseudo image": 1.0, "teacher backward": 5.0}


def test_rates_are_counted_work_by_time():
    flops = Flops(encoder=6.0, decoder=4.0, heads=0.0, momentum=2.0, teacher=0.0)
    seconds = {"encoder": 1.0, "encoder backward": 2.0, "decoder": 0.5, "momentum branch": 4.0, "heads": 1.0}
    assert parts.rates(seconds, flops, images=10) == {"encoder": 20.0, "decoder": 80.0, "momentum": 5.0}
    assert parts.medians([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}
    assert parts.matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05) > 1e8
    assert set(parts.COUNTED) == set(vars(count_flops(_recipe())))


def test_a_trace_names_the_operations_of_each_part(world, tmp_path):
    contestant = _watched(world)
    path = tmp_path / "trace.json"
    result = trace.record(lambda: contestant.step(2, world.device), str(path))
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == parts.MARK + "decoder backward" for event in events)
    encoder, teacher = result["seconds"]["encoder"], result["seconds"]["teacher backward"]
    assert encoder["aten::addmm"] > 0
    assert "aten::native_layer_norm_backward" in teacher
    assert "aten::native_layer_norm_backward" not in encoder
    assert "aten::_fused_adamw_" in result["seconds"]["optimiser"]
    shown = trace.table(result).splitlines()
    assert shown[-1].startswith("all")
    with pytest.raises(UserError, match=r"profile=.*cannot be written"):
        trace.record(lambda: contestant.step(3, world.device), str(tmp_path / "no" / "trace.json"))
