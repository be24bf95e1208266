"""Losses, predictions and scores of both tasks, by hand and against PyTorch's and scikit-learn's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from sklearn.metrics import f1_score

from mcf.downstream.alignment import Alignment, heatmaps, points_of
from mcf.downstream.datasets import open_faces
from mcf.downstream.loader import Batch, Loader
from mcf.downstream.parsing import Parsing
from mcf.downstream.scores import choose


def test_points_are_centres_of_mass():
    heat = torch.zeros(1, 2, 10, 20)
    heat[0, 0, 3, 7] = 0.4
    heat[0, 0, 3, 8] = 1.2  # x = (7·0.4 + 8·1.2)/1.6 = 7.75
    points = points_of(heat)
    assert points[0, 0].tolist() == pytest.approx([(7.75 + 0.5) / 20, (3 + 0.5) / 10])
    assert points[0, 1].tolist() == pytest.approx([0.5 / 20, 0.5 / 10])  # no mass: the division is by 1e-6, not by 0


def test_target_heatmaps_are_the_formula():
    size, radius = 128, 5.0
    points = torch.tensor([[[0.5, 0.25], [0.001, 0.999]]])
    found = heatmaps(points, size, radius)
    for p, (x, y) in enumerate(points[0].tolist()):
        cx, cy = x * size - 0.5, y * size - 0.5
        for row, column in [(31, 63), (32, 64), (29, 66), (31, 70), (127, 0), (125, 2), (0, 0)]:
            square = (column - cx) ** 2 + (row - cy) ** 2
            expected = np.exp(-square * 16 / (2 * radius**2)) if square**0.5 <= radius else 0.0
            assert float(found[0, p, row, column]) == pytest.approx(expected, abs=1e-6)
    # A heat-map's centre of mass is the point, inside the picture.
    assert points_of(found)[0, 0].tolist() == pytest.approx([0.5, 0.25], abs=1e-4)


def test_the_loss_of_alignment(tmp_path, config):
    trees.table(tmp_path)
    task = Alignment(open_faces("alignment", "csv", tmp_path), config(heatmap={"size": 128, "radius": 5.0}))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 68, 112, 112, generator=generator, requires_grad=True)
    points = torch.rand(2, 68, 2, generator=generator)
    terms = task.terms(logits, Batch([], torch.empty(0), points, None))
    sigmoid = 1 / (1 + np.exp(-logits.detach().double().numpy()))
    mass = sigmoid.sum((2, 3))
    x = (sigmoid * np.arange(112)).sum((2, 3)) / mass
    y = (sigmoid * np.arange(112)[:, None]).sum((2, 3)) / mass
    distance = np.hypot((x + 0.5) / 112 - points[..., 0].numpy(), (y + 0.5) / 112 - points[..., 1].numpy())
    assert terms["coordinate"].item() == pytest.approx(distance.mean(), rel=1e-5)
    p = torch.sigmoid(F.interpolate(logits.detach().double(), (128, 128), mode="bilinear", align_corners=False))
    t = heatmaps(points.double(), 128, 5.0)
    entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    assert terms["heatmap"].item() == pytest.approx(float(entropy), rel=1e-5)
    assert terms["total"].item() == pytest.approx(distance.mean() + float(entropy), rel=1e-5)
    terms["total"].backward()
    assert torch.isfinite(logits.grad).all()


def test_perfect_heatmaps_give_the_true_points_of_the_original(tmp_path, config):
    """Through crop, square, heat-map and back: errors are in pixels of the original image."""
    trees.table(tmp_path)
    faces, settings = open_faces("alignment", "csv", tmp_path), config(warp_size=512, input_size=64)
    task = Alignment(faces, settings)
    with Loader(faces, settings, torch.device("cpu"), 1) as loader:
        (batch,) = list(loader.plain(faces.test, 4))
    heat = heatmaps(batch.points, 112, 5.0).clamp(1e-12, 1 - 1e-7)
    predictions = task.predict(torch.log(heat / (1 - heat)), batch.faces)
    judged = [task.judge(p, prepared) for p, prepared in zip(predictions, batch.faces)]
    for prediction, face in zip(predictions, faces.test):
        # Points near the square's edge lose a part of their heat-map: only those inside are exact.
        inside = np.abs(face.points - (face.box[:2] + face.box[2:]) / 2).max(1) < 0.45 * (face.box[2] - face.box[0])
        assert np.abs(prediction - face.points)[inside].max() < 0.02
    scores = task.score(faces.test, judged)
    assert scores.metrics["nme_inter_ocular"] < 0.2
    shifted = task.score(faces.test, [p + [3.0, 4.0] for p in (face.points for face in faces.test)])
    apart = [np.hypot(*(face.points[36] - face.points[45])) for face in faces.test]
    assert shifted.metrics["nme_inter_ocular"] == pytest.approx(np.mean(500 / np.array(apart)))
    assert shifted.metrics["fr_inter_ocular_10"] == 100.0
    assert shifted.errors == pytest.approx(500 / np.array(apart))


def test_subsets_are_scored_apart(tmp_path, config):
    trees.wflw(tmp_path)
    faces = open_faces("alignment", "wflw", tmp_path)
    task = Alignment(faces, config())
    scores = task.score(faces.test, [faces.test[0].points + 1.0, faces.test[1].points])
    assert scores.metrics["nme_inter_ocular/blur"] == 0.0
    assert scores.metrics["auc_inter_ocular_10/makeup"] == pytest.approx(100.0)
    assert "nme_inter_ocular/largepose" not in scores.metrics
    assert scores.metrics["nme_inter_ocular"] == pytest.approx(scores.errors.mean())


def test_the_loss_of_parsing_is_the_mean_over_all_pixels_of_the_square(tmp_path, config):
    trees.masks(tmp_path)
    settings = config(task="parsing", dataset="masks", warp_size=48)
    task = Parsing(open_faces("parsing", "masks", tmp_path), settings)
    logits, labels = torch.randn(2, 19, 12, 12), torch.randint(0, 19, (2, 48, 48))
    terms = task.terms(logits, Batch([], torch.empty(0), None, labels))
    log = F.interpolate(logits.double(), (48, 48), mode="bilinear", align_corners=False).log_softmax(1)
    expected = -np.mean([log[b, labels[b, y, x], y, x] for b in range(2) for y in range(48) for x in range(48)])
    assert terms["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("warp", [0.0, 0.8])
def test_true_labels_as_logits_come_back_at_original_resolution(tmp_path, config, warp):
    trees.masks(tmp_path)
    settings = config(task="parsing", dataset="masks", warp_size=256, input_size=64)
    faces = dataclasses.replace(open_faces("parsing", "masks", tmp_path), warp=warp)
    task = Parsing(faces, settings)
    with Loader(faces, settings, torch.device("cpu"), 1) as loader:
        (batch,) = list(loader.plain(faces.test, 4))
    predictions = task.predict(F.one_hot(batch.labels, 19).permute(0, 3, 1, 2).float() * 10, batch.faces)
    judged = [task.judge(p, prepared) for p, prepared in zip(predictions, batch.faces)]
    scores = task.score(faces.test, judged)
    assert all(p.shape == (48, 64) for p in predictions)
    # The squares of 8 pixels are sampled four times as densely or squeezed towards the edge; a seam may change sides.
    assert scores.metrics["f1_mean"] > (97 if warp == 0 else 75)
    true = np.concatenate([prepared.labels.ravel() for prepared in batch.faces])
    seen = np.concatenate([p.ravel() for p in predictions])
    expected = f1_score(true, seen, average=None, labels=sorted(set(true) | set(seen)))
    present = [scores.metrics[f"f1/{faces.classes[c]}"] for c in sorted(set(true) | set(seen))]
    assert present == pytest.approx(100 * expected)


def test_selected_and_best_on_test_are_both_told():
    history = [
        {"epoch": e, "test": {"nme": t}, "validation": v} for e, t, v in [(1, 5.0, 4.0), (2, 3.0, 3.6), (3, 3.5, 3.2), (4, 3.8, 3.9)]
    ]  # fmt: skip
    plain = choose(history, "nme", "lower", validated=False)
    assert (plain["selected"]["epoch"], plain["selected"]["by"]) == (4, "last epoch")
    assert (plain["best_on_test"]["epoch"], plain["best_on_test"]["nme"]) == (2, 3.0)
    assert choose(history, "nme", "lower", validated=True)["selected"]["epoch"] == 3
    upwards = choose(history, "nme", "higher", validated=True)
    assert (upwards["selected"]["epoch"], upwards["best_on_test"]["epoch"]) == (1, 1)
