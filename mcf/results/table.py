"""The numbers of all heads, and the table of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INITIALISATIONS = {"random": "random", "mae": "MAE: pixel loss alone", "mcf": "MCF: the method"}
# What the table shows of each task: a metric of metrics.json, its heading, which way is better.
SHOWN = {
    "alignment": (("nme_inter_ocular", "NME inter-ocular, %", "↓"), ("fr_inter_ocular_10", "FR at 10 %", "↓"),
                  ("auc_inter_ocular_10", "AUC at 10 %", "↑")),
    "parsing": (("f1_mean", "mean F1, %", "↑"),),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One number of the table's raw data."""

    initialisation: str
    task: str
    seed: int
    metric: str
    value: float


def collect(out: Path, seeds: Sequence[int]) -> list[Result]:
    """All metrics of all heads, from their metrics.json."""
    found = []
    for kind in INITIALISATIONS:
        for task in SHOWN:
            for seed in seeds:
                told = json.loads((out / "runs" / f"{task}-{kind}-{seed}" / "metrics.json").read_text())["selected"]
                numbers = {name: value for name, value in told.items() if name not in ("epoch", "by")}
                found += [Result(kind, task, seed, name, value) for name, value in numbers.items()]
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown: a row an initialisation, in every cell mean ± sample standard deviation over the seeds, and the range."""
    columns = [(task, *shown) for task in SHOWN for shown in SHOWN[task] if any(r.metric == shown[0] for r in results)]
    lines = [
        "| Frozen encoder | "
        + " | ".join(f"{task}: {heading} {better}" for task, _, heading, better in columns)
        + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for kind, name in INITIALISATIONS.items():
        cells = []
        for task, metric, _, _ in columns:
            values = [r.value for r in results if (r.initialisation, r.task, r.metric) == (kind, task, metric)]
            cell = f"{statistics.mean(values):.2f}"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.2f} ({min(values):.2f}–{max(values):.2f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
