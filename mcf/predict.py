"""Draw what a fine-tuned model sees: `python -m mcf.predict weights=RUN images=FILE|FOLDER out=FOLDER`.

    image ──► cut as in training ──► network ──► points or classes in the image's own pixels ──► OUT/NAME.png, sheet.jpg

There is no face detector here: a face is expected to fill its picture, or `boxes` says where it is. A model of points
looks again, at a cut around the points that it has found, until they stay where they are.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mcf import caches, cli
from mcf.config import Positive, Section
from mcf.errors import UserError

if TYPE_CHECKING:
    import numpy as np

KINDS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SHEET = "sheet.jpg"
LEGEND = "legend.png"
SHOWN = 12  # pictures on the sheet
LOOKS = 10  # of a model of points, at most


class PredictConfig(Section):
    """Draw the points or classes that a fine-tuned model finds on your own pictures.

    Each picture is taken for one upright face that fills it, unless boxes= says where the face is. Beside the pictures,
    points go to OUT/points.csv, classes to OUT/NAME.classes.png, their names to OUT/classes.txt and their colours to
    OUT/legend.png. The first twelve stand together on OUT/sheet.jpg. Pictures that cannot be read are left out, and said.
    """

    weights: str = Field(description="run directory of mcf.finetune, or its model.safetensors")
    images: str = Field(description="a picture, or a folder of pictures")
    out: str = Field("predictions", description="folder for the results")
    boxes: str | None = Field(None, description="CSV of file,left,top,right,bottom in pixels: where the faces are")
    threads: Positive | None = Field(None, description="CPU threads of torch; default: as many as it likes")


@cli.main
def main(argv: list[str] | None = None) -> int:
    """The verb."""
    config = cli.parse(PredictConfig, sys.argv[1:] if argv is None else argv, verb="predict")
    pictures = find_pictures(config.images)
    boxes = read_boxes(config.boxes, pictures) if config.boxes else {}
    out = Path(config.out)
    if any(picture.parent.resolve() == out.resolve() for picture in pictures):
        raise UserError(f"out={out}: the pictures themselves lie there; choose another folder")
    # torch comes with them: help and refusals need not wait for it.
    import torch
    from PIL import Image

    from mcf import linear
    from mcf.downstream import saved
    from mcf.downstream.inference import Predictor
    from mcf.downstream.pictures import indexed, legend, tiles, with_classes, with_points

    if config.threads:
        torch.set_num_threads(config.threads)
    caches.keep_local()
    linear.use("auto")
    network, description = saved.load(config.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor(network.to(device), description)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    shown: list[tuple[str, list[np.ndarray]]] = []
    left_out = 0
    for picture in pictures:
        try:
            image, found = predictor(picture, boxes.get(picture.name), looks=LOOKS)
        except UserError as error:
            if len(pictures) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr, flush=True)
            left_out += 1
            continue
        drawn = with_points(image, found) if description.task == "alignment" else with_classes(image, found)
        Image.fromarray(drawn).save(out / f"{picture.name}.png")
        if len(shown) < SHOWN:
            shown.append((picture.name, [image, drawn]))
        if description.task == "alignment":
            rows.append([picture.name, *(f"{value:.2f}" for value in found.ravel())])
        else:
            indexed(found).save(out / f"{picture.name}.classes.png")
    if left_out == len(pictures):
        raise UserError(f"images={config.images}: none of its {left_out} pictures can be read; give others")
    if description.task == "alignment":
        write_points(out / "points.csv", rows, description.outputs)
    else:
        (out / "classes.txt").write_text("\n".join(description.classes) + "\n", encoding="utf-8")
        Image.fromarray(legend(description.classes)).save(out / LEGEND)
    heading = f"{'Points' if rows else 'Classes'} that a model of {description.dataset} finds"
    Image.fromarray(tiles(heading, shown, classes=description.classes)).save(out / SHEET, quality=90)
    about = {"weights": str(Path(config.weights).resolve()), "task": description.task, "dataset": description.dataset}
    (out / "predictions.json").write_text(json.dumps(about, indent=1) + "\n")
    seen = len(pictures) - left_out
    print(f"{out}: {seen} picture{'s' if seen > 1 else ''} with {description.outputs} {'points' if rows else 'classes'} "
          f"of a model of {description.dataset}{f', {left_out} left out' if left_out else ''}")  # fmt: skip
    return 0


def find_pictures(images: str) -> list[Path]:
    """The pictures of a file or folder, by name. Raises UserError where there are none."""
    path = Path(images).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"images={images}: no such file or folder; give a picture, or a folder of pictures")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS)
    if not found:
        raise UserError(f"images={images}: no pictures in it ({', '.join(KINDS)}); give a folder that holds some")
    return found


def read_boxes(path: str, pictures: Sequence[Path]) -> dict[str, np.ndarray]:
    """Boxes (left, top, right, bottom) by file name. Raises UserError for a row that is no box, or pictures without one."""
    from mcf.downstream.datasets.faceset import table_points, table_rows

    file, where = Path(path).expanduser(), f"boxes={path}"
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"{where}: {what}; give CSV of file,left,top,right,bottom")
    boxes: dict[str, np.ndarray] = {}
    for number, row in enumerate(table_rows(file, where), 1):
        if not row or row[0] == "file":
            continue
        if len(row) != 5:
            what = f"{len(row)} value{'s' if len(row) > 1 else ''}, expected file,left,top,right,bottom"
            raise UserError(f"{where}:{number}: {what} with commas between them")
        box = table_points(row[1:], f"{where}:{number}").ravel()
        if not (box[2:] > box[:2]).all():
            raise UserError(f"{where}:{number}: a box without an area; expected left < right and top < bottom")
        boxes[row[0]] = box
    if missing := [picture.name for picture in pictures if picture.name not in boxes]:
        raise UserError(f"{where}: no box for {len(missing)} of the pictures (for example {missing[0]}); add them")
    return boxes


def write_points(path: Path, rows: Sequence[Sequence[str]], points: int) -> None:
    """A table that dataset=csv could read: file, x0, y0 …"""
    # Names of files are bytes: what is no UTF-8 goes out as it came.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", *(f"{axis}{i}" for i in range(points) for axis in "xy")])
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
