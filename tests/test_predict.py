"""mcf.predict on models that have learned nothing: what it reads, what it writes, and what a person sees of it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcf import predict
from mcf.downstream import saved
from mcf.downstream.datasets.faceset import Face, read_labels
from mcf.downstream.datasets.parsing import CELEBAMASK_CLASSES
from mcf.downstream.pictures import COLOURS
from mcf.errors import UserError

SHAPE = {
    "warp_size": 32, "input_size": 32, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "mlp_ratio": 4.0,
    "taps": (0, 1, 2, 3), "head": {"channels": 8, "pools": [1, 2]}, "epoch": 1, "scale": 1.0, "warp": 0.0,
}  # fmt: skip


def model(folder: Path, task: str) -> Path:
    """A run directory with a model of 19 classes, or of 5 points."""
    classes = CELEBAMASK_CLASSES if task == "parsing" else ()
    description = saved.Description(
        task=task, dataset="masks" if classes else "csv", outputs=len(classes) or 5, classes=classes,
        crop="whole" if classes else "box", **SHAPE,
    )  # fmt: skip
    folder.mkdir()
    saved.write(folder / saved.FILE, saved.build(description), description)
    return folder


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, format="PNG")
    return folder


BOXES = "file,left,top,right,bottom\na.png,1,2,30,35.5\n"


@pytest.mark.parametrize("heading", [True, False])
def test_boxes_of_a_spreadsheet_are_read(tmp_path, heading):
    text = BOXES if heading else BOXES.partition("\n")[2]
    (tmp_path / "boxes.csv").write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    boxes = predict.read_boxes(str(tmp_path / "boxes.csv"), [Path("a.png")])
    assert {name: box.tolist() for name, box in boxes.items()} == {"a.png": [1.0, 2.0, 30.0, 35.5]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOXES.encode("utf-16"), ": cannot be read as a table (it is not UTF-8); save it as CSV in UTF-8"),
        (BOXES.replace(",", ";").encode(), ":1: 1 value, expected file,left,top,right,bottom with commas between them"),
        (b'a.png,"' + bytes(200_000).replace(b"\0", b"9"), ": cannot be read as a table (field larger"),
        (b"a.png,1,2,3," + 900 * b"x", f":1: y of point 1 is '{60 * 'x'}', not a number"),
    ],
)
def test_what_is_no_table_of_boxes_is_one_short_line(tmp_path, content, said):
    file = tmp_path / "boxes.csv"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        predict.read_boxes(str(file), [Path("a.png")])
    assert str(error.value).startswith(f"boxes={file}{said}")
    assert len(str(error.value)) < len(str(file)) + 150


@pytest.mark.parametrize(("kind", "said"), [("folder", "a folder"), ("nothing", "no such file")])
def test_boxes_that_are_no_file_are_refused(tmp_path, kind, said):
    place = tmp_path if kind == "folder" else tmp_path / "boxes.csv"
    with pytest.raises(UserError) as error:
        predict.read_boxes(str(place), [])
    assert str(error.value) == f"boxes={place}: {said}; give CSV of file,left,top,right,bottom"


def test_a_file_name_that_is_no_utf_8_goes_out_as_it_came(tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9.png")  # Latin-1
    shown = pictures(tmp_path / "faces", "a.png", odd)
    out = tmp_path / "out"
    weights = model(tmp_path / "points", "alignment")
    assert predict.main([f"weights={weights}", f"images={shown}", f"out={out}", "threads=1"]) == 0, capsys.readouterr()
    with (out / "points.csv").open(newline="", errors="surrogateescape") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a.png", odd]
    with Image.open(out / "sheet.jpg") as sheet:
        assert sheet.width > sheet.height  # two pictures and what was found in them, beside each other
    assert (out / f"{odd}.png").is_file() and (out / "predictions.json").is_file()


def test_classes_are_seen_in_colours_that_a_legend_names(tmp_path, monkeypatch, capsys):
    """The classes that a network would have found stand in the mask as they are, and a reader of masks takes it."""
    labels = np.random.default_rng(1).integers(0, 19, (40, 60), dtype=np.uint8)
    monkeypatch.setattr("mcf.downstream.inference.Predictor.classes", lambda *_: labels)
    shown, out = pictures(tmp_path / "faces", "a.png"), tmp_path / "out"
    weights = model(tmp_path / "classes", "parsing")
    assert predict.main([f"weights={weights}", f"images={shown}", f"out={out}", "threads=1"]) == 0, capsys.readouterr()
    with Image.open(out / "a.png.classes.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask.convert("RGB")), COLOURS[labels])
    face = Face("a", shown / "a.png", labels=out / "a.png.classes.png")
    assert np.array_equal(read_labels(face, 19, (40, 60)), labels)
    with Image.open(out / "legend.png") as legend:
        named = {tuple(colour) for colour in np.asarray(legend).reshape(-1, 3).tolist()}
    assert named >= {tuple(colour) for colour in COLOURS[1:].tolist()}
    with Image.open(out / "sheet.jpg") as sheet:
        assert sheet.height > 288 + 3 * 20  # caption and legend above one row of tiles
