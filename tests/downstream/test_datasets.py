"""Readers against trees in the published layouts, and everything that can be wrong with a label, in one line each."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from mcf.downstream.datasets import open_faces
from mcf.downstream.datasets.faceset import read_image, read_labels
from mcf.errors import UserError

PUBLISHED = {
    "aflw19": "alignment", "300w": "alignment", "wflw": "alignment", "csv": "alignment",
    "lapa": "parsing", "celebamask_hq": "parsing", "masks": "parsing", "faces": "parsing",
}  # fmt: skip


def refused(task: str, dataset: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_faces(task, dataset, root)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def test_aflw19(tmp_path):
    written = trees.aflw19(tmp_path)
    found = open_faces("alignment", "aflw19", tmp_path)
    assert (len(found.train), len(found.test), found.points) == (20_000, 5, 19)
    for split, first in ((found.train, 0), (found.test, 20_000)):
        for place in (0, 3):
            index, face = written["order"][first + place], split[place]
            assert face.points[:, 0].tolist() == written["data"][index][:19].tolist()
            assert face.points[:, 1].tolist() == written["data"][index][19:].tolist()
            assert face.image == tmp_path / "data/flickr" / written["names"][index]
            assert face.box.tolist() == [10.0, 8.0, 40.0, 38.0]
            assert ("frontal" in face.tags) == bool(written["visible"][index].all())
    assert (found.scale, found.crop, found.auc, found.epochs) == (1.0, "box", ("box", 0.07), 150)
    assert "AFLW-19 has 20,000 and 4,386" in found.notes[0]


def test_300w(tmp_path):
    points = trees.w300(tmp_path)
    found = open_faces("alignment", "300w", tmp_path)
    assert [face.name for face in found.train] == ["helen/a.jpg"]
    assert [(face.name, *face.tags) for face in found.test] == [
        ("lfpw/b.png", "common"), ("helen/c.jpg", "common"), ("ibug/image_092 _01.jpg", "challenge"),
    ]  # fmt: skip
    for face in [*found.train, *found.test]:
        assert face.points == pytest.approx(points - 2.0, abs=1e-3)
        assert face.box == pytest.approx([30.0 - 20, 25.0 - 20, 30.0 + 20, 25.0 + 20])  # centre −2, half 100·0.2
    assert (found.scale, found.epochs, found.units[0].name) == (0.8, 250, "inter_ocular")


def test_wflw(tmp_path):
    points = trees.wflw(tmp_path)
    found = open_faces("alignment", "wflw", tmp_path)
    assert (len(found.train), len(found.test), found.points) == (1, 2, 98)
    assert found.test[0].points == pytest.approx(points[0], abs=1e-3)  # no shift
    assert [face.tags for face in found.test] == [(), ("makeup", "blur")]  # faces, not images, are in subsets
    assert found.train[0].box == pytest.approx([25 - 30, 25 - 30, 25 + 30, 25 + 30])
    assert (found.scale, found.auc, found.units[0].left) == (0.8, ("inter_ocular", 0.10), (60,))


def test_lapa(tmp_path):
    points = trees.lapa(tmp_path)
    found = open_faces("parsing", "lapa", tmp_path)
    assert [[face.name for face in split] for split in (found.train, found.test)] == [["a", "b"], ["d"]]
    assert found.test[0].align == pytest.approx(points[[104, 105, 54, 84, 90]], abs=1e-3)
    assert (len(found.classes), found.crop, found.warp, found.epochs) == (11, "similarity", 0.8, 300)
    labels = read_labels(found.test[0], 11, (48, 64))
    assert np.array_equal(labels, np.random.default_rng(4).integers(0, 11, (48, 64)))


def test_celebamask_hq(tmp_path):
    trees.celebamask_hq(tmp_path)
    found = open_faces("parsing", "celebamask_hq", tmp_path)
    assert [[face.name for face in split] for split in (found.train, found.test)] == [["0"], ["2003"]]
    (face,) = found.test
    image, labels = read_image(face), read_labels(face, 19, (512, 512))
    assert image.shape == (512, 512, 3)
    column = labels[:, 7]
    names = [found.classes[c] for c in (column[120], column[195], column[250], column[60], column[450])]
    assert names == ["hair", "neck_l", "skin", "hair", "background"]  # later parts lie over earlier ones
    assert found.classes.index("skin") == 2
    # 1024 → 512 without a filter: the mean of each 2×2, which is what bilinear sampling at its middle gives.
    with Image.open(face.image) as opened:
        original = np.asarray(opened, float)
    mean = original.reshape(512, 2, 512, 2, 3).mean((1, 3))
    assert np.abs(image - mean).max() <= 0.5 + 1e-3


def test_a_table(tmp_path):
    trees.table(tmp_path)
    trees.picture(tmp_path / "images/unlabelled.jpg")
    found = open_faces("alignment", "csv", tmp_path)
    assert (len(found.train), len(found.test)) == (6, 4)
    face = found.train[3]
    assert face.person == "person 1"
    assert face.points == pytest.approx(trees.face_points(seed=3), abs=0.006)
    low, high = face.points.min(0), face.points.max(0)
    assert face.box[2:] - face.box[:2] == pytest.approx([1.25 * (high - low).max()] * 2)
    assert (face.box[2:] + face.box[:2]) / 2 == pytest.approx((low + high) / 2)
    assert found.notes == ["1 images have no label and are left out (for example unlabelled.jpg)"]


def test_a_table_of_other_points_has_no_eyes(tmp_path):
    trees.table(tmp_path, points=5)
    found = open_faces("alignment", "csv", tmp_path)
    assert [unit.name for unit in found.units] == ["diag", "box"]
    assert found.auc == ("diag", 0.10)


def test_masks_and_the_names_of_their_classes(tmp_path):
    trees.masks(tmp_path, classes=3)
    assert len(open_faces("parsing", "masks", tmp_path).classes) == 19
    (tmp_path / "classes.txt").write_text("background\nface\nhair\n\n")
    found = open_faces("parsing", "masks", tmp_path)
    assert found.classes == ("background", "face", "hair")
    labels = read_labels(found.train[1], 3, (48, 64))  # a palette's indices, not its colours
    assert np.array_equal(labels[::8, ::8], np.random.default_rng(1).integers(0, 3, (6, 8)))


def test_generated_faces_serve_both_tasks_and_split_people(tmp_path):
    from mcf.data.faces.writing import Settings, write_faces

    list(write_faces(tmp_path, 10, Settings(0, 64, 90, 2), 1))
    for task, channels in (("alignment", 68), ("parsing", 19)):
        found = open_faces(task, "faces", tmp_path)
        assert found.channels == channels
        assert (len(found.train), len(found.test)) == (8, 2)
        assert not {f.person for f in found.train} & {f.person for f in found.test}
    assert read_labels(found.test[0], 19, (64, 64)).max() < 19


def test_the_real_faces_open(shared_data):
    found = open_faces("alignment", "csv", shared_data / "youtube_faces")
    assert (len(found.train), len(found.test)) == (2114, 607)
    assert not {f.person for f in found.train} & {f.person for f in found.test}
    assert "5 faces have points outside" in found.notes[0]
    found = open_faces("parsing", "masks", shared_data / "celebamask_mini")
    assert (len(found.train), len(found.test), len(found.classes)) == (242, 92, 19)


def test_images_are_upright(tmp_path):
    """OpenCV, which made the published numbers, turns images by their EXIF tag; sizes and points follow it."""
    trees.table(tmp_path, train=2, test=2)
    trees.picture(tmp_path / "images/0.jpg", 48, 64, exif=6)
    found = open_faces("alignment", "csv", tmp_path)
    assert read_image(found.train[0]).shape == (48, 64, 3)


# --- what can be wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", sorted(PUBLISHED))
def test_a_missing_or_wrong_folder_says_what_was_expected_where(tmp_path, dataset):
    task = PUBLISHED[dataset]
    for root in (tmp_path / "nowhere", tmp_path):
        said = refused(task, dataset, root)
        assert said.startswith(f"data={root}: no ")
        assert f"dataset={dataset} expects " in said
    file = trees.picture(tmp_path / "file.jpg")
    assert "is a file" in refused(task, dataset, file)


def test_a_set_of_the_other_task(tmp_path):
    assert "it is a set of task=parsing" in refused("alignment", "lapa", tmp_path)
    assert "there are: lapa, celebamask_hq, masks, faces" in refused("parsing", "lappa", tmp_path)


def edit(path: Path, row: int, column: int, value: str | None) -> None:
    """Change a cell of a table, or take it away."""
    lines = path.read_text().splitlines()
    cells = lines[row].split(",")
    cells[column : column + 1] = [] if value is None else [value]
    lines[row] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (5, "nan", "train.csv:3: y of point 1 is 'nan', not a number"),
        (5, "", "train.csv:3: y of point 1 is 'missing', not a number"),
        (4, "12,5", "train.csv:3: 139 values, the heading has 138"),
        (4, None, "train.csv:3: 137 values, the heading has 138; points are missing"),
        (4, "inf", "x of point 1 is 'inf'"),
        (4, "900", "1.jpg: point 1 at (900, "),
        (0, "gone.jpg", "gone.jpg: no such image, but there is a label for it"),
    ],
)
def test_bad_rows_of_a_table(tmp_path, column, value, said):
    trees.table(tmp_path)
    edit(tmp_path / "train.csv", 2, column, value)
    assert said in refused("alignment", "csv", tmp_path)


def test_a_point_a_little_outside_is_kept_and_told(tmp_path):
    trees.table(tmp_path)
    edit(tmp_path / "train.csv", 2, 4, "-3.5")
    found = open_faces("alignment", "csv", tmp_path)
    assert found.notes == [
        f"1 faces have points outside of their image (kept; for example 1.jpg: point 1 at (-3.5, {found.train[1].points[1, 1]:g}) of 64×48)"
    ]


def test_bad_tables(tmp_path):
    trees.table(tmp_path)
    (tmp_path / "dev.csv").write_text((tmp_path / "dev.csv").read_text().splitlines()[0] + "\n")
    assert "the test split of dataset=csv is empty" in refused("alignment", "csv", tmp_path)
    (tmp_path / "dev.csv").write_text("name,x0,y0\n")
    assert "expected a heading file,person,x0,y0" in refused("alignment", "csv", tmp_path)
    (tmp_path / "dev.csv").write_text("file,x0,x1\n")
    assert "must be x0,y0,x1,y1" in refused("alignment", "csv", tmp_path)
    trees.table(tmp_path)
    edit(tmp_path / "dev.csv", 0, 2, "x9")
    assert "must be x0,y0,x1,y1" in refused("alignment", "csv", tmp_path)
    trees.table(tmp_path / "other", points=5)
    shutil.copy(tmp_path / "other/dev.csv", tmp_path / "dev.csv")
    assert "faces with 5 and with 68 points" in refused("alignment", "csv", tmp_path)
    (tmp_path / "dev.csv").unlink()
    assert "no test.csv or dev.csv" in refused("alignment", "csv", tmp_path)


def test_tables_of_a_spreadsheet(tmp_path):
    """With the mark that Excel puts in front they are read; with semicolons, or in UTF-16, they are one short line."""
    trees.table(tmp_path, train=3, test=2)
    table = tmp_path / "train.csv"
    text = table.read_text()
    plain = [(face.name, face.points.tolist()) for face in open_faces("alignment", "csv", tmp_path).train]
    table.write_text("\ufeff" + text)
    assert [(face.name, face.points.tolist()) for face in open_faces("alignment", "csv", tmp_path).train] == plain
    table.write_text(text.replace(",", ";"))
    told = refused("alignment", "csv", tmp_path)
    assert told.startswith(f"{table}: begins with 'file;person;x0;y0;")
    assert told.endswith("…'; expected a heading file,person,x0,y0,x1,y1,… with commas between its columns")
    assert len(told) < len(str(table)) + 160
    table.write_text(text, encoding="utf-16")
    assert refused("alignment", "csv", tmp_path).startswith(f"{table}: cannot be read as a table (it is not UTF-8)")


def test_eyes_in_one_place(tmp_path):
    trees.table(tmp_path)
    for column in (2 + 2 * 45, 3 + 2 * 45):
        edit(
            tmp_path / "dev.csv", 1, column, (tmp_path / "dev.csv").read_text().splitlines()[1].split(",")[column - 18]
        )
    assert "its inter_ocular distance is 0" in refused("alignment", "csv", tmp_path)


def test_masks_that_do_not_fit_their_images(tmp_path):
    trees.masks(tmp_path)
    found = open_faces("parsing", "masks", tmp_path)
    face = found.train[0]
    for labels, said in [
        (np.full((48, 64), 19), "class 19, but classes are 0 to 18"),
        (np.zeros((47, 64)), "mask of 64×47 pixels for an image of 64×48"),
    ]:
        trees.mask(face.labels, labels)
        with pytest.raises(UserError, match=said):
            read_labels(face, 19, read_image(face).shape)
    face.labels.write_bytes(b"no mask")
    with pytest.raises(UserError, match="cannot be read as a mask"):
        read_labels(face, 19, (48, 64))
    face.image.write_bytes(face.image.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(face)


def test_an_image_without_a_label_and_the_reverse(tmp_path):
    trees.masks(tmp_path)
    (tmp_path / "train/masks/2.png").unlink()
    said = refused("parsing", "masks", tmp_path)
    assert "1 of its files have no mask" in said and "for example 2" in said
    (tmp_path / "train/images/2.jpg").unlink()
    (tmp_path / "dev/images/1.jpg").unlink()
    assert "have no image in" in refused("parsing", "masks", tmp_path)
    for path in (tmp_path / "dev").rglob("*.*"):
        path.unlink()
    assert "the test split of dataset=masks is empty" in refused("parsing", "masks", tmp_path)


def test_what_is_missing_from_published_sets(tmp_path):
    trees.lapa(tmp_path / "lapa")
    (tmp_path / "lapa/train/landmarks/b.txt").write_text("106\n1 2\n")
    assert "expected 106" in refused("parsing", "lapa", tmp_path / "lapa")
    (tmp_path / "lapa/train/landmarks/b.txt").unlink()
    assert "b.txt: no such file, but there is an image" in refused("parsing", "lapa", tmp_path / "lapa")
    trees.celebamask_hq(tmp_path / "hq")
    for part in (tmp_path / "hq/CelebAMask-HQ-mask-anno/1").iterdir():
        part.unlink()
    assert "no mask 02003_*.png" in refused("parsing", "celebamask_hq", tmp_path / "hq")
    trees.wflw(tmp_path / "wflw")
    (tmp_path / "wflw/face_landmarks_wflw_test_blur.csv").unlink()
    assert "no face_landmarks_wflw_test_blur.csv" in refused("alignment", "wflw", tmp_path / "wflw")
    trees.aflw19(tmp_path / "aflw")
    (tmp_path / "aflw/AFLWinfo_release.mat").write_bytes(b"no matrix")
    assert "not AFLW's file of labels" in refused("alignment", "aflw19", tmp_path / "aflw")
