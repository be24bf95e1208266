"""The picture of reconstructions shows the right pixels in the right places."""

from __future__ import annotations

import numpy as np
import pytest

from mcf.track import images as pictures
from mcf.track.images import reconstruction_grid, to_pixels, unpatchify

P, SIDE = 8, 32
L = (SIDE // P) ** 2


def patchified(image):
    """Patches of one face in METHOD's order, written as loops: patch by patch, row, column, channel."""
    corners = [(top, left) for top in range(0, SIDE, P) for left in range(0, SIDE, P)]
    return np.array(
        [[image[top + y, left + x, c] for y in range(P) for x in range(P) for c in range(3)] for top, left in corners]
    )


def normalised(image):
    return (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


@pytest.fixture
def faces():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    targets = rng.integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    mask = (rng.random((6, L)) < 0.75).astype(np.float32)
    pred = np.stack([patchified(normalised(target)) for target in targets])
    return images, targets, mask, pred


def find(picture, tile):
    """(top, left) of every exact copy of `tile` in `picture`, enlarged as small images are."""
    times = -(-pictures.SMALLEST // len(tile))
    tile = np.kron(tile, np.ones((times, times, 1), dtype=np.uint8))
    height, width, _ = tile.shape
    corners = np.argwhere((picture[:-height, :-width] == tile[0, 0]).all(axis=2))
    return [(int(y), int(x)) for y, x in corners if np.array_equal(picture[y : y + height, x : x + width], tile)]


def test_unpatchify_and_denormalise_undo_the_method(faces):
    _, targets, _, pred = faces
    # Rounding to whole pixels absorbs float error: 255 · 0.2 · 1e-7 is far below one half.
    assert np.array_equal(to_pixels(unpatchify(pred, P, SIDE, SIDE)), targets)


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_every_face_has_its_row_with_input_masked_prediction_and_pasted(faces, count):
    images, targets, mask, pred = (part[:count] for part in faces)
    picture = reconstruction_grid(images, mask, pred, P)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    for image, target, dropped in zip(images, targets, mask):
        masked, pasted = image.copy(), image.copy()
        for patch in range(L):
            if dropped[patch]:
                y, x = divmod(patch, SIDE // P)
                window = slice(y * P, y * P + P), slice(x * P, x * P + P)
                masked[window] = pictures.DROPPED
                pasted[window] = target[window]
        places = [find(picture, tile) for tile in (image, masked, target, pasted)]
        assert all(len(place) == 1 for place in places)
        tops, lefts = zip(*(place[0] for place in places))
        assert len(set(tops)) == 1
        assert list(lefts) == sorted(lefts)


def test_out_of_range_and_non_finite_predictions_are_clipped(faces):
    images, _, mask, pred = (part[:1] for part in faces)
    pred = pred.copy()
    pred[0, 0], pred[0, 1], pred[0, 2] = 1e6, -1e6, np.nan
    column = to_pixels(unpatchify(pred.astype(np.float32), P, SIDE, SIDE))[0]
    assert (column[:P, :P] == 255).all()
    assert (column[:P, P : 3 * P] == 0).all()
    reconstruction_grid(images, mask, pred, P)


def test_captions_do_not_touch_the_faces(faces):
    images, _, mask, pred = faces
    picture = reconstruction_grid(images, mask, pred, P)
    top = min(find(picture, image)[0][0] for image in images)
    heading = picture[:top]
    assert (heading < 128).any()
    assert (heading[-2:] == 255).all()


def test_shapes_that_do_not_belong_together_are_refused(faces):
    images, _, mask, pred = faces
    with pytest.raises(ValueError, match="do not fit"):
        reconstruction_grid(images, mask[:, :-1], pred, P)
    with pytest.raises(ValueError, match="do not fit"):
        reconstruction_grid(images, mask, pred, 16)
