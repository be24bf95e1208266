"""Augmentation: the published distributions, by statistics of many draws; colours by hand; the same on every machine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mcf.downstream.augment import Draw, box_blur, colours, draw

PLAIN = Draw(1.0, 0.0, (0.0, 0.0), None, 0.0, False, 1.0, 0.0, 0)


def test_parsing_draws_as_published():
    draws = [draw("parsing", 0, n) for n in range(4000)]
    # Standard errors of 4,000 draws: 1.1 % of σ for a σ, 1.6 % of σ for a mean; tolerances are four of them.
    assert np.std([d.angle for d in draws]) == pytest.approx(0.314, rel=0.05)
    assert np.mean([d.angle for d in draws]) == pytest.approx(0.0, abs=0.02)
    assert np.std([d.scale for d in draws]) == pytest.approx(0.1, rel=0.05)
    assert np.mean([d.scale for d in draws]) == pytest.approx(1.0, abs=0.01)
    shifts = np.array([d.shift for d in draws])
    assert np.abs(shifts).max() == pytest.approx(0.01, rel=0.01)
    assert np.std(shifts) == pytest.approx(0.01 / 3**0.5, rel=0.05)
    assert np.mean([d.grey for d in draws]) == pytest.approx(0.1, abs=0.02)
    assert [np.mean([d.gamma == g for d in draws]) for g in (0.5, 1.0, 2.0)] == pytest.approx([1 / 3] * 3, abs=0.03)
    assert min(d.blur for d in draws) >= 0
    assert max(d.blur for d in draws) == pytest.approx(0.01, rel=0.01)
    assert all(d.hidden is None and d.noise == 0 for d in draws)


def test_alignment_draws_as_published():
    draws = [draw("alignment", 0, n, scale=0.8) for n in range(4000)]
    angles, scales = (np.array([getattr(d, name) for d in draws]) for name in ("angle", "scale"))
    assert np.abs(angles).max() == pytest.approx(0.174, rel=0.01)
    assert np.std(angles) == pytest.approx(0.174 / 3**0.5, rel=0.05)
    assert (scales.min(), scales.max()) == pytest.approx((0.7, 0.9), abs=0.002)
    assert np.abs([d.shift for d in draws]).max() == pytest.approx(0.05, rel=0.01)
    boxes = np.array([d.hidden for d in draws])
    heights, widths = 2 * (boxes[:, 3] - boxes[:, 1]), 2 * (boxes[:, 2] - boxes[:, 0])
    assert (heights.min(), heights.max()) == pytest.approx((0.2, 0.8), abs=0.01)
    assert np.abs(widths - heights).max() == pytest.approx(0.2, abs=0.01)
    noisy = [d.noise for d in draws if d.noise]
    assert len(noisy) / len(draws) == pytest.approx(0.5, abs=0.035)
    assert max(noisy) == pytest.approx(0.5, abs=0.01)


def test_a_draw_is_a_function_of_seed_and_sample():
    assert draw("alignment", 3, 7) == draw("alignment", 3, 7)
    others = [draw("alignment", 3, 8), draw("alignment", 4, 7), draw("alignment", 7, 3)]
    assert all(draw("alignment", 3, 7) != other for other in others)


def test_colours_by_hand():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = lambda **changes: colours(image[None], [dataclasses.replace(PLAIN, **changes)])[0]  # noqa: E731
    assert torch.equal(one(), image)
    torch.testing.assert_close(one(gamma=2.0), image**2)
    torch.testing.assert_close(one(gamma=0.5), image.sqrt())
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    torch.testing.assert_close(one(grey=True), grey.expand(3, -1, -1))
    hidden = one(hidden=(0.25, 0.5, 0.5, 2.0))
    assert (hidden[:, 16:, 8:16] == 0).all()
    hidden[:, 16:, 8:16] = image[:, 16:, 8:16]
    assert torch.equal(hidden, image)
    noisy, again, other = one(noise=0.3), one(noise=0.3), one(noise=0.3, seed=1)
    assert torch.equal(noisy, again) and not torch.equal(noisy, other)
    assert ((noisy - 0.7 * image) / 0.3).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_blur_is_a_mean_over_a_mirrored_window(window):
    image = torch.rand(2, 9, 11, generator=torch.Generator().manual_seed(1))
    before, after = window // 2, window - 1 - window // 2
    padded = np.pad(image.numpy(), ((0, 0), (before, after), (before, after)), mode="reflect")
    expected = np.lib.stride_tricks.sliding_window_view(padded, (window, window), axis=(1, 2)).mean((-1, -2))
    assert box_blur(image, window).numpy() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(box_blur(image, 1), image)
