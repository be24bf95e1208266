"""Start a run, or go on with one: `python -m mcf.launch recipe=NAME key=value … mode=local|slurm|print`.

    recipe ──► plan, printed ──► RUN/recipe.yaml, RUN/code (a copy of the code) ──► submitit ──► one task a rank (task.py)

Here (mode=local) the ranks are processes of this machine, two of them train on CPU over gloo; their output is followed
until the end, and ctrl-C lets them save first. On Slurm (mode=slurm, submit.py) they are tasks of a job, and this returns
at once. Launched again under the same name, a run goes on from its last checkpoint.
Imports neither torch nor anything that does: a login node answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field

from mcf import atomic, checkpoint, cli, slurm, snapshot
from mcf.config import Recipe, Section
from mcf.errors import UserError
from mcf.follow import follow_slurm
from mcf.local import directory, run_here
from mcf.lock import RunLock
from mcf.machine import load_machine
from mcf.plan import make_plan
from mcf.submit import job_script, submit
from mcf.task import JOBS, TRAIN, Rank, restarts

RECIPE = "recipe.yaml"


class LaunchConfig(Section):
    """Start a run, or go on with it where it stopped.

    For example: python -m mcf.launch recipe=vit_b_20m data.path=SHARDS teacher.path=moco_v3.pth.tar nodes=4
    """

    mode: Literal["auto", "local", "slurm", "print", "prepare"] = Field(
        "auto",
        description="local: run on this machine; slurm: submit; auto: slurm where there is sbatch, else local; print: only "
        "show plan and job script; prepare: only write the run directory and print its name, for batch scripts",
    )
    follow: bool = Field(False, description="on Slurm: show what the run prints until it has ended, as mcf.follow does")


@cli.main
def main(argv: list[str]) -> int:
    """Launch; exit status 0, or that of the rank that failed first."""
    return launch(argv)


def launch(argv: list[str], command: tuple[str, ...] = TRAIN, grace: float = 10.0) -> int:
    """Launch `command run=RUN_DIR` on every rank; see `main`. After a rank has died the others have `grace` seconds."""
    job = os.environ.get("SLURM_JOB_ID") if "mode=prepare" in argv else None
    if job and (begun := begun_before(job)):
        with RunLock(begun, job) as lock:
            lock.add(slurm_job=job)
        print(begun)
        return 0
    recipe, config = cli.load(argv, LaunchConfig, verb="launch")
    recipe = absolute_paths(recipe)
    mode = ("slurm" if slurm.available() else "local") if config.mode == "auto" else config.mode
    if mode == "local" and recipe.nodes > 1:
        raise UserError(
            f"nodes={recipe.nodes} with mode=local, which is this machine alone; use nodes=1 (and gpus_per_node for the "
            "ranks), or mode=slurm"
        )
    if mode != "print":
        check_inputs(recipe)
    plan = make_plan(recipe, count_samples(recipe), load_machine(recipe.machine))
    # Of mode=prepare a script reads the run directory, and nothing else.
    out = sys.stderr if mode == "prepare" else sys.stdout
    print(*plan.lines(shutil.get_terminal_size().columns if out.isatty() else 1000), sep="\n", file=out)
    why = (
        {"local": " (there is no sbatch on this machine)", "slurm": " (sbatch is there)"}[mode]
        if config.mode == "auto"
        else ""
    )
    print(f"{'mode':<16}{mode}{why}\n", file=out, flush=True)
    run_dir = plan.run_dir
    if mode == "print":
        print(job_script(recipe, run_dir))
        return 0
    checkpoint.make_run_dir(run_dir, JOBS)
    with RunLock(run_dir, job) as lock:
        prepare(run_dir, recipe, out)
        if mode == "prepare":
            if job:
                lock.add(slurm_job=job)
                slurm.set_comment(job, str(run_dir))
            print(run_dir)
            return 0
        task = Rank((*command, f"run={run_dir}"), run_dir, os.environ.get("CUDA_VISIBLE_DEVICES"), grace)
        if mode == "local":
            return run_here(recipe, run_dir, task, lock)
        with directory(run_dir):
            number = submit(recipe, run_dir, task)
        lock.add(slurm_job=number)
    print(
        f"Slurm job {number}: {run_dir}",
        f"  follow  python -m mcf.follow {shlex.quote(f'run={run_dir}')}",
        f"  stop    scancel --signal=INT {number}    (it saves and ends; scancel {number} ends it at once)",
        f"  resume  python -m mcf.launch {shlex.join(argv)}",
        sep="\n",
        flush=True,
    )
    return follow_slurm(number, run_dir) if config.follow else 0


def begun_before(job: str) -> Path | None:
    """Run directory of a job that Slurm starts again; None at its first start.

    It goes on with the code and the recipe that it began with, whatever has become of the files they came from.
    """
    if not restarts(os.environ):
        return None
    run_dir = Path(slurm.comment(job) or ".")
    return run_dir if (run_dir / RECIPE).is_file() and (run_dir / "code").is_dir() else None


# --- before anything starts -----------------------------------------------------------------------------------------


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its paths made absolute: the ranks run in the run directory. URIs stay as they are."""
    track = recipe.track.mlflow
    if track.startswith("sqlite:///") and not track.startswith("sqlite:////"):
        track = "sqlite:///" + _absolute(track.removeprefix("sqlite:///"))
    elif track not in ("local", "off"):
        track = _absolute(track)
    return recipe.model_copy(
        update={
            "output": _absolute(recipe.output),
            "data": recipe.data.model_copy(update={"path": _absolute(recipe.data.path)}),
            "teacher": recipe.teacher.model_copy(update={"path": _absolute(recipe.teacher.path)}),
            "start": recipe.start.model_copy(update={"path": _absolute(recipe.start.path)}),
            "probe": recipe.probe.model_copy(update={"data": _absolute(recipe.probe.data)}),
            "track": recipe.track.model_copy(update={"mlflow": track}),
        }
    )


def _absolute(path: str | None) -> Any:
    if path is None or "://" in path or path.startswith("databricks"):
        return path
    return str(Path(path).expanduser().absolute())


def count_samples(recipe: Recipe) -> int | None:
    """Samples of the packed folder, from its manifest; None if there is none yet."""
    manifest = Path(recipe.data.path or "") / "manifest.json"
    if recipe.data.path is None or not manifest.is_file():
        return None
    try:
        return int(json.loads(manifest.read_text())["samples"])
    except (ValueError, KeyError, TypeError):
        folder = recipe.data.path
        raise UserError(
            f"{manifest}: damaged manifest; restore it, or delete {folder} and pack it again: "
            f"python -m mcf.pack source=IMAGES out={folder}"
        ) from None


def check_inputs(recipe: Recipe) -> None:
    """Raise UserError for data, teacher, start or probed faces that are not where the recipe says; the ranks look closer."""
    data, teacher = recipe.data.path, recipe.teacher
    pack = "pack images with: python -m mcf.pack source=IMAGES out="
    if data is None:
        raise UserError(f"data.path is not set: which folder of packed shards is to be trained on? {pack}FOLDER")
    folder = Path(data)
    if not folder.exists():
        raise UserError(f"data.path={data}: no such folder; {pack}{data}")
    if not folder.is_dir():
        raise UserError(f"data.path={data} is a file; give the folder that mcf.pack wrote, or {pack}FOLDER")
    if not (folder / "manifest.json").is_file():
        # A folder that holds something else is not packed into.
        out = "NEW_FOLDER" if any(folder.iterdir()) else data
        raise UserError(f"data.path={data}: no manifest.json in it; {pack}{out}")
    if recipe.loss.feature and teacher.path and "://" not in teacher.path and not Path(teacher.path).exists():
        raise UserError(f"teacher.path={teacher.path}: no such file; give the file of the teacher's weights")
    begun = checkpoint.steps(
        Path(recipe.output) / recipe.name
    )  # then the start is behind it, whatever became of the file
    if recipe.start.path and not begun and not Path(recipe.start.path).exists():
        raise UserError(f"start.path={recipe.start.path}: no such file; give weights to start from, or leave it out")
    if recipe.probe.every and not Path(recipe.probe.data or "").is_dir():
        raise UserError(f"probe.data={recipe.probe.data}: no such folder; give labelled faces, or set probe.every=0")


def prepare(run_dir: Path, recipe: Recipe, out: TextIO) -> None:
    """Write the resolved recipe and a copy of the code; say what changed since the last launch."""
    file = run_dir / RECIPE
    if file.is_file():
        print(f"going on with {run_dir}", *changes(file, recipe), sep="\n", file=out, flush=True)
    snapshot.take(run_dir)
    atomic.write(file, cli.dump(recipe))


def changes(file: Path, recipe: Recipe) -> list[str]:
    """The keys whose values differ between the recipe of the last launch and this one; the trainer decides on them."""
    try:
        before = cli.flatten(cli.load_recipe([f"recipe={file}"]))
    except UserError as error:
        return [f"  the recipe of the last launch is not readable any more ({error})"]
    now = cli.flatten(recipe)
    return [f"  {key}: {cli.render(before[key])} → {cli.render(now[key])}" for key in now if now[key] != before[key]]


if __name__ == "__main__":
    sys.exit(main())
