"""MLflow, fed from a thread of its own: a server that is down, slow or full costs training nothing.

    metrics() ── bounded queue ──► thread ── log_batch, log_artifact ──► MLflow
                     └ full: the oldest record falls out; metrics.jsonl has it

The thread connects, then sends what the queue holds. What fails is tried again, with longer and longer pauses, until
the run ends; meanwhile the queue keeps the newest `track.queue` records. Every batch carries the tag `mcf.step`, the
last step that the server has: when the server is back, or a killed run goes on, all that lies between is read from
metrics.jsonl, and a step that the server has already is not sent twice. `mlflow.json` in the run directory remembers
which MLflow run belongs to which server, so that one training run is one MLflow run across restarts.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mcf.errors import missing_package
from mcf.track import jsonl
from mcf.track.origin import NOTE, Tracked, tags

LEDGER = "mlflow.json"
STEP_TAG = "mcf.step"

REQUEST_TIMEOUT = 5  # seconds until an answer is given up
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries, doubling
PATIENCE = 10.0  # seconds the end of a run waits for the last records
GATHER = 0.5  # seconds the thread waits after a record, to send several at once

ITEMS_A_TURN = 50  # records taken from the queue at once

# MLflow's limits of one request, and of one value
METRICS_A_BATCH = 900
VALUES_A_BATCH = 100
PARAMETER_LENGTH = 6000
TAG_LENGTH = 5000
BAD_IN_NAME = re.compile(r"[^\w .:/-]", re.ASCII)

# Without the kind, MLflow's page takes an experiment without models for one about language models.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE: "Face encoders (Mask Contrastive Face): one run is one training run.",
}

NOT_METRICS = {"step", "samples", "time"}
# Keys that may differ between two launches of one training run: how it is run, not what is computed.
OF_THE_LAUNCH = re.compile(
    r"(track|slurm|checkpoint)\.|(nodes|gpus_per_node|output|train\.(stop_after|threads|log_every)|data\.(threads|prefetch))$"
)


@dataclass(frozen=True, eq=False)
class Artifact:
    """A file of the run directory, and the folder of MLflow's artifacts it goes to (None: the top)."""

    path: Path
    folder: str | None


class _GivenUp(Exception):
    """The run has ended, and MLflow is still away."""


class MLflowSink:
    """Sends a run to MLflow; every method returns at once and raises nothing, except `close`, which waits a little."""

    def __init__(
        self,
        recipe: Tracked,
        run_dir: Path,
        *,
        description: str = "",
        run_id: str | None = None,
        start: int | None = None,
        tell: Callable[[str], None] = print,
    ):
        """Start the thread.

        `run_id`: MLflow run that the checkpoint names; `start`: steps done when this process began (0: from scratch,
        so that a changed recipe makes a new MLflow run); `tell` gets one line when MLflow goes away or comes back.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.uri = tracking_uri(recipe, run_dir)
        self.run_id = run_id
        self.dropped = 0  # items that fell out of the queue
        self.refused = 0  # items that the server would never take
        self._recipe = recipe
        self._run_dir = Path(run_dir)
        self._description = description
        self._start = start
        self._opened = time.time()
        self._tell = tell
        self._queue: deque[dict[str, Any] | Artifact] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._client: Any = None
        self._experiment_id: str | None = None
        self._known = -1  # last step that the server had when this process connected
        self._sent = -1  # last step that it has now
        self._gap = True  # whether metrics.jsonl may hold steps after `_sent` that are not in the queue
        self._away = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def how_to_open(self) -> str:
        """What a user does to see this run's page."""
        return how_to_open(self.uri, self._experiment_id, self.run_id if self._experiment_id else None)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Queue a record; it must be in metrics.jsonl already, where it is looked up if it falls out of the queue."""
        self._put(dict(record))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Queue a file of the run directory for the artifact folder `folder`."""
        self._put(Artifact(Path(path), folder))

    def close(self, status: str = "FINISHED", timeout: float | None = None) -> None:
        """Send the rest for at most `timeout` seconds (10 by default), and set MLflow's status of the run."""
        timeout = PATIENCE if timeout is None else timeout
        self._status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._tell(f"MLflow at {self.uri} did not take the rest in {timeout:g} s; {jsonl.METRICS} has all of it")

    def _put(self, item: dict[str, Any] | Artifact) -> None:
        with self._lock:
            if len(self._queue) >= self._recipe.track.queue:
                # The oldest record goes: the file has it. Pictures are few, and stay as long as there are records.
                oldest = next((i for i, queued in enumerate(self._queue) if isinstance(queued, dict)), 0)
                del self._queue[oldest]
                self.dropped += 1
                self._gap = True
            self._queue.append(item)
        self._wake.set()

    # Everything below runs in the thread.

    def _work(self) -> None:
        try:
            self._insist(self._connect)
            while not self._closing.is_set():
                self._wake.wait()
                self._closing.wait(GATHER)
                self._wake.clear()
                self._insist(self._send)
            self._insist(self._finish)
        except _GivenUp:
            self._tell(f"MLflow at {self.uri} has no steps after {max(0, self._sent)}; {jsonl.METRICS} has all of them")
        except ModuleNotFoundError as error:
            missing = missing_package((error.name or "mlflow").partition(".")[0], "track.mlflow")
            self._tell(f"{missing}; {jsonl.METRICS} has everything")
        except Exception as error:  # a thread that died in silence would look like a run without numbers
            self._tell(f"MLflow tracking ended ({_reason(error)}); {jsonl.METRICS} has everything")

    def _insist(self, action: Callable[[], None]) -> None:
        """Do it until it succeeds or the run ends; say once that the server is away, and once that it is back."""
        pause = FIRST_PAUSE
        while (error := _attempt(action)) is not None:
            if not self._away:
                self._away = True
                self._tell(
                    f"MLflow at {self.uri} fails ({_reason(error)}); training goes on, {jsonl.METRICS} has "
                    "everything, and is sent once it answers"
                )
            if self._closing.is_set():
                raise _GivenUp from error
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if self._away and action != self._connect:
            self._away = False
            late = f" ({self.dropped} of them from {jsonl.METRICS})" if self.dropped else ""
            self._tell(f"MLflow at {self.uri} is back and has all records up to step {max(0, self._sent)}{late}")

    def _connect(self) -> None:
        from mlflow.tracking import MlflowClient

        _quiet()
        client = MlflowClient(tracking_uri=self.uri)
        run = self._reopen(client) or self._create(client)
        self.run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        self._remember()
        self._describe(client, run)
        self._known = self._sent = int(run.data.tags.get(STEP_TAG, -1))
        self._client = client

    def _reopen(self, client: Any) -> Any:
        """The MLflow run of this training run, or None if this server has none."""
        from mlflow.exceptions import MlflowException

        for run_id in dict.fromkeys(filter(None, (self._remembered(), self.run_id))):
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    raise
                continue
            another = self._start == 0 and any(not OF_THE_LAUNCH.match(key) for key in self._changed(run))
            if run.info.lifecycle_stage == "active" and not another:
                client.update_run(run_id, status="RUNNING")
                return run
        return None

    def _create(self, client: Any) -> Any:
        from mlflow.exceptions import MlflowException

        name = self._recipe.track.experiment
        if client.get_experiment_by_name(name) is None:
            try:
                client.create_experiment(name, _artifacts(self.uri, self._run_dir), tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was quicker
                    raise
        experiment_id = client.get_experiment_by_name(name).experiment_id
        start_time = int(self._opened * 1000)
        if self._away:  # a slow server may have made the run although the answer came too late
            made = client.search_runs(
                [experiment_id], f"attributes.start_time = {start_time} AND attributes.run_name = '{self._recipe.name}'"
            )
            if made:
                return made[0]
        return client.create_run(
            experiment_id,
            start_time=start_time,
            run_name=self._recipe.name,
            tags=tags(self._run_dir, self._description),
        )

    def _describe(self, client: Any, run: Any) -> None:
        """Parameters, tags and recipe.yaml; MLflow's parameters are for ever, so a changed one becomes a tag."""
        from mlflow.entities import Param, RunTag

        run_id, there = run.info.run_id, run.data.params
        values = flatten(self._recipe.model_dump(mode="json"))
        changed = self._changed(run)
        notes = {f"mcf.changed.{key}": f"{there[key]} → {value}"[:TAG_LENGTH] for key, value in changed.items()}
        for chunk in _chunks([Param(key, value) for key, value in values.items() if key not in there]):
            client.log_batch(run_id, params=chunk)
        notes |= tags(self._run_dir, self._description)
        if NOTE in run.data.tags:  # somebody may have edited it on the page
            notes.pop(NOTE, None)
        for chunk in _chunks([RunTag(key, value) for key, value in notes.items()]):
            client.log_batch(run_id, tags=chunk)
        if changed or not there:
            step = run.data.tags.get(STEP_TAG)
            name = f"recipe-after-step-{step}.yaml" if step else "recipe.yaml"
            self._upload(client, lambda: client.log_text(run_id, self._recipe_yaml(), name), name)

    def _changed(self, run: Any) -> dict[str, str]:
        """Recipe keys whose value is not the one that the MLflow run has, with the value they have now."""
        there = run.data.params
        values = flatten(self._recipe.model_dump(mode="json"))
        return {key: value for key, value in values.items() if there.get(key, value) != value}

    def _recipe_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False)

    def _send(self, last: bool = False) -> None:
        """Send the queue, and before it what metrics.jsonl has and the queue lost. What fails stays in the queue."""
        while True:
            with self._lock:
                items = list(islice(self._queue, ITEMS_A_TURN))
                records = [item for item in items if isinstance(item, dict)]
                gap = self._gap and bool(records or last)
                self._gap = self._gap and not gap
            try:
                if gap:
                    self._send_records(self._missing(before=records[0]["step"] if records else math.inf))
                self._send_records([record for record in records if record["step"] > self._known])
                for item in items:
                    if isinstance(item, Artifact):
                        self._send_artifact(item)
            except Exception:
                self._gap = self._gap or gap
                raise
            with self._lock:
                done = {id(item) for item in items}
                while self._queue and id(self._queue[0]) in done:
                    self._queue.popleft()
                if not self._queue:
                    return

    def _missing(self, before: float) -> list[dict[str, Any]]:
        """Records of metrics.jsonl after the last step that the server has and before step `before`."""
        return [r for r in jsonl.read(self._run_dir / jsonl.METRICS) if self._sent < r.get("step", -1) < before]

    def _send_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException

        batch: list[Any] = []
        for number, record in enumerate(records, 1):
            batch += [
                Metric(name, value, int(record["time"] * 1000), record["step"]) for name, value in _numbers(record)
            ]
            full = number < len(records) and len(batch) + len(records[number]) > METRICS_A_BATCH
            if full or number == len(records):
                try:
                    tag = RunTag(STEP_TAG, str(record["step"]))
                    self._client.log_batch(self.run_id, metrics=batch, tags=[tag])
                except MlflowException as error:
                    # What a server finds wrong it will always find wrong; anything else is tried again.
                    if error.get_http_status_code() != 400:
                        raise
                    self._refuse(f"metrics of step {record['step']}", error)
                self._sent = record["step"]
                batch = []

    def _send_artifact(self, item: Artifact) -> None:
        if item.path.exists():
            client = self._client
            self._upload(client, lambda: client.log_artifact(self.run_id, str(item.path), item.folder), item.path.name)

    def _upload(self, client: Any, upload: Callable[[], None], what: str) -> None:
        """Upload a file. Numbers never wait for files: what fails while the server answers is given up."""
        try:
            upload()
        except Exception as error:
            client.get_run(self.run_id)  # raises where the server itself is away: then both are tried again
            self._refuse(what, error)

    def _refuse(self, what: str, error: Exception) -> None:
        """Say the first time that something was not taken, and why."""
        self.refused += 1
        if self.refused == 1:
            self._tell(f"MLflow at {self.uri} did not take {what} ({_reason(error)}); later ones are not reported")

    def _finish(self) -> None:
        self._send(last=True)
        events = self._run_dir / jsonl.EVENTS
        if events.exists():
            self._send_artifact(Artifact(events, None))
        self._client.set_terminated(self.run_id, self._status)

    def _remembered(self) -> str | None:
        """Run id of this directory's run on this server."""
        try:
            return json.loads((self._run_dir / LEDGER).read_text()).get(self.uri)
        except (OSError, ValueError, AttributeError):
            return None

    def _remember(self) -> None:
        path = self._run_dir / LEDGER
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get(self.uri) != self.run_id:
            staged = path.with_suffix(".tmp")
            staged.write_text(json.dumps({**known, self.uri: self.run_id}, indent=1) + "\n")
            staged.replace(path)


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


def how_to_open(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """What a user does to see the page of a run (or, without one, the server's first page)."""
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning" if run_id else ""
    if uri.startswith(("http://", "https://")):
        return f"open {uri.rstrip('/')}{page}"
    return f"mlflow ui --workers 1 --backend-store-uri '{uri}', then open http://127.0.0.1:5000{page}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested recipe as MLflow's parameters: dotted keys, values as text no longer than MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)[:PARAMETER_LENGTH]
    return flat


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a record that MLflow can draw, names in its alphabet."""
    for name, value in record.items():
        if name not in NOT_METRICS and isinstance(value, (int, float)):
            yield BAD_IN_NAME.sub("_", name), float(value)


def _chunks(values: Sequence[Any]) -> Iterable[list[Any]]:
    return (list(values[i : i + VALUES_A_BATCH]) for i in range(0, len(values), VALUES_A_BATCH))


def _artifacts(uri: str, run_dir: Path) -> str | None:
    """Where pictures go: a server knows; for a database they lie beside the run directories."""
    if uri.startswith(("http:", "https:", "file:", "databricks")):
        return None
    return (Path(run_dir).resolve().parent / "mlartifacts").as_uri()


def _attempt(action: Callable[[], None]) -> Exception | None:
    """Do it, and return what went wrong. Only a missing package is not worth another try."""
    try:
        action()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        return error
    return None


def _reason(error: Exception) -> str:
    """What went wrong in a line: the network's own word at the bottom of a chain, else the top's."""
    cause: BaseException = error
    while below := cause.__cause__ or cause.__context__:
        cause = below
    network = isinstance(cause, OSError) or type(cause).__module__.startswith("urllib3")
    text = " ".join(str(cause if network else error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "…"


def _quiet() -> None:
    """Hold back what MLflow's database set-up says about itself."""
    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.ERROR)
