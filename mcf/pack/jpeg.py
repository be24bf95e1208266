"""What a JPEG is made of, as far as its markers tell (ITU-T T.81, Annex B), and whether its scan is complete.

libjpeg only warns when the entropy-coded data ends before the image does, and fills the rest with grey; Pillow does
not pass warnings on. A file whose tail was lost and that still ends in EOI looks whole to it. It is found by decoding
a second time with other bytes put before the EOI: a complete scan does not read them, an incomplete one does.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass

from PIL import Image

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
BASELINE = 0xC0
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn, without DHT, JPG and DAC
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # TEM and RSTn carry no length
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Codes of several lengths, no 0xFF among them; more than the bit buffer of a decoder reads ahead.
_FILLER = bytes((i * 37 + 11) % 251 for i in range(4096))


@dataclass(frozen=True)
class Structure:
    """Frame type (low byte of SOFn), component ids, Adobe's colour transform, where the first scan ends, EXIF or not."""

    frame: int
    components: bytes
    transform: int | None
    end: int | None
    single_scan: bool
    exif: bool

    @property
    def plain(self) -> bool:
        """Whether any decoder reads this the same way: baseline, one scan, three components of YCbCr, an end."""
        return (
            self.frame == BASELINE
            and self.single_scan
            and len(self.components) == 3
            and self.components != b"RGB"
            and self.transform != 0
        )


def structure(content: bytes) -> Structure | None:
    """Read the markers of a JPEG up to the end of its first scan; None if they make no sense."""
    frame, components, transform, exif = None, b"", None, False
    position = 2
    while position + 4 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _ALONE:
            position += 2
            continue
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        body = content[position + 4 : position + 2 + length]
        if marker in _FRAMES and len(body) >= 6:
            frame, components = marker, body[6 : 6 + 3 * body[5] : 3]
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            transform = body[11]
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = True
        elif marker == SOS:
            if frame is None:
                return None
            found = _END_OF_SCAN.search(content, position + 2 + length)
            end = found.start() if found else None
            single = end is not None and content[end + 1] == EOI
            return Structure(frame, components, transform, end, single, exif)
        position += 2 + length
    return None


def complete(content: bytes, parts: Structure, image: Image.Image) -> bool:
    """Whether the scan reaches the end of the image, which was decoded from `content` without an error.

    The second decoding is spared where it cannot find anything: lost blocks of a sequential JPEG are exactly
    mid-grey, up to the last pixel (a cut inside the very last block, bits of 16x16 pixels, passes). Progressive ones are always looked at, for their lost data is mere sharpness.
    """
    end = parts.end if parts.single_scan else content.rfind(b"\xff\xd9")
    if end is None or end < 0:
        return False
    corner = image.getpixel((image.width - 1, image.height - 1))
    if parts.single_scan and image.mode in ("L", "RGB") and corner not in (128, (128, 128, 128)):
        return True
    other = content[:end] + _FILLER + b"\xff\xd9"
    try:
        return _fingerprint(content) == _fingerprint(other)
    except (OSError, SyntaxError):
        return False


def _fingerprint(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return hashlib.sha256(image.tobytes()).digest()
