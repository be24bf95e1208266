"""What can be known of a JPEG without decoding it."""

from __future__ import annotations

import numpy as np

MAX_PIXELS = 1 << 26  # a header that claims more is damaged; decoding it would take gigabytes
_END = b"\xff\xd9"  # the marker that no data holds: in them a 0 follows each 0xFF


def jpeg_size(jpeg: np.ndarray) -> tuple[int, int] | None:
    """Height and width that the header of a JPEG (uint8 [bytes]) states; None if it is no JPEG or breaks off before."""
    at = _start_of_frame(jpeg)
    if at is None:
        return None
    high, low, wide, last = jpeg[at + 5 : at + 9].tolist()
    return high << 8 | low, wide << 8 | last


def unfit(jpeg: np.ndarray) -> str | None:
    """Why a JPEG (uint8 [bytes]) is not given to a decoder; None if it is.

    A size that would take gigabytes is refused, and a file that breaks off: decoders do not agree on those, and a GPU's
    may say of one that it was decoded.
    """
    at = _start_of_frame(jpeg)
    if at is None:
        return "no JPEG header"
    height, width = jpeg_size(jpeg) or (0, 0)
    if not 0 < height * width <= MAX_PIXELS:
        return f"header claims {width}x{height} pixels"
    # Before the frame a thumbnail may have an end of its own; after the end there may be anything.
    return None if _END in jpeg[at:].tobytes() else "breaks off"


def _start_of_frame(jpeg: np.ndarray) -> int | None:
    """Where the marker lies that the size follows; None where none comes before the data."""
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
            return at
        elif marker in (0xD9, 0xDA):  # end of image, start of scan: the frame should have come before
            return None
        else:
            at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + (data[at + 2] << 8 | data[at + 3])
    return None
