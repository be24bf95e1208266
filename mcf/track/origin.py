"""Where a run's numbers come from: code version, host, job, and a description a stranger can read."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from mcf import __version__
from mcf.config import Recipe, TrackConfig

ROOT = Path(__file__).resolve().parents[2]
# A snapshot of the code has no .git: the launcher writes the commit into this file beside it.
SNAPSHOT_VERSION = "VERSION"
NOTE = "mlflow.note.content"  # the description on MLflow's page of a run


class Tracked(Protocol):
    """What tracking must know of a run (a recipe of any verb does)."""

    @property
    def name(self) -> str:
        """Name of the run."""

    @property
    def batch(self) -> int:
        """Samples of a step."""

    @property
    def track(self) -> TrackConfig:
        """Where numbers go."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """All keys, as plain values."""

    def is_of_the_launch(self, key: str) -> bool:
        """Whether a dotted key says how a run is run, and not what it computes."""


@cache
def code_version() -> str:
    """Commit of the running code, with "+changes" if the working tree had any; "" where nothing tells."""
    with contextlib.suppress(OSError):
        return (ROOT / SNAPSHOT_VERSION).read_text().strip()
    if not (ROOT / ".git").exists():
        return ""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def tags(run_dir: Path, description: str) -> dict[str, str]:
    """MLflow's tags of a run: those that its page shows by themselves, and ours under `mcf.`."""
    commit, _, changes = code_version().partition("+")
    found = {
        NOTE: description,
        "mlflow.source.name": "mcf.train",
        "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
        "mlflow.source.git.commit": commit,
        "mcf.version": __version__,
        "mcf.code": code_version() if changes else "",
        "mcf.host": socket.gethostname(),
        "mcf.run_dir": str(Path(run_dir).resolve()),
        "mcf.slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }
    with contextlib.suppress(Exception):  # a container's user may have no name
        found["mlflow.user"] = getpass.getuser()
    return {name: value for name, value in found.items() if value}


def describe(recipe: Tracked, plan: Any, run_dir: Path) -> str:
    """Markdown for MLflow's description of a pre-training run: what is trained, on what, how long, how to read the charts."""
    if not isinstance(recipe, Recipe):
        return ""
    model, steps, lr = recipe.model, plan_value(plan, "steps"), plan_value(plan, "lr")
    terms = [
        f"{weight:g}·{name}"
        for name, weight in (
            ("feature", recipe.loss.feature),
            ("contrast", recipe.loss.contrast),
            ("pixel", recipe.loss.pixel),
        )
        if weight
    ]
    length = f"{steps:,} steps" if steps else f"{recipe.train.steps or f'{recipe.train.epochs:g} epochs'}"
    lines = [
        "Pre-training of a face encoder (Mask Contrastive Face).",
        "",
        f"* **Encoder**: ViT, {model.depth} blocks of width {model.width}, patches of {model.patch_size} on "
        f"{model.image_size}², {recipe.mask.ratio:.0%} of them masked; decoder of {model.decoder.depth} blocks",
        f"* **Teacher**: {recipe.teacher.source}" + (f" (`{recipe.teacher.path}`)" if recipe.teacher.path else ""),
        f"* **Loss**: {' + '.join(terms)}; `loss/total` is this sum, the other `loss/` charts are its unweighted terms",
        f"* **Data**: `{recipe.data.path}`",
        f"* **Length**: {length}, batch {recipe.batch:,}" + (f", peak learning rate {lr:.3g}" if lr else ""),
        f"* **Run directory**: `{Path(run_dir).resolve()}`: `metrics.jsonl` there holds every number shown here",
        "",
        "Pictures of reconstructions are among the artifacts, in `images`.",
    ]
    return "\n".join(lines)


def plan_value(plan: Any, name: str) -> Any:
    """A field of a plan, which is an object, a mapping or None."""
    return plan.get(name) if isinstance(plan, Mapping) else getattr(plan, name, None)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        env=_git_environment(),
    )
    return done.stdout.strip()


def _git_environment() -> dict[str, str]:
    """Without optional locks: `git status` must not disturb a working tree that somebody is using."""
    return {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
