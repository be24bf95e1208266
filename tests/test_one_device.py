"""A step's networks, losses and averages away from the host: on tensors of the device `meta`, which hold no values.

What would meet a tensor of the host's is found so on a machine without a GPU, and what is made on the host and carried over:
for that, the host would wait until the GPU has done everything before.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcf.bench.plain import PlainMCF
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.models import MomentumBranch, Objective, build_student, dropped
from mcf.models.patches import normalise
from mcf.step import Masks
from mcf.weights import load_teacher

AWAY = torch.device("meta")
BATCH = 4


class Carried(TorchDispatchMode):
    """Operations that see, or make, tensors of both sides. A number on the host may meet any tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, named, out)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors if tensor.dim() or tensor is out}) > 1:
            self.found.append(function.overloadpacket.__name__)
        return out


class Listed(TorchFunctionMode):
    """Tensors made elsewhere than on the host out of numbers that Python holds, which go there as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        makes = function in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if makes and out.device == AWAY and not any(isinstance(a, Tensor) for a in arguments[-1:]):
            self.found.append(function.__name__)
        return out


WAYS: dict[str, dict] = {
    "plain": {},
    "all patches, pixels": {"mask__momentum": "none", "loss__pixel": 1.0, "loss__pixel_normalise": True},
    "channels": {"loss__feature_axis": "channels"},
    "synchronised": {"model__projection__batch_norm": "synchronised"},
}


def recipe(**overrides) -> Recipe:
    values = tiny.recipe(Path("runs/r"), Path("data"), **overrides)
    return Recipe.model_validate({**values, "kernels": "reference", "attention": "sdpa"})


def batch(config: Recipe) -> Batch:
    size = config.model.image_size
    images = torch.empty(BATCH, size, size, 3, dtype=torch.uint8, device=AWAY)
    return Batch(images, torch.empty(BATCH, dtype=torch.int64, device=AWAY), [""] * BATCH)


@pytest.fixture
def away(monkeypatch):
    """What asks for the kind of device is told the host's where meta would not do."""
    # So that a synchronised BatchNorm does what it does among several.
    monkeypatch.setattr("mcf.models.heads._ranks", lambda: 2)
    monkeypatch.setattr("mcf.models.heads.dist.all_reduce", lambda tensor: None)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *rest, **named: autocast("cpu", *rest, **named))
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: enabled("cpu"))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_stays_where_it_is(away, way):
    config = recipe(**WAYS[way])
    student = build_student(config).to(AWAY)
    momentum = MomentumBranch(student).to(AWAY)
    teacher = load_teacher(config.teacher, image_size=config.model.image_size, attention="sdpa", kernels="reference")
    objective = Objective(config, teacher).to(AWAY)
    taken, masks = batch(config), Masks(config)
    with Listed() as listed, Carried() as carried:
        ids_keep, ids_restore = masks.of_encoder(taken)
        with torch.no_grad():
            momentum.update(dict(student.named_parameters()), 0.99)
            keys = momentum(taken.images, masks.of_momentum(taken))
        pred, q = student(taken.images, ids_keep, ids_restore)
        labels = torch.arange(BATCH, device=AWAY)
        terms = objective(taken.images, pred, q, keys, labels, dropped(ids_restore, ids_keep.shape[1]))
        terms["total"].backward()
    assert carried.found == listed.found == []
    assert {value.device for value in terms.values()} == {AWAY}
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_the_plain_step_stays_where_it_is(away):
    """The one that the benchmark holds ours against."""
    config = recipe()
    teacher = config.teacher
    grid = (config.model.image_size // teacher.patch_size) ** 2
    model = PlainMCF(config, (grid, teacher.patch_size, teacher.width, teacher.depth, teacher.heads)).to(AWAY)
    taken = batch(config)
    noise = torch.empty(BATCH, config.model.patches, device=AWAY)
    with Listed() as listed, Carried() as carried:
        losses = model(normalise(taken.images), noise, noise)
        losses["total"].backward()
    assert carried.found == listed.found == []
    assert {losses[name].device for name in ("feature", "contrast", "total")} == {AWAY}


def test_what_is_carried_over_is_found():
    values, labels = torch.empty(3, 3, device=AWAY), torch.arange(3)
    with Listed() as listed, Carried() as carried:
        torch.nn.functional.cross_entropy(values, labels.to(AWAY))
        values - values.new_tensor([1.0, 2.0, 3.0]) - torch.tensor([1.0], device=AWAY)
        values - torch.full((), 2.0)  # one number of the host's goes with the launch
    assert carried.found == ["_to_copy"] and listed.found == ["new_tensor", "tensor"]
    with Carried() as carried, pytest.raises(RuntimeError, match="device"):
        values + labels
