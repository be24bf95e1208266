"""The mask kernel gives the reference's ids to the last bit, and the masks are as random as they should be."""

import pytest
import torch

from mcf import kernels
from mcf.kernels import reference
from mcf.kernels.mask import MOST_PATCHES, _mask

POSITIONS = [0, 1, 12345, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**45, 2**63 - 1]


def same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype == torch.int64 and torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1])
def test_ids_of_any_seed_are_the_references(seed, device):
    positions = torch.tensor(POSITIONS if seed == 7 else POSITIONS[-2:])
    view = kernels.MOMENTUM if seed % 2 else kernels.ENCODER
    ours = kernels.mask(seed, positions.to(device), view, 20, 5, implementation="triton")
    same(ours, reference.mask(seed, positions, view, 20, 5))


@pytest.mark.parametrize(
    "patches, keep", [(196, 49), (49, 12), (1, 1), (2, 1), (63, 63), (197, 1), (256, 64), (1000, 250), (1024, 1023)]
)
def test_ids_of_any_size_are_the_references(patches, keep, device):
    # A sample of 1024 keys takes the interpreter two seconds: one is enough.
    positions = torch.tensor([2**32 + 1] if patches > 500 else [12345, 2**45])
    ours = kernels.mask(3, positions.to(device), kernels.MOMENTUM, patches, keep, implementation="triton")
    same(ours, reference.mask(3, positions, kernels.MOMENTUM, patches, keep))


def test_anything():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
    @hypothesis.given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(1, 70), st.floats(0, 1))
    def check(seed, position, patches, share):
        keep = max(1, round(share * patches))
        positions = torch.tensor([position], device="cuda" if torch.cuda.is_available() else "cpu")
        ours = kernels.mask(seed, positions, kernels.ENCODER, patches, keep, implementation="triton")
        same(ours, reference.mask(seed, positions.cpu(), kernels.ENCODER, patches, keep))

    check()


def test_equal_keys_are_in_the_order_of_their_patches(device):
    # The first position whose 1024 keys of 32 bits are not all different.
    position, pair = torch.tensor([12216]), (190, 526)
    words = reference._words(0, position[:, None], torch.arange(1024)[None], kernels.ENCODER)[0]
    assert words[pair[0]] == words[pair[1]]
    _, ids_restore = kernels.mask(0, position.to(device), kernels.ENCODER, 1024, 256, implementation="triton")
    assert ids_restore[0, pair[1]] == ids_restore[0, pair[0]] + 1
    assert torch.equal(ids_restore.cpu(), reference.mask(0, position, kernels.ENCODER, 1024, 256)[1])


def test_every_patch_and_every_pair_is_kept_as_often_as_chance_says(device):
    stats = pytest.importorskip("scipy.stats")
    samples, patches, keep = 20_000, 49, 12
    _, ids_restore = kernels.mask(3, torch.arange(samples, device=device), kernels.ENCODER, patches, keep)
    kept = (ids_restore < keep).double()
    together = (kept.T @ kept).cpu().numpy()
    # Exact two-sided tests; under the null hypothesis the smallest of n p-values is under 1e-3/n once in a thousand.
    single = 2 * min(
        min(stats.binom.cdf(n, samples, keep / patches), stats.binom.sf(n - 1, samples, keep / patches))
        for n in together.diagonal()
    )
    assert single > 1e-3 / patches
    p, pairs = keep * (keep - 1) / (patches * (patches - 1)), patches * (patches - 1) // 2
    upper = together[torch.triu(torch.ones(patches, patches), 1).bool().numpy()]
    assert len(upper) == pairs
    pair = 2 * min(stats.binom.cdf(upper, samples, p).min(), stats.binom.sf(upper - 1, samples, p).min())
    assert pair > 1e-3 / pairs
    # And any rank is as likely in any place: 49 × 49 counts.
    ranks = torch.zeros(patches, patches).index_put_(
        (torch.arange(patches).repeat(samples), ids_restore.flatten().cpu()), torch.ones(()), accumulate=True
    )
    # Rows and columns of counts add up to `samples` each: (L−1)² are free.
    statistic = float(((ranks - samples / patches) ** 2 / (samples / patches)).sum())
    assert 1e-3 < stats.chi2.sf(statistic, (patches - 1) ** 2) < 1 - 1e-3


def test_more_patches_than_the_kernel_ranks_are_the_references(device):
    positions = torch.arange(2, device=device)
    same(
        kernels.mask(0, positions, 0, MOST_PATCHES + 1, 300),
        reference.mask(0, positions.cpu(), 0, MOST_PATCHES + 1, 300),
    )
    with pytest.raises(ValueError, match="mask: implementation='triton': the kernel ranks at most 1024 patches; use"):
        kernels.mask(0, positions, 0, MOST_PATCHES + 1, 300, implementation="triton")


def test_strided_and_empty_positions(device):
    positions = torch.arange(40, device=device)[::13]
    same(kernels.mask(5, positions, 1, 20, 5, implementation="triton"), reference.mask(5, positions.cpu(), 1, 20, 5))
    for implementation in ("triton", "reference"):
        ids_keep, ids_restore = kernels.mask(0, positions[:0], 0, 20, 5, implementation=implementation)
        assert ids_keep.shape == (0, 5) and ids_restore.shape == (0, 20)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_through_torch_compile_without_breaks(implementation, device):
    def run(positions):
        ids_keep, ids_restore = kernels.mask(2**64 - 1, positions + 1, 1, 8, 3, implementation=implementation)
        return ids_keep * 2, ids_restore

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        positions = torch.arange(batch, device=device)
        same(compiled(positions), run(positions))


def test_the_operator_is_what_it_says(device):
    torch.library.opcheck(_mask, (torch.arange(2, device=device), -1, 1, 8, 3))


@pytest.mark.parametrize("implementation", ["auto", "triton", "reference"])
def test_what_does_not_fit_is_one_line(implementation):
    positions = torch.arange(2)
    for wrong, error, words in [
        ((0, positions, 0, 4, 0), ValueError, r"keep=0 is not in 1\.\.4"),
        ((0, positions, 0, 4, 5), ValueError, r"keep=5 is not in 1\.\.4"),
        ((0, positions[None], 0, 4, 2), ValueError, r"positions has shape \[1, 2\]; it must be \[B\]"),
        ((0, positions.int(), 0, 4, 2), TypeError, "positions is int32; it must be int64"),
    ]:
        with pytest.raises(error, match=words) as caught:
            kernels.mask(*wrong, implementation=implementation)
        assert str(caught.value).startswith("mask: ") and "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("patches, keep", [(196, 49), (49, 12), (256, 64), (1024, 256), (784, 78)])
def test_gpu_gives_the_cpus_ids_and_repeats_them(patches, keep):
    positions = torch.cat([torch.arange(1024), torch.tensor(POSITIONS)])
    ours = kernels.mask(2**64 - 3, positions.cuda(), kernels.MOMENTUM, patches, keep)
    same(ours, reference.mask(2**64 - 3, positions, kernels.MOMENTUM, patches, keep))
    same(ours, kernels.mask(2**64 - 3, positions.cuda(), kernels.MOMENTUM, patches, keep))
