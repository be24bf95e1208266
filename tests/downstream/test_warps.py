"""Warps against their formulas, against a slow sampler in NumPy, and there and back again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mcf.downstream.warps import STANDARD_POINTS, Warp, about_centre, box_matrix, needed_region, similarity_matrix


def some_warps(size: int) -> list[Warp]:
    """One of each kind, upright and turned, for images of about 200 pixels."""
    box = box_matrix(torch.tensor([40.0, 30.0, 170.0, 190.0]), size)
    face = torch.tensor([[80.0, 90.0], [120.0, 84.0], [104.0, 110.0], [90.0, 136.0], [116.0, 133.0]])
    aligned = similarity_matrix(face, size)
    turned = about_centre(size, 0.85, 0.3, (4.0, -7.0))
    return [
        Warp(box, size), Warp(turned @ box, size), Warp(aligned, size), Warp(turned @ aligned, size),
        Warp(aligned, size, 0.8), Warp(turned @ aligned, size, 0.8), Warp(box, size, 1.0),
    ]  # fmt: skip


def test_the_box_crop_is_the_formula():
    matrix = box_matrix(torch.tensor([[10.0, 20.0, 110.0, 70.0], [0.0, 0.0, 512.0, 512.0]]), 512)
    points = torch.tensor([[[10.0, 20.0], [110.0, 70.0], [60.0, 45.0]]] * 2)
    moved = Warp(matrix, 512).points(points)
    expected = [[(x - 10) / 100 * 512 - 0.5, (y - 20) / 50 * 512 - 0.5] for x, y in points[0].tolist()]
    assert moved[0].tolist() == pytest.approx(np.array(expected))
    # A box of the image's own edges, from 0 to its size, moves pixels by half of one: DOWNSTREAM's formula as it stands.
    assert moved[1].tolist() == pytest.approx(points[1].numpy() - 0.5)


def test_the_similarity_is_exact_where_one_exists():
    turn = Rotation.from_euler("z", 0.4).as_matrix()[:2, :2]
    face = (STANDARD_POINTS.numpy() - 256) @ turn.T / 3.7 + [88.0, 131.0]
    matrix = similarity_matrix(torch.tensor(face), 512)
    moved = Warp(matrix, 512).points(torch.tensor(face))
    assert moved.numpy() == pytest.approx(STANDARD_POINTS.numpy(), abs=1e-9)
    assert float(torch.linalg.det(matrix[:2, :2])) == pytest.approx(3.7**2)


def test_the_similarity_is_the_best_one_and_keeps_shape():
    """Against scipy's orthogonal Procrustes alignment, and against small changes of its own parameters."""
    rng = np.random.default_rng(0)
    # A noisy face: of anything like a mirrored one, scipy's rotation in space would turn over the plane.
    face = STANDARD_POINTS.numpy() / 3 + rng.normal(0, 6, (5, 2))
    target = STANDARD_POINTS.numpy() / 4
    matrix = similarity_matrix(torch.tensor(face), 128).numpy()
    a, b = matrix[0, 0], matrix[1, 0]
    assert matrix[:2, :2] == pytest.approx(np.array([[a, -b], [b, a]]))

    def loss(m):
        return np.square(face @ m[:2, :2].T + m[:2, 2] - target).sum()

    s, t = face - face.mean(0), target - target.mean(0)
    turn = Rotation.align_vectors(np.c_[t, np.zeros(5)], np.c_[s, np.zeros(5)])[0].as_matrix()[:2, :2]
    scale = np.trace(turn @ s.T @ t) / np.square(s).sum()
    procrustes = np.eye(3)
    procrustes[:2, :2] = scale * turn
    procrustes[:2, 2] = target.mean(0) - procrustes[:2, :2] @ face.mean(0)
    assert matrix == pytest.approx(procrustes, abs=1e-6)
    for step in (1e-4, -1e-4):
        for da, db, dx, dy in np.eye(4) * step:
            assert loss(matrix + np.array([[da, -db, dx], [db, da, dy], [0, 0, 0]])) > loss(matrix)


@pytest.mark.parametrize("a", [0.3, 0.8, 1.0])
def test_the_tanh_warp_is_the_formula(a):
    size = 512
    warp = Warp(torch.eye(3, dtype=torch.float64), size, a)
    for c in (-1.7, -1.0, -0.6, -0.21, -0.1, 0.0, 0.15, 0.19, 0.5, 1.0, 2.5):
        if abs(c) <= 1 - a:
            expected = c
        else:
            expected = math.copysign(math.tanh((abs(c) - (1 - a)) / a) * a + (1 - a), c)
        x = (c + 1) / 2 * size
        (there,) = warp.points(torch.tensor([[x, x]], dtype=torch.float64)).tolist()
        assert there == pytest.approx([(expected + 1) / 2 * size] * 2, abs=1e-9)


def test_the_inverse_stops_at_the_clamp():
    """arctanh is clamped to ±0.999: the edge of the square is the same far point as what lies beyond it."""
    size, a = 512, 0.8
    warp = Warp(torch.eye(3, dtype=torch.float64), size, a)
    edge, outside = warp.points_back(torch.tensor([[512.0, 0.0], [900.0, -300.0]])).tolist()
    far = math.atanh(0.999) * a + (1 - a)
    assert edge == pytest.approx([(far + 1) / 2 * size, (-far + 1) / 2 * size])
    assert outside == pytest.approx(edge)


@pytest.mark.parametrize("size", [96, 128, 512])
def test_points_return_within_half_a_pixel(size):
    points = torch.rand(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 200
    for warp in some_warps(size):
        seen = warp.points(points)
        returned = warp.points_back(seen)
        # What the clamp cuts off (0.999 of the way) is far outside of the face; everything before it returns exactly.
        inside = ((seen * 2 / size - 1).abs() <= (1 - warp.factor) + warp.factor * 0.998).all(-1) | (warp.factor == 0)
        assert inside.sum() > 100
        assert (returned - points)[inside].abs().max() < 1e-6


def test_a_mask_returns_within_half_a_pixel():
    """A disc, warped and warped back as logits: its border lies within half a pixel of where it was."""
    size = 512
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    distance = ((x - 100) ** 2 + (y - 108) ** 2).sqrt()
    mask = (distance <= 45).float()
    for warp in some_warps(size):
        warp = Warp(warp.matrix[None], warp.size, warp.factor)
        square = warp.images(mask[None, None], "nearest")
        logits = torch.cat([1 - square, square], dim=1)
        back = warp.images_back(logits, 200, 200).argmax(1)[0]
        wrong = back.bool() != mask.bool()
        # Pixels may change sides only if the border runs within half a pixel of their own half pixel.
        assert not (wrong & ((distance - 45).abs() > 1.0)).any()
        assert wrong.sum() <= 0.25 * 2 * math.pi * 45
        centre = torch.stack([x[back.bool()].mean(), y[back.bool()].mean()])
        assert (centre - torch.tensor([100.0, 108.0])).abs().max() < 0.1


def slow_sample(image: np.ndarray, x: float, y: float) -> float:
    """Bilinear, 0 outside, in plain loops."""
    total = 0.0
    for j in (math.floor(y), math.floor(y) + 1):
        for i in (math.floor(x), math.floor(x) + 1):
            if 0 <= j < image.shape[0] and 0 <= i < image.shape[1]:
                total += image[j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return total


@pytest.mark.parametrize("index", range(7))
def test_images_are_sampled_where_points_come_from(index):
    warp = some_warps(24)[index]
    image = np.random.default_rng(2).uniform(0, 255, (200, 180))
    square = Warp(warp.matrix[None], 24, warp.factor).images(torch.tensor(image)[None, None])[0, 0]
    for row, column in [(0, 0), (3, 17), (12, 12), (23, 5), (20, 23)]:
        x, y = warp.points_back(torch.tensor([[float(column), float(row)]]))[0].tolist()
        # float32 coordinates of up to 200 pixels, values up to 255: some 1e-5 · 255.
        assert float(square[row, column]) == pytest.approx(slow_sample(image, x, y), abs=5e-3)


def test_a_batch_is_its_images_and_padding_is_outside():
    """Images of two sizes in one batch, with 0 around the smaller one, give what each gives alone."""
    generator = torch.Generator().manual_seed(3)
    large = torch.rand(3, 150, 200, generator=generator)
    small = torch.rand(3, 90, 70, generator=generator)
    both = torch.zeros(2, 3, 150, 200)
    both[0], both[1, :, :90, :70] = large, small
    matrices = torch.stack([some_warps(64)[1].matrix, box_matrix(torch.tensor([-20.0, -10.0, 80.0, 100.0]), 64)])
    together = Warp(matrices, 64).images(both)
    for i, alone in enumerate((large, small)):
        expected = Warp(matrices[i : i + 1], 64).images(alone[None])[0]
        # The grid's coordinates are rounded relative to the batch's size: some 1e-5 pixels of slopes of 1.
        torch.testing.assert_close(together[i], expected, rtol=0, atol=1e-4)


def test_a_region_holds_all_that_is_read():
    image = torch.rand(1, 1, 200, 180, generator=torch.Generator().manual_seed(4))
    outside = Warp(box_matrix(torch.tensor([500.0, 500.0, 600.0, 600.0]), 32), 32)
    for warp in [*some_warps(32), outside]:
        left, top, right, bottom = needed_region(warp, 200, 180)
        assert 0 <= left < right <= 180
        assert 0 <= top < bottom <= 200
        whole = Warp(warp.matrix[None], 32, warp.factor)
        shift = torch.eye(3, dtype=torch.float64)
        shift[:2, 2] = torch.tensor([left, top])
        part = Warp((warp.matrix @ shift)[None], 32, warp.factor)
        torch.testing.assert_close(
            part.images(image[:, :, top:bottom, left:right]), whole.images(image), rtol=0, atol=1e-4
        )
    small = needed_region(some_warps(32)[0], 2000, 3000)
    assert (small[2] - small[0]) * (small[3] - small[1]) < 40_000


def test_turning_about_the_centre():
    matrix = about_centre(101, 2.0, math.pi / 2, (3.0, 5.0))
    assert Warp(matrix, 101).points(torch.tensor([[50.0, 50.0], [60.0, 50.0]])).tolist() == [
        pytest.approx([53.0, 55.0]),
        pytest.approx([53.0, 75.0]),
    ]


def test_nearest_keeps_classes():
    labels = torch.randint(0, 19, (1, 1, 60, 60), generator=torch.Generator().manual_seed(5))
    square = Warp(box_matrix(torch.tensor([[0.0, 0.0, 60.0, 60.0]]), 41), 41, 0.8).images(labels, "nearest")
    assert set(square.unique().tolist()) <= set(range(19))
