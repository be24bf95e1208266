"""Names of the released checkpoint: every one of the golden state finds its place in our modules, and comes back."""

import pytest
import torch
from safetensors import safe_open

from mcf.config import ModelConfig
from mcf.models import MCF, MomentumBranch
from mcf.weights.reference import from_reference, ours, theirs, to_reference


@pytest.fixture
def released(golden_dir):
    with safe_open(golden_dir / "rank0.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("before.")]  # noqa: SIM118
        return {name.removeprefix("before."): file.get_tensor(name) for name in names}


def test_there_and_back(released):
    state = from_reference(released)
    back = to_reference(state.student, state.momentum, state.teacher)
    heads = {"perceptual_loss.model.head.weight", "perceptual_loss.model.head.bias"}
    assert released.keys() - back.keys() == heads
    assert all(torch.equal(back[name], released[name]) for name in back)


def test_our_modules_take_them_strictly(released):
    config = {
        "width": 48, "depth": 2, "heads": 2,
        "decoder": {"width": 32, "depth": 2, "heads": 2}, "projection": {"hidden": 96, "dim": 32},
    }  # fmt: skip
    network = MCF(ModelConfig.model_validate(config))
    branch = MomentumBranch(network)
    state = from_reference(released)
    network.load_state_dict(state.student)
    branch.load_state_dict(state.momentum)
    # Both branches hold a fully trained-looking encoder of equal shapes: the names alone tell them apart.
    assert torch.equal(network.encoder.norm.weight, released["online_encoder.norm.weight"])
    assert torch.equal(branch.projector[3].weight, released["target_encoder.fc.3.weight"])
    assert torch.equal(network.decoder.pred.bias, released["decoder_pred.bias"])


def test_foreign_names_are_refused():
    for name in ("encoder.norm.weight", "module.base_encoder.norm.weight"):
        with pytest.raises(KeyError):
            ours(name)
    with pytest.raises(KeyError):
        theirs("optimiser.step")
