"""The loader: order, ranks, restarts, and labels that follow their images through the warp."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from PIL import Image

from mcf.downstream.datasets import open_faces
from mcf.downstream.datasets.faceset import read_image
from mcf.downstream.loader import Loader, Order, face_warp
from mcf.errors import UserError


def test_the_order_is_a_permutation_an_epoch():
    order = Order(11, 4, seed=3)
    epochs = [[order[n] for n in range(8 * e, 8 * e + 8)] for e in range(3)]
    assert all(len(set(epoch)) == 8 and max(epoch) <= 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order(11, 4, seed=3)[n] for n in range(16, 24)] == epochs[2]  # wherever one begins
    assert [Order(11, 4, seed=4)[n] for n in range(8)] != epochs[0]


@pytest.fixture
def alignment(tmp_path, config):
    trees.table(tmp_path, train=11, test=5)
    return open_faces("alignment", "csv", tmp_path), config()


def taken(loader, faces, count, **where):
    batches = loader.training(faces.train, where.pop("start", 0), where.pop("rank", 0), where.pop("ranks", 1), **where)
    return [next(batches) for _ in range(count)]


def test_samples_depend_on_their_number_alone(alignment):
    faces, config = alignment
    with Loader(faces, config, torch.device("cpu"), 2) as loader:
        whole = taken(loader, faces, 3, micro_batch=4)
        later = taken(loader, faces, 1, start=8, micro_batch=4)
        ranks = [taken(loader, faces, 3, rank=r, ranks=2, micro_batch=2) for r in range(2)]
        small = taken(loader, faces, 6, micro_batch=2)
    assert [p.face.name for p in later[0].faces] == [p.face.name for p in whole[2].faces]
    # Padding differs with the batch's other images, and with it the last bits of the sampling grid.
    torch.testing.assert_close(later[0].images, whole[2].images, rtol=0, atol=1e-5)
    for step in range(3):
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][step].images, whole[step].images[rank::2], rtol=0, atol=1e-4)
            torch.testing.assert_close(ranks[rank][step].points, whole[step].points[rank::2])
        torch.testing.assert_close(small[2 * step].points, whole[step].points[:2])


def test_points_follow_their_image(tmp_path, config):
    """A bright spot at a point is found, in the turned square, where the warped label says it is."""
    trees.table(tmp_path, train=8, test=1)
    faces = open_faces("alignment", "csv", tmp_path)
    for face in faces.train:
        y, x = np.mgrid[:48, :64]
        spot = np.exp(-((x - face.points[30, 0]) ** 2 + (y - face.points[30, 1]) ** 2) / (2 * 1.5**2))
        Image.fromarray((255 * spot).round().astype(np.uint8)).convert("RGB").save(face.image, "PNG")
    settings, compared = config(warp_size=96, input_size=96), 0
    with Loader(faces, settings, torch.device("cpu"), 1) as loader:
        for batch in (loader.collate(turned(loader, faces.train)), next(loader.plain(faces.train, 8))):
            y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
            for image, points in zip(batch.images.mean(1), batch.points):
                centre = torch.stack([(image * x).sum(), (image * y).sum()]) / image.sum()
                if ((points[30] - 0.5).abs() < 0.3).all():  # all of the spot is in the square
                    # Values rounded to 1/255 over some hundred pixels: less than a tenth of a pixel.
                    assert (centre + 0.5 - 96 * points[30]).abs().max() < 0.1
                    compared += 1
    assert compared >= 8


def turned(loader: Loader, faces) -> list:
    """Faces under the geometry of their draws, without what these do to the colours."""
    return [dataclasses.replace(loader._draw(face, n), draw=None) for n, face in enumerate(faces)]


def test_labels_follow_their_image(tmp_path, config):
    """An image that shows its own mask as grey levels: in the square both still say the same."""
    trees.masks(tmp_path, train=4, test=1)
    faces = open_faces("parsing", "masks", tmp_path)
    for face in faces.train:
        labels = np.asarray(Image.open(face.labels))
        Image.fromarray((labels * 10 + 10).astype(np.uint8)).convert("RGB").save(face.image.with_suffix(".png"))
        face.image.unlink()
    faces = open_faces("parsing", "masks", tmp_path)
    settings = config(task="parsing", dataset="masks", warp_size=96, input_size=96)
    with Loader(faces, settings, torch.device("cpu"), 1) as loader:
        plain, drawn = next(loader.plain(faces.train, 4)), loader.collate(turned(loader, faces.train))
    for batch in (plain, drawn):
        seen = ((batch.images.mean(1) * 255 - 10) / 10).round()
        labels = batch.labels.float()
        # Where two classes meet bilinear sampling mixes them: only pixels among their own kind are compared.
        same = F.max_pool2d(labels, 5, 1, 2) == -F.max_pool2d(-labels, 5, 1, 2)
        # Class 0 is also what lies outside of the image, and what lies beyond the square is not known here.
        inside = same & (labels > 0)
        inside[:, [0, 1, -2, -1]], inside[:, :, [0, 1, -2, -1]] = False, False
        assert inside.float().mean() > 0.2
        assert (seen[inside] == labels[inside]).float().mean() > 0.999
    assert not torch.equal(plain.labels, drawn.labels)


def test_the_plain_crop_shows_the_box_at_its_scale(alignment):
    faces, _ = alignment
    face = faces.test[0]
    warp = face_warp(face, faces, 100, (48, 64), None)
    left, top, right, bottom = face.box
    corners = warp.points(torch.tensor([[left, top], [right, bottom]], dtype=torch.float64))
    # The box fills 0.8 of the square, about its centre at 49.5.
    assert corners.numpy() == pytest.approx(np.array([[9.5, 9.5], [89.5, 89.5]]) + 0.0, abs=0.5)


def test_a_broken_image_ends_in_its_name(alignment):
    faces, config = alignment
    faces.train[5].image.write_bytes(b"\xff\xd8 no jpeg")
    with (
        Loader(faces, config, torch.device("cpu"), 2) as loader,
        pytest.raises(UserError, match=r"5\.jpg: cannot be read"),
    ):
        list(loader.plain(faces.train, 4))


def test_only_what_the_square_needs_is_kept(tmp_path, config):
    trees.table(tmp_path, train=2, test=1)
    trees.picture(tmp_path / "images/0.jpg", 900, 700)
    faces = open_faces("alignment", "csv", tmp_path)
    with Loader(faces, config(), torch.device("cpu"), 1) as loader:
        prepared = loader.prepare(faces.train[0], None)
    assert prepared.image.size < read_image(faces.train[0]).size / 10
    assert prepared.shape == (700, 900)
