"""What the header of a JPEG states, read without decoding it."""

from __future__ import annotations

import numpy as np

MAX_PIXELS = 1 << 26  # a header that claims more is damaged; decoding it would take gigabytes


def jpeg_size(jpeg: np.ndarray) -> tuple[int, int] | None:
    """Height and width that the header of a JPEG (uint8 [bytes]) states; None if it is no JPEG or breaks off before."""
    if len(jpeg) < 4 or jpeg[0] != 0xFF or jpeg[1] != 0xD8:
        return None
    data, at = jpeg.data, 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame, of any coding
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
        elif marker in (0xD9, 0xDA):  # end of image, start of scan: the frame should have come before
            return None
        else:
            at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def absurd_size(jpeg: np.ndarray) -> str | None:
    """What is wrong with the size that a JPEG's header states, before anything is decoded; None if nothing is."""
    size = jpeg_size(jpeg)
    if size is None:
        return "no JPEG header"
    height, width = size
    if not 0 < height * width <= MAX_PIXELS:
        return f"header claims {width}x{height} pixels"
    return None
