"""Patches against float64 and against the images they were cut from: bytes, floats, gradients, and odd shapes."""

import pytest
import torch
from torch import Tensor

from mcf import kernels
from mcf.kernels import reference
from mcf.kernels.patch_gather import _patch_gather, _patch_scatter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Patch size, height, width: words of 4, 2 and 1 bytes, with patches that fill a tile and such that do not.
SHAPES = [(16, 32, 48), (14, 28, 42), (8, 24, 40), (3, 9, 6), (6, 12, 18), (16, 64, 16), (32, 32, 64), (1, 5, 3)]


def pictures(height: int, width: int, batch: int = 3, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator).to(device)


def floats(height: int, width: int, batch: int = 3, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height)).to(device)


def some(patches: int, batch: int = 3, device: torch.device | str = "cpu") -> Tensor:
    """A third of the patches, in random order."""
    return reference.mask(0, torch.arange(batch), 0, patches, max(1, patches // 3))[0].to(device)


def exactly(images: Tensor) -> Tensor:
    """Images in float64, [B, 3, H, W], normalised."""
    mean, std = (torch.tensor(x, dtype=torch.float64, device=images.device) for x in (MEAN, STD))
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("patch_size, height, width", SHAPES)
def test_bytes_against_float64(patch_size, height, width, device):
    images = pictures(height, width, device=device)
    for ids in (None, some(height * width // patch_size**2, device=device)):
        ours = kernels.patch_gather(images, ids, patch_size, MEAN, STD, implementation="triton")
        truth = reference.patch_gather(exactly(images), ids, patch_size)
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        # A scale, a shift and their sum, of magnitudes up to 5, 3 and 3, are rounded once each: half a unit of 2⁻²¹ or
        # 2⁻²² each.
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=6e-7)
        # bfloat16 has 8 bits: a part of 2⁻⁸ if rounded, and of 2⁻⁷ if cut off, as the interpreter does.
        half = kernels.patch_gather(images, ids, patch_size, MEAN, STD, dtype=torch.bfloat16, implementation="triton")
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), truth, rtol=2**-7, atol=6e-7)


@pytest.mark.parametrize("patch_size, height, width", SHAPES)
def test_floats_and_their_gradients_to_the_bit(patch_size, height, width, device):
    for ids in (None, some(height * width // patch_size**2, device=device)):
        ours, theirs = (floats(height, width, device=device).requires_grad_() for _ in range(2))
        a = kernels.patch_gather(ours, ids, patch_size, implementation="triton")
        b = reference.patch_gather(theirs, ids, patch_size)
        above = torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).to(device)
        torch.autograd.backward([a, b], [above, above])
        # Values are moved and not computed with; where no patch lies the gradient is zero.
        assert torch.equal(a, b) and torch.equal(ours.grad, theirs.grad)


def test_a_patch_that_is_wanted_twice_gets_both_gradients(device):
    ids = torch.tensor([[4, 1, 4, 4], [0, 5, 5, 0]], device=device)
    ours, exact = floats(8, 12, 2, device).requires_grad_(), floats(8, 12, 2, device).double().requires_grad_()
    above = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(1)).to(device)
    kernels.patch_gather(ours, ids, 4, implementation="triton").backward(above)
    reference.patch_gather(exact, ids, 4).backward(above.double())
    # Sums of up to three numbers.
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-7, atol=2e-7)


def test_any_shape():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
    @hypothesis.given(st.integers(1, 4), st.integers(1, 18), st.integers(1, 5), st.integers(1, 5), st.booleans())
    def check(batch, patch_size, rows, columns, all_of_them):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = rows * patch_size, columns * patch_size
        ids = None if all_of_them else some(rows * columns, batch, device)
        images = pictures(*size, batch, device)
        ours = kernels.patch_gather(images, ids, patch_size, MEAN, STD, implementation="triton")
        truth = reference.patch_gather(exactly(images), ids, patch_size)
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=6e-7)
        x = floats(*size, batch, device).requires_grad_()
        (gradient,) = torch.autograd.grad(
            kernels.patch_gather(x, ids, patch_size, implementation="triton").square().sum(), x
        )
        (expected,) = torch.autograd.grad(reference.patch_gather(x, ids, patch_size).square().sum(), x)
        assert torch.equal(gradient, expected)

    check()


def test_images_twice_in_one_graph(device):
    x = floats(8, 8, device=device).requires_grad_()
    ids = some(4, device=device)
    both = kernels.patch_gather(x, None, 4, implementation="triton").sum() * 2
    (both + kernels.patch_gather(x, ids, 4, implementation="triton").sum() * 3).backward()
    y = floats(8, 8, device=device).requires_grad_()
    (reference.patch_gather(y, None, 4).sum() * 2 + reference.patch_gather(y, ids, 4).sum() * 3).backward()
    assert torch.equal(x.grad, y.grad)


def test_strided_shifted_and_empty_inputs(device):
    images = pictures(12, 16, device=device)
    expected = kernels.patch_gather(images, None, 4, MEAN, STD, implementation="triton")
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    # Contiguous, but not where words of 4 bytes, or of 2, may begin.
    shifted = torch.cat([images.new_zeros(3), images.flatten()])[3:].view_as(images)
    for same in (strided, shifted):
        assert torch.equal(kernels.patch_gather(same, None, 4, MEAN, STD, implementation="triton"), expected)
    values = floats(12, 16, device=device)
    strided = values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    ids = some(12, 6, device)[::2]
    a = kernels.patch_gather(strided, ids, 4, implementation="triton")
    assert torch.equal(a, reference.patch_gather(values, ids, 4))
    # The gradient of a sum comes expanded, without memory of its own for each value.
    a.sum().backward()
    assert strided.grad.sum() == a.numel() and strided.grad.unique().tolist() == [0, 1]

    for implementation in ("triton", "reference"):
        none = kernels.patch_gather(images[:0], None, 4, MEAN, STD, implementation=implementation)
        assert none.shape == (0, 12, 48)
        x = values.clone().requires_grad_()
        none = kernels.patch_gather(x, ids[:, :0], 4, implementation=implementation)
        none.sum().backward()
        assert none.shape == (3, 0, 48) and not x.grad.any()


def test_ids_that_are_no_patch_read_no_strange_memory(device):
    if device.type == "cpu":
        # On a GPU alone: the reference's gather refuses them on a CPU, and a kernel cannot without waiting.
        ids = torch.tensor([[12]])
        with pytest.raises((RuntimeError, IndexError)):
            kernels.patch_gather(pictures(12, 16, 1), ids, 4, MEAN, STD)
    ids = torch.tensor([[12, -1, 2**40], [0, 5, 11]], device=device)
    x = floats(12, 16, 2, device).requires_grad_()
    out = kernels.patch_gather(x, ids, 4, implementation="triton")
    assert torch.equal(out[1:], reference.patch_gather(x[1:], ids[1:], 4)) and not out[0, :2].any()
    out.sum().backward()
    assert not x.grad[0].any()


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_through_torch_compile_without_breaks(implementation, device):
    def run(images, values, ids):
        a = kernels.patch_gather(images, ids, 4, MEAN, STD, dtype=torch.float32, implementation=implementation)
        b = kernels.patch_gather(values * 2, None, 4, implementation=implementation)
        c = kernels.patch_gather(values, ids, 4, implementation=implementation)
        return a.sum() + b.sin().sum() + (a * c).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        images, ids = pictures(8, 12, batch, device), some(6, batch, device)
        found = []
        for function in (run, compiled):
            x = floats(8, 12, batch, device).requires_grad_()
            result = function(images, x, ids)
            result.backward()
            found.append((result.detach(), x.grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_operators_are_what_they_say(device):
    images, ids = pictures(8, 12, device=device), some(6, device=device)
    for wanted in (ids, None):
        torch.library.opcheck(_patch_gather, (images, wanted, 4, MEAN, STD, torch.bfloat16))
        x = floats(8, 12, device=device).requires_grad_()
        torch.library.opcheck(_patch_gather, (x, wanted, 4, [], [], torch.float32))
        grad = torch.ones(3, 6 if wanted is None else wanted.shape[1], 48, device=device)
        torch.library.opcheck(_patch_scatter, (grad, wanted, 4, 8, 12, torch.float32))


def test_types_that_kernels_do_not_compute_in_are_the_references(device):
    x = floats(4, 6, 2, device).double().requires_grad_()
    ids = some(6, 2, device)
    assert torch.autograd.gradcheck(lambda x: kernels.patch_gather(x, ids, 2), (x,), atol=1e-7)
    assert kernels.patch_gather(x, ids, 2).dtype == torch.float64
    wide = kernels.patch_gather(pictures(4, 6, device=device), None, 2, MEAN, STD, dtype=torch.float64)
    assert wide.dtype == torch.float64
    with pytest.raises(ValueError, match="the kernel does not compute in float64"):
        kernels.patch_gather(x, ids, 2, implementation="triton")
    with pytest.raises(ValueError, match="the kernel writes float32 and bfloat16 only"):
        kernels.patch_gather(x.float(), ids, 2, dtype=torch.float16, implementation="triton")


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_autocast_does_not_touch_it(implementation, device):
    with torch.autocast(device.type, torch.bfloat16):
        inside = kernels.patch_gather(pictures(8, 8, device=device), None, 4, MEAN, STD, implementation=implementation)
        moved = kernels.patch_gather(floats(8, 8, device=device), None, 4, implementation=implementation)
    outside = kernels.patch_gather(pictures(8, 8, device=device), None, 4, MEAN, STD, implementation=implementation)
    assert inside.dtype == moved.dtype == torch.float32 and torch.equal(inside, outside)


@pytest.mark.parametrize("implementation", ["auto", "triton", "reference"])
def test_what_does_not_fit_is_one_line(implementation):
    images, x, ids = pictures(8, 12), floats(8, 12), some(6)
    for wrong, error, words in [
        ((x[0], None, 4), ValueError, r"images has shape \[3, 8, 12\]; it must be \[B, H, W, 3\] in uint8"),
        ((x.permute(0, 2, 3, 1), None, 4), ValueError, r"images has shape \[3, 8, 12, 3\]"),
        ((images.permute(0, 3, 1, 2), None, 4, MEAN, STD), ValueError, r"images has shape \[3, 3, 8, 12\]"),
        ((x, None, 5), ValueError, "of a height and width that patch_size=5 divides"),
        ((x.long(), None, 4), TypeError, "images is int64; it must be uint8 or float32 or bfloat16"),
        ((x, ids.int(), 4), TypeError, "ids is int32; it must be int64"),
        ((x, ids[:2], 4), ValueError, r"ids has shape \[2, 2\]; it must be \[3, K\]"),
        ((x, ids.to("meta"), 4), ValueError, "ids is on meta and images on cpu; move one to the other's device"),
        ((images, None, 4), ValueError, r"mean=\(\) and std=\(\) must have a value for each of the three channels"),
        ((images, None, 4, MEAN, STD[:2]), ValueError, "for each of the three channels"),
        ((x, None, 0), ValueError, "patch_size=0"),
    ]:
        with pytest.raises(error, match=words) as caught:
            kernels.patch_gather(*wrong, implementation=implementation)
        assert str(caught.value).startswith("patch_gather: ") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("patch_size, side", [(16, 224), (14, 224), (16, 448), (14, 518), (8, 96)])
def test_gpu_against_float64_and_to_the_bit(patch_size, side):
    images = pictures(side, side, 8, "cuda")
    for ids in (None, some((side // patch_size) ** 2, 8, "cuda")):
        for dtype in (torch.float32, torch.bfloat16):
            ours, again = (kernels.patch_gather(images, ids, patch_size, MEAN, STD, dtype=dtype) for _ in range(2))
            truth = reference.patch_gather(exactly(images), ids, patch_size)
            # Rounded to nearest: half a unit of bfloat16's last bit, on top of float32's.
            torch.testing.assert_close(ours.double(), truth, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=6e-7)
            assert torch.equal(ours, again)
        for dtype in (torch.float32, torch.bfloat16):
            x, y = (floats(side, side, 8, "cuda").to(dtype).requires_grad_() for _ in range(2))
            a, b = kernels.patch_gather(x, ids, patch_size), reference.patch_gather(y, ids, patch_size)
            above = torch.randn_like(b)
            torch.autograd.backward([a, b], [above, above])
            assert torch.equal(a, b) and torch.equal(x.grad, y.grad)


@pytest.mark.gpu
def test_gpu_beyond_32_bit_addresses():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    batch, side = 14_400, 224  # 2.17e9 values
    images = torch.zeros(batch, side, side, 3, dtype=torch.uint8, device="cuda")
    images[-2:] = pictures(side, side, 2, "cuda")
    ids = some(196, 2, "cuda")[:1].expand(batch, -1)
    ours = kernels.patch_gather(images, ids, 16, MEAN, STD, dtype=torch.bfloat16)
    expected = kernels.patch_gather(images[-2:], ids[-2:], 16, MEAN, STD, dtype=torch.bfloat16)
    assert torch.equal(ours[-2:], expected)
    dense = kernels.patch_gather(images, None, 16, MEAN, STD, dtype=torch.bfloat16)
    assert torch.equal(dense[-2:].gather(1, ids[-2:, :, None].expand_as(expected)), expected)
    back = _patch_scatter(dense, None, 16, side, side, torch.bfloat16)
    assert torch.equal(back[-2:], _patch_scatter(dense[-2:], None, 16, side, side, torch.bfloat16))
