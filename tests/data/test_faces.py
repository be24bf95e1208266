"""Generated faces: pure functions of (seed, index), with labels that agree with the pixels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mcf.data.faces import Face, Label, draw, sample, sample_identity
from mcf.data.faces.__main__ import main
from mcf.data.faces.parameters import FaceParameters
from mcf.data.faces.render import landmarks
from mcf.data.faces.writing import PALETTE, read_table

SIZE = 128
MANY = range(0, 80, 4)


def plain(index: int, **scene) -> FaceParameters:
    """Somebody who looks ahead with nothing over the face."""
    parameters = sample(3, index)
    still = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "glasses": "none", "hat": "none", "eye_open": 1.0, **scene}
    return FaceParameters(
        replace(parameters.identity, hair_style="short", hairline=0.0), replace(parameters.scene, **still)
    )


@pytest.fixture(scope="module")
def faces() -> list[tuple[FaceParameters, Face]]:
    return [(sample(0, index), draw(sample(0, index), SIZE)) for index in MANY]


def distance(mask: np.ndarray, classes: tuple[int, ...], points: np.ndarray) -> np.ndarray:
    """Pixels between points [N, 2] and the nearest pixel of some classes."""
    away = ndimage.distance_transform_edt(~np.isin(mask, classes))
    column, row = np.clip(np.floor(points).astype(int), 0, len(mask) - 1).T
    return away[row, column]


def test_a_face_is_the_same_in_another_process():
    code = (
        "import sys, zlib; from mcf.data.faces import draw, sample; f = draw(sample(5, 17), 64);"
        "print(zlib.crc32(f.image.tobytes()), zlib.crc32(f.mask.tobytes()), zlib.crc32(f.landmarks.tobytes()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    draw(sample(1, 2), 64)  # what was drawn before must not matter
    again = subprocess.run([sys.executable, "-c", code.replace("f = draw", "draw(sample(0, 3), 96); f = draw")],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert there == again
    face, twin = draw(sample(5, 17), 64), draw(sample(5, 17), 64)
    assert (face.image == twin.image).all() and (face.landmarks == twin.landmarks).all()
    assert not (face.image == draw(sample(5, 18), 64).image).all()
    assert not (face.image == draw(sample(6, 17), 64).image).all()


def test_a_person_keeps_identity_and_changes_pose():
    first, second = sample(0, 8), sample(0, 9)
    assert first.identity == second.identity != sample(0, 12).identity
    assert first.identity == sample_identity(0, 2) == sample(0, 700, person=2).identity
    assert first.scene.yaw != second.scene.yaw and first.scene.light != second.scene.light
    assert first.scene.backdrop_colours != second.scene.backdrop_colours


def test_people_differ_over_the_whole_range():
    people = [sample_identity(0, person) for person in range(300)]
    tones = np.histogram([who.melanin for who in people], bins=5, range=(0, 1))[0]
    assert tones.min() > 30  # of 60 expected in each fifth
    assert {who.hair_style for who in people} >= {"bald", "short", "long", "afro", "fringe", "bob"}
    assert {who.beard for who in people} == {"none", "stubble", "moustache", "goatee", "full"}
    yaws = [sample(0, index).scene.yaw for index in range(300)]
    assert min(yaws) < -30 and max(yaws) > 30 and max(map(abs, yaws)) <= 40


def test_masks_hold_the_19_classes(faces):
    seen = np.zeros(19, int)
    for _, face in faces:
        assert face.image.shape == (SIZE, SIZE, 3) and face.image.dtype == face.mask.dtype == np.uint8
        assert face.mask.shape == (SIZE, SIZE) and face.mask.max() <= 18
        counts = np.bincount(face.mask.ravel(), minlength=19)
        seen += counts > 0
        assert counts[Label.SKIN] > 0.04 * SIZE * SIZE
        assert counts[Label.NOSE] > 0.004 * SIZE * SIZE
        assert counts[Label.BACKGROUND] > 0
    always = (Label.SKIN, Label.NOSE, Label.UPPER_LIP, Label.LOWER_LIP, Label.NECK, Label.CLOTH)
    assert (seen[list(always)] == len(faces)).all()
    assert (seen[: Label.HAIR + 1] > 0).all()


def test_landmarks_lie_in_the_picture(faces):
    for parameters, face in faces:
        if abs(parameters.scene.yaw) < 30 and abs(parameters.scene.roll) < 20:
            assert face.landmarks.min() > 0 and face.landmarks.max() < SIZE
        assert np.allclose(face.landmarks, landmarks(parameters, SIZE))


@pytest.mark.parametrize("index", range(0, 48, 8))
def test_landmarks_agree_with_the_mask(index):
    """Seen from the front nothing hides a feature: its landmarks are on its class or at its edge.

    Within one and a half pixels: the mask is sampled at pixel centres, and a point of the outline may lie in the pixel
    beside it, also diagonally. Corners of eyes and mouth get two and a half: the wedge before them is thinner than a pixel.
    """
    face = draw(plain(index), 256)
    lips = (Label.UPPER_LIP, Label.MOUTH, Label.LOWER_LIP)
    classes: dict[range, tuple[int, ...]] = {
        range(17, 22): (Label.RIGHT_BROW,),
        range(22, 27): (Label.LEFT_BROW,),
        range(27, 36): (Label.NOSE,),
        range(36, 42): (Label.RIGHT_EYE,),
        range(42, 48): (Label.LEFT_EYE,),
        range(48, 55): (Label.UPPER_LIP,),
        range(55, 60): (Label.LOWER_LIP,),
        range(60, 68): lips,
    }
    for points, where in classes.items():
        away = distance(face.mask, where, face.landmarks[points.start : points.stop])
        for point, pixels in zip(points, away, strict=True):
            assert pixels <= (2.5 if point in (36, 39, 42, 45, 48, 54, 60, 64) else 1.5), (point, pixels)
    # The jaw is the outline of the face below the ears: of skin towards neck, cloth, ears or backdrop.
    head = np.isin(face.mask, [*range(1, 8), 10, 11, 12, 13])
    edge = head & ~ndimage.binary_erosion(head)
    column, row = np.floor(face.landmarks[2:15]).astype(int).T
    assert ndimage.distance_transform_edt(~edge)[row, column].max() <= 4


def test_landmarks_follow_the_pose():
    """A turned head's landmarks are the turned points: eyes and nose move as a rigid body seen from far away."""
    ahead, turned = plain(4), plain(4, yaw=30.0)
    a, b = landmarks(ahead, 256), landmarks(turned, 256)
    assert np.allclose(a[17:, 1], b[17:, 1], atol=1e-3)  # turning about the vertical keeps heights
    nose, corners = 30, [36, 45]
    assert b[nose, 0] - a[nose, 0] > 20  # positive yaw turns to the image's right, and the nose sticks out furthest
    assert np.diff(b[corners, 0])[0] == pytest.approx(np.diff(a[corners, 0])[0] * np.cos(np.radians(30)), abs=1e-2)
    rolled = landmarks(plain(4, roll=20.0), 256)
    between = rolled[45] - rolled[36]
    assert np.degrees(np.arctan2(-between[1], between[0])) == pytest.approx(20, abs=0.1)


def test_points_are_ordered_as_ibug_68():
    points = landmarks(plain(0), 256)
    x, y = points.T
    assert (np.diff(x[:17]) > 0).all() and y[8] == y.max()  # jaw from the image's left to its right, chin lowest
    assert (np.diff(x[17:27]) > 0).all() and (np.diff(y[27:31]) > 0).all() and (np.diff(x[31:36]) > 0).all()
    assert x[36] < x[39] < x[42] < x[45]  # outer, inner, inner, outer corner
    assert y[37] < y[41] and y[38] < y[40] and y[43] < y[47] and y[44] < y[46]  # lids, upper over lower
    assert (np.diff(x[48:55]) > 0).all() and (np.diff(x[55:60]) < 0).all() and y[51] < y[57]
    assert (np.diff(x[60:65]) > 0).all() and (np.diff(x[65:68]) < 0).all()


def test_picture_and_mask_agree():
    """Where the mask says sclera, iris, hair or skin, the picture has their colours: drawn with the same shapes."""
    parameters = plain(0, noise=0.0, blur=0.0, light=(0.0, 30.0), mouth_open=0.0, smile=0.0)
    who = replace(parameters.identity, melanin=0.15, hair_colour=(0.1, 0.08, 0.07), makeup=0.0, beard="none")
    face = draw(FaceParameters(who, parameters.scene), 256)
    colour = face.image.astype(float)
    skin, hair = colour[face.mask == Label.SKIN].mean(axis=0), colour[face.mask == Label.HAIR].mean(axis=0)
    assert skin[0] > skin[1] > skin[2] and skin.mean() > 2.5 * hair.mean()
    lips = colour[np.isin(face.mask, (Label.UPPER_LIP, Label.LOWER_LIP))].mean(axis=0)
    assert lips[0] / lips[1] > 1.05 * skin[0] / skin[1]
    # The outline of the hair in the picture is where the mask has it: darkness changes across it.
    dark = colour.mean(axis=2) < (skin.mean() + hair.mean()) / 2
    forehead = slice(*np.sort(face.landmarks[[19, 24], 0].astype(int)))
    rows = range(int(face.landmarks[19:25, 1].min()) - 60, int(face.landmarks[19:25, 1].min()) - 4)
    agree = (dark == (face.mask == Label.HAIR))[rows.start : rows.stop, forehead]
    assert agree.mean() > 0.93  # stray strands and the shadow below them


def test_left_and_right_are_those_of_celebamask(shared_data: Path, faces):
    """Classes 4/5, 6/7 and 8/9: the class with the larger x is the same in real masks and in ours."""

    def votes(masks: list[np.ndarray]) -> list[int]:
        tally = []
        for left, right in ((4, 5), (6, 7), (8, 9)):
            order = [
                np.nonzero(mask == left)[1].mean() > np.nonzero(mask == right)[1].mean()
                for mask in masks
                if (mask == left).sum() > 8 and (mask == right).sum() > 8
            ]
            assert len(order) >= 3
            assert abs(np.mean(order) - 0.5) > 0.35  # a few real masks have them swapped
            tally.append(round(np.mean(order)))
        return tally

    files = sorted((shared_data / "celebamask_mini/dev/masks").glob("*.png"))
    real = [np.asarray(Image.open(file)) for file in files]
    assert votes(real) == votes([face.mask for _, face in faces])


def test_the_verb_writes_what_it_says(tmp_path: Path, capsys):
    out = tmp_path / "faces"
    assert main([f"out={out}", "count=6", "size=64", "seed=9", "workers=1", "images_per_person=3"]) == 0
    assert "6 faces" in capsys.readouterr().out
    names, people, points = read_table(out / "landmarks.csv")
    assert names == [f"{i:06d}.jpg" for i in range(6)] and len(set(people)) == 2 and people[0] == people[2] != people[3]
    for index, name in enumerate(names):
        face = draw(sample(9, index, images_per_person=3), 64)
        assert np.abs(points[index] - face.landmarks).max() <= 0.005 + 1e-9  # two decimals
        with Image.open(out / "images" / name) as image:
            assert image.format == "JPEG" and not image.info.get("progressive") and image.mode == "RGB"
            # JPEG at quality 92 with subsampled colour: a few grey levels on average.
            assert np.abs(np.asarray(image, float).mean(axis=2) - face.image.mean(axis=2)).mean() < 4
        with Image.open(out / "masks" / name.replace(".jpg", ".png")) as mask:
            assert mask.mode == "P" and (np.asarray(mask) == face.mask).all()
            assert tuple(mask.getpalette()[39:42]) == PALETTE[13]


def test_the_table_has_the_columns_of_the_real_one(tmp_path: Path, shared_data: Path):
    main([f"out={tmp_path}", "count=1", "size=64", "workers=1"])
    with (shared_data / "youtube_faces/train.csv").open() as real, (tmp_path / "landmarks.csv").open() as ours:
        assert real.readline().strip() == ours.readline().strip()


def test_two_processes_and_an_interruption_give_the_same_folder(tmp_path: Path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([f"out={whole}", "count=20", "size=64", "workers=2"])
    main([f"out={parts}", "count=7", "size=64", "workers=1"])
    (parts / "images/000003.jpg").unlink()
    kept = (parts / "images/000001.jpg").stat().st_mtime_ns
    main([f"out={parts}", "count=20", "size=64", "workers=1"])
    assert (parts / "images/000001.jpg").stat().st_mtime_ns == kept  # not drawn again
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.*"))
    assert files == sorted(path.relative_to(parts) for path in parts.rglob("*.*")) and len(files) == 42
    assert all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["count=5"], "out"),
        (["out={out}", "count=0"], "count"),
        (["out={out}", "cuont=5"], "count"),
        (["out={out}", "size=8"], "size"),
        (["out={out}", "seed=2"], "other settings"),
        (["out={file}"], "choose a folder"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys, settings, told):
    out, file = tmp_path / "faces", tmp_path / "file"
    file.write_text("")
    main([f"out={out}", "count=1", "size=64", "workers=1", "seed=1"])
    capsys.readouterr()
    assert main([word.format(out=out, file=file) for word in settings] + ["workers=1"]) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1 and message.startswith("error:")
