"""Contact sheets: every picture in its place, damage to be seen."""

import io

import numpy as np
from PIL import Image

from mcf.data.sheet import sheet


def jpeg(colour) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def test_pictures_stand_in_rows_in_their_order_whatever_their_size():
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]
    pictures = [jpeg(colours[0]), np.full((20, 20, 3), colours[1], np.uint8), jpeg(colours[2]), *map(jpeg, colours[3:])]
    picture = np.asarray(sheet(pictures, columns=3, cell=40)).astype(int)
    assert picture.shape == (84, 128, 3)
    for number, colour in enumerate(colours):
        x, y = number % 3 * 44 + 20, number // 3 * 44 + 20
        assert np.abs(picture[y, x] - colour).max() < 4
    assert (picture[64, 108] == 255).all()  # the sixth place is empty


def test_small_pictures_grow_by_whole_factors_and_keep_their_edges():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    picture = np.asarray(sheet([pixels], columns=1, cell=50))
    assert picture.shape == (50, 50, 3)
    assert (picture[10, 1:25] == 0).all() and (picture[10, 25:49] == 255).all()


def test_what_does_not_decode_is_crossed_out_and_captions_are_cut():
    plain = np.asarray(sheet([jpeg((9, 9, 9)), b"no jpeg"], columns=2, cell=40))
    assert len(np.unique(plain[1:39, 45:83])) > 1 and (plain[5, 60] == 255).all()
    captioned = np.asarray(
        sheet([jpeg((9, 9, 9))] * 2, columns=2, cell=60, captions=["a", "a caption that is far too long"])
    )
    assert captioned.shape[0] > 60 and captioned.shape[1] == 124
    assert (captioned[62:, :60] < 128).any() and (captioned[62:, 64:] < 128).any()
