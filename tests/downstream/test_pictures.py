"""Pictures say what the numbers say: colours where classes are, dots where points are, cells in their order."""

from __future__ import annotations

import numpy as np
import pytest

from mcf.downstream.charts import bar_chart, ced_chart
from mcf.downstream.datasets.parsing import CELEBAMASK_CLASSES
from mcf.downstream.pictures import (
    COLOURS,
    OVERLAY,
    PREDICTED,
    SWATCH,
    TILE,
    TRUE,
    indexed,
    tiles,
    with_classes,
    with_points,
)


def test_classes_colour_their_pixels_and_the_background_stays():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    labels = np.zeros((20, 30), int)
    labels[5:10, 5:20], labels[12:, 3:4] = 13, 25  # 25 is beyond the palette
    drawn = with_classes(image, labels)
    assert np.array_equal(drawn[labels == 0], image[labels == 0])
    expected = image[5:10, 5:20] * (1 - OVERLAY) + COLOURS[13] * OVERLAY
    assert np.abs(drawn[5:10, 5:20] - expected).max() <= 1
    assert not np.array_equal(drawn[12:, 3], image[12:, 3])


def test_points_stand_where_they_are():
    drawn = with_points(np.zeros((100, 200, 3), np.uint8), np.array([[150.0, 20.0]]), np.array([[40.0, 70.0]]))
    assert tuple(drawn[20, 150]) == PREDICTED
    assert tuple(drawn[70, 40]) == TRUE
    assert drawn[45, 95].any()  # the line between the two
    assert not drawn[90:, 100:].any()


def test_cells_stand_in_rows_in_their_order():
    pictures = [np.full((10, 20, 3), value, np.uint8) for value in (10, 60, 110, 160, 210)]
    sheet = tiles("heading", [(f"{i}", [p]) for i, p in enumerate(pictures)], columns=2)
    centres = [np.argwhere((sheet == value).all(-1)).mean(0).round() for value in (10, 60, 110, 160, 210)]
    assert [tuple(np.round((c - centres[0]) / TILE).astype(int)) for c in centres] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    ]


@pytest.mark.parametrize("columns", [1, 4])
def test_each_class_has_its_colour_and_its_name_in_the_legend(columns):
    grey = np.full((20, 20, 3), 128, np.uint8)
    cells = [("face", [grey])] * columns
    plain, sheet = tiles("Classes", cells, columns), tiles("Classes", cells, columns, CELEBAMASK_CLASSES)
    added = len(sheet) - len(plain)
    assert np.array_equal(sheet[-TILE:], plain[-TILE:])  # the pictures are where they were, further down
    top = len(sheet) - TILE - added - 40
    side, corners = SWATCH - 2, []
    for colour in COLOURS[1:]:
        is_it = np.lib.stride_tricks.sliding_window_view((sheet[top:-TILE] == colour).all(-1), (side, side))
        ((y, x),) = np.argwhere(is_it.all((2, 3))).tolist()
        corners.append((y, x))
    assert corners == sorted(corners)  # in the order of the classes, row by row
    # Beside each swatch stands ink, and none runs out of the sheet.
    for y, x in corners:
        beside = sheet[top + y : top + y + SWATCH, x + SWATCH + 2 : x + SWATCH + 30]
        assert (beside.sum(-1) < 400).sum() > 20
    assert sheet[:-TILE, -4:].min() == 255


def test_indices_are_the_classes_and_a_viewer_sees_colours():
    labels = np.arange(19, dtype=np.uint8).reshape(1, 19).repeat(2, 0)
    picture = indexed(labels)
    assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
    assert np.array_equal(np.asarray(picture.convert("RGB"))[0], COLOURS)


def test_charts_draw():
    x = np.linspace(0, 0.2, 50)
    low, high = (ced_chart(x, np.full(50, share), 0.1, "t", "inter_ocular") for share in (0.1, 0.9))
    assert low.shape == high.shape and low.dtype == np.uint8
    rows = [
        np.argwhere((chart[:, :, 2].astype(int) - chart[:, :, 0] > 60).sum(1) > 200).ravel() for chart in (low, high)
    ]
    assert rows[0].mean() > rows[1].mean() + 100  # the higher curve stands higher
    bars = bar_chart({"skin": 90.0, "hat": 10.0}, 50.0, "t")
    blue = (bars[:, :, 2].astype(int) - bars[:, :, 0] > 60).sum(1)
    upper, lower = blue[: len(blue) // 2].max(), blue[len(blue) // 2 :].max()
    assert upper > 5 * lower  # the first name is on top
