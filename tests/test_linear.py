"""The products of linear layers by oneDNN, against float64 and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mcf import linear, processor
from mcf.linear import LEAST

# [.., in] and out: just enough multiplications, and an odd number of rows.
SHAPE, OUT = (3, 149, 160), 480


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(linear, "_onednn", False)


def run(function, x, weight, bias, grad):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (SHAPE, (OUT, SHAPE[-1]), (OUT,), (*SHAPE[:-1], OUT))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_onednn(function, *inputs):
    """Whether a convolution was called."""
    counter = FlopCounterMode(display=False)
    with counter:
        function(*inputs)
    return torch.ops.aten.convolution in counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("weights_too", [True, False])
def test_output_and_gradients_are_those_of_float64_as_torchs_own_are(monkeypatch, weights_too):
    monkeypatch.setattr(linear, "_weights_too", lambda: weights_too)
    inputs = tensors()
    assert inputs[0].numel() * OUT >= LEAST
    exact = run(F.linear, *(tensor.double() for tensor in inputs))
    own = run(F.linear, *inputs)
    linear.use("onednn")
    ours = run(linear.linear, *inputs)
    for wanted, usual, got in zip(exact, own, ours, strict=True):
        assert got.shape == wanted.shape and got.is_contiguous()
        # Another order of the same sums: as far from float64 as torch's own is, give or take the luck of rounding.
        error, allowed = ((value.double() - wanted).norm() for value in (got, usual))
        assert error <= 3 * allowed


@pytest.mark.parametrize("weights_too", [True, False])
def test_gradients_of_weights_are_mkls_but_where_onednn_is_faster_for_them_too(monkeypatch, weights_too):
    monkeypatch.setattr(linear, "_weights_too", lambda: weights_too)
    linear.use("onednn")
    x, weight, bias, _ = tensors()
    y = linear.linear(x, weight.requires_grad_(), bias)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    called = counter.get_flop_counts()["Global"]
    assert list(called) == [torch.ops.aten.convolution_backward if weights_too else torch.ops.aten.mm]


@pytest.mark.parametrize("weights_too", [True, False])
def test_the_layer_takes_it_where_it_was_told_to_and_counts_the_same_work(monkeypatch, weights_too):
    monkeypatch.setattr(linear, "_weights_too", lambda: weights_too)
    x, weight, bias, _ = tensors()
    assert not by_onednn(linear.linear, x, weight, bias)
    linear.use("onednn")
    assert by_onednn(linear.linear, x, weight, bias)
    counts = []
    for function in (F.linear, linear.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        with FlopCounterMode(display=False) as counter:
            function(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * x.numel() * OUT


def test_other_types_small_products_autocast_and_exports_stay_torchs():
    linear.use("onednn")
    x, weight, bias, _ = tensors()
    assert not by_onednn(linear.linear, x[:, :10], weight, bias)
    assert not by_onednn(linear.linear, *tensors(torch.bfloat16)[:3])
    assert not by_onednn(linear.linear, *tensors(torch.float64)[:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(linear.linear, x, weight, bias)
    meta = [tensor.to("meta") for tensor in (x, weight, bias)]
    assert not by_onednn(linear.linear, *meta)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return linear.linear(x, weight, bias)

    program = torch.export.export(Layer(), (x,))
    assert "conv" not in str(program.graph)


def test_a_frozen_layer_keeps_nothing_of_its_input():
    linear.use("onednn")
    x, weight, bias, _ = tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear.linear(x.requires_grad_(), weight, bias)
    assert [tensor.shape for tensor in kept] == [weight.shape]


def test_a_second_derivative_is_refused():
    linear.use("onednn")
    x, weight, bias, _ = tensors()
    (first,) = torch.autograd.grad(linear.linear(x.requires_grad_(), weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("maker", "family", "flags", "capability", "wanted"),
    [
        ("AuthenticAMD", 26, "avx2 avx512f avx512_bf16", "AVX512", ["output", "weight"]),
        ("AuthenticAMD", 26, "avx2 avx512f avx512_bf16", "AVX2", []),
        ("AuthenticAMD", 25, "avx2 avx512f avx512_bf16", "AVX512", ["output"]),
        ("AuthenticAMD", 25, "avx2", "AVX2", ["output"]),
        ("AuthenticAMD", 23, "avx2", "AVX2", []),
        ("GenuineIntel", 26, "avx2 avx512f", "AVX512", []),
        ("GenuineIntel", 25, "avx2", "AVX2", []),
    ],
)
def test_auto_is_onednn_where_it_was_found_faster(monkeypatch, maker, family, flags, capability, wanted):
    info = f"vendor_id\t: {maker}\ncpu family\t: {family}\nmodel name\t: A\nflags\t: {flags}\n"
    monkeypatch.setattr(processor, "here", lambda: processor.read(info))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    linear.use("auto")
    x, weight, bias, _ = tensors()
    assert by_onednn(linear.linear, x, weight, bias) == ("output" in wanted)
    total = linear.linear(x, weight.requires_grad_(), bias).sum()
    with FlopCounterMode(display=False) as counter:
        total.backward()
    by = counter.get_flop_counts()["Global"]
    assert (torch.ops.aten.convolution_backward in by) == ("weight" in wanted)
