"""An MLflow of the tests' own, and a sink in a hurry."""

from __future__ import annotations

import shutil

import pytest

from mcf.track.mlflow import sink


@pytest.fixture
def quick(monkeypatch):
    """Short pauses and an impatient client, so that failures are tried again within a test."""
    monkeypatch.setattr(sink, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(sink, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(sink, "GATHER", 0.02)
    monkeypatch.setattr(sink, "PATIENCE", 60)  # these tests ask what arrives, on however busy a machine
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An sqlite store without runs: making the tables takes seconds, copying the file none."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    from mlflow.tracking import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
