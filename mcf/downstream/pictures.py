"""Pictures of predictions: points on faces, classes as colours over faces, in tiles with a caption each."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 288  # side of a face, pixels
MARGIN = 8
SWATCH = 14  # side of a class's colour in the legend
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
    mixed = image + OVERLAY * (colours(int(labels.max()) + 1)[labels].astype(np.float32) - image)
    return np.where(labels[:, :, None] > 0, mixed.round(), image).astype(np.uint8)


def indexed(labels: NDArray[np.uint8]) -> Image.Image:
    """Classes [H, W] as a picture whose values they are, shown by any viewer in the colours of `with_classes`."""
    picture = Image.fromarray(labels)
    picture.putpalette(colours(256).tobytes())
    return picture


def legend(classes: Sequence[str], width: int = 2 * TILE) -> NDArray[np.uint8]:
    """The colours of classes and their names, in columns, `width` pixels wide; the background, which has none, is left out."""
    font = _font(15)
    named = list(zip(classes, colours(len(classes)).tolist()))[1:]
    cell = min(SWATCH + 6 + int(max((font.getlength(name) for name, _ in named), default=0)) + 16, width)
    columns, line = max(1, width // cell), int(font.getbbox("Ag")[3]) + 6
    canvas = Image.new("RGB", (width, max(1, -(-len(named) // columns) * line)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (name, colour) in enumerate(named):
        x, y = index % columns * cell, index // columns * line
        draw.rectangle((x, y + 3, x + SWATCH - 1, y + 2 + SWATCH), fill=tuple(colour), outline=INK)
        x += SWATCH + 6
        draw.text((x, y), _fitting(name, cell - SWATCH - 6, font), fill=INK, font=font)
    return np.asarray(canvas)


def tiles(
    heading: str,
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    columns: int = COLUMNS,
    classes: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """Under a heading: cells of a caption and one or more pictures beside each other, in rows of about `columns` pictures.

    classes: names for a legend between the two.
    """
    cells = max(1, columns // max(len(pictures) for _, pictures in rows))
    width = max(len(pictures) for _, pictures in rows) * (TILE + 2) - 2
    font = _font(15)
    caption = int(font.getbbox("Ag")[3]) + 6
    down = -(-len(rows) // cells)
    across = min(cells, len(rows))
    whole = MARGIN + across * (width + MARGIN)
    top = MARGIN + caption + MARGIN
    named = Image.fromarray(legend(classes, whole - 2 * MARGIN)) if classes else None
    under = top + (named.height + MARGIN if named else 0)
    canvas = Image.new("RGB", (whole, under + down * (TILE + caption + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), _fitting(heading, canvas.width - 2 * MARGIN, font), fill=INK, font=font)
    if named:
        canvas.paste(named, (MARGIN, top))
    for index, (text, pictures) in enumerate(rows):
        x = MARGIN + index % cells * (width + MARGIN)
        y = under + index // cells * (TILE + caption + MARGIN)
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


def colours(count: int) -> NDArray[np.uint8]:
    """Colours [count, 3] of as many classes; beyond the palette they are drawn, and the same every time."""
    more = np.random.default_rng(0).integers(40, 256, (max(0, count - len(COLOURS)), 3), dtype=np.uint8)
    return np.concatenate([COLOURS, more])[: max(count, 1)]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
