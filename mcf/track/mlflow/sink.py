"""MLflow, fed from a thread of its own: a server that is down, slow or full costs training nothing.

    metrics() ── bounded queue ──► thread ── log_batch, log_artifact ──► MLflow
                     └ full: the oldest record falls out; metrics.jsonl has it

The thread connects, then sends what the queue holds. What fails is tried again, with longer and longer pauses, until
the run ends; meanwhile the queue keeps the newest `track.queue` records. Every batch carries the tag `mcf.step`, the
last step that the server has: when the server is back, or a killed run goes on, all that lies between is read from
metrics.jsonl, and a step that the server has already is not sent twice.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mcf.errors import missing_package
from mcf.track import jsonl
from mcf.track.mlflow.run import STEP_TAG, MLflowRun
from mcf.track.mlflow.server import ENVIRONMENT, hold_back_logs, how_to_open, reason, tracking_uri
from mcf.track.origin import Tracked

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries, doubling
PATIENCE = 10.0  # seconds the end of a run waits for the last records
GATHER = 0.5  # seconds the thread waits after a record, to send several at once

ITEMS_A_TURN = 50  # records taken from the queue at once

METRICS_A_BATCH = 900  # MLflow's limit of one request
BAD_IN_NAME = re.compile(r"[^\w .:/-]", re.ASCII)
NOT_METRICS = {"step", "samples", "time"}


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
        self.dropped = 0  # items that fell out of the queue
        self.refused = 0  # items that the server would never take
        self._run_dir = Path(run_dir)
        self._run = MLflowRun(recipe, self._run_dir, self.uri, description=description, run_id=run_id, start=start)
        self._longest = recipe.track.queue  # records and files that the queue holds
        self._tell = tell
        self._queue: deque[dict[str, Any] | Artifact] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._client: Any = None
        self._known = -1  # last step that the server had when this process connected
        self._sent = -1  # last step that it has now
        self._gap = True  # whether metrics.jsonl may hold steps after `_sent` that are not in the queue
        self._away = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run; None before the server has answered, where no checkpoint named it."""
        return self._run.id

    @property
    def how_to_open(self) -> str:
        """What a user does to see this run's page."""
        experiment = self._run.experiment_id
        return how_to_open(self.uri, experiment, self.run_id if experiment else None)

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
            if len(self._queue) >= self._longest:
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
            self._tell(f"MLflow tracking ended ({reason(error)}); {jsonl.METRICS} has everything")

    def _insist(self, action: Callable[[], None]) -> None:
        """Do it until it succeeds or the run ends; say once that the server is away, and once that it is back."""
        pause = FIRST_PAUSE
        while (error := _attempt(action)) is not None:
            if not self._away:
                self._away = True
                self._tell(
                    f"MLflow at {self.uri} fails ({reason(error)}); training goes on, {jsonl.METRICS} has "
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

        hold_back_logs()
        self._client = MlflowClient(tracking_uri=self.uri)
        self._known = self._sent = self._run.open(self._client, again=self._away)
        if name := self._run.recipe_file:
            text = self._run.recipe_yaml()
            self._upload(lambda: self._client.log_text(self.run_id, text, name), name)
            self._run.recipe_file = None

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
            self._upload(lambda: self._client.log_artifact(self.run_id, str(item.path), item.folder), item.path.name)

    def _upload(self, upload: Callable[[], None], what: str) -> None:
        """Upload a file. Numbers never wait for files: what fails while the server answers is given up."""
        try:
            upload()
        except Exception as error:
            self._client.get_run(self.run_id)  # raises where the server itself is away: then both are tried again
            self._refuse(what, error)

    def _refuse(self, what: str, error: Exception) -> None:
        """Say the first time that something was not taken, and why."""
        self.refused += 1
        if self.refused == 1:
            self._tell(f"MLflow at {self.uri} did not take {what} ({reason(error)}); later ones are not reported")

    def _finish(self) -> None:
        self._send(last=True)
        events = self._run_dir / jsonl.EVENTS
        if events.exists():
            self._send_artifact(Artifact(events, None))
        self._client.set_terminated(self.run_id, self._status)


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a record that MLflow can draw, names in its alphabet."""
    for name, value in record.items():
        if name not in NOT_METRICS and isinstance(value, (int, float)):
            yield BAD_IN_NAME.sub("_", name), float(value)


def _attempt(action: Callable[[], None]) -> Exception | None:
    """Do it, and return what went wrong. Only a missing package is not worth another try."""
    try:
        action()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        return error
    return None
