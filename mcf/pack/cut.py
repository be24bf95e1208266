"""Faces out of images: an image file and its faces → the JPEGs to be stored, or a reason why not.

    plain JPEG      only the rectangle that the crops lie in is decoded (DALI), many images at a time
    all else        decoded whole and turned upright by Pillow (`mcf.pack.convert`): other formats, EXIF's turns, CMYK,
                    what DALI refuses, what may be truncated, and everything that a detector has to look at
    crop            resized by torch (bicubic, antialiased: as Pillow's within a level, at a third of the time), encoded

Both ways give the same bytes for the same image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mcf.data.dali import RegionDecoder
from mcf.data.encoding import JpegEncoder
from mcf.data.jpeg import jpeg_size
from mcf.errors import UserError
from mcf.pack import convert, jpeg
from mcf.pack.convert import Prepared, Refused
from mcf.pack.crops import Turned, View, around, upright
from mcf.pack.faces import Face, select, telling
from mcf.pack.options import PackConfig

DETECTOR_FAILED = "the detector failed"
BATCH = 32  # images whose rectangles are decoded at once
_GREY = 128  # what libjpeg fills lost blocks with

Finder = Callable[[np.ndarray], list[Face]]


@dataclass(frozen=True)
class Cut:
    """What became of one image: its crops, why faces were left out, and why the image gave no crop (or None)."""

    crops: list[Prepared]
    refused: list[str]
    left_out: Refused | None = None


@dataclass(frozen=True)
class _Plan:
    """The crops of one image: its upright size, the faces with their numbers, a view each, and the faces' refusals."""

    size: tuple[int, int]
    faces: list[tuple[int, Face]]
    views: list[View]
    refused: list[str]

    @property
    def region(self) -> tuple[int, int, int, int]:
        """The rectangle (left, top, right, bottom) that holds all views, whole pixels."""
        boxes = np.array([view.box for view in self.views])
        left, top = np.floor(boxes[:, :2].min(0)).astype(int).tolist()
        right, bottom = np.ceil(boxes[:, 2:].max(0)).astype(int).tolist()
        return left, top, right, bottom


class Cutter:
    """Cuts the faces out of images, up to BATCH at a time.

    find: a detector (uint8 RGB [H, W, 3] → faces), asked for images that come without faces. Not for several threads.
    """

    def __init__(self, options: PackConfig, find: Finder | None = None):
        self.options, self.find = options, find
        self._regions = RegionDecoder(BATCH)
        self._encoder = JpegEncoder(options.quality)

    def cut(self, images: Sequence[tuple[bytes, Sequence[Face] | None]]) -> list[Cut]:
        """What becomes of each (file content, its faces or None: look for them)."""
        results: list[Cut | None] = [None] * len(images)
        plans: dict[int, _Plan] = {}
        for i, (content, faces) in enumerate(images):
            if faces is None or (size := _plain_size(content)) is None:
                continue
            try:
                plans[i] = self._plan(size, faces)
            except _NoFace as refusal:
                results[i] = Cut([], refusal.refused, refusal)
            except Refused as refusal:
                results[i] = Cut([], [], refusal)
        if plans:
            pixels = self._regions.decode(
                [np.frombuffer(images[i][0], np.uint8) for i in plans], [plan.region for plan in plans.values()]
            )
            for (i, plan), region in zip(plans.items(), pixels):
                if region is not None and not _may_be_lost(region):
                    results[i] = self._crops(plan, region, plan.region[:2])
        return [result or self._whole(*images[i]) for i, result in enumerate(results)]

    def _plan(self, size: tuple[int, int], faces: Sequence[Face]) -> _Plan:
        width, height = size
        convert.check_size(width, height, self.options)
        kept, refused = select(faces, width, height, self.options)
        if not kept:
            raise _NoFace(refused)
        place = upright if self.options.cropping == "aligned" else around
        views = [place(face, width, height, self.options.size, self.options.margin) for _, face in kept]
        return _Plan(size, kept, views, refused)

    def _crops(self, plan: _Plan, pixels: np.ndarray, corner: tuple[int, int]) -> Cut:
        crops = []
        for (number, face), view in zip(plan.faces, plan.views):
            content = self._encoder.encode(_render(pixels, corner, view))
            crops.append(Prepared(content, view.size, plan.size, (), face, number))
        return Cut(crops, plan.refused)

    def _whole(self, content: bytes, faces: Sequence[Face] | None) -> Cut:
        """The slow way, for whatever an image can be."""
        try:
            pixels = _decode_upright(content, self.options)
            if faces is None:
                faces = self._look(pixels)
            plan = self._plan((pixels.shape[1], pixels.shape[0]), faces)
            left, top, right, bottom = plan.region
            return self._crops(plan, pixels[top:bottom, left:right], (left, top))
        except _NoFace as refusal:
            return Cut([], refusal.refused, refusal)
        except Refused as refusal:
            return Cut([], [], refusal)

    def _look(self, pixels: np.ndarray) -> list[Face]:
        try:
            return self.find(pixels) if self.find else []
        except UserError:
            raise
        except Exception as error:  # whatever a detector stumbles over costs the image alone
            raise Refused(DETECTOR_FAILED, f"{type(error).__name__}: {error}") from None


class _NoFace(Refused):
    """An image none of whose faces is kept."""

    def __init__(self, refused: list[str]):
        super().__init__(telling(refused), f"{len(refused)} faces" if len(refused) > 1 else "")
        self.refused = refused


def _plain_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG whose pixels stand as they are shown; None for everything else."""
    size = jpeg_size(np.frombuffer(content, np.uint8))
    parts = jpeg.structure(content) if size else None
    if size is None or parts is None or not parts.plain or parts.exif:
        return None
    return size[1], size[0]


def _may_be_lost(pixels: np.ndarray) -> bool:
    """Whether the last pixel is what libjpeg puts in the place of data that is not there: then a closer look is due."""
    return pixels[-1, -1].tolist() == [_GREY] * 3


def _decode_upright(content: bytes, options: PackConfig) -> np.ndarray:
    """uint8 RGB [H, W, 3] of any image file. Raises Refused."""
    if not content:
        raise Refused(convert.EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = convert.opened(content)
        convert.check_size(*image.size, options)
        convert.decode(image, content)
        turn = convert.TURNS.get(convert.orientation_of(image))
        return np.asarray(convert.rgb(image.transpose(turn) if turn is not None else image))


def _render(pixels: np.ndarray, corner: tuple[int, int], view: View) -> np.ndarray:
    """What a view shows, of the part of the image that begins at `corner` (left, top)."""
    if isinstance(view, Turned):
        return _turned(pixels, corner, view)
    left, top, right, bottom = (round(value) for value in view.box)
    return _resized(pixels[top - corner[1] : bottom - corner[1], left - corner[0] : right - corner[0]], view.size)


def _turned(pixels: np.ndarray, corner: tuple[int, int], view: Turned) -> np.ndarray:
    left, top, right, bottom = view.reach
    x, y = corner
    before, after = (
        (max(0, y - top), max(0, x - left)),
        (max(0, bottom - y - pixels.shape[0]), max(0, right - x - pixels.shape[1])),
    )
    part = pixels[max(0, top - y) : max(0, bottom - y), max(0, left - x) : max(0, right - x)]
    part = np.pad(part, ((before[0], after[0]), (before[1], after[1]), (0, 0)), mode="edge")
    shrunk = max(1.0, view.scale)
    if shrunk > 1:  # what is to become smaller is averaged first: the turn itself looks at single pixels
        small = (max(1, round(part.shape[1] / shrunk)), max(1, round(part.shape[0] / shrunk)))
        ratio = (part.shape[1] / small[0], part.shape[0] / small[1])
        part = _resized(part, small)
    else:
        ratio = (1.0, 1.0)
    result = Image.fromarray(part).transform(
        view.size, Image.Transform.AFFINE, view.affine(left, top, ratio), Image.Resampling.BICUBIC
    )
    return np.asarray(result)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] → [size[1], size[0], 3]."""
    import torch
    import torch.nn.functional as F

    if (pixels.shape[1], pixels.shape[0]) == size:
        return np.ascontiguousarray(pixels)
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(
        0, 3, 1, 2
    )  # in memory channels last: quicker
    resized = F.interpolate(tensor, (size[1], size[0]), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()
