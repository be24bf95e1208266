"""What is pre-trained on: crops of the training pictures, without their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcf.errors import UserError
from mcf.results import runs

if TYPE_CHECKING:
    from mcf.downstream.datasets import FaceSet

SHARES = (1.0, 0.7)  # sides of the crops, of the shorter side: in the middle of a picture faces come in several sizes


def pack(out: Path, sets: Sequence[FaceSet], size: int) -> None:
    """Crops of the training pictures, and shards of them; nothing that the heads are tested on is among them."""
    if (out / "shards/manifest.json").is_file():
        return
    pictures = training_pictures(sets)
    folder = out / "crops"
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        squares(picture, folder, size)
    print(f"{len(pictures):,} pictures of the training splits, {len(SHARES)} crops each: {folder}", flush=True)
    runs.call(
        out, runs.Job("pack", "pack", (f"source={folder}", f"out={out / 'shards'}", "crop=square", f"size={size}"))
    )


def training_pictures(sets: Sequence[FaceSet]) -> list[Path]:
    """The pictures of all training splits; UserError if one of them, or a person, is in a test split too."""
    tested = {face.image.resolve() for faces in sets for face in faces.test}
    pictures: dict[Path, None] = {}
    for faces in sets:
        people = {face.person for face in faces.test if face.person}
        for face in faces.train:
            if face.person in people or face.image.resolve() in tested:
                raise UserError(
                    f"{face.image}: {face.person or 'the picture'} is in the training and in a test split; split by person"
                )
            pictures[face.image.resolve()] = None
    return list(pictures)


def squares(picture: Path, folder: Path, size: int) -> None:
    """Write the squares in the middle of a picture, as large as its shorter side and smaller, at size × size pixels."""
    from PIL import Image, ImageOps

    with Image.open(picture) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    for share in SHARES:
        side = round(min(image.size) * share)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Sets may have files of one name.
        name = f"{picture.stem}-{hashlib.sha1(str(picture).encode()).hexdigest()[:8]}-{100 * share:.0f}.png"
        cut = image.crop((left, top, left + side, top + side))
        cut.resize((size, size), Image.Resampling.LANCZOS).save(folder / name)
