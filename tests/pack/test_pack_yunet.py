"""detector=FILE.onnx: OpenCV's YuNet, with a network of YuNet's inputs and outputs that takes red squares for faces.

The published file is not ours to keep here. Everything but its weights is real: the file, OpenCV's reader, its decoding
of the outputs, and its choice among overlapping faces.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from mcf.pack import detectors
from mcf.pack.cut import Cutter
from mcf.pack.options import PackConfig

pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
onnx = pytest.importorskip("onnx")

STRIDE = 8  # of the cells that answer; YuNet's others, 16 and 32, find nothing here
SIDE = 32.0  # pixels, of every face that is found
# The five points as shares of a cell from its corner: right eye, left eye, nose, right and left corner of the mouth.
POINTS = [-1.0, -0.5, 1.5, -0.75, 0.25, 0.5, -0.5, 1.25, 1.0, 1.75]


@pytest.fixture(scope="module")
def yunet(tmp_path_factory) -> str:
    """[1, 3, H, W] of BGR in 0…255 → cls, obj, bbox and kps of each stride, as face_detection_yunet has them."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, outputs = [], [], []

    def constant(name: str, values, kind=np.float32) -> str:
        weights.append(numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    red = np.zeros((1, 3, 1, 1))
    red[0, 2] = 1 / 255
    nodes.append(helper.make_node("Conv", ["input", constant("red", red)], ["redness"]))
    for stride in (8, 16, 32):
        nodes.append(
            helper.make_node(
                "AveragePool", ["redness"], [f"m{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            )
        )
        shape = constant(f"shape{stride}", [1, -1, 1], np.int64)
        nodes.append(helper.make_node("Reshape", [f"m{stride}", shape], [f"cells{stride}"]))
        factor = constant(f"factor{stride}", [[[1.0 if stride == STRIDE else 0.0]]])
        heads = {"cls": [1.0], "obj": [1.0], "bbox": [0.5, 0.5, *[math.log(SIDE / STRIDE)] * 2], "kps": POINTS}
        for name, values in heads.items():
            # Scores are the redness; boxes and points are the same in every cell: 0 · redness + values.
            weight = constant(f"{name}{stride}w", np.full((1, 1, len(values)), float(name in ("cls", "obj"))))
            bias = constant(f"{name}{stride}b", np.reshape(values if name in ("bbox", "kps") else [0.0], (1, 1, -1)))
            scaled = [f"cells{stride}", factor] if name in ("cls", "obj") else [f"cells{stride}", weight]
            nodes.append(helper.make_node("Mul", scaled, [f"{name}{stride}s"]))
            nodes.append(helper.make_node("Add", [f"{name}{stride}s", bias], [f"{name}_{stride}"]))
            outputs.append((f"{name}_{stride}", len(values)))
    graph = helper.make_graph(
        nodes, "yunet", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "N", n]) for name, n in sorted(outputs)], weights,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("yunet") / "face_detection_yunet.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), path)
    return str(path)


def scene(height: int, width: int, cells: list[tuple[int, int]], side: int = STRIDE) -> np.ndarray:
    """A blue picture with red squares of `side` in the cells (row, column)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 255  # BGR and RGB mixed up would find a face everywhere
    for row, column in cells:
        pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = (255, 0, 0)
    return pixels


def test_boxes_scores_and_points_are_where_the_network_says(yunet):
    faces = detectors.finder(yunet)(scene(160, 200, [(4, 5), (12, 18)]))
    assert len(faces) == 2
    for face, (row, column) in zip(sorted(faces, key=lambda face: face.box), [(4, 5), (12, 18)]):
        x, y = (column + 0.5) * STRIDE, (row + 0.5) * STRIDE
        assert face.box == pytest.approx((x - SIDE / 2, y - SIDE / 2, x + SIDE / 2, y + SIDE / 2), abs=0.01)
        assert face.score == pytest.approx(1.0, abs=1e-3)
        corner = np.tile([column, row], 5)
        assert face.landmarks == pytest.approx((corner + POINTS) * STRIDE, abs=0.01)


def test_a_large_picture_is_looked_at_smaller_and_answered_in_its_own_pixels(yunet):
    (face,) = detectors.finder(yunet)(scene(1600, 2048, [(40, 30)], 2 * STRIDE))
    x, y = 30.5 * 2 * STRIDE, 40.5 * 2 * STRIDE
    assert face.box == pytest.approx((x - SIDE, y - SIDE, x + SIDE, y + SIDE), abs=0.05)


def test_neighbours_are_one_face_and_a_picture_without_red_has_none(yunet):
    find = detectors.finder(yunet)
    assert len(find(scene(160, 200, [(4, 5), (4, 6)]))) == 1
    assert find(scene(160, 200, [])) == []


def test_what_it_finds_is_cut_out(yunet):
    stream = io.BytesIO()
    Image.fromarray(scene(160, 200, [(8, 12)])).save(stream, "PNG")
    options = PackConfig(source="x", out="y", detector=yunet, crop="face", size=64, margin=0, min_face=20)
    cutter = Cutter(options, detectors.finder(yunet))
    (cut,) = cutter.cut([(stream.getvalue(), None)])
    (crop,) = cut.crops
    picture = np.asarray(Image.open(io.BytesIO(crop.jpeg))).astype(int)
    assert crop.face and crop.face.side == pytest.approx(SIDE, abs=0.01)
    # The red cell, a quarter of the face's side, lies in the crop's middle.
    assert picture[28:36, 28:36, 0].min() > 200 > 80 > picture[:16, :, 0].max()
