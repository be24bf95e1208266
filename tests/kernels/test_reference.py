"""The reference operations against known answers, against other ways to compute them, and against finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcf import kernels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def gradcheck(function, *inputs):
    return torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def doubles(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


# ------------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    "counter, key, words",
    [  # Random123's published known answers for philox4x32-10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    got = kernels.philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(word) for word in got] == words


def philox_in_integers(counter, key):
    """Philox4x32-10 on Python's unbounded integers."""
    (a, b, c, d), (x, y) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ x, right % 2**32, (left >> 32) ^ d ^ y, left % 2**32
        x, y = (x + 0x9E3779B9) % 2**32, (y + 0xBB67AE85) % 2**32
    return a, b, c, d


def mask_in_integers(seed, position, view, patches, keep):
    key = (seed % 2**32, seed >> 32)
    low, high = position % 2**32, position >> 32
    words = [philox_in_integers((low, high, patch, view), key)[0] for patch in range(patches)]
    order = sorted(range(patches), key=lambda patch: (words[patch], patch))
    return order[:keep], [order.index(patch) for patch in range(patches)]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
def test_masks_are_the_documented_function_of_seed_and_position(seed):
    positions = [0, 1, 12345, 2**31, 2**32 - 1, 2**32 + 1, 2**45]
    for view in (kernels.ENCODER, kernels.MOMENTUM):
        ids_keep, ids_restore = kernels.mask(seed, torch.tensor(positions), view, 49, 12)
        for row, position in enumerate(positions):
            assert (ids_keep[row].tolist(), ids_restore[row].tolist()) == mask_in_integers(seed, position, view, 49, 12)


def test_a_mask_does_not_depend_on_its_batch():
    positions = torch.arange(1000, 1064)
    whole = kernels.mask(3, positions, kernels.ENCODER, 196, 49)
    for part in (slice(0, 1), slice(5, 30), slice(63, 64)):
        for all_rows, some in zip(whole, kernels.mask(3, positions[part], kernels.ENCODER, 196, 49)):
            assert torch.equal(all_rows[part], some)


def test_masks_are_uniform_and_views_are_independent():
    stats = pytest.importorskip("scipy.stats")
    samples, patches, keep = 20_000, 196, 49
    positions = torch.arange(samples)
    _, first = kernels.mask(0, positions, kernels.ENCODER, patches, keep)
    _, second = kernels.mask(0, positions, kernels.MOMENTUM, patches, keep)
    a, b = first < keep, second < keep

    # Every patch is kept a quarter of the time, every pair of neighbours as often as drawing without return says, and
    # the two views overlap as independent draws do: p-values of exact tests, the smallest of 196 not under 1e-5.
    p = min(stats.binomtest(int(count), samples, keep / patches).pvalue for count in a.sum(0))
    assert p > 1e-5
    pairs = (a[:, 1:] & a[:, :-1]).sum(0)
    both = keep * (keep - 1) / (patches * (patches - 1))
    assert min(stats.binomtest(int(count), samples, both).pvalue for count in pairs) > 1e-5
    overlap = (a & b).sum(1).double()
    expected = keep * keep / patches
    spread = stats.hypergeom(patches, keep, keep).std() / samples**0.5
    assert abs(overlap.mean() - expected) < 5 * spread
    # Each rank is equally likely in each place.
    assert stats.chisquare(np.bincount(first[:, 17].numpy(), minlength=patches)).pvalue > 1e-5


def test_rank_breaks_ties_by_index():
    noise = torch.tensor([[0.5, 0.1, 0.5, 0.1]])
    ids_keep, ids_restore = kernels.rank(noise, 3)
    assert ids_keep.tolist() == [[1, 3, 0]] and ids_restore.tolist() == [[2, 0, 3, 1]]


def test_uniform_is_word_zero_of_patch_zero():
    stats = pytest.importorskip("scipy.stats")
    positions = torch.tensor([0, 5, 2**33 + 1])
    got = kernels.uniform(9, positions, kernels.FLIP)
    for value, position in zip(got.tolist(), positions.tolist()):
        word = philox_in_integers((position % 2**32, position >> 32, 0, kernels.FLIP), (9, 0))[0]
        assert value == (word >> 8) / 2**24
    many = kernels.uniform(1, torch.arange(50_000), kernels.FLIP)
    assert many.dtype == torch.float32 and many.min() >= 0 and many.max() < 1
    assert stats.kstest(many.numpy(), "uniform").pvalue > 1e-4


def test_impossible_masks_are_refused():
    for keep in (0, 5):
        with pytest.raises(ValueError, match=f"keep={keep}"):
            kernels.mask(0, torch.arange(2), 0, 4, keep)


# ------------------------------------------------------------------------------------------------ patches and tokens


def test_patch_gather_reads_what_a_convolution_reads():
    images = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8)
    ids, _ = kernels.mask(0, torch.arange(3), 0, 9, 4)
    floats = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    floats = floats.permute(0, 3, 1, 2)
    expected = F.unfold(floats, 8, stride=8).transpose(1, 2)  # (channel, row, column), as a convolution's weight

    # float32 holds a normalised pixel, of magnitude up to 3, to 3 · 2⁻²⁴ and three roundings led there.
    torch.testing.assert_close(kernels.patch_gather(images, None, 8, MEAN, STD).double(), expected, rtol=0, atol=6e-7)
    some = kernels.patch_gather(images, ids, 8, MEAN, STD).double()
    for i in range(3):
        torch.testing.assert_close(some[i], expected[i, ids[i]], rtol=0, atol=6e-7)
    assert torch.equal(kernels.patch_gather(floats, ids, 8)[1], expected[1, ids[1]])


def test_patch_gather_gradient():
    ids = torch.tensor([[0, 3], [2, 1]])
    assert gradcheck(lambda x: kernels.patch_gather(x, ids, 2), doubles(2, 3, 4, 4))
    assert gradcheck(lambda x: kernels.patch_gather(x, None, 2), doubles(2, 3, 4, 4))


def test_token_restore_puts_every_token_in_its_place():
    ids_keep, ids_restore = kernels.mask(1, torch.arange(5), 0, 16, 6)
    tokens, position = torch.randn(5, 7, 8), torch.randn(1, 17, 8)
    mask_token = torch.randn(1, 1, 8)
    got = kernels.token_restore(tokens, mask_token, position, ids_restore) - position
    for i in range(5):
        expected = mask_token[0].expand(16, -1).clone()
        expected[ids_keep[i]] = tokens[i, 1:]
        # The sum with the position, and its difference, round once each at magnitude 4.
        torch.testing.assert_close(got[i], torch.cat([tokens[i, :1], expected]), rtol=0, atol=1e-6)


def test_token_restore_gradient():
    _, ids_restore = kernels.mask(0, torch.arange(2), 0, 6, 2)
    inputs = doubles(2, 3, 4), doubles(1, 1, 4, seed=1), doubles(1, 7, 4, seed=2)
    assert gradcheck(lambda t, m, p: kernels.token_restore(t, m, p, ids_restore), *inputs)


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("axis, dim", [("tokens", 1), ("channels", 2)])
def test_feature_loss_is_the_cosine_formula(axis, dim):
    a, b = doubles(3, 7, 5), doubles(3, 7, 5, seed=1).detach()
    cosines = F.cosine_similarity(a, b, dim=dim)
    # mean of (â − b̂)² over N·L·C values, of which every column sums to 2 − 2·cos (KERNELS 3.1).
    expected = (2 - 2 * cosines).sum() / a.numel()
    torch.testing.assert_close(kernels.feature_loss(a, b, axis), expected)
    assert gradcheck(lambda x: kernels.feature_loss(x, b, axis), a)
    assert float(kernels.feature_loss(a, -a, axis).detach()) == pytest.approx(4 / a.shape[dim])


def test_feature_loss_of_a_dead_channel_is_finite_and_its_target_gets_no_gradient():
    a, b = doubles(2, 4, 3), doubles(2, 4, 3, seed=1)
    with torch.no_grad():
        a[:, :, 1] = 0
    kernels.feature_loss(a, b).backward()
    assert a.grad is not None and a.grad.isfinite().all() and b.grad is None


def test_info_nce_is_the_sum_over_keys():
    q, keys = doubles(4, 6), F.normalize(doubles(9, 6, seed=1), dim=1)
    labels = torch.tensor([8, 0, 3, 3])
    t = 0.2
    expected = 0.0
    for row, label in zip(q, labels):
        logits = [float((row @ key / row.norm()).detach()) / t for key in keys]
        expected += (np.log(np.exp(logits).sum()) - logits[label]) / len(q) * 2 * t
    assert float(kernels.info_nce(q, keys, labels, t).detach()) == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda x: kernels.info_nce(x, keys.detach(), labels, t), q)
    kernels.info_nce(q, leaf := keys.detach().requires_grad_(), labels, t).backward()
    assert leaf.grad is None


def test_info_nce_of_groups_is_the_mean_of_the_groups():
    q, keys = doubles(6, 5), F.normalize(doubles(3, 4, 5, seed=1).detach(), dim=2)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    each = [kernels.info_nce(q[2 * g : 2 * g + 2], keys[g], labels[2 * g : 2 * g + 2], 0.1) for g in range(3)]
    torch.testing.assert_close(kernels.info_nce(q, keys, labels, 0.1), sum(each) / 3)
    assert gradcheck(lambda x: kernels.info_nce(x, keys, labels, 0.1), q)


def test_losses_are_float32_under_autocast():
    a, b = torch.randn(2, 5, 4).bfloat16(), torch.randn(2, 5, 4).bfloat16()
    q, keys, labels = torch.randn(3, 8).bfloat16(), F.normalize(torch.randn(4, 8), dim=1), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        feature, contrast = kernels.feature_loss(a, b), kernels.info_nce(q, keys, labels, 0.2)
    # Equal to float64 on the same (rounded) inputs to float32's precision: nothing was computed in bfloat16.
    torch.testing.assert_close(feature.double(), kernels.feature_loss(a.double(), b.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        contrast.double(), kernels.info_nce(q.double(), keys.double(), labels, 0.2), rtol=1e-5, atol=0
    )
    assert feature.dtype == contrast.dtype == torch.float32
