"""Where MLflow is, what a user does to see it, and what keeps its client from asking, waiting and talking."""

from __future__ import annotations

import logging
from pathlib import Path

from mcf.track.origin import Tracked

REQUEST_TIMEOUT = 5  # seconds until an answer is given up

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT),
    # The thread tries again itself: it knows when the run ends.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(recipe: Tracked, run_dir: Path) -> str:
    """MLflow's URI for track.mlflow; 'local' is the sqlite file beside the run directory."""
    if recipe.track.mlflow == "local":
        return f"sqlite:///{Path(run_dir).resolve().parent / 'mlflow.db'}"
    return recipe.track.mlflow


def artifact_location(uri: str, run_dir: Path) -> str | None:
    """Where pictures go: a server knows (None); for a database they lie beside the run directories."""
    if uri.startswith(("http:", "https:", "file:", "databricks")):
        return None
    return (Path(run_dir).resolve().parent / "mlartifacts").as_uri()


def how_to_open(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """What a user does to see the page of a run (or, without one, the server's first page)."""
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning" if run_id else ""
    if uri.startswith(("http://", "https://")):
        return f"open {uri.rstrip('/')}{page}"
    return f"mlflow ui --workers 1 --backend-store-uri '{uri}', then open http://127.0.0.1:5000{page}"


def hold_back_logs() -> None:
    """Hold back what MLflow's database set-up says about itself."""
    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.ERROR)


def reason(error: Exception) -> str:
    """What went wrong in a line: the network's own word at the bottom of a chain, else the top's."""
    cause: BaseException = error
    while below := cause.__cause__ or cause.__context__:
        cause = below
    network = isinstance(cause, OSError) or type(cause).__module__.startswith("urllib3")
    text = " ".join(str(cause if network else error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "…"
