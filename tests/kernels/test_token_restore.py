"""The decoder's input and its gradients against the float64 reference, in memory that starts as NaN."""

import pytest
import torch
from torch import Tensor

from mcf import kernels
from mcf.kernels import reference
from mcf.kernels.token_restore import _token_restore, _token_scatter

# Images, patches, visible patches, width: several tiles of rows and of width, and such as fill none.
SHAPES = [(2, 130, 33, 512), (3, 63, 17, 40), (5, 21, 21, 384), (2, 20, 3, 1000), (1, 1, 1, 4), (9, 16, 4, 32)]


def inputs(batch: int, patches: int, keep: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """tokens, mask token, position, ids_restore."""
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(batch, 1 + keep, width, generator=generator)
    mask_token = torch.randn(1, 1, width, generator=generator)
    position = torch.randn(1, 1 + patches, width, generator=generator)
    ids_restore = reference.mask(0, torch.arange(batch), 0, patches, keep)[1]
    return tuple(x.to(device) for x in (tokens, mask_token, position, ids_restore))


def run(function, tensors: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    """The result, and the gradients of the three inputs, for a gradient that is the same whatever the types are."""
    *leaves, ids = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, ids, **options)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return (out.detach(), *torch.autograd.grad(out, leaves, above))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_against_float64(shape, device):
    tensors = inputs(*shape, device=device)
    exact = tuple(x.double() for x in tensors[:3]) + tensors[3:]
    ours = run(kernels.token_restore, tensors, implementation="triton")
    truth = run(reference.token_restore, exact)
    assert [x.dtype for x in ours] == [torch.float32] * 4 and [x.shape for x in ours] == [x.shape for x in truth]
    # One sum of two numbers under 8: half a unit of 2⁻²¹ at most.
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=2.5e-7)
    # The tokens' gradients are moved and not computed with.
    assert torch.equal(ours[1], truth[1].float())
    # Sums of n normal numbers, in float32, of rows in order and then in a tree: a few roundings of the sum's size, √n.
    n = shape[0] * (shape[1] + 1)
    for a, b in zip(ours[2:], truth[2:]):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=6e-7 * n**0.5)


def test_any_shape():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
    @hypothesis.given(st.integers(1, 6), st.integers(1, 24), st.floats(0, 1), st.integers(1, 300))
    def check(batch, patches, share, width):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensors = inputs(batch, patches, max(1, round(share * patches)), width, device)
        ours = run(kernels.token_restore, tensors, implementation="triton")
        theirs = run(reference.token_restore, tensors)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        for a, b in zip(ours[2:], theirs[2:]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * (batch * patches) ** 0.5)

    check()


@pytest.mark.parametrize("tokens, table", [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_bfloat16_tokens_and_streams(tokens, table, device):
    t, m, p, ids = inputs(2, 20, 6, 40, device=device)
    t, p = t.to(getattr(torch, tokens)), p.to(getattr(torch, table))
    ours = run(kernels.token_restore, (t, m, p, ids), implementation="triton")
    theirs = run(reference.token_restore, (t, m, p, ids))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert ours[0].dtype == (torch.bfloat16 if tokens == table == "bfloat16" else torch.float32)
    # Each number is rounded once or twice, by a part of 2⁻⁸, or cut off by the interpreter, 2⁻⁷. The mask token's
    # gradient is a sum that the reference adds up in the tokens' type, of 28 numbers.
    for a, b, slack in zip(ours, theirs, (2, 2, 8, 4)):
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-7, atol=slack * 2**-7)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_only_what_wants_a_gradient_gets_one(implementation, device):
    tokens, mask_token, position, ids = inputs(2, 9, 4, 8, device=device)
    leaf = mask_token.clone().requires_grad_()
    kernels.token_restore(tokens, leaf, position, ids, implementation=implementation).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2 * (9 - 4)))
    # A position table of two dimensions, and a mask token of one, get gradients of their shapes.
    tables = position[0].clone().requires_grad_(), mask_token.flatten().requires_grad_()
    kernels.token_restore(tokens, tables[1], tables[0], ids, implementation=implementation).sum().backward()
    assert torch.equal(tables[0].grad, torch.full_like(tables[0], 2)) and tables[1].grad.shape == (8,)
    with torch.no_grad():
        assert not kernels.token_restore(tokens, leaf, position, ids, implementation=implementation).requires_grad


def test_inputs_twice_in_one_graph(device):
    def twice(tokens, mask_token, position, ids, **options):
        once = kernels.token_restore(tokens, mask_token, position, ids, **options)
        return once * kernels.token_restore(tokens * 2, mask_token, position, ids.flip(0), **options)

    tensors = inputs(2, 12, 4, 16, device=device)
    ours = run(twice, tensors, implementation="triton")
    theirs = run(twice, tuple(x.double() for x in tensors[:3]) + tensors[3:], implementation="reference")
    # Products of two sums of numbers under 8, in float32.
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_strided_and_empty_inputs(device):
    tokens, mask_token, position, ids = tensors = inputs(4, 12, 5, 16, device=device)
    strided = (
        tokens.transpose(0, 2).contiguous().transpose(0, 2),
        mask_token.expand(1, 2, 16)[:, :1],
        position.transpose(1, 2).contiguous().transpose(1, 2),
        ids.t().contiguous().t(),
    )
    for a, b in zip(
        run(kernels.token_restore, strided, implementation="triton"), run(reference.token_restore, tensors)
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # The gradient of a sum comes expanded, without memory of its own for each value.
    leaf = tokens.clone().requires_grad_()
    kernels.token_restore(leaf, mask_token, position, ids, implementation="triton").sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    for implementation in ("triton", "reference"):
        leaf = mask_token.clone().requires_grad_()
        none = kernels.token_restore(tokens[:0], leaf, position, ids[:0], implementation=implementation)
        none.sum().backward()
        assert none.shape == (0, 13, 16) and not leaf.grad.any()


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_through_torch_compile_without_breaks(implementation, device):
    def function(tokens, mask_token, position, ids):
        out = kernels.token_restore(tokens * 2, mask_token, position, ids, implementation=implementation)
        return torch.sin(out)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        tensors = inputs(batch, 12, 5, 16, device=device)
        for a, b in zip(run(compiled, tensors), run(function, tensors)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_operators_are_what_they_say(device):
    tokens, mask_token, position, ids = inputs(2, 9, 4, 8, device=device)
    leaves = [x.clone().requires_grad_() for x in (tokens, mask_token, position)]
    torch.library.opcheck(_token_restore, (*leaves, ids))
    torch.library.opcheck(_token_restore, (tokens.bfloat16(), mask_token, position, ids))
    torch.library.opcheck(_token_scatter, (torch.ones(2, 10, 8, device=device), ids, 4, torch.bfloat16))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_autocast_does_not_touch_it(implementation, device):
    tensors = inputs(2, 9, 4, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = kernels.token_restore(*tensors, implementation=implementation)
    assert torch.equal(inside, reference.token_restore(*tensors)) and inside.dtype == torch.float32


def test_float64_is_the_references_and_passes_gradcheck():
    tokens, mask_token, position, ids = inputs(2, 6, 2, 4)
    leaves = [x.double().requires_grad_() for x in (tokens, mask_token, position)]
    assert torch.autograd.gradcheck(lambda *x: kernels.token_restore(*x, ids), leaves, atol=1e-7)
    with pytest.raises(ValueError, match="the kernel does not compute in float64; use 'auto' or 'reference'"):
        kernels.token_restore(*leaves, ids, implementation="triton")


@pytest.mark.parametrize("implementation", ["auto", "triton", "reference"])
def test_what_does_not_fit_is_one_line(implementation):
    tokens, mask_token, position, ids = inputs(2, 9, 4, 8)
    for wrong, error, words in [
        ((tokens[0], mask_token, position, ids), ValueError, r"tokens has shape \[5, 8\]; it must be \[B, 1\+K, D\]"),
        ((tokens[:, :1], mask_token, position, ids), ValueError, "with K ≥ 1"),
        ((tokens, mask_token[..., :7], position, ids), ValueError, r"mask_token has shape \[1, 1, 7\].* 8 values"),
        ((tokens, mask_token, position[:, 1:], ids), ValueError, r"position has shape \[1, 9, 8\].* \[1, 10, 8\]"),
        ((tokens, mask_token, position, ids[:1]), ValueError, r"ids_restore has shape \[1, 9\].* \[2, L\] with L ≥ 4"),
        ((tokens, mask_token, position[:, :4], ids[:, :3]), ValueError, r"ids_restore has shape \[2, 3\]"),
        ((tokens, mask_token, position, ids.int()), TypeError, "ids_restore is int32; it must be int64"),
        ((tokens.long(), mask_token, position, ids), TypeError, "tokens is int64; it must be floating point"),
        ((tokens, mask_token, position.to("meta"), ids), ValueError, "position is on meta and tokens on cpu"),
    ]:
        with pytest.raises(error, match=words) as caught:
            kernels.token_restore(*wrong, implementation=implementation)
        assert str(caught.value).startswith("token_restore: ") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(64, 196, 49, 512), (7, 256, 64, 256), (3, 1024, 100, 768), (2, 63, 17, 40)], ids=str
)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_against_float64_and_to_the_bit(shape, table):
    tokens, mask_token, position, ids = inputs(*shape, device="cuda")
    # The mask token is rounded with the tokens: in a type that has it, nothing is left to chance.
    tensors = (tokens.bfloat16(), mask_token.bfloat16().float(), position.to(table), ids)
    ours = run(kernels.token_restore, tensors)
    truth = run(reference.token_restore, tuple(x.double() for x in tensors[:3]) + (ids,))
    # What comes back is rounded to its type once, 2⁻⁹ of the norm at most. The gradient from above, rounded when it is
    # bfloat16, is no part of that: for its sums it adds 2⁻⁹ at random.
    for a, b in zip(ours, truth):
        assert float((a.double() - b).norm()) <= 2**-8 * float(b.norm())
    for again in (run(kernels.token_restore, tensors) for _ in range(2)):
        assert all(torch.equal(a, b) for a, b in zip(ours, again))


@pytest.mark.gpu
def test_gpu_beyond_32_bit_addresses():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    batch, width = 21_400, 512  # 2.16e9 values
    tokens, mask_token, position, ids = inputs(2, 196, 49, width, device="cuda")
    many = torch.zeros(batch, 50, width, dtype=torch.bfloat16, device="cuda")
    many[-2:] = tokens
    all_ids = ids[:1].repeat(batch, 1)
    all_ids[-2:] = ids
    out = kernels.token_restore(many, mask_token, position.bfloat16(), all_ids)
    expected = kernels.token_restore(many[-2:], mask_token, position.bfloat16(), ids)
    assert torch.equal(out[-2:], expected)
    back, _ = _token_scatter(out, all_ids, 49, torch.bfloat16)
    assert torch.equal(back[-2:], _token_scatter(expected, ids, 49, torch.bfloat16)[0])
