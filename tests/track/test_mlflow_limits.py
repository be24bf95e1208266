"""What MLflow takes at most."""

from __future__ import annotations

import pytest

from mcf.config import Recipe
from mcf.track import Tracker
from mcf.track.mlflow import run as mlflow_run

pytest.importorskip("mlflow")


def recipe(folder) -> Recipe:
    return Recipe.model_validate({"name": "run", "output": str(folder), "batch": 8})


def test_many_records_at_once_are_cut_into_requests_that_mlflow_takes(tmp_path, quick, store, monkeypatch):
    """MLflow's documented limit is 1,000 items a request; its own store refuses more."""
    from mlflow.tracking import MlflowClient

    log_batch, sizes = MlflowClient.log_batch, []

    def noted(self, run_id, metrics=(), params=(), tags=(), **named):
        sizes.append(len(metrics) + len(params) + len(tags))
        return log_batch(self, run_id, metrics=metrics, params=params, tags=tags, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", noted)
    tracker = Tracker(recipe(tmp_path), tmp_path / "run")
    for step in range(1, 41):
        tracker.metrics(step, {f"m/{i}": float(step) for i in range(40)})
    tracker.close()
    assert 40 < max(sizes) <= 1000  # several at once
    there = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in ("m/0", "m/39"):
        history = there.get_metric_history(tracker.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [(step, step) for step in range(1, 41)]
    assert tracker._mlflow.refused == 0


def test_values_are_no_longer_than_mlflow_takes():
    """Its documented limit of a parameter is 6,000 letters."""
    assert mlflow_run.flatten({"data": {"path": "x" * 7000}, "none": {}}) == {"data.path": "x" * 6000, "none": "{}"}
