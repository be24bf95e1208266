"""Tables of labelled faces: what is read, who stands on which side, what the encoder sees, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mcf.config import ProbeKeys
from mcf.errors import UserError
from mcf.probing.faces import cut, points_in_image, points_in_square, read_faces


def write(root, name, heading, rows, size=(40, 30)):
    """A table, and a picture for each of its rows."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([heading, *rows]) + "\n")
    for row in rows:
        Image.new("RGB", size, (90, 60, 30)).save(root / "images" / row.split(",")[0])


def read(root, **keys):
    return read_faces(ProbeKeys(data=str(root), **keys), f"data={root}")


def people(root, count=4, videos=3, frames=2, name="faces.csv"):
    rows = [f"P{p}_{v}{f}.png,P{p},{p % 2}" for p in range(count) for v in range(videos) for f in range(frames)]
    write(root, name, "file,person,smiling", rows)


def test_frames_of_a_video_are_one_group_and_no_group_is_fitted_and_tested(tmp_path):
    people(tmp_path)
    found = read(tmp_path)
    names = [face.name for face in found.faces]
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            # P0_20 and P0_21 are one video; P0_2… and P1_2… are not.
            assert (found.groups[i] == found.groups[j]) == (one[:-5] == other[:-5])
    assert found.told.all() and found.points == 0
    assert not set(found.groups[found.fit]) & set(found.groups[~found.fit])
    for person in range(4):
        inside = found.labels == person
        assert (len(set(found.groups[inside & found.fit])), len(set(found.groups[inside & ~found.fit]))) == (2, 1)
    # Nobody is trained and tested on by the ridge.
    assert not set(found.people[found.train]) & set(found.people[~found.train])
    assert (~found.train).sum() == 6


def test_one_frame_under_two_names_is_one_group(tmp_path):
    write(tmp_path, "faces.csv", "file,person", ["a_X_11.png,X", "b_X_10.png,X", "a_X_20.png,X", "b_Y_11.png,Y"])
    groups = read(tmp_path).groups
    assert groups[0] == groups[1]
    assert len({groups[0], groups[2], groups[3]}) == 3


def test_another_label_is_told_across_people(tmp_path):
    people(tmp_path)
    found = read(tmp_path, label="smiling")
    assert list(found.groups) == list(found.people)
    assert sorted(set(found.labels)) == [0, 1]
    assert not set(found.people[found.fit]) & set(found.people[~found.fit])
    assert read(tmp_path, label="smiling", group="^(P._.)").groups.max() == 11
    own = read(tmp_path, group="(.*)").groups
    assert len(set(own)) == len(own)


def test_faces_without_the_label_and_labels_of_one_group(tmp_path):
    rows = ["A_10.png,A,x", "A_20.png,A,", "B_10.png,B,x", "C_10.png,C,y"]
    write(tmp_path, "faces.csv", "file,person,mood", rows)
    found = read(tmp_path, label="mood")
    assert list(found.labels >= 0) == [True, False, True, True]
    assert list(found.told) == [True, False, True, False]  # only one person has y


def test_two_tables_are_the_ridges_sides_and_people_stay_whole(tmp_path):
    people(tmp_path, count=20, name="train.csv")
    rows = [f"Q{p}_{v}0.png,Q{p},0" for p in range(10) for v in range(3)]
    write(tmp_path, "dev.csv", "file,person,smiling", rows)
    found = read(tmp_path)
    assert [face.name.startswith("P") for face in found.faces] == list(found.train)
    some = read(tmp_path, faces=75)
    assert 65 <= len(some.faces) <= 85
    for person in {face.person for face in some.faces}:
        assert sum(f.person == person for f in some.faces) == sum(f.person == person for f in found.faces)
    assert some.train.any() and not some.train.all()


def test_the_square_is_the_box_around_the_points(tmp_path):
    """A bright dot at each point of a picture comes out where the square says the points are."""
    rng = np.random.default_rng(0)
    points = np.array([[60.0, 50.0], [120.0, 55.0], [90.0, 110.0]])
    image = np.zeros((160, 200, 3), np.uint8)
    for x, y in points.astype(int):
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images/a.png")
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "images/b_10.png")
    flat = ",".join(f"{v:g}" for v in points.ravel())
    (tmp_path / "landmarks.csv").write_text(f"file,person,x0,y0,x1,y1,x2,y2\na.png,A,{flat}\na.png,A,{flat}\n")
    with pytest.raises(UserError, match="no person has faces in two groups"):
        read(tmp_path)
    (tmp_path / "landmarks.csv").write_text(f"file,x0,y0,x1,y1,x2,y2\na.png,{flat}\n")
    face = read(tmp_path).faces[0]
    square = cut(face, 64).float().sum(-1)
    inside = points_in_square(face)
    np.testing.assert_allclose(points_in_image(face, inside), points, atol=1e-9)
    for x, y in (inside * 64 - 0.5).tolist():
        window = square[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
        where = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij"), -1).view(-1, 2) - 2
        mass = window.reshape(-1, 1) / window.sum()
        # The middle of the dot, to a tenth of a pixel.
        assert (mass * where).sum(0).tolist() == pytest.approx([y - round(y), x - round(x)], abs=0.1)
    # By the longer side: 60 wide and 60 high, 1.25 times, at scale 0.8.
    side = 60 * 1.25 / 0.8
    assert (points_in_square(face)[1, 0] - points_in_square(face)[0, 0]).item() == pytest.approx(60 / side)


def test_a_face_without_points_is_all_of_its_picture(tmp_path):
    people(tmp_path)
    square = cut(read(tmp_path).faces[0], 32)
    # 40 × 30 in a square of 40: an eighth of the rows above and below are empty.
    assert square[4:28].min() > 0
    assert square[:3].max() == 0 and square[29:].max() == 0


@pytest.mark.parametrize(
    ("table", "keys", "said"),
    [
        (None, {}, "no table in it"),
        ("name,person\na.png,A", {}, "begins with 'name,person'"),
        ("\ufefffile,person\na_11.png,A\na_12.png,A", {}, "the group of a_11.png is 'A 1'"),  # as Excel writes it
        (
            "file;person" + 99 * ";more" + "\na.png;A",
            {},
            "more;mo…'; expected a heading file,person,…,x0,y0,… with commas",
        ),
        ("file,person\na.png,A,7", {}, "faces.csv:2: 3 values, the heading has 2"),
        ("file,person,x0,y0\na.png,A,1,oops", {}, "y of point 0 is 'oops'"),
        ("file,x1,y1\na.png,1,1", {}, "no column person"),
        ("file,person,x0,y1\na.png,A,1,1", {}, "each once; rename its columns"),
        ("file,person", {}, "has no rows"),
        ("file,person\na_11.png,A\na_12.png,A", {}, "the group of a_11.png is 'A 1'"),
        (
            "file,person\na.png,A\nb.png,A",
            {"label": "mood"},
            "no column mood in its tables, there are person; set label=",
        ),
        ("file\na.png", {}, "there are no labels at all"),
        ("file,person\nz_10.png,A\nz_20.png,A", {}, "z_10.png: no such image"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, table, keys, said):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "a_11", "a_12"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"images/{name}.png")
    if table is not None:
        (tmp_path / "faces.csv").write_text(table + "\n")
    with pytest.raises(UserError) as error:
        read(tmp_path, **keys)
    assert said in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder; expected images/ and train"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images/ in it"):
        read(tmp_path)


def test_the_real_faces_have_more_than_one_video_of_everybody(shared_data):
    found = read(shared_data / "youtube_faces", faces=20_000)
    assert (len(found.faces), found.points, len(set(found.people))) == (2721, 68, 224)
    assert found.told.all()
    # Numbered 0 to 5, of 3 frames at most under one of two names: 743 videos.
    assert len(set(found.groups)) == 743
    assert (~found.train).sum() == 607
