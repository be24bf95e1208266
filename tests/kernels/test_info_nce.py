"""The contrastive loss in one pass against the float64 reference: loss, gradient, statistics, and labels or keys of all kinds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcf import kernels
from mcf.kernels import reference

FIELDS = kernels.InfoNCE._fields
# NumPy, in the interpreter, warns of infinities that the kernels mean.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def contrast(rows: int, count: int, width: int, *, groups: int = 0, seed: int = 0, device="cpu", like: float = 0.3):
    """Queries of lengths from 0.1 to 10, keys of length 1, labels in no order; queries lean to their keys a bit."""
    g = torch.Generator().manual_seed(seed)
    shape = (groups, count, width) if groups else (count, width)
    keys = F.normalize(torch.randn(*shape, generator=g), dim=-1)
    labels = torch.randint(0, count, (rows,), generator=g)
    own = keys.view(max(groups, 1), count, width)[torch.arange(rows) * max(groups, 1) // rows, labels]
    queries = F.normalize(torch.randn(rows, width, generator=g), dim=1) + like * own
    queries = queries * 10 ** (2 * torch.rand(rows, 1, generator=g) - 1)
    return queries.to(device), keys.to(device), labels.to(device)


def truth(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> tuple[kernels.InfoNCE, Tensor]:
    """Loss and statistics, and the loss's gradient, in float64."""
    x = queries.detach().double().requires_grad_()
    result = reference.info_nce_statistics(x, keys.double(), labels, temperature)
    result.loss.backward()
    return kernels.InfoNCE(*(value.detach() for value in result)), x.grad


def run(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float, implementation: str = "triton"):
    """Loss and statistics, and the loss's gradient, of the kernels."""
    x = queries.detach().clone().requires_grad_()
    result = kernels.info_nce_statistics(x, keys, labels, temperature, implementation=implementation)
    assert [value.requires_grad for value in result] == [True, False, False, False, False]
    result.loss.backward()
    return kernels.InfoNCE(*(value.detach() for value in result)), x.grad


def rows_close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Every row's error within a share of its length: queries differ in length, and so do their gradients."""
    assert ours.isfinite().all()
    errors = (ours.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(errors.max()) <= tolerance, float(errors.max())


def cosine_error(device: torch.device) -> float:
    """Of a cosine in float32: a sum of up to 512 products of 6e-8 each, at random; on tensor cores three products of TF32 parts,
    2⁻²¹ of each, whose sums are cut off and not rounded."""
    return 1e-6 if device.type == "cuda" else 3e-7


def agree(ours, exact, temperature: float) -> None:
    """Within what an error of the cosines makes of all that follows from them, in float32."""
    (values, gradient), (expected, exact_gradient) = ours, exact
    logit = cosine_error(gradient.device) / temperature
    for name, value, other in zip(FIELDS, values, expected):
        tolerance = {"loss": 2 * temperature * logit, "entropy": 20 * logit}.get(name, 1e-6)
        assert value.dtype == torch.float32 and value.shape == ()
        assert float(value) == pytest.approx(float(other), abs=tolerance), name
    rows_close(gradient, exact_gradient, 2 * logit)


# What is even: N and M multiples of every tile or of none, D a power of two or not, the product whole or in steps (256).
SHAPES = [(64, 256, 64), (63, 197, 64), (50, 1000, 100), (63, 197, 256), (32, 128, 256), (17, 63, 512), (5, 2, 16)]


@pytest.mark.parametrize("temperature", [0.2, 0.02])  # the constant maximum, and the one that is followed
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_gradient_and_statistics_against_float64(shape, temperature, device):
    case = (*contrast(*shape, device=device), temperature)
    agree(run(*case), truth(*case), temperature)


@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_groups_meet_keys_of_their_own(temperature, device):
    queries, keys, labels = contrast(66, 70, 64, groups=3, device=device)
    case = (queries, keys, labels, temperature)
    ours = run(*case)
    agree(ours, truth(*case), temperature)
    parts = [run(queries[22 * g : 22 * g + 22], keys[g], labels[22 * g : 22 * g + 22], temperature) for g in range(3)]
    for value, *of_parts in zip(ours[0], *(values for values, _ in parts)):
        assert float(value) == pytest.approx(float(sum(of_parts)) / 3, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(ours[1], torch.cat([gradient for _, gradient in parts]) / 3, rtol=1e-5, atol=1e-7)


def test_any_shape_and_temperature():
    hypothesis = pytest.importorskip("hypothesis")
    st, phase = hypothesis.strategies, hypothesis.Phase

    @hypothesis.settings(max_examples=10, deadline=None, derandomize=True, phases=(phase.explicit, phase.generate))
    @hypothesis.given(
        st.integers(1, 40), st.integers(2, 300), st.integers(4, 300), st.floats(0.015, 2), st.integers(0, 9)
    )
    def check(rows, count, width, temperature, seed):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        case = (*contrast(rows, count, width, seed=seed, device=device), temperature)
        (values, gradient), (expected, exact) = run(*case), truth(*case)
        assert float(values.loss) == pytest.approx(
            float(expected.loss), rel=3e-7, abs=2 * cosine_error(gradient.device)
        )
        assert float(values.accuracy) == pytest.approx(float(expected.accuracy), abs=1e-6)
        # Of few dimensions a query may lie along its direction, and its gradient be a small rest of what is taken away.
        assert float((gradient - exact).norm()) <= 3e-6 / temperature * float(exact.norm()) + 1e-7 / temperature

    check()


def test_a_model_that_is_sure_keeps_its_digits(device):
    """p → 1: the loss is a millionth and less, its gradient 1 − p, and neither is a difference of ones."""
    labels = torch.arange(40, device=device)
    # Other keys are 18·T away in cosine, exp(−18) is 2e-8, and there are 39 of them.
    for temperature, common in ((0.05, 0.029), (0.02, 0.152)):
        keys = F.normalize(torch.eye(40, 64) + common, dim=1).to(device)
        case = (2 * keys + 0.01, keys, labels, temperature)
        (values, gradient), (expected, exact) = run(*case), truth(*case)
        assert 1e-9 < float(expected.loss) < 1e-6 and float(values.accuracy) == 1
        # log(1 + x) in float32 sees x to 6e-8.
        assert float(values.loss) == pytest.approx(float(expected.loss), abs=2 * temperature * 6e-8)
        # The sum of 64 products that is left over along the query: 1e-6 of the gradient's own terms, 1/T in exp.
        rows_close(gradient, exact, 2e-6 / temperature)


def test_the_least_temperatures_on_both_sides(device):
    """Keys that oppose their queries as far as they can: every term is the smallest there is, and the loss 2T·2/T."""
    queries, _, _ = contrast(8, 8, 64, device=device)
    unit = F.normalize(queries, dim=1)
    own, other = -unit[:1], -unit[:1]
    for temperature in (2 / 84.9, 2 / 85.1, 0.001):
        keys = torch.cat([own, other, F.normalize(unit[1:2], dim=1)])
        labels = torch.zeros(8, dtype=torch.int64, device=device)
        case = (queries, keys, labels, temperature)
        (values, gradient), (expected, exact) = run(*case), truth(*case)
        assert float(values.loss) == pytest.approx(float(expected.loss), rel=1e-6)
        # Two equal keys share the first row's probability, whatever T is.
        torch.testing.assert_close(
            gradient.double(), exact, rtol=1e-4 / temperature, atol=1e-4 * float(exact.abs().max())
        )


def test_one_key_and_keys_that_are_all_one(device):
    queries, keys, _ = contrast(6, 5, 64, device=device)
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    for temperature in (0.2, 0.02):
        values, gradient = run(queries, keys[:1], labels, temperature)
        assert [float(values.loss), float(values.negative), float(values.entropy)] == pytest.approx([0, 0, 0], abs=1e-7)
        assert not gradient.any() and float(values.accuracy) == 1
        # Collapse: nobody is nearer to the own key than to others, though rounding would have it for half of them.
        values, gradient = run(queries, keys[:1].expand(37, -1), labels + 20, temperature)
        assert float(values.accuracy) == 0 and float(values.loss) == pytest.approx(
            2 * temperature * math.log(37), abs=2e-6
        )
        assert float(values.entropy) == pytest.approx(math.log(37), abs=1e-4) and float(gradient.abs().max()) < 1e-4
        assert float(values.positive) == pytest.approx(float(values.negative), abs=1e-6)


def test_a_query_of_zero_or_of_extreme_length(device):
    queries, keys, labels = contrast(6, 37, 64, device=device)
    queries[1], queries[2], queries[3] = 0, queries[2] * 1e-14 / queries[2].norm(), queries[3] * 1e15
    for temperature in (0.2, 0.02):
        case = (queries, keys, labels, temperature)
        (values, gradient), (expected, exact) = run(*case), truth(*case)
        assert float(values.loss) == pytest.approx(float(expected.loss), abs=2 * cosine_error(device))
        rows_close(gradient, exact, 2 * cosine_error(device) / temperature)


@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_what_is_not_finite_shows(temperature, device):
    queries, keys, labels = contrast(40, 70, 64, device=device)
    for place, value in (((queries, 33)), float("nan")), (((queries, 33)), float("inf")), (((keys, 69)), float("nan")):
        tensor, row = place
        spoilt = tensor.clone()
        spoilt[row, 5] = value
        pair = (spoilt, keys) if tensor is queries else (queries, spoilt)
        loss = kernels.info_nce(*pair, labels, temperature, implementation="triton")
        assert not loss.isfinite(), f"{value} went unnoticed"


def test_a_label_that_is_none_is_not_a_number(device):
    queries, keys, labels = contrast(5, 7, 64, device=device)
    for wrong in (7, -1, -100, 2**32 + 1, -(2**40)):
        spoilt = labels.clone()
        spoilt[3] = wrong
        assert kernels.info_nce(queries, keys, spoilt, 0.2, implementation="triton").isnan()
    with pytest.raises(IndexError):
        kernels.info_nce(queries.cpu(), keys.cpu(), labels.cpu() + 7, 0.2)


def test_it_is_the_same_every_time_and_no_matter_what_a_row_stands_beside(device):
    queries, keys, labels = contrast(40, 500, 64, device=device)
    first, again = run(queries, keys, labels, 0.2), run(queries, keys, labels, 0.2)
    assert torch.equal(torch.stack(first[0]), torch.stack(again[0])) and torch.equal(first[1], again[1])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    moved = run(queries[order], keys, labels[order], 0.2)[1]
    if device.type == "cuda":
        assert torch.equal(moved, first[1][order])
    else:
        # The interpreter's products are a BLAS's, and some add a row up in another order where it stands elsewhere: 64
        # products and 500 keys, rounded to 2⁻²⁴ each.
        torch.testing.assert_close(moved, first[1][order], rtol=0, atol=1e-6 * float(first[1].abs().max()))


def test_inputs_used_twice_and_gradients_from_above(device):
    queries, keys, labels = contrast(20, 30, 64, device=device)
    exact = truth(queries, keys, labels, 0.2)[1]
    x = queries.clone().requires_grad_()
    loss = kernels.info_nce(x, keys, labels, 0.2, implementation="triton")
    (3 * loss + kernels.info_nce(x, keys, labels, 0.2, implementation="triton")).backward()
    rows_close(x.grad, 4 * exact, 10 * cosine_error(device))
    # A query may be a key as well: as that it gets no gradient.
    y, leaf = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    kernels.info_nce(y, F.normalize(y, dim=1), labels % 20, 0.2, implementation="triton").backward()
    rows_close(y.grad, truth(queries, F.normalize(queries, dim=1), labels % 20, 0.2)[1], 10 * cosine_error(device))
    kernels.info_nce(queries.clone().requires_grad_(), leaf, labels, 0.2, implementation="triton").backward()
    assert leaf.grad is None


def test_bfloat16_on_either_side_is_multiplied_in_bfloat16(device):
    queries, keys, labels = contrast(40, 70, 64, device=device)
    half = queries.bfloat16(), keys.bfloat16()
    expected, exact = truth(*half, labels, 0.2)
    for pair in (half, (half[0], keys), (queries, half[1])):
        values, gradient = run(*pair, labels, 0.2)
        assert gradient.dtype == pair[0].dtype and values.loss.dtype == torch.float32
        # Products of bfloat16 are exact in float32: the loss is that of the rounded inputs to float32's precision.
        assert float(values.loss) == pytest.approx(float(expected.loss), abs=1e-6)
        # Rounded where the kernel multiplies exp(s/T), 2⁻⁹, and cut off where it writes bfloat16, 2⁻⁸.
        rows_close(gradient, exact, 2**-7)


# ------------------------------------------------------------------------------------------------ what is around it


def test_strided_inputs_give_the_same(device):
    queries, keys, labels = contrast(20, 30, 64, device=device)
    whole = run(queries, keys, labels, 0.2)
    strided = run(queries.T.contiguous().T, keys.repeat(1, 2)[:, :64], labels.repeat_interleave(2)[::2], 0.2)
    assert torch.equal(torch.stack(whole[0]), torch.stack(strided[0])) and torch.equal(whole[1], strided[1])


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_through_torch_compile_without_breaks(implementation, device):
    queries, keys, labels = contrast(20, 30, 64, device=device)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        result = kernels.info_nce_statistics(x * 2, keys, labels, 0.2, implementation=implementation)
        return (result.loss + kernels.info_nce(x, keys, labels, 0.1, implementation=implementation), *result[1:])

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = queries.clone().requires_grad_()
        values = function(x)
        values[0].backward()
        outcomes.append((*(value.detach() for value in values), x.grad))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-6, atol=1e-7)


def test_the_operator_is_what_it_says(device):
    queries, keys, labels = contrast(6, 30, 64, device=device)
    for temperature in (0.2, 0.02):
        torch.library.opcheck(torch.ops.mcf.info_nce.default, (queries.requires_grad_(), keys, labels, temperature))
    grouped = contrast(6, 30, 64, groups=2, device=device)
    torch.library.opcheck(torch.ops.mcf.info_nce.default, (*grouped, 0.2))
    above, kept = torch.tensor(3.0, device=device), torch.randn(6, 64, device=device)
    torch.library.opcheck(torch.ops.mcf.info_nce_backward.default, (above, kept, queries.detach().bfloat16()))


def test_autocast_does_not_touch_it(device):
    queries, keys, labels = contrast(20, 30, 64, device=device)
    for implementation in ("triton", "reference"):
        outside = kernels.info_nce(queries, keys, labels, 0.2, implementation=implementation)
        with torch.autocast(device.type, torch.bfloat16):
            inside = kernels.info_nce(queries, keys, labels, 0.2, implementation=implementation)
        assert torch.equal(outside, inside) and inside.dtype == torch.float32


def test_the_references_statistics_are_what_they_say():
    queries, keys, labels = (x.double() if x.is_floating_point() else x for x in contrast(30, 12, 16, like=0.4))
    result = kernels.info_nce_statistics(queries, keys, labels, 0.1)
    cosines = F.cosine_similarity(queries[:, None], keys[None], dim=2)
    own = F.one_hot(labels, 12).bool()
    p = (cosines / 0.1).softmax(1)
    assert float(result.positive) == pytest.approx(float(cosines[own].mean()))
    assert float(result.negative) == pytest.approx(float(cosines[~own].mean()))
    assert float(result.entropy) == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    assert 0 < float(result.accuracy) < 1
    assert float(result.accuracy) == pytest.approx(float((cosines.argmax(1) == labels).double().mean()))
    assert torch.equal(result.loss, reference.info_nce(queries, keys, labels, 0.1))
    assert all(value.dtype == torch.float64 for value in result)


def test_float64_is_the_references_and_passes_gradcheck():
    queries, keys, labels = (x.double() if x.is_floating_point() else x for x in contrast(5, 7, 6))
    function = lambda x: kernels.info_nce_statistics(x, keys, labels, 0.2).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, (queries.requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_on_a_cpu_auto_is_the_reference_and_wide_keys_are_its():
    case = (*contrast(5, 7, 600), 0.2)
    assert torch.equal(kernels.info_nce(*case), reference.info_nce(*case))
    with pytest.raises(ValueError, match=r"keys of up to 512 dimensions.*use 'auto' or 'reference'"):
        kernels.info_nce(*case, implementation="triton")


@pytest.mark.parametrize("implementation", ["auto", "triton", "reference"])
@pytest.mark.parametrize("function", [kernels.info_nce, kernels.info_nce_statistics])
def test_what_does_not_fit_is_one_line(function, implementation):
    q, k, labels = contrast(6, 7, 8)
    for wrong, error, words in [
        ((q[:, :7], k, labels, 0.2), ValueError, r"keys has shape \[7, 8\]; it must be \[M, 7\] or \[G, M, 7\]"),
        ((q[0], k, labels, 0.2), ValueError, r"queries has shape \[8\]; it must be \[N, D\]"),
        ((q[:0], k, labels[:0], 0.2), ValueError, r"queries has shape \[0, 8\].*none of them 0"),
        ((q, k[:0], labels, 0.2), ValueError, r"keys has shape \[0, 8\].*none of them 0"),
        ((q, k[None].expand(4, -1, -1), labels, 0.2), ValueError, "of 4 equal runs"),
        ((q, k, labels[:5], 0.2), ValueError, r"labels has shape \[5\]; it must be one for each query: \[6\]"),
        ((q.long(), k, labels, 0.2), TypeError, "queries is int64; it must be floating point"),
        ((q, k.int(), labels, 0.2), TypeError, "keys is int32; it must be floating point"),
        ((q, k, labels.int(), 0.2), TypeError, "labels is int32; it must be int64"),
        ((q, k.to("meta"), labels, 0.2), ValueError, "keys is on meta and queries on cpu"),
        ((q, k, labels, 0.0), ValueError, "temperature=0.0 must be a number above 0"),
        ((q, k, labels, float("nan")), ValueError, "temperature=nan must be a number above 0"),
        ((q, k, labels, float("inf")), ValueError, "temperature=inf must be a number above 0"),
    ]:
        with pytest.raises(error, match=words) as caught:
            function(*wrong, implementation=implementation)
        assert str(caught.value).startswith("info_nce: ") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.2, 0.02])
@pytest.mark.parametrize(
    "shape",
    [(1024, 4096, 256), (512, 10_007, 256), (1000, 999, 128), (63, 197, 64), (130, 5000, 512), (77, 130, 100)],
    ids=str,
)
def test_gpu_in_bfloat16_against_float64_and_to_the_bit(shape, temperature):
    queries, keys, labels = contrast(*shape, device="cuda")
    case = (queries.bfloat16(), keys.bfloat16(), labels, temperature)
    (values, gradient), (expected, exact) = run(*case), truth(*case)
    # The products are of the inputs as they are, added in float32 (by tensor cores, which cut off instead of rounding:
    # 1e-6 of a cosine), and exp(s/T) is rounded to 2⁻⁹ at random before the second; the gradient at the end, once.
    assert float(values.loss) == pytest.approx(float(expected.loss), abs=1e-5)
    assert float(values.accuracy) == pytest.approx(float(expected.accuracy), abs=1.5 / shape[0])
    for name in ("positive", "negative"):
        assert float(getattr(values, name)) == pytest.approx(float(getattr(expected, name)), abs=1e-5)
    assert float(values.entropy) == pytest.approx(float(expected.entropy), abs=1e-3 / temperature)
    assert float((gradient.double() - exact).norm() / exact.norm()) < 4e-3
    for _ in range(3):
        again = run(*case)
        assert torch.equal(torch.stack(again[0]), torch.stack(values)) and torch.equal(again[1], gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(200, 4096, 256), (63, 197, 64), (65, 1000, 512), (33, 130, 100)], ids=str)
def test_gpu_in_float32_against_float64(shape):
    for temperature in (0.2, 0.02):
        case = (*contrast(*shape, device="cuda"), temperature)
        (values, gradient), (expected, exact) = run(*case), truth(*case)
        # Three products of TF32 parts leave 2⁻²¹ of each, 5e-7.
        assert float(values.loss) == pytest.approx(float(expected.loss), abs=1e-5)
        assert float((gradient.double() - exact).norm() / exact.norm()) < 1e-5 / temperature


@pytest.mark.gpu
def test_gpu_does_not_keep_what_is_as_large_as_queries_times_keys():
    queries, keys, labels = contrast(2048, 65_536, 256, device="cuda")
    queries, keys = queries.bfloat16().requires_grad_(), keys.bfloat16()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.info_nce(queries, keys, labels, 0.2).backward()
    # The logits alone would be 256 MiB in bfloat16.
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


@pytest.mark.gpu
def test_gpu_does_not_wait_for_the_device():
    queries, keys, labels = contrast(64, 300, 64, device="cuda")
    queries.requires_grad_()
    kernels.info_nce(queries, keys, labels, 0.2).backward()  # compiled before, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.info_nce_statistics(queries, keys, labels, 0.2).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
