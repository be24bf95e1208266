"""Tracking: where a run's numbers, pictures and events go. Nothing here can stop or slow a run.

    RUN/metrics.jsonl     every record of numbers: the truth (jsonl.py)
    RUN/events.jsonl      bad samples, checkpoints, restarts, warnings
    RUN/images/           pictures of reconstructions (images.py)
    RUN/mlflow.json       which MLflow run this is
    stdout                a live line on a terminal, plain lines in a file (console.py)
    MLflow                from a thread of its own (mlflow.py)

Names of metrics, as every sink shows them:

    loss/total, loss/feature, loss/contrast, loss/pixel     the weighted sum; the terms without their weights
    lr, momentum, grad_norm
    rate/images_per_s     of all ranks
    rate/data_wait        share of the time, 0–1, that the step waited for data
    memory/gib            largest memory of a device (without a GPU: of the process), GiB
    GROUP/name            anything else; charts are grouped by what stands before the slash
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from mcf import atomic
from mcf.track import jsonl
from mcf.track.console import Console
from mcf.track.origin import Tracked, describe, plan_value

if TYPE_CHECKING:
    import numpy as np

IMAGES = "images"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Tracker:
    """One door to all sinks; on ranks other than 0 it does nothing.

    A sink that fails is reported once and tried again with the next record; no method raises.
    """

    def __init__(
        self,
        recipe: Tracked,
        run_dir: str | Path,
        *,
        description: str | None = None,
        rank: int = 0,
        plan: Any = None,
        run_id: str | None = None,
        start: int | None = None,
        stream: TextIO | None = None,
    ):
        """Open the sinks of `run_dir` (made if it is not there).

        Args:
            recipe: what is run; `track` says where to.
            run_dir: the run directory.
            description: of the run for MLflow's page, in Markdown; by default that of a pre-training recipe.
            rank: this process's rank.
            plan: object or mapping with `steps` and `lr`, for progress, time to go and the description.
            run_id: MLflow run that the checkpoint names.
            start: optimiser steps done so far; 0 says that the run begins from scratch, whatever lies in `run_dir`.
            stream: where lines go, stdout by default.
        """
        self.run_dir = Path(run_dir)
        self._recipe = recipe
        self._run_id = run_id
        self._told: set[str] = set()
        self._uncut = True
        self._closed = False
        self._metrics: jsonl.Writer | None = None
        self._events: jsonl.Writer | None = None
        self._console: Console | None = None
        self._mlflow: Any = None
        if rank != 0:
            return
        with self._guarded("console"):
            self._console = Console(plan_value(plan, "steps"), recipe.batch, stream)
        with self._guarded("run directory"):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = jsonl.Writer(self.run_dir / jsonl.METRICS)
            self._events = jsonl.Writer(self.run_dir / jsonl.EVENTS)
        if recipe.track.mlflow != "off":
            with self._guarded("MLflow"):
                from mcf.track.mlflow import MLflowSink

                self._mlflow = MLflowSink(
                    recipe,
                    self.run_dir,
                    description=describe(recipe, plan, self.run_dir) if description is None else description,
                    run_id=run_id,
                    start=start,
                    tell=lambda line: self.event("tracking", message=line),
                )

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the server has given one."""
        return self._mlflow.run_id if self._mlflow is not None else self._run_id

    @property
    def how_to_open(self) -> str | None:
        """What a user does to see the MLflow page; None where there is none."""
        return self._mlflow.how_to_open if self._mlflow is not None else None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers after optimiser step `step` (counted from 1, rising). Returns in well under a millisecond."""
        record = {"step": int(step), "samples": int(step) * self._recipe.batch, "time": time.time()}
        record |= {name: _number(value) for name, value in values.items()}
        if self._metrics is not None:
            with self._guarded("metrics.jsonl"):
                if self._uncut:
                    self._metrics.cut(step)
                    self._uncut = False
                self._metrics.append(record)
        if self._mlflow is not None and not self._closed:
            with self._guarded("MLflow"):
                self._mlflow.metrics(record)
        if self._console is not None:
            with self._guarded("console"):
                self._console.metrics(record)

    def image(self, step: int, name: str, array: np.ndarray) -> Path | None:
        """Keep a picture, uint8 [H, W, 3], as RUN/images/step-000123-NAME.png; returns its path."""
        if self._metrics is None:
            return None
        with self._guarded("images"):
            from PIL import Image

            path = self.run_dir / IMAGES / f"step-{step:06d}-{name}.png"
            path.parent.mkdir(exist_ok=True)
            with atomic.replacing(path, sync=False) as staged:
                Image.fromarray(array).save(staged, format="PNG")
            if self._mlflow is not None:
                self._mlflow.artifact(path, IMAGES)
            return path
        return None

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened: kind ("bad_sample", "checkpoint", "restart", "warning", …) and its fields."""
        record = {"kind": kind, "time": time.time(), **fields}
        if self._events is not None:
            with self._guarded("events.jsonl"):
                self._events.append(record)
        if self._console is not None:
            with self._guarded("console"):
                self._console.event(record)

    def sync(self) -> None:
        """Wait until all lines so far are on the disk; for the moment of a checkpoint."""
        for writer in (self._metrics, self._events):
            if writer is not None:
                with self._guarded(writer.path.name):
                    writer.sync()

    def close(self, status: Literal["finished", "stopped", "failed"] = "finished") -> None:
        """Give MLflow a few seconds for the rest, and close the files. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._mlflow is not None:
            with self._guarded("MLflow"):
                self._mlflow.close(STATUS[status])
        self.sync()
        closers: list[Callable[[], None]] = [
            s.close for s in (self._console, self._metrics, self._events) if s is not None
        ]
        for close in closers:
            with self._guarded("close"):
                close()
        self._console = self._metrics = self._events = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("finished" if kind is None else "failed")

    def _guarded(self, sink: str) -> _Guard:
        return _Guard(self._told, sink)


class _Guard:
    """Keeps a sink's failure from its caller; the first of each sink is said on stderr."""

    def __init__(self, told: set[str], sink: str):
        self._told = told
        self._sink = sink

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._sink not in self._told:
            self._told.add(self._sink)
            line = f"tracking: {self._sink} failed ({error}); the run goes on without it"
            with contextlib.suppress(OSError, ValueError):  # stderr may be gone as well
                print(line, file=sys.stderr, flush=True)
        return True


def _number(value: Any) -> Any:
    """A plain number of a number of NumPy or torch; anything else as it is."""
    return value.item() if hasattr(value, "item") else value
