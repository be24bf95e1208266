"""Start a run, or go on with one: `python -m mcf.launch recipe=NAME key=value … mode=local|slurm|print`.

    recipe ──► plan, printed ──► RUN/recipe.yaml, RUN/code (a copy of the code) ──► submitit ──► one task a rank (task.py)

Here (mode=local) the ranks are processes of this machine, two of them train on CPU over gloo; their output is followed
until the end, and ctrl-C lets them save first. Launched again under the same name, a run goes on from its last checkpoint.
Imports neither torch nor anything that does: a login node answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mcf import cli, snapshot
from mcf.config import Recipe, Section
from mcf.errors import UserError, missing_package
from mcf.follow import Stop, follow
from mcf.lock import RunLock
from mcf.machine import load_machine
from mcf.plan import make_plan
from mcf.task import Rank

if TYPE_CHECKING:
    from submitit import SlurmExecutor

TRAIN = (sys.executable, "-u", "-m", "mcf.train")
RECIPE = "recipe.yaml"
JOBS = "jobs"
YEAR = 366 * 24 * 60  # minutes: a local job has no time limit, but submitit wants one


class LaunchConfig(Section):
    """Start a run, or go on with it where it stopped.

    For example: python -m mcf.launch recipe=vit_b_20m data.path=SHARDS teacher.path=moco_v3.pth.tar nodes=4
    """

    mode: Literal["local", "slurm", "print"] | None = Field(
        None,
        description="run on this machine, submit to Slurm, or only show plan and job script; default: slurm where there is "
        "sbatch, else local",
    )


@cli.main
def main(argv: list[str]) -> int:
    """Launch; exit status 0, or that of the rank that failed first."""
    return launch(argv)


def launch(argv: list[str], command: tuple[str, ...] = TRAIN, grace: float = 10.0) -> int:
    """Launch `command run=RUN_DIR` on every rank; see `main`. After a rank has died the others have `grace` seconds."""
    recipe, config = cli.load(argv, LaunchConfig, verb="launch")
    recipe = absolute_paths(recipe)
    mode = config.mode or ("slurm" if shutil.which("sbatch") else "local")
    if mode == "local" and recipe.nodes > 1:
        raise UserError(
            f"nodes={recipe.nodes} with mode=local, which is this machine alone; use nodes=1 (and gpus_per_node for the "
            "ranks), or mode=slurm"
        )
    if mode != "print":
        check_inputs(recipe)
    plan = make_plan(recipe, count_samples(recipe), load_machine(recipe.machine))
    print(*plan.lines(shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000), sep="\n")
    why = "" if config.mode else " (there is no sbatch on this machine)" if mode == "local" else " (sbatch is there)"
    print(f"{'mode':<16}{mode}{why}\n", flush=True)
    if mode == "print":
        print(job_script(recipe, plan.run_dir))
        return 0
    make_folder(plan.run_dir)
    with RunLock(plan.run_dir) as lock:
        prepare(plan.run_dir, recipe)
        task = Rank(
            (*command, f"run={plan.run_dir}"), plan.run_dir / JOBS, os.environ.get("CUDA_VISIBLE_DEVICES"), grace
        )
        return (run_here if mode == "local" else submit)(recipe, plan.run_dir, task, lock)


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
    """Raise UserError for data or teacher that are not where the recipe says; the ranks look closer."""
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


def make_folder(run_dir: Path) -> None:
    """Make the run directory."""
    try:
        (run_dir / JOBS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={run_dir.parent}: {run_dir} cannot be made ({error.strerror}); set output=") from None


def prepare(run_dir: Path, recipe: Recipe) -> None:
    """Write the resolved recipe and a copy of the code; say what changed since the last launch."""
    file = run_dir / RECIPE
    if file.is_file():
        print(f"going on with {run_dir}")
        for line in changes(file, recipe):
            print(line)
    snapshot.take(run_dir)
    staged = file.with_suffix(".tmp")
    staged.write_text(cli.dump(recipe))
    staged.replace(file)


def changes(file: Path, recipe: Recipe) -> list[str]:
    """The keys whose values differ between the recipe of the last launch and this one; the trainer decides on them."""
    try:
        before = cli.flatten(cli.load_recipe([f"recipe={file}"]))
    except UserError as error:
        return [f"  the recipe of the last launch is not readable any more ({error})"]
    now = cli.flatten(recipe)
    return [f"  {key}: {cli.render(before[key])} → {cli.render(now[key])}" for key in now if now[key] != before[key]]


# --- this machine ---------------------------------------------------------------------------------------------------


def run_here(recipe: Recipe, run_dir: Path, task: Rank, lock: RunLock) -> int:
    """Run all ranks on this machine and follow rank 0; the exit status of the run."""
    submitit = _submitit()
    jobs = run_dir / JOBS
    executor = submitit.LocalExecutor(jobs)
    executor.update_parameters(tasks_per_node=recipe.gpus_per_node, timeout_min=YEAR, stderr_to_stdout=True)
    variables = {
        "PYTHONPATH": _python_path(run_dir),
        "MASTER_PORT": str(_free_port()),
        "SUBMITIT_LOG_LEVEL": "ERROR",
    }
    with Stop(jobs, patience=recipe.slurm.warn_seconds) as stop:
        # In the run directory no `mcf` of the current directory hides the copy; SIGINT is the launcher's alone.
        with submitit.helpers.clean_env(), _environment(variables), _directory(run_dir), _ignoring(signal.SIGINT):
            job = executor.submit(task)
        lock.add(pid=int(job.job_id))
        return follow(job, jobs, run_dir, stop)


def _free_port() -> int:
    """A port to meet at, below Linux's dynamic ports (32768 on) so that no outgoing connection takes it."""
    for _ in range(100):
        port = random.SystemRandom().randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no free port between 20000 and 32000 on this machine; stop what holds them")


# --- Slurm ----------------------------------------------------------------------------------------------------------


def submit(recipe: Recipe, run_dir: Path, task: Rank, lock: RunLock) -> int:
    """Hand the run to Slurm, and say where to look."""
    submitit = _submitit()
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("mode=slurm, but sbatch and srun are not on this machine; use mode=local, or a login node")
    executor = slurm_executor(recipe, run_dir)
    with submitit.helpers.clean_env(), _directory(run_dir):
        try:
            job = executor.submit(task)
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch refused the job: {error}; see slurm.* in --help") from None
    lock.add(slurm_job=job.job_id)
    print(f"Slurm job {job.job_id}; follow it with: tail -F {job.paths.stdout}", flush=True)
    return 0


def job_script(recipe: Recipe, run_dir: Path) -> str:
    """The sbatch script that mode=slurm would submit."""
    executor = slurm_executor(recipe, run_dir)
    # submitit's own steps, short of writing the file: there is no public way to see the script.
    return str(executor._make_submission_file_text(executor._submitit_command_str, "plan"))


def slurm_executor(recipe: Recipe, run_dir: Path) -> SlurmExecutor:
    """submitit's executor with what the recipe asks of Slurm."""
    submitit = _submitit()

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc, name-defined]
        """Does not ask for srun: a script can be shown where there is none."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    slurm = recipe.slurm
    asked = {
        "job_name": recipe.name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "mem": slurm.mem,
        "time": slurm.time,
        "nodes": recipe.nodes,
        "ntasks_per_node": recipe.gpus_per_node,
        "gpus_per_node": recipe.gpus_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "signal_delay_s": slurm.warn_seconds,
        "stderr_to_stdout": True,
        "additional_parameters": {"chdir": str(run_dir), **{k: v for k, v in slurm.extra.items() if v is not False}},
        # Without it the others wait for a dead rank until the time limit.
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": [f"export PYTHONPATH={shlex.quote(_python_path(run_dir))}", "export SUBMITIT_LOG_LEVEL=ERROR"],
    }
    executor = Executor(run_dir / JOBS, max_num_timeout=slurm.max_requeues)
    executor.update_parameters(**{name: value for name, value in asked.items() if value is not None})
    return executor


# --- surroundings ---------------------------------------------------------------------------------------------------


def _submitit() -> Any:
    try:
        import submitit
        import submitit.helpers
    except ImportError:
        raise missing_package("submitit", "launching") from None
    return submitit


def _python_path(run_dir: Path) -> str:
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(run_dir / "code"), *([before] if before else [])])


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    """Children that start here ignore the signal."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


if __name__ == "__main__":
    sys.exit(main())
