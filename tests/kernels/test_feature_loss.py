"""The feature loss and its tap against the float64 reference: forward, gradients, and where they must not be trusted."""

import pytest
import torch
from torch import Tensor

from mcf import kernels
from mcf.kernels import reference

AXES = ("tokens", "channels")
# Whole columns and such as are read in pieces (beyond 512 tokens, 2048 channels), none a multiple of a tile.
SHAPES = [(2, 63, 40), (3, 197, 100), (1, 600, 17), (1, 1000, 33), (1, 3, 2100), (1, 1, 5)]

# A mean of float32 numbers, each of a few roundings of 6e-8 and sums over up to 2,100 values in a tree.
LOSS = {"rtol": 1e-6, "atol": 0}


def numbers(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers in float32, with a column of zeros for either axis where there is room."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if shape[1] > 2 and shape[2] > 2:
        x[0, seed], x[:, :, seed] = 0, 0
    return x.to(device)


def truth(features: Tensor, target: Tensor, axis: str, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in float64."""
    x = features.detach().double().requires_grad_()
    loss = reference.feature_loss(x, target.double(), axis, eps)
    loss.backward()
    return loss.detach(), x.grad


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """‖ours − exact‖ within a share of ‖exact‖."""
    assert ours.isfinite().all()
    assert float((ours.double() - exact).norm()) <= tolerance * float(exact.norm())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_against_float64(shape, axis, device):
    a, b, g = (numbers(*shape, seed=i, device=device) for i in range(3))
    loss, gradient = truth(a, b, axis)
    # A column of one value has a gradient of exactly zero: nothing to be relative to.
    scale = 0 if shape[{"tokens": 1, "channels": 2}[axis]] == 1 else 1

    x = a.clone().requires_grad_()
    plain = kernels.feature_loss(x, b, axis, implementation="triton")
    torch.testing.assert_close(plain.detach().double(), loss, **LOSS)
    plain.backward()
    if scale:
        # Float32's rounding of every factor: 1e-7, and not more than a few of them.
        close(x.grad, gradient, 5e-7)

    # The upstream weight makes both parts of the sum alike in size.
    weight = float(g.norm() / gradient.norm()) if scale else 1.0
    x = a.clone().requires_grad_()
    through, tapped = kernels.feature_tap(x, b, axis, implementation="triton")
    assert torch.equal(through, a) and torch.equal(tapped, plain)
    ((through * g).sum() + weight * tapped).backward()
    close(x.grad, g.double() + weight * gradient, 5e-7)


@pytest.mark.parametrize("axis", AXES)
def test_below_eps_a_norm_is_a_constant(axis, device):
    # Norms around eps: some columns are divided by their norm, others by eps, and both gradients are the reference's.
    a, b = numbers(2, 9, 12, device=device), numbers(2, 9, 12, seed=1, device=device)
    a = a * torch.logspace(-3, 0, 12, device=device) * torch.logspace(-2, 0, 9, device=device)[:, None]
    loss, gradient = truth(a, b, axis, eps=0.1)
    norms = a.norm(dim={"tokens": 1, "channels": 2}[axis])
    assert (norms < 0.1).any() and (norms > 0.1).any()
    x = a.clone().requires_grad_()
    ours = kernels.feature_loss(x, b, axis, eps=0.1, implementation="triton")
    ours.backward()
    torch.testing.assert_close(ours.detach().double(), loss, **LOSS)
    close(x.grad, gradient, 5e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, of what is not looked at
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(2, 9, 12), (1, 600, 17), (1, 3, 2100)], ids=str)
def test_without_a_bound_what_pads_a_tile_is_not_seen(shape, axis, device):
    # Columns that are whole and in pieces, tiles that are not full; none of the columns is zero.
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    loss, gradient = truth(a, b, axis, eps=0.0)
    x = a.clone().requires_grad_()
    ours = kernels.feature_loss(x, b, axis, eps=0.0, implementation="triton")
    ours.backward()
    torch.testing.assert_close(ours.detach().double(), loss, **LOSS)
    close(x.grad, gradient, 5e-7)


def test_features_that_are_nearly_the_targets_keep_their_digits(device):
    b = numbers(2, 63, 20, device=device)
    a = b + 1e-4 * numbers(2, 63, 20, seed=1, device=device)
    loss, _ = truth(a, b, "tokens")
    ours = kernels.feature_loss(a, b, implementation="triton")
    # Each difference, 1e-4 of its terms, has lost four digits of seven: 1e-3 of itself, at random over 2,500 of them.
    # 2 − 2·cos, which is 1e-8, would be nothing but rounding.
    assert float(ours) == pytest.approx(float(loss), rel=1e-4)
    # On a GPU a·scale − b·scale is one fused operation, which keeps what rounding one of the products has lost.
    assert float(kernels.feature_loss(b, b, implementation="triton")) < 1e-15


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_stream_of_taps(implementation, device):
    """Taps between layers, as the teacher has them: the last one's features lead nowhere."""
    weights = [torch.randn(24, 24, generator=torch.Generator().manual_seed(i)).to(device) / 5 for i in range(3)]
    targets = [numbers(2, 17, 24, seed=i, device=device) for i in range(3)]

    def run(x: Tensor, tap) -> Tensor:
        losses = []
        for weight, target in zip(weights, targets):
            x = x + torch.tanh(x @ weight.to(x.dtype))
            x, loss = tap(x, target.to(x.dtype))
            losses.append(loss)
        return torch.stack(losses).sum()

    start = numbers(2, 17, 24, seed=5, device=device)
    exact, ours = start.double().requires_grad_(), start.clone().requires_grad_()
    total = run(ours, lambda x, t: kernels.feature_tap(x, t, implementation=implementation))
    expected = run(exact, lambda x, t: (x, reference.feature_loss(x, t)))
    torch.autograd.backward([1000 * total, 1000 * expected])
    torch.testing.assert_close(total.detach().double(), expected.detach(), rtol=2e-6, atol=0)
    # Three layers of float32 products lie between.
    close(ours.grad, exact.grad, 5e-6)


def test_a_tap_whose_loss_or_features_are_not_used(device):
    a, b, g = (numbers(2, 9, 12, seed=i, device=device) for i in range(3))
    x = a.clone().requires_grad_()
    (kernels.feature_tap(x, b, implementation="triton")[0] * g).sum().backward()
    assert torch.equal(x.grad, g), "without its loss a tap is not there"
    x = a.clone().requires_grad_()
    kernels.feature_tap(x, b, implementation="triton")[1].backward()
    close(x.grad, truth(a, b, "tokens")[1], 5e-7)
    with torch.no_grad():
        through, loss = kernels.feature_tap(a, b, implementation="triton")
    assert torch.equal(through, a) and not loss.requires_grad


def test_inputs_used_twice(device):
    a = numbers(2, 9, 12, device=device)
    # The features are their own target, shifted; and the target gets no gradient.
    x = a.clone().requires_grad_()
    shifted = x.roll(1, dims=2)
    loss = kernels.feature_loss(x, shifted, implementation="triton") + kernels.feature_loss(
        x, a, implementation="triton"
    )
    loss.backward()
    exact = truth(a, a.roll(1, dims=2), "tokens")[1] + truth(a, a, "tokens")[1]
    close(x.grad, exact, 1e-6)
    # Twice the same tap: twice the gradient.
    y = a.clone().requires_grad_()
    b = numbers(2, 9, 12, seed=1, device=device)
    through, first = kernels.feature_tap(y, b, implementation="triton")
    _, second = kernels.feature_tap(through, b, implementation="triton")
    (first + second).backward()
    close(y.grad, 2 * truth(a, b, "tokens")[1], 5e-7)


def test_any_shape():
    hypothesis = pytest.importorskip("hypothesis")
    st, phase = hypothesis.strategies, hypothesis.Phase

    @hypothesis.settings(max_examples=12, deadline=None, derandomize=True, phases=(phase.explicit, phase.generate))
    @hypothesis.given(st.integers(1, 4), st.integers(2, 600), st.integers(2, 70), st.sampled_from(AXES))
    def check(batch, tokens, channels, axis):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b = (numbers(batch, tokens, channels, seed=i, device=device) for i in range(2))
        loss, gradient = truth(a, b, axis)
        x = a.clone().requires_grad_()
        ours = kernels.feature_loss(x, b, axis, implementation="triton")
        ours.backward()
        torch.testing.assert_close(ours.detach().double(), loss, **LOSS)
        # The gradient of a column of two values is a small difference of large ones.
        assert float((x.grad.double() - gradient).norm()) <= 2e-5 * float(gradient.norm())

    check()


# ------------------------------------------------------------------------------------------------ what is around it


def test_strided_inputs_give_the_same(device):
    a, b = numbers(2, 12, 18, device=device), numbers(2, 12, 18, seed=1, device=device)
    g = numbers(2, 12, 18, seed=2, device=device)
    results = []
    for x, t in ((a, b), (a.transpose(1, 2).contiguous().transpose(1, 2), b.repeat(1, 1, 2)[:, :, :18])):
        x = x.detach().requires_grad_()
        through, loss = kernels.feature_tap(x, t, implementation="triton")
        # A gradient that comes expanded, or transposed, as sums and transpositions leave it.
        ((through.transpose(1, 2) * g.transpose(1, 2)).sum() + 50 * loss + through.sum()).backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_through_torch_compile_without_breaks(implementation, device):
    a, b = numbers(2, 9, 12, device=device), numbers(2, 9, 12, seed=1, device=device)

    def run(x: Tensor) -> Tensor:
        x, first = kernels.feature_tap(x * 2, b, implementation=implementation)
        x, second = kernels.feature_tap(torch.sin(x), b, implementation=implementation)
        return first + second + kernels.feature_loss(x, b, "channels", implementation=implementation)

    gradients = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x = a.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        gradients.append((loss.detach(), x.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)


def test_operators_are_what_they_say(device):
    ops = torch.ops.mcf
    a, b = numbers(2, 9, 12, device=device), numbers(2, 9, 12, seed=1, device=device)
    for axis in AXES:
        torch.library.opcheck(ops.feature_loss.default, (a.clone().requires_grad_(), b, axis, 1e-12))
        columns = ops.feature_loss(a, b, axis, 1e-12)[1]
        for grad in (None, numbers(2, 9, 12, seed=2, device=device)):
            weight = torch.tensor(3.0, device=device)
            torch.library.opcheck(ops.feature_loss_backward.default, (weight, grad, a, b, columns, axis))


def test_autocast_does_not_touch_it(device):
    a, b = numbers(2, 9, 12, device=device), numbers(2, 9, 12, seed=1, device=device)
    outside = kernels.feature_loss(a, b, implementation="triton")
    with torch.autocast(device.type, torch.bfloat16):
        x = a.clone().requires_grad_()
        through, inside = kernels.feature_tap(x, b, implementation="triton")
    assert torch.equal(inside, outside) and through.dtype == inside.dtype == torch.float32


def test_a_bfloat16_stream_and_mixed_types(device):
    a, b = numbers(2, 63, 40, device=device), numbers(2, 63, 40, seed=1, device=device)
    for x, t in ((a.bfloat16(), b.bfloat16()), (a.bfloat16(), b), (a, b.bfloat16())):
        loss, gradient = truth(x, t, "tokens")
        x = x.requires_grad_()
        ours = kernels.feature_loss(x, t, implementation="triton")
        ours.backward()
        assert x.grad.dtype == x.dtype and ours.dtype == torch.float32
        torch.testing.assert_close(ours.detach().double(), loss, **LOSS)
        # Computed in float32 and rounded once, or cut off, which is all that the interpreter can do: 2⁻⁸ at most.
        close(x.grad, gradient, 2**-8 if x.dtype == torch.bfloat16 else 5e-7)


def test_float64_is_the_references_and_passes_gradcheck():
    a, b = (numbers(2, 5, 4, seed=i).double() for i in range(2))
    a[0, 0], a[:, :, 0] = 1, 1  # a norm of zero has no derivative
    for axis in AXES:
        check = lambda x, axis=axis: sum(kernels.feature_tap(x, b, axis)[1:])  # noqa: E731
        assert torch.autograd.gradcheck(check, (a.requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_on_a_cpu_auto_is_the_reference_to_the_bit():
    a, b = numbers(2, 9, 12), numbers(2, 9, 12, seed=1)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    through, ours = kernels.feature_tap(x, b)
    assert torch.equal(ours, reference.feature_loss(y, b)) and through is x
    torch.autograd.backward([ours, reference.feature_loss(y, b)])
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("implementation", ["auto", "triton", "reference"])
@pytest.mark.parametrize("function", [kernels.feature_loss, kernels.feature_tap])
def test_what_does_not_fit_is_one_line(function, implementation):
    a = numbers(2, 5, 4)
    for wrong, error, words in [
        ((a, a[:, :4]), ValueError, r"target has shape \[2, 4, 4\]; it must be the features': \[2, 5, 4\]"),
        ((a[0], a[0]), ValueError, r"features has shape \[5, 4\]"),
        ((a[:0], a[:0]), ValueError, r"features has shape \[0, 5, 4\].*none of them 0"),
        ((a.long(), a), TypeError, "features is int64; it must be floating point"),
        ((a, a.long()), TypeError, "target is int64; it must be floating point"),
        ((a, a, "rows"), ValueError, "axis='rows' is none of tokens, channels"),
        ((a, a.to("meta")), ValueError, "target is on meta and features on cpu"),
    ]:
        with pytest.raises(error, match=words) as caught:
            function(*wrong, implementation=implementation)
        assert function.__name__ in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 197, 768), (5, 257, 1280), (3, 1025, 384), (2, 63, 100)], ids=str)
def test_gpu_against_float64_and_to_the_bit(shape, dtype, axis):
    a, b, g = (numbers(*shape, seed=i, device="cuda").to(dtype) for i in range(3))
    loss, gradient = truth(a, b, axis)
    weight = float(g.norm() / gradient.norm())
    results = []
    for _ in range(3):
        x = a.clone().requires_grad_()
        through, ours = kernels.feature_tap(x, b, axis)
        ((through * g).sum() + weight * ours).backward()
        results.append((ours.detach(), x.grad))
    torch.testing.assert_close(results[0][0].double(), loss, **LOSS)
    # bfloat16: rounded to nearest, once: 2⁻⁹ at most.
    close(results[0][1], g.double() + weight * gradient, 2**-9 if dtype == torch.bfloat16 else 5e-7)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@pytest.mark.gpu
def test_gpu_beyond_32_bit_addresses():
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    batch, tokens, channels = 14_300, 197, 768  # 2.16e9 values
    a = torch.randn(batch, tokens, channels, device="cuda", dtype=torch.bfloat16)
    b = a.roll(1, dims=2)
    columns = torch.ops.mcf.feature_loss(a, b, "tokens", 1e-12)[1].view(3, batch, channels)
    weight = torch.tensor(float(a.numel()), device="cuda")
    grad = torch.ops.mcf.feature_loss_backward(weight, None, a, b, columns.flatten(1), "tokens")
    last = torch.ops.mcf.feature_loss(a[-2:], b[-2:], "tokens", 1e-12)[1]
    weight = torch.tensor(float(a[-2:].numel()), device="cuda")
    expected = torch.ops.mcf.feature_loss_backward(weight, None, a[-2:], b[-2:], last, "tokens")
    assert torch.equal(columns[:, -2:].flatten(1), last)
    # The weights undo the share of one value, which is rounded apart for each.
    torch.testing.assert_close(grad[-2:], expected, rtol=2**-7, atol=0)


@pytest.mark.gpu
def test_gpu_does_not_wait_for_the_device():
    a, b = (numbers(3, 63, 40, seed=i, device="cuda") for i in range(2))
    a.requires_grad_()
    sum(kernels.feature_tap(a, b)[1:]).backward()  # compiled before, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(kernels.feature_tap(a, b)[1:]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
