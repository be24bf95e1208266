"""Float8 products of the teacher: what is rounded, and how much; the same weights for both passes."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcf.errors import UserError
from mcf.models import Teacher, float8
from mcf.models.float8 import Float8Linear, quantise
from mcf.models.vit import Block, VisionTransformer

pytestmark = pytest.mark.float8

CPU = torch.device("cpu")
# A rounding to bfloat16, of 8 significant bits.
BFLOAT16 = 2.0**-8
# Relative error of a number rounded to 4 significant bits, by norm: a uniform error over a step of 2⁻³ within [1, 2), of
# variance 2⁻⁶/12, over the mean square 1.5/ln 2 of a significand spread evenly in its logarithm. 2.45 %.
E4M3 = (2.0**-6 / 12 / (1.5 / np.log(2))) ** 0.5


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `quantise` is to do with float32 rows, in float64: numbers of e4m3, and scales."""
    scale = (np.abs(x).max(axis=1, keepdims=True) / np.float32(448)).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)
    quotient = np.clip((x / scale).astype(np.float64), -448, 448)
    # Three bits after the leading one; below 2⁻⁶ the step stays that of subnormal numbers. Ties go to even.
    exponent = np.floor(np.log2(np.maximum(np.abs(quotient), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.round(quotient / step) * step, scale.astype(np.float64)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 64)


# ------------------------------------------------------------------------------------------- one layer


def test_numbers_of_e4m3_are_rounded_to_the_nearest_and_ties_to_even():
    """All of its positive numbers, and the middles between them."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    middles = (codes[1:] + codes[:-1]) / 2
    # With 448 among them the scale is 1.
    row = np.concatenate([codes, middles, -middles]).astype(np.float32)[None]
    expected, scale = rounded(row)
    assert scale == 1 and np.array_equal(expected[0, :127], codes)
    found, found_scale = quantise(torch.from_numpy(row))
    assert found_scale.item() == 1 and np.array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_numbers(layer, dtype):
    """Against float64 on numbers that numpy rounded: both ways, scales of tokens and channels far apart."""
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 2, 64)[:, None] * torch.logspace(2, -2, 96)
    x = (torch.randn(3, 7, 96) * torch.logspace(-4, 4, 7)[:, None]).to(dtype).requires_grad_()
    cotangent = torch.randn(3, 7, 64).bfloat16()
    y = Float8Linear(layer)(x)
    y.backward(cotangent)
    assert y.dtype == torch.bfloat16 and x.grad.dtype == dtype

    weight = layer.weight.detach().numpy()
    passes = {
        "forward": (x.detach().float().reshape(-1, 96).numpy(), weight.T, layer.bias.detach().bfloat16().double().numpy(), y),
        "backward": (cotangent.float().reshape(-1, 64).numpy(), weight, 0, x.grad),
    }  # fmt: skip
    for name, (left, right, bias, found) in passes.items():
        (a, scale), (b, scale_b) = rounded(left), rounded(np.ascontiguousarray(right.T))
        a, b = a * scale, (b * scale_b).T
        expected = a @ b + bias
        # One rounding to bfloat16, and float32's of the sums.
        allowed = BFLOAT16 * np.abs(expected) + 2.0**-24 * left.shape[1] * (np.abs(a) @ np.abs(b))
        assert (np.abs(found.detach().double().reshape(expected.shape).numpy() - expected) <= allowed).all(), name


def test_the_error_is_that_of_three_bits(layer):
    x = torch.randn(512, 96, requires_grad=True)
    cotangent = torch.randn(512, 64)
    y = Float8Linear(layer)(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent.bfloat16())
    # Both factors are rounded, independently. The largest numbers of a row are no even spread within a binade: a fifth.
    expected = 2**0.5 * E4M3
    assert apart(y, layer(x)) == pytest.approx(expected, rel=0.2)
    assert apart(gradient, cotangent @ layer.weight) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_a_row_times_a_power_of_two_gives_the_same_bits_times_it(layer, exponent):
    layer.bias = None
    product, x = Float8Linear(layer), torch.randn(5, 96)
    assert torch.equal(product(x * 2.0**exponent), product(x) * 2.0**exponent)


def test_zeros_give_the_bias_and_numbers_below_all_scales_stay_finite(layer):
    product = Float8Linear(layer)
    x = torch.stack([torch.zeros(96), torch.full((96,), 1e-44)]).requires_grad_()
    y = product(x)
    assert torch.equal(y[0], layer.bias.bfloat16()) and y.isfinite().all()
    (gradient,) = torch.autograd.grad(y, x, torch.zeros_like(y))
    assert not gradient.any() and not torch.isnan(gradient).any()
    # A channel that weighs nothing.
    with torch.no_grad():
        layer.weight[3], layer.weight[:, 5] = 0, 0
    x = torch.randn(4, 96, requires_grad=True)
    y = Float8Linear(layer)(x)
    y.sum().backward()
    assert torch.equal(y[:, 3], layer.bias[3].bfloat16().expand(4)) and not x.grad[:, 5].any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(layer, compiled):
    product = Float8Linear(layer)
    if compiled:
        torch._dynamo.reset()
        product.compile(backend="inductor", fullgraph=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        x, cotangent = torch.randn(4, 96), torch.randn(4, 64).bfloat16()
        x[2, 7] = cotangent[1, 9] = value
        y = product(x.requires_grad_())
        assert y.isnan().all(dim=1).tolist() == y.isnan().any(dim=1).tolist() == [False, False, True, False]
        (gradient,) = torch.autograd.grad(y, x, cotangent)
        assert (
            gradient.isnan().all(dim=1).tolist() == gradient.isnan().any(dim=1).tolist() == [False, True, False, False]
        )


def test_autocast_and_casting_the_network_change_nothing(layer):
    product, x = Float8Linear(layer), torch.randn(4, 96)
    expected = product(x)
    before = {name: tensor.dtype for name, tensor in product.named_buffers()}
    network = nn.Sequential(product).to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in product.named_buffers()} == before
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), expected)
    assert not list(product.parameters())


def test_widths_that_do_not_fit_are_refused_in_a_line():
    with pytest.raises(
        UserError, match=r"a layer from 40 to 64 .* multiples of 16: use teacher.products=bfloat16, or"
    ) as told:
        Float8Linear(nn.Linear(40, 64))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="a layer from 48 to 72"):
        Float8Linear(nn.Linear(48, 72))


@pytest.mark.gpu
def test_a_gpu_computes_the_same():
    """Sums in another order, then rounded to bfloat16: by at most one step of it."""
    device = torch.device("cuda")
    if why := float8.unavailable(device):
        pytest.skip(why)
    torch.manual_seed(0)
    product, x = Float8Linear(nn.Linear(768, 3072)), torch.randn(394, 768)
    assert apart(product.to(device)(x.to(device)).cpu(), product.cpu()(x)) < BFLOAT16


# ------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_block_is_one_graph(backend):
    """LayerNorm, attention and GELU around it: fullgraph raises where a graph breaks."""
    torch.manual_seed(0)
    network = VisionTransformer(image_size=32, patch_size=8, width=64, depth=1, heads=4)
    (block,) = Teacher(network.state_dict(), heads=4, taps=(0,)).to_float8().vit.blocks
    x, cotangent = torch.randn(2, 17, 64, requires_grad=True), torch.randn(2, 17, 64)

    def found() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
            with torch.no_grad():
                alone = block(x)
        return [y.detach(), alone, *torch.autograd.grad(y, x, cotangent)]

    torch._dynamo.reset()
    plain = found()
    block.compile(backend=backend, fullgraph=True, dynamic=False)
    # What inductor fuses is not rounded to bfloat16 on its way, by 2⁻⁹ in the mean. That is the share 2⁻⁹ / 2⁻³ of a step
    # of e4m3, and as many numbers fall to the other side of one: an error of variance 2⁻⁶ steps², beside 1/12 of the rounding
    # itself. Four products' inputs may be such.
    allowed = 1e-5 if backend == "aot_eager" else (12 * 2.0**-6) ** 0.5 * 4**0.5 * E4M3
    for ours, theirs in zip(found(), plain):
        assert apart(ours, theirs) < allowed
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- the teacher


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size=32, patch_size=8, width=64, depth=12, heads=4)


def teacher_of(vit: VisionTransformer) -> Teacher:
    return Teacher(vit.state_dict(), heads=4, taps=(2, 5, 11))


WAYS = {
    "float32 stream": lambda teacher: teacher.to_float8().to_autocast(torch.bfloat16),
    "bfloat16 stream": lambda teacher: teacher.to_float8().to_stream(torch.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_product_of_the_blocks_and_nothing_else(vit, way):
    teacher = WAYS[way](teacher_of(vit))
    names = {n for n, m in teacher.vit.named_modules() if isinstance(m, Float8Linear)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"blocks.{index}.{name}" for index in range(12) for name in layers}
    # The weights are rounded once, from float32.
    for index, name in itertools.product((0, 11), layers):
        layer = teacher.vit.get_submodule(f"blocks.{index}.{name}")
        expected, _ = rounded(vit.get_submodule(f"blocks.{index}.{name}").weight.detach().numpy())
        assert np.array_equal(layer.weight.double().numpy(), expected)
    assert not any(isinstance(module, nn.Linear) for block in teacher.vit.blocks for module in block.modules())
    assert teacher.vit.norm.weight.dtype == (torch.bfloat16 if way == "bfloat16 stream" else torch.float32)
    assert teacher.to_float8() is teacher, "a second time is none"


@pytest.mark.parametrize("way", WAYS)
def test_features_and_gradients_of_twelve_blocks(vit, way):
    """Against float32 throughout, which float8 must be near, and against bfloat16, from which it must differ."""
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cotangents = torch.randn(3, 4, 17, 64, generator=torch.Generator().manual_seed(1))

    def found(teacher: Teacher, autocast: bool) -> tuple[list[Tensor], Tensor]:
        pixels = (images.permute(0, 3, 1, 2).float() / 64 - 2).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = teacher.features(pixels)
        torch.stack([(f.float() * c).sum() for f, c in zip(features, cotangents)]).sum().backward()
        return [f.detach() for f in features], pixels.grad

    plain = teacher_of(vit)
    shares = branch_shares(plain)
    exact, gradient = found(plain, autocast=False)
    cast, _ = found(teacher_of(vit).to_autocast(torch.bfloat16), autocast=True)
    float8s, moved = found(WAYS[way](teacher_of(vit)), autocast=True)
    # A branch is two products after one another, of two factors each: its error is √4·E4M3 of it, independent of what it
    # is added to. The stream hands on what relative error it has, and gets as much more as the branch is of it.
    expected = [2 * E4M3 * sum(shares[: 2 * (tap + 1)]) ** 0.5 for tap in plain.taps]
    assert [apart(ours, theirs) for ours, theirs in zip(float8s, exact)] == pytest.approx(expected, rel=0.15)
    assert all(8 * apart(a, b) < apart(c, b) for a, b, c in zip(cast, exact, float8s)), "bfloat16 is as far off"
    # On the way back the same happens once more, through what the way forward left: an error of √2 as much at most, and a
    # cosine of 1 − ε²/2.
    cosine = float(F.cosine_similarity(moved.double().flatten(), gradient.double().flatten(), dim=0))
    assert 1 - expected[-1] ** 2 < cosine < 1 - expected[-1] ** 2 / 8, cosine


def branch_shares(teacher: Teacher) -> list[float]:
    """Filled by a forward pass: the squared norm of each branch over that of the stream with it, two a block."""
    shares: list[float] = []

    def forward(block: Block, x: Tensor) -> Tensor:
        for branch in (lambda x: block.attn(block.norm1(x)), lambda x: block.mlp(block.norm2(x))):
            added = branch(x)
            x = x + added
            shares.append(float((added.detach().norm() / x.detach().norm()) ** 2))
        return x

    for block in teacher.vit.blocks:
        block.forward = partial(forward, block)
    return shares


@pytest.mark.parametrize("way", WAYS)
def test_both_passes_use_the_same_rounded_teacher(vit, way):
    """An image against itself has no loss: with other targets it would be held to a teacher's rounding."""
    teacher = WAYS[way](teacher_of(vit))
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            targets = teacher.features(pixels.detach())
        loss = teacher.feature_loss(pixels, targets)
        again = teacher.features(pixels)
    assert all(torch.equal(a, b) for a, b in zip(targets, again))
    # It is computed as 2 − 2·cosine, in float32.
    assert abs(loss.item()) < 1e-6
