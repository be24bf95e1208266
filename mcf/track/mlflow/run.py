"""Which MLflow run a training run is: found again or made, and described.

`mlflow.json` in the run directory remembers which MLflow run belongs to which server, so that one training run is one
MLflow run across restarts; a checkpoint names it too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcf import atomic
from mcf.track.mlflow.server import artifact_location
from mcf.track.origin import NOTE, Tracked, tags

LEDGER = "mlflow.json"
STEP_TAG = "mcf.step"

# MLflow's limits of one request, and of one value
VALUES_A_BATCH = 100
PARAMETER_LENGTH = 6000
TAG_LENGTH = 5000

# Without the kind, MLflow's page takes an experiment without models for one about language models.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE: "Face encoders (Mask Contrastive Face): one run is one training run.",
}


class MLflowRun:
    """The MLflow run of a training run on one server.

    `run_id` is what a checkpoint names, `start` the steps done when this process began (0: from scratch, so that a changed
    recipe makes a new MLflow run).

    id, experiment_id: MLflow's, once `open` has succeeded (id may be a checkpoint's before). recipe_file: the name
    under which the server is still to get the recipe, None where it has it.
    """

    def __init__(
        self, recipe: Tracked, run_dir: Path, uri: str, *, description: str, run_id: str | None, start: int | None
    ):
        self.id = run_id
        self.experiment_id: str | None = None
        self.recipe_file: str | None = None
        self._recipe = recipe
        self._run_dir = run_dir
        self._uri = uri
        self._description = description
        self._start = start
        self._opened = time.time()

    def open(self, client: Any, *, again: bool) -> int:
        """Find the run or make it, and describe it. The last step that the server has of it; −1 for none.

        `again`: an earlier try failed, whose answer may have come too late only. Raises what MLflow raises.
        """
        run = self._reopen(client) or self._create(client, again)
        self.id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self._remember()
        self._describe(client, run)
        return int(run.data.tags.get(STEP_TAG, -1))

    def recipe_yaml(self) -> str:
        """The recipe, as a file that would start this run."""
        import yaml

        return yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False)

    def _reopen(self, client: Any) -> Any:
        """The MLflow run of this training run, or None if this server has none."""
        from mlflow.exceptions import MlflowException

        for run_id in dict.fromkeys(filter(None, (self._remembered(), self.id))):
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    raise
                continue
            another = self._start == 0 and any(not self._recipe.is_of_the_launch(key) for key in self._changed(run))
            if run.info.lifecycle_stage == "active" and not another:
                client.update_run(run_id, status="RUNNING")
                return run
        return None

    def _create(self, client: Any, again: bool) -> Any:
        from mlflow.exceptions import MlflowException

        name = self._recipe.track.experiment
        if client.get_experiment_by_name(name) is None:
            try:
                client.create_experiment(name, artifact_location(self._uri, self._run_dir), tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was quicker
                    raise
        experiment_id = client.get_experiment_by_name(name).experiment_id
        start_time = int(self._opened * 1000)
        if again:  # a slow server may have made the run although the answer came too late
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
        """Parameters and tags; MLflow's parameters are for ever, so a changed one becomes a tag."""
        from mlflow.entities import Param, RunTag

        run_id, there = run.info.run_id, run.data.params
        values = flatten(self._recipe.model_dump(mode="json"))
        changed = self._changed(run)
        if changed or not there:
            step = run.data.tags.get(STEP_TAG)
            self.recipe_file = f"recipe-after-step-{step}.yaml" if step else "recipe.yaml"
        notes = {f"mcf.changed.{key}": f"{there[key]} → {value}"[:TAG_LENGTH] for key, value in changed.items()}
        for chunk in _chunks([Param(key, value) for key, value in values.items() if key not in there]):
            client.log_batch(run_id, params=chunk)
        notes |= tags(self._run_dir, self._description)
        if NOTE in run.data.tags:  # somebody may have edited it on the page
            notes.pop(NOTE, None)
        for chunk in _chunks([RunTag(key, value) for key, value in notes.items()]):
            client.log_batch(run_id, tags=chunk)

    def _changed(self, run: Any) -> dict[str, str]:
        """Recipe keys whose value is not the one that the MLflow run has, with the value they have now."""
        there = run.data.params
        values = flatten(self._recipe.model_dump(mode="json"))
        return {key: value for key, value in values.items() if there.get(key, value) != value}

    def _remembered(self) -> str | None:
        """Run id of this directory's run on this server."""
        try:
            return json.loads((self._run_dir / LEDGER).read_text()).get(self._uri)
        except (OSError, ValueError, AttributeError):
            return None

    def _remember(self) -> None:
        path = self._run_dir / LEDGER
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get(self._uri) != self.id:
            atomic.write(path, json.dumps({**known, self._uri: self.id}, indent=1) + "\n")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested recipe as MLflow's parameters: dotted keys, values as text no longer than MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)[:PARAMETER_LENGTH]
    return flat


def _chunks(values: Sequence[Any]) -> Iterable[list[Any]]:
    return (list(values[i : i + VALUES_A_BATCH]) for i in range(0, len(values), VALUES_A_BATCH))
