"""A model of points looks again until it has found the face: how often, and where it ends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mcf.downstream.inference import Predictor

# In a picture of 200 pixels, left of its middle; their mean is the middle of their box.
FACE = np.array([[70.0, 60], [90, 60], [80, 72.5], [72, 85], [88, 85]])


class OfCentredFaces(Predictor):
    """Takes every face for one in the middle of the cut: what it finds lies a third of the way from there to the face.

    It stands for a network, which would have to be trained for this.
    """

    def __init__(self, dataset: str = "csv"):
        super().__init__(None, SimpleNamespace(task="alignment", dataset=dataset, scale=0.8, warp=0.0, warp_size=64))
        self.looks = 0

    def points(self, image, warp):
        self.looks += 1
        middle = warp.points_back(torch.tensor([[31.5, 31.5]], dtype=torch.float64)).numpy()
        return FACE + (1 - 1 / 3) * (middle - FACE.mean(axis=0))


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (200, 200)).save(tmp_path / "face.png")
    return tmp_path / "face.png"


def test_it_looks_until_the_points_stay(picture):
    predictor = OfCentredFaces()
    image, points = predictor(picture, looks=50)
    assert image.shape == (200, 200, 3)
    # Each look leaves two thirds of what the middle of the cut is away from the face. It ends when that third is under
    # half a percent of the box, 1.25 times the 25 pixels of the points: then 0.31 pixels at most are left.
    assert np.linalg.norm(points - FACE, axis=1).max() < 2 * 0.005 * 1.25 * 25
    first = np.linalg.norm(np.array([99.5, 99.5]) - FACE.mean(axis=0))
    expected = next(n for n in range(1, 50) if first * (2 / 3) ** (n - 1) / 3 < 0.005 * 1.25 * 25)
    assert predictor.looks == expected


@pytest.mark.parametrize(("looks", "dataset", "times"), [(1, "csv", 1), (4, "csv", 4), (4, "aflw19", 1)])
def test_it_does_not_look_more_often_than_it_may(picture, looks, dataset, times):
    predictor = OfCentredFaces(dataset)
    predictor(picture, looks=looks)
    assert predictor.looks == times


def test_a_box_that_is_right_is_looked_at_once_more(picture):
    predictor = OfCentredFaces()
    centre = FACE.mean(axis=0)
    _, points = predictor(picture, np.concatenate([centre - 20, centre + 20]), looks=50)
    assert predictor.looks == 2
    np.testing.assert_allclose(points, FACE, atol=1e-9)
