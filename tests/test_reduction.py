"""Gradients averaged beside the backward pass: what is sent when, and what the parameters then have.

On several ranks the engine's tests hold the results, under every stage, against float64 (tests/test_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcf.engine.reduction import Reduction

WIDTH = 6


class Net(nn.Module):
    """Four layers, one after the other, and a parameter that is used only if asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.seldom = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, whole: bool = False) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum() + (self.seldom.sum() if whole else 0)


@pytest.fixture
def sent(world, monkeypatch) -> list[str]:
    """What happens, in order: "sent N elements", and whatever a test notes between."""
    events: list[str] = []
    plain: Callable = dist.all_reduce

    def all_reduce(tensor: Tensor, async_op: bool = False):
        assert async_op, "the backward pass would wait"
        events.append(f"sent {tensor.numel()}")
        return plain(tensor, async_op=True)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return events


def inputs(number: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(number))


def test_buckets_are_sent_while_the_backward_pass_goes_on(sent):
    net = Net()
    reduction = Reduction(list(net.parameters()), ranks=1)
    for index, layer in enumerate(net.layers):
        layer.weight.register_hook(lambda _, index=index: sent.append(f"layer {index}"))
    reduction.begin()
    net(inputs(0), whole=True).backward()
    before_the_end = list(sent)
    reduction.finish()
    numbers = [int(event.split()[1]) for event in sent if event.startswith("sent")]
    assert sum(numbers) == sum(p.numel() for p in net.parameters())
    # A layer has 42 elements, and the model's eighth is 22: its weight is a bucket, its bias one with what stands before.
    assert len(numbers) >= 6
    assert before_the_end.index(f"sent {numbers[0]}") < before_the_end.index("layer 0"), "nothing was sent beside it"
    assert sum(event.startswith("sent") for event in before_the_end) >= len(numbers) - 1


def test_gradients_are_the_mean_of_what_micro_batches_have_added_up(sent):
    """Ranks that all have the same: the sum of one group's only rank, divided by the two that are claimed, is the half."""
    plain, net = Net(), Net()
    reduction = Reduction(list(net.parameters()), ranks=2)
    for step in range(3):
        for module in (plain, net):
            module.zero_grad()
        for number in range(3):
            plain(inputs(3 * step + number), whole=True).backward()
            if number == 2:
                assert not any(event.startswith("sent") for event in sent), "only the last micro-batch is announced"
                reduction.begin()
            net(inputs(3 * step + number), whole=True).backward()
        reduction.finish()
        sent.clear()
        for ours, theirs in zip(net.parameters(), plain.parameters()):
            assert torch.equal(ours.grad, theirs.grad / 2)  # halves are exact


def test_what_a_step_leaves_out_gets_zeros_and_holds_up_nothing_for_good(sent):
    net = Net()
    reduction = Reduction(list(net.parameters()), ranks=1)
    for whole in (False, True, False):
        net.zero_grad()
        reduction.begin()
        net(inputs(0), whole=whole).backward()
        reduction.finish()
        assert torch.equal(net.seldom.grad, torch.full((3,), float(whole)))
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.layers.parameters())


def test_a_parameter_larger_than_a_bucket_is_one(sent):
    class Lopsided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1000))

    net = Lopsided()
    reduction = Reduction(list(net.parameters()), ranks=1)
    reduction.begin()
    (net.small.sum() + 3 * net.large.sum()).backward()
    reduction.finish()
    assert sent == ["sent 1000", "sent 2"]
    assert torch.equal(net.large.grad, torch.full((1000,), 3.0)) and torch.equal(net.small.grad, torch.ones(2))
