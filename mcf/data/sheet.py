"""Contact sheets: many small pictures on one, with a line of text under each where that helps."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 4  # pixels between pictures
_GROUND, _INK = (255, 255, 255), (60, 60, 60)


def sheet(
    pictures: Sequence[np.ndarray | bytes], columns: int, cell: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Pictures (uint8 [H, W, 3], or JPEG bytes) in rows, each fitted into a square of `cell` pixels.

    What does not decode is a crossed-out square: a sheet is for looking, and damage is one of the things to see.
    captions: a line under each, cut off where it is too long.
    """
    letters = max(9, cell // 11)
    font = ImageFont.load_default(size=letters)
    line = letters * 3 // 2 if captions else 0
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (cell + _GAP) - _GAP, max(1, rows * (cell + line + _GAP) - _GAP)), _GROUND)
    pen = ImageDraw.Draw(canvas)
    for number, picture in enumerate(pictures):
        x, y = number % columns * (cell + _GAP), number // columns * (cell + line + _GAP)
        image = _opened(picture)
        if image is None:
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=_INK)
            pen.line((x, y, x + cell, y + cell), fill=_INK)
            pen.line((x, y + cell, x + cell, y), fill=_INK)
        else:
            image = _fitted(image, cell)
            canvas.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
        if captions:
            pen.text((x, y + cell + 1), _fitting(captions[number], cell, font), fill=_INK, font=font)
    return canvas


def _opened(picture: np.ndarray | bytes) -> Image.Image | None:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return image.convert("RGB")
    except Exception:  # whatever a damaged image brings about
        return None


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """Shrunk to fit, or enlarged by a whole factor, pixels as squares: patches and masks keep their edges."""
    factor = cell // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image


def _fitting(text: str, width: int, font) -> str:
    """The text, or its beginning and … where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
