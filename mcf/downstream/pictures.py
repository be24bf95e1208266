"""Pictures of predictions: points on faces, classes as colours over faces, in tiles with a caption each."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 288  # side of a face, pixels
MARGIN = 8
COLUMNS = 4
INK = (60, 60, 60)
TRUE, PREDICTED = (60, 220, 90), (255, 70, 60)
OVERLAY = 0.55  # weight of a class's colour over the face
# One colour a class, told apart also by neighbours; the background stays as it is.
COLOURS = np.array([
    (0, 0, 0), (222, 168, 140), (92, 170, 66), (214, 204, 70), (66, 99, 255), (160, 80, 230), (96, 226, 236),
    (255, 196, 206), (140, 90, 40), (240, 70, 50), (130, 20, 60), (255, 236, 80), (30, 60, 170), (110, 80, 60),
    (245, 80, 160), (40, 210, 190), (245, 245, 245), (255, 160, 70), (40, 130, 50),
], np.uint8)  # fmt: skip


def with_points(image: NDArray[np.uint8], points: NDArray, true: NDArray | None = None) -> NDArray[np.uint8]:
    """An image [H, W, 3] with predicted points (red) over true ones (green), if there are, and a line between each two."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    radius = max(1.5, 0.006 * max(image.shape[:2]))
    if true is not None:
        for p, t in zip(points, true):
            draw.line([*map(float, t), *map(float, p)], fill=(255, 235, 120), width=max(1, round(radius / 2)))
        for x, y in true:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=TRUE)
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PREDICTED)
    return np.asarray(canvas)


def with_classes(image: NDArray[np.uint8], labels: NDArray) -> NDArray[np.uint8]:
    """An image [H, W, 3] under the colours of its classes [H, W]; class 0 is left as it is."""
    colours = COLOURS if labels.max() < len(COLOURS) else _many(int(labels.max()) + 1)
    mixed = image + OVERLAY * (colours[labels].astype(np.float32) - image)
    return np.where(labels[:, :, None] > 0, mixed.round(), image).astype(np.uint8)


def tiles(
    heading: str, rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: int = COLUMNS
) -> NDArray[np.uint8]:
    """Under a heading: cells of a caption and one or more pictures beside each other, in rows of about `columns` pictures."""
    cells = max(1, columns // max(len(pictures) for _, pictures in rows))
    width = max(len(pictures) for _, pictures in rows) * (TILE + 2) - 2
    font = _font(15)
    caption = int(font.getbbox("Ag")[3]) + 6
    down = -(-len(rows) // cells)
    across = min(cells, len(rows))
    top = MARGIN + caption + MARGIN
    canvas = Image.new("RGB", (MARGIN + across * (width + MARGIN), top + down * (TILE + caption + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), _fitting(heading, canvas.width - 2 * MARGIN, font), fill=INK, font=font)
    for index, (text, pictures) in enumerate(rows):
        x = MARGIN + index % cells * (width + MARGIN)
        y = top + index // cells * (TILE + caption + MARGIN)
        draw.text((x, y), _fitting(text, width, font), fill=INK, font=font)
        for place, picture in enumerate(pictures):
            canvas.paste(_tile(picture), (x + place * (TILE + 2), y + caption))
    return np.asarray(canvas)


def _tile(picture: NDArray[np.uint8]) -> Image.Image:
    """A picture made to fit a tile, its shape kept."""
    image = Image.fromarray(picture)
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(image.resize(size, Image.Resampling.LANCZOS), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a file's name may be no UTF-8
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _many(count: int) -> NDArray[np.uint8]:
    """Colours for sets of more classes than the palette has."""
    more = np.random.default_rng(0).integers(40, 256, (count - len(COLOURS), 3), dtype=np.uint8)
    return np.concatenate([COLOURS, more])


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
