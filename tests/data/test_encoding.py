"""JPEGs of nvImageCodec against Pillow's."""

import io

import numpy as np
import pytest
from PIL import Image

from mcf.data.encoding import JpegEncoder


@pytest.mark.parametrize("quality", [50, 95, 100])
def test_the_bytes_are_pillows(quality):
    encoder, rng = JpegEncoder(quality), np.random.default_rng(quality)
    for height, width in ((1, 1), (7, 13), (16, 17), (255, 300)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
        assert encoder.encode(pixels) == stream.getvalue()
        turned = np.ascontiguousarray(pixels.transpose(1, 0, 2)).transpose(1, 0, 2)  # not contiguous
        assert encoder.encode(turned) == stream.getvalue()


def test_a_picture_that_no_jpeg_can_hold_raises_and_the_next_is_encoded():
    encoder = JpegEncoder(90)
    with pytest.raises(RuntimeError, match="65501"):
        encoder.encode(np.zeros((65_501, 1, 3), np.uint8))
    assert encoder.encode(np.zeros((2, 2, 3), np.uint8))[:2] == b"\xff\xd8"
