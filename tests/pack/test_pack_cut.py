"""Faces cut out of images: by their pixels, the fast way and the slow way alike, and every box that must be refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from scenes import decode, distance, encode, scene

from mcf.pack import convert, cut, faces
from mcf.pack.crops import TEMPLATE
from mcf.pack.cut import Cutter
from mcf.pack.faces import Face
from mcf.pack.options import PackConfig

CLOSE = 1.5  # levels; one JPEG generation of these smooth scenes and a resize (0.3 to 1.2), a pixel off is 2 and more
BOX = (200.0, 120.0, 320.0, 260.0)


def options(**keys) -> PackConfig:
    return PackConfig(**({"crop": "face", "size": 96, "margin": 0.5, "min_face": 20} | keys))


def one(content: bytes, found, **keys) -> cut.Cut:
    (result,) = Cutter(options(**keys)).cut([(content, found)])
    return result


def refused(found, **keys) -> list[str]:
    result = one(encode(scene(640, 480)), found, **keys)
    assert result.crops == [] and result.left_out is not None
    return [result.left_out.reason, *result.refused]


def test_a_crop_is_the_square_around_the_box_grown_by_the_margin():
    large = scene(640, 480)
    result = one(encode(large), [Face(BOX)])
    # The longer side is 140, grown by half 210, around (260, 190).
    wanted = large.crop((155, 85, 365, 295)).resize((96, 96), Image.Resampling.BOX)
    assert distance(decode(result.crops[0].jpeg), wanted) < CLOSE
    assert result.crops[0].original == (640, 480) and result.crops[0].face.box == BOX and result.refused == []


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ((0, 0, 100, 100), (0, 0, 150, 150)),  # would reach over the corner: moved inside
        ((580, 400, 640, 480), (520, 360, 640, 480)),
        ((-20, 100, 100, 220), (0, 70, 180, 250)),  # the box itself reaches over the edge
        ((100, 20, 460, 470), (40, 0, 520, 480)),  # longer than the image is high: cut down to that
    ],
)
def test_at_the_edge_no_pixels_are_made_up(box, wanted):
    large = scene(640, 480)
    found = decode(one(encode(large), [Face(box)]).crops[0].jpeg)
    assert distance(found, large.crop(wanted).resize((96, 96), Image.Resampling.BOX)) < CLOSE


def forms() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain": encode(scene(640, 480)),
        "4:4:4": encode(scene(640, 480), subsampling="4:4:4"),
        "4:2:2": encode(scene(640, 480), subsampling="4:2:2"),
        "restarts": encode(scene(640, 480), restart_marker_rows=1),
        "progressive": encode(scene(640, 480), progressive=True),
        "grey": encode(scene(640, 480).convert("L")),
        "turned": encode(scene(640, 480).transpose(Image.Transpose.ROTATE_90), exif=exif),
        "png": encode(scene(640, 480), "PNG"),
        "webp": encode(scene(640, 480), "WEBP", lossless=True),
        "bmp": encode(scene(640, 480), "BMP"),
    }


@pytest.mark.parametrize("crop", ["face", "aligned"])
def test_every_form_gives_the_face_and_both_ways_the_same_bytes(crop, monkeypatch):
    """In one batch, so that the fast ones and the slow ones are put back in their places."""
    content = forms()
    faces_of = [[Face(BOX, 0.99, landmarks(220, 150, 1.0))]] * len(content)
    quick = Cutter(options(crop=crop)).cut(list(zip(content.values(), faces_of)))
    monkeypatch.setattr(cut, "_plain_size", lambda content: None)
    slow = Cutter(options(crop=crop)).cut(list(zip(content.values(), faces_of)))
    assert [q.crops[0].jpeg for q in quick] == [s.crops[0].jpeg for s in slow]
    colour = decode(quick[0].crops[0].jpeg)
    for name, result in zip(content, quick):
        wanted = Image.fromarray(colour.astype(np.uint8)).convert("L" if name == "grey" else "RGB")
        assert distance(decode(result.crops[0].jpeg), wanted) < 2 * CLOSE, name


def landmarks(x: float, y: float, scale: float, angle: float = 0.0) -> tuple[float, ...]:
    """TEMPLATE's points in a square of 112·scale pixels at (x, y), turned around its corner."""
    points = TEMPLATE * 112 * scale @ [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return tuple((points + [x, y]).ravel())


@pytest.mark.parametrize(("scale", "angle"), [(1.0, 0.0), (0.6, 0.5), (2.4, -0.4), (1.3, 3.0)])
def test_an_aligned_crop_puts_landmarks_where_the_template_has_them(scale, angle):
    """Five coloured discs are painted where the landmarks are; in the crop they lie where they should."""
    large = Image.new("RGB", (900, 900), (90, 90, 90))
    canvas = np.asarray(large).copy()
    marks = np.array(landmarks(430, 430, scale, angle)).reshape(5, 2)
    y, x = np.mgrid[0:900, 0:900] + 0.5
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250)]
    for (mark_x, mark_y), colour in zip(marks, colours):
        canvas[np.hypot(x - mark_x, y - mark_y) < 5 * scale] = colour
    low, high = marks.min(0) - 40 * scale, marks.max(0) + 40 * scale
    face = Face((*low, *high), 1.0, tuple(marks.ravel()))
    found = decode(
        one(encode(Image.fromarray(canvas), subsampling="4:4:4"), [face], crop="aligned", size=112).crops[0].jpeg
    )
    for place, colour in zip(TEMPLATE, colours):
        # A margin of 0.5 shrinks the template around the middle of the crop.
        wanted = ((place - 0.5) / 1.5 + 0.5) * 112
        near = np.abs(found - colour).sum(-1) < 160
        rows, columns = np.nonzero(near)
        centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
        assert np.abs(centre - wanted).max() < 1.0, (colour, centre, wanted)  # pixels; discs are 6.7 across


def test_an_aligned_crop_over_the_edge_repeats_the_outermost_pixels():
    large = Image.new("RGB", (400, 400), (200, 120, 40))
    marks = landmarks(-20, 100, 1.0)
    face = Face((-20, 100, 92, 212), 1.0, marks)
    found = decode(one(encode(large), [face], crop="aligned").crops[0].jpeg)
    assert np.abs(found - [200, 120, 40]).max() < 6  # nothing black or grey came in


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((math.nan, 0, 100, 100), faces.NOT_FINITE),
        ((0, 0, math.inf, 100), faces.NOT_FINITE),
        ((100, 100, 100, 200), faces.EMPTY_BOX),
        ((200, 200, 100, 100), faces.EMPTY_BOX),
        ((700, 100, 800, 200), faces.OUTSIDE),
        ((-90, 100, 30, 200), faces.OUTSIDE),
        ((0, 0, 200, 15), faces.SMALL_FACE),
    ],
)
def test_boxes_that_are_none_are_refused_by_their_fault(box, reason):
    assert refused([Face(box)]) == [reason, reason]
    assert len(one(encode(scene(640, 480)), [Face(box), Face(BOX)]).crops) == 1


def test_scores_sizes_and_landmarks_are_held_against_their_keys():
    assert refused([Face(BOX, 0.89)]) == [faces.LOW_SCORE] * 2
    assert len(one(encode(scene(640, 480)), [Face(BOX, 0.89)], min_score=0.8).crops) == 1
    assert refused([Face(BOX)], min_face=121) == [faces.SMALL_FACE] * 2
    assert refused([Face(BOX)], crop="aligned") == [faces.NO_LANDMARKS] * 2
    assert refused([Face(BOX, 1.0, (250.0,) * 10)], crop="aligned") == [faces.ODD_LANDMARKS] * 2
    assert refused([Face(BOX, 1.0, landmarks(900, 900, 1))], crop="aligned") == [faces.ODD_LANDMARKS] * 2
    assert refused([]) == [faces.NO_FACE]
    # Of several reasons the image is given that of the face that came furthest.
    assert refused([Face((700, 1, 800, 99)), Face(BOX, 0.1), Face((0, 0, 9, 9), 0.95)])[0] == faces.SMALL_FACE


def test_of_several_faces_the_largest_or_all_with_their_numbers():
    found = [Face((10, 10, 90, 90)), Face(BOX), Face((400, 300, 460, 380)), Face((0, 0, 5, 5))]
    single = one(encode(scene(640, 480)), found)
    assert [crop.number for crop in single.crops] == [1]
    assert sorted(single.refused) == sorted([faces.SMALL_FACE, faces.NOT_LARGEST, faces.NOT_LARGEST])
    several = one(encode(scene(640, 480)), found, faces="all")
    assert [crop.number for crop in several.crops] == [0, 1, 2]
    assert several.crops[1].jpeg == single.crops[0].jpeg
    assert several.crops[2].jpeg == one(encode(scene(640, 480)), found[2:3]).crops[0].jpeg


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"], ids=["cut", "cut, but with an end marker"])
def test_a_truncated_image_is_refused_unless_the_face_is_whole(end):
    rng = np.random.default_rng(0)
    rough = Image.fromarray((np.asarray(scene(640, 480)) // 2 + rng.integers(0, 128, (480, 640, 3))).astype(np.uint8))
    content = encode(rough)
    content = content[: len(content) // 2] + end
    low, high = Face((200, 330, 320, 450)), Face((200, 20, 320, 140))
    results = Cutter(options()).cut([(content, [low]), (encode(rough), [low]), (content, [high]), (content, [low])])
    assert [r.left_out and r.left_out.reason for r in (results[0], results[3])] == [convert.TRUNCATED] * 2
    assert results[1].crops
    # Rows above the cut are read without what lies below: the very pixels of the whole image.
    if results[2].crops:
        assert results[2].crops[0].jpeg == one(encode(rough), [high]).crops[0].jpeg


def test_what_is_no_image_costs_only_itself():
    good = encode(scene(640, 480))
    bad = [b"", b"a text", good[:300], good[:30], b"\xff\xd8\xff\xe0" + bytes(100)]
    results = Cutter(options()).cut([(content, [Face(BOX)]) for content in [good, *bad, good]])
    assert [len(result.crops) for result in results] == [1, 0, 0, 0, 0, 0, 1]
    assert all(result.left_out for result in results[1:-1])


def test_a_bomb_is_not_decoded(monkeypatch):
    header = encode(scene(64, 64))
    at = header.index(b"\xff\xc0")
    bomb = header[: at + 5] + (30_000).to_bytes(2, "big") * 2 + header[at + 9 :]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(cut.RegionDecoder, "_run", lambda *_: pytest.fail("decoded"))
    result = one(bomb, [Face((0, 0, 9_000, 9_000))])
    assert result.left_out.reason == convert.TOO_LARGE and "30000x30000" in result.left_out.detail


def test_a_detector_is_asked_where_there_are_no_boxes():
    asked = []

    def find(pixels):
        asked.append(pixels.shape)
        return [Face(BOX, 0.95)]

    cutter = Cutter(options(), find)
    results = cutter.cut([(encode(scene(640, 480)), None), (encode(scene(640, 480)), [Face(BOX, 0.95)])])
    assert asked == [(480, 640, 3)]
    assert results[0].crops[0].jpeg == results[1].crops[0].jpeg


def test_a_face_of_exactly_the_least_score_is_kept():
    found = [Face(BOX, score=score) for score in (0.9, math.nextafter(0.9, 0))]
    kept, reasons = faces.select(found, 640, 480, options(min_score=0.9))
    assert (kept, reasons) == ([(0, found[0])], [faces.LOW_SCORE])
