"""The picture of reconstructions: what the encoder saw, and what the decoder made of it.

One row a face: input | masked | prediction | prediction with the visible patches pasted in. Wide batches are laid
out in two blocks of rows side by side, so that the picture stays near a screen's shape.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)

MARGIN = 6  # pixels between two faces
GAP = 24  # pixels between two blocks of rows
PAPER = 255  # the background
INK = (60, 60, 60)
DROPPED = 190  # grey of a dropped patch
SMALLEST = 112  # side of a face in the picture, pixels, at least
ROWS = 4  # faces in a block before a second block is begun


def reconstruction_grid(images: np.ndarray, mask: np.ndarray, pred: np.ndarray, patch_size: int) -> np.ndarray:
    """Picture of N faces, their masks and their reconstructions.

    Args:
        images: uint8 [N, H, W, 3], what the loader gave.
        mask: [N, L], 1 where a patch was dropped, L = (H/p)·(W/p) in row order.
        pred: float [N, L, p·p·3], the decoder's patches: values in (row, column, channel) order (METHOD, 1), in
            ImageNet-normalised units.
        patch_size: p, side of a patch in pixels; H and W are multiples of it.

    Returns:
        uint8 [height, width, 3]; small images are shown in whole multiples of their size. Values outside [0, 255]
        after denormalising are clipped, non-finite ones are black.

    Raises:
        ValueError: shapes do not belong together.
    """
    images, mask, pred = np.asarray(images), np.asarray(mask), np.asarray(pred, dtype=np.float32)
    count, height, width, channels = images.shape
    patches = (height // patch_size) * (width // patch_size)
    if channels != 3 or mask.shape != (count, patches) or pred.shape != (count, patches, patch_size**2 * 3):
        raise ValueError(
            f"images {images.shape}, mask {mask.shape} and pred {pred.shape} do not fit with patches of {patch_size}"
        )
    dropped = unpatchify(np.repeat(mask.astype(bool)[:, :, None], patch_size**2 * 3, axis=2), patch_size, height, width)
    predicted = to_pixels(unpatchify(pred, patch_size, height, width))
    columns = {
        "input": images,
        "masked": np.where(dropped, np.uint8(DROPPED), images),
        "prediction": predicted,
        "with visible": np.where(dropped, predicted, images),
    }
    times = -(-SMALLEST // height)
    return _lay_out({name: faces.repeat(times, axis=1).repeat(times, axis=2) for name, faces in columns.items()})


def unpatchify(patches: np.ndarray, patch_size: int, height: int, width: int) -> np.ndarray:
    """[N, L, p·p·3] in (row, column, channel) order → [N, H, W, 3]."""
    rows, columns = height // patch_size, width // patch_size
    grid = patches.reshape(len(patches), rows, columns, patch_size, patch_size, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(len(patches), height, width, 3)


def to_pixels(normalised: np.ndarray) -> np.ndarray:
    """ImageNet-normalised float [..., 3] → uint8, rounded, clipped; non-finite values become 0."""
    pixels = np.nan_to_num((normalised * STD + MEAN) * 255, nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _lay_out(columns: dict[str, np.ndarray]) -> np.ndarray:
    count, height, width, _ = next(iter(columns.values())).shape
    font = _font(max(10, height // 14))
    caption = font.getbbox("Ag")[3] + MARGIN
    blocks = 1 if count <= ROWS else 2
    rows = -(-count // blocks)
    block = len(columns) * (width + MARGIN) - MARGIN
    canvas = Image.new(
        "RGB",
        (2 * MARGIN + blocks * block + (blocks - 1) * GAP, MARGIN + caption + rows * (height + MARGIN)),
        (PAPER,) * 3,
    )
    draw = ImageDraw.Draw(canvas)
    for b in range(blocks):
        for c, (name, faces) in enumerate(columns.items()):
            x = MARGIN + b * (block + GAP) + c * (width + MARGIN)
            draw.text((x + width / 2, MARGIN), _fitting(name, width, font), fill=INK, font=font, anchor="ma")
            for row, face in enumerate(faces[b * rows : (b + 1) * rows]):
                canvas.paste(Image.fromarray(face), (x, MARGIN + caption + row * (height + MARGIN)))
    return np.asarray(canvas)


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The caption, or as many of its letters as the column has room for."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
