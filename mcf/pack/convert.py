"""From the bytes of any image file to the bytes of an upright RGB JPEG, or a reason why not.

A JPEG that every decoder reads alike and that has the wanted size keeps its bytes. All else is decoded, turned
upright, brought to RGB, cropped, resized and encoded once. What is stored is decoded again from its shard, by the
decoder of training (`mcf.pack.checking`). Colour profiles are applied where there is no meaning without one (CMYK), and dropped
elsewhere: what the encoder learns from RGB files are their numbers as they stand.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageCms

from mcf.pack import jpeg
from mcf.pack.crops import VIEWS, View
from mcf.pack.faces import Face
from mcf.pack.options import PackConfig

# Only formats that Pillow decodes itself: an .eps would be handed to Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "DDS", "ICO")
_JPEG = ("JPEG", "MPO")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")
_LONGEST = 65_500  # what libjpeg encodes
_NEUTRAL = (128, 128, 128)  # shows through transparent pixels; near the mean of photographs, unlike black or white
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")

EMPTY = "empty"
NOT_AN_IMAGE = "not an image"
TRUNCATED = "truncated"
DAMAGED = "damaged"
UNSUPPORTED = "unsupported"
TOO_SMALL = "too small"
TOO_LARGE = "too large"
NOT_DECODABLE = "does not decode with DALI"

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Refused(Exception):
    """An image that is left out: one of the reasons above, and details for a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = _ADDRESS.sub("…", detail)[:200]


@dataclass(frozen=True)
class Prepared:
    """A JPEG to be stored: its size and that of the upright original (width, height), and what was changed.

    face, number: which face it shows, and the how manieth of the image's faces that is.
    """

    jpeg: bytes
    size: tuple[int, int]
    original: tuple[int, int]
    changes: tuple[str, ...]
    face: Face | None = None
    number: int = 0

    @property
    def light(self) -> Prepared:
        """The same without the bytes: what is remembered of it until its shard is finished."""
        return replace(self, jpeg=b"")


def prepare(content: bytes, options: PackConfig) -> Prepared:
    """Turn an image file into what is stored of it.

    Raises Refused for anything that cannot be read in full or is outside the limits of `options`.
    """
    if not content:
        raise Refused(EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; its pixel limit, which is ours to set
        image = opened(content)
        check_size(*image.size, options)
        if image.format not in _JPEG:
            decode(image, content)  # first of all: some formats have their metadata behind the pixels
        orientation = orientation_of(image)
        width, height = reversed(image.size) if orientation >= 5 else image.size
        view = VIEWS[options.cropping](width, height, options.size)
        if max(view.size) > _LONGEST:
            raise Refused(TOO_LARGE, f"{width}x{height}: a JPEG has at most {_LONGEST} pixels a side")
        changes = _changes(image, content, orientation, view)
        if not changes:
            decode(image, content)
            return Prepared(content, view.size, (width, height), ())
        _draft(image, orientation, view)
        decode(image, content)
        upright = image.transpose(TURNS[orientation]) if orientation in TURNS else image
        result = _resize(rgb(upright), view, (width, height))
        return Prepared(encode(result, options), view.size, (width, height), changes)


def opened(content: bytes) -> Image.Image:
    Image.init()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        if content.startswith(_MAGIC):
            raise Refused(DAMAGED, "the header is broken or incomplete") from None
        if content[4:8] == b"ftyp":
            raise Refused(UNSUPPORTED, "HEIC, AVIF or a video: convert it first") from None
        raise Refused(NOT_AN_IMAGE) from None
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise Refused(DAMAGED, f"{type(error).__name__}: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or EXIF is broken, which says nothing about the pixels."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in TURNS else 1


def check_size(width: int, height: int, options: PackConfig) -> None:
    if min(width, height) < options.min_side:
        raise Refused(TOO_SMALL, f"{width}x{height}, min_side={options.min_side}")
    if width * height > options.max_pixels:
        raise Refused(TOO_LARGE, f"{width}x{height}, max_pixels={options.max_pixels}")


def _changes(image: Image.Image, content: bytes, orientation: int, view: View) -> tuple[str, ...]:
    """What keeps an image from being stored as it is, in words for the report."""
    changes = []
    if image.format != "JPEG":
        changes.append(f"format {image.format}")
    else:
        parts = jpeg.structure(content)
        if image.info.get("progressive"):
            changes.append("progressive")
        elif image.mode == "RGB" and not (parts and parts.plain):
            changes.append("unusual JPEG")
    if _animated(image):
        changes.append("first frame of several")
    if image.mode != "RGB":
        changes.append(f"colours {image.mode}")
    if orientation != 1:
        changes.append("turned upright")
    width, height = reversed(image.size) if orientation >= 5 else image.size
    if not view.keeps(width, height):
        changes.append("cropped or resized")
    return tuple(changes)


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # later frames may be broken; only the first is wanted
        return True


def _draft(image: Image.Image, orientation: int, view: View) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8, but no smaller than twice the result: the rest is Lanczos's."""
    if image.format in _JPEG and view.scale >= 4:
        factor = 2 / view.scale
        image.draft(None, (int(image.width * factor), int(image.height * factor)))


def decode(image: Image.Image, content: bytes) -> None:
    try:
        image.load()
    except MemoryError:
        raise Refused(TOO_LARGE, "not enough memory to decode it") from None
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise Refused(TRUNCATED if "truncated" in detail else DAMAGED, detail) from None
    if image.format == "JPEG":
        parts = jpeg.structure(content)
        if parts is not None and not jpeg.complete(content, parts, image):
            raise Refused(TRUNCATED, "the compressed data ends before the image does")


def rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow → RGB, 8 bits a channel."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (*_NEUTRAL, 255))
            return Image.alpha_composite(ground, image).convert("RGB")
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        return image.convert("RGB")
    except ValueError as error:
        raise Refused(UNSUPPORTED, f"colours {image.mode}: {error}") from None


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a broken profile: the plain formula is better than no image
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise Refused(UNSUPPORTED, "integer pixels beyond 16 bits have no known range")
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")


def _resize(image: Image.Image, view: View, original: tuple[int, int]) -> Image.Image:
    """Cut `view` out of an image that may have been decoded smaller than its original."""
    shrunk_x, shrunk_y = image.width / original[0], image.height / original[1]
    left, top, right, bottom = view.box
    box = (left * shrunk_x, top * shrunk_y, min(right * shrunk_x, image.width), min(bottom * shrunk_y, image.height))
    if box == (0, 0, *view.size) and image.size == view.size:
        return image
    return image.resize(view.size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def encode(image: Image.Image, options: PackConfig) -> bytes:
    """A JPEG as hardware decoders take it: baseline, 4:2:0, no EXIF, no profile."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=options.quality, subsampling="4:2:0")
    return stream.getvalue()
