"""What a fine-tuning run ends with: metrics.json, a table, and pictures of the test set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mcf.downstream.alignment import Alignment
from mcf.downstream.charts import bar_chart, ced_chart
from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import FaceSet
from mcf.downstream.datasets.faceset import read_image
from mcf.downstream.loader import Loader, Prepared
from mcf.downstream.metrics import ced
from mcf.downstream.network import Network
from mcf.downstream.parsing import Parsing
from mcf.downstream.pictures import tiles, with_classes, with_points
from mcf.downstream.scores import Scores
from mcf.downstream.warps import Warp, box_matrix

SHOWN = 1.5  # side of the part of an image that a picture shows, in sides of the face's box
PIXELS = 384  # side of that part, drawn on
TITLES = {"spread": "From all over the test set", "best": "Best of the test set", "worst": "Worst of the test set"}
POINTS = "prediction red, label green, a line between"
CLASSES = "face, label, prediction"


def description(config: FinetuneConfig, faces: FaceSet, train: int) -> str:
    """Markdown for MLflow's description of a run."""
    backbone = "frozen" if config.freeze else "fine-tuned"
    untrained = " (RANDOM weights of its shape)" if config.random else ""
    return "\n".join([
        f"Face {config.task} on {config.dataset} with an encoder of `{config.weights}`{untrained}, {backbone}.",
        "",
        f"* **Data**: `{config.data}`: {train:,} faces to train on, {len(faces.test):,} to test on",
        f"* **Network**: input {config.input_size}², head of {config.head.channels} channels",
        "* `test/` charts are of the moving average of the weights, on the test set",
    ])  # fmt: skip


def table(results: Mapping[str, Any]) -> str:
    """Selected and best epoch beside each other, a metric a line."""
    selected, best = results["selected"], results["best_on_test"]
    names = [name for name in selected if name not in ("epoch", "by")]
    width = max(map(len, [*names, "chosen by"])) + 2
    lines = [
        f"{'':<{width}}{'selected':>24}{'best_on_test':>24}",
        f"{'chosen by':<{width}}{selected['by']:>24}{best['by']:>24}",
        f"{'epoch':<{width}}{selected['epoch']:>24}{best['epoch']:>24}",
    ]
    for name in names:
        values = "".join(f"{part[name]:>24.3f}" if name in part else f"{'–':>24}" for part in (selected, best))
        lines.append(f"{name:<{width}}{values}")
    return "\n".join(lines)


def pictures(
    faces: FaceSet, task: Alignment | Parsing, scores: Scores, network: Network, loader: Loader, count: int
) -> dict[str, NDArray[np.uint8]]:
    """Pictures by name, uint8 [H, W, 3]: `count` faces spread over the test set, the best and the worst of it; charts."""
    order = scores.errors.argsort(kind="stable")
    spread = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    chosen = {"spread": spread, "best": order[:count], "worst": order[::-1][:count]}
    found: dict[str, NDArray[np.uint8]] = {}
    for name, indices in chosen.items():
        rows = []
        for batch in loader.plain([faces.test[i] for i in indices], 8):
            with torch.no_grad():
                predictions = task.predict(network(batch.images), batch.faces)
            rows += [shown(prediction, prepared) for prediction, prepared in zip(predictions, batch.faces)]
        label = "NME {:.2f} %" if isinstance(task, Alignment) else "F1 {:.1f} %"
        values = scores.errors[indices] if isinstance(task, Alignment) else 100 - scores.errors[indices]
        captions = [f"{label.format(value)}  {faces.test[i].name}" for i, value in zip(indices, values)]
        heading, columns = (POINTS, 4) if isinstance(task, Alignment) else (CLASSES, 6)
        found[f"test-{name}"] = tiles(f"{TITLES[name]}: {heading}", list(zip(captions, rows)), columns, faces.classes)
    if isinstance(task, Alignment):
        unit = faces.units[0].name
        threshold = faces.auc[1] if faces.auc is not None and faces.auc[0] == unit else 0.10
        # Far enough to see most of the faces, also where many fail.
        x, share = ced(scores.errors / 100, max(threshold, float(np.quantile(scores.errors, 0.95)) / 100))
        found["ced"] = ced_chart(x, share, threshold, f"{faces.name}: {len(order):,} test faces", unit)
    else:
        values = {name.removeprefix("f1/"): value for name, value in scores.metrics.items() if name.startswith("f1/")}
        found["classes"] = bar_chart(values, scores.metrics["f1_mean"], f"{faces.name}: {len(order):,} test faces")
    return found


def shown(prediction: NDArray, prepared: Prepared) -> list[NDArray[np.uint8]]:
    """The pictures of one prediction: a face with both kinds of points, or a face, its true and its predicted classes."""
    whole = read_image(prepared.face)
    if prepared.labels is not None:
        return [whole, with_classes(whole, prepared.labels), with_classes(whole, prediction)]
    true, box = np.asarray(prepared.face.points), np.asarray(prepared.face.box)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max() * SHOWN / 2 / 1.25
    view = Warp(box_matrix(torch.from_numpy(np.concatenate([centre - half, centre + half])), PIXELS)[None], PIXELS)
    part = view.images(torch.from_numpy(whole).permute(2, 0, 1)[None])[0].round().clamp(0, 255).byte()
    moved, marked = (view.points(torch.from_numpy(points))[0].numpy() for points in (prediction, true))
    return [with_points(part.permute(1, 2, 0).numpy(), moved, marked)]
