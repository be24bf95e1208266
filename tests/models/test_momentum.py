"""The momentum branch: the average, what it leaves alone, and taking a step back."""

import copy

import pytest
import torch

from mcf import kernels
from mcf.models import MomentumBranch, build_student


@pytest.fixture
def pair(recipe):
    student = build_student(recipe)
    branch = MomentumBranch(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return student, branch


def test_it_starts_as_a_copy_without_gradient(recipe):
    student = build_student(recipe)
    branch = MomentumBranch(student)
    theirs = student.state_dict()
    assert set(branch.state_dict()) == {n for n in theirs if n.startswith(("encoder.", "projector."))}
    assert all(torch.equal(t, theirs[n]) for n, t in branch.state_dict().items())
    assert not any(p.requires_grad for p in branch.parameters())
    assert {p.data_ptr() for p in branch.parameters()}.isdisjoint(p.data_ptr() for p in student.parameters())


def test_update_moves_parameters_and_no_buffers(pair):
    student, branch = pair
    before = copy.deepcopy(branch.state_dict())
    parameters = dict(student.named_parameters())
    branch.update(parameters, 0.9)
    for name, tensor in branch.state_dict().items():
        if name in parameters:
            expected = 0.9 * before[name].double() + 0.1 * parameters[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=3e-7, atol=3e-7)  # three float32 roundings
        else:
            assert torch.equal(tensor, before[name])
    branch.update(parameters, 0.0)
    assert all(torch.equal(p, parameters[n]) for n, p in branch.named_parameters())


def test_update_needs_every_parameter(pair):
    student, branch = pair
    parameters = dict(student.named_parameters())
    del parameters["encoder.norm.bias"]
    with pytest.raises(KeyError, match=r"encoder\.norm\.bias"):
        branch.update(parameters, 0.9)


def test_keys_come_from_batch_statistics_and_move_the_running_ones(pair, images):
    _, branch = pair
    branch.eval()  # has no effect: the branch stays in training mode
    ids, _ = kernels.mask(0, torch.arange(5), kernels.MOMENTUM, 16, 4)
    before = branch.projector[4].running_mean.clone()
    k = branch(images, ids)
    # The last BatchNorm has no affine part: each dimension of the keys has mean 0 and variance 1 over the batch.
    torch.testing.assert_close(k.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(k.var(0, correction=0), torch.ones(8), rtol=0, atol=1e-3)
    assert not k.requires_grad and not torch.equal(branch.projector[4].running_mean, before)


def test_without_a_mask_all_patches_are_seen(pair, images):
    _, branch = pair
    everything = torch.arange(16).expand(5, -1)
    torch.testing.assert_close(branch(images), branch(images, everything), rtol=0, atol=1e-4)


def test_restore_takes_parameters_and_buffers_back(pair, images):
    student, branch = pair
    with pytest.raises(RuntimeError, match="before any snapshot"):
        branch.restore()
    # Micro-batches before the step is refused; refused steps one after the other.
    for moves in (1, 3, 0, 1, 1):
        branch(images)
        branch.snapshot()
        before = copy.deepcopy(branch.state_dict())
        for _ in range(moves):
            branch.update(dict(student.named_parameters()), 0.5)
        branch(images)
        with torch.no_grad():
            if moves:
                branch.encoder.norm.bias.fill_(float("nan"))
        branch.restore()
        after = branch.state_dict()
        assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("rank", range(3))
def test_pieces_move_as_the_whole_does(pair, rank):
    """Three ranks, which divide hardly any size here; gathering them is tested in tests/test_stages.py."""
    student, whole = pair
    split = copy.deepcopy(whole)
    split.split(rank, 3)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        length = -(-tensor.numel() // 3)
        padded = torch.cat([tensor.detach().flatten(), torch.zeros(3 * length - tensor.numel())])
        return padded[rank * length :][:length]

    pieces = {name: cut(parameter) for name, parameter in student.named_parameters()}
    for branch in (whole, split):
        branch.snapshot()
    before = {name: parameter.clone() for name, parameter in split.named_parameters()}
    for m in (0.9, 0.5):
        whole.update(dict(student.named_parameters()), m)
        split.update(pieces, m)
    for name, parameter in whole.named_parameters():
        assert torch.equal(split.get_parameter(name), cut(parameter)), name
    split.restore()
    assert all(torch.equal(parameter, before[name]) for name, parameter in split.named_parameters())

    split.load_full_state_dict(whole.state_dict())
    assert all(torch.equal(split.get_parameter(name), cut(parameter)) for name, parameter in whole.named_parameters())
    wrong = whole.state_dict() | {"projector.0.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"shape \[3, 3\] for a parameter of shape"):
        split.load_full_state_dict(wrong)
