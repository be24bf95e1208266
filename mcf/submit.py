"""A run as a Slurm job, through submitit: the batch script, and handing it in.

    setup      PYTHONPATH=RUN/code; python -m mcf.job run=RUN              do all nodes see the run?
    srun       one task a rank: submitit unpickles mcf.task.Rank
    teardown   python -m mcf.job run=RUN status=$?                         done, or back to the queue

`slurm/pretrain_full.sh` is the same by hand, without submitit.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcf import slurm
from mcf.config import Recipe
from mcf.errors import UserError, missing_package
from mcf.task import JOBS, Rank

if TYPE_CHECKING:
    from submitit import SlurmExecutor


def need_submitit() -> Any:
    """submitit, or UserError where it is missing."""
    try:
        import submitit
        import submitit.helpers
    except ImportError:
        raise missing_package("submitit", "launching") from None
    return submitit


def submit(recipe: Recipe, run_dir: Path, task: Rank) -> str:
    """Hand the run to Slurm; the job's number. Raises UserError, with Slurm's own words, if it is refused."""
    submitit = need_submitit()
    if not slurm.available():
        raise UserError("mode=slurm, but sbatch and srun are not on this machine; use mode=local, or a login node")
    executor = slurm_executor(recipe, run_dir)
    # submitit prints what sbatch says, and raises it: once is enough.
    with _outside_of_a_job(), contextlib.redirect_stderr(io.StringIO()):
        try:
            return str(executor.submit(task).job_id)
        except submitit.core.utils.FailedJobError as error:
            said = (
                " ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines()) or "no reason given"
            )
            raise UserError(f"Slurm refused the job: {said}; see slurm.* in --help") from None


def job_script(recipe: Recipe, run_dir: Path) -> str:
    """The sbatch script that mode=slurm would submit."""
    executor = slurm_executor(recipe, run_dir)
    # submitit's own steps, short of writing the file: there is no public way to see the script.
    return str(executor._make_submission_file_text(executor._submitit_command_str, "plan"))


def slurm_executor(recipe: Recipe, run_dir: Path) -> SlurmExecutor:
    """submitit's executor with what the recipe asks of Slurm."""
    submitit = need_submitit()

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc, name-defined]
        """Does not ask for srun: a script can be shown where there is none."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    asked = recipe.slurm
    around = f"{shlex.quote(sys.executable)} -m mcf.job {shlex.quote(f'run={run_dir}')}"
    # A key of slurm.extra that is asked for anyway takes its place: `gpus-per-node: false` on nodes without GPUs.
    extra = {name.replace("_", "-"): value for name, value in asked.extra.items()}
    parameters = {
        "job_name": recipe.name,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "mem": asked.mem,
        "time": asked.time,
        "nodes": recipe.nodes,
        "ntasks_per_node": recipe.gpus_per_node,
        "gpus_per_node": recipe.gpus_per_node,
        "cpus_per_task": asked.cpus_per_task,
        "signal_delay_s": asked.warn_seconds,
        "stderr_to_stdout": True,
        "additional_parameters": {
            name: value
            for name, value in {"chdir": str(run_dir), "requeue": True, **extra}.items()
            if value is not False
        },
        # A dead rank ends the step: without it the others wait for it until the time limit. srun has not taken the
        # cores of a task over from sbatch since Slurm 22.05.
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", f"--cpus-per-task={asked.cpus_per_task}"],
        "setup": [
            f"export PYTHONPATH={shlex.quote(python_path(run_dir))} SUBMITIT_LOG_LEVEL=ERROR",
            "trap : TERM  # Slurm ends the ranks; this script is still needed then",
            f"{around} || exit",
        ],
        "teardown": [f"{around} status=$?"],
    }
    executor = Executor(run_dir / JOBS)
    executor.update_parameters(
        **{
            name: value
            for name, value in parameters.items()
            if value is not None and name.replace("_", "-") not in extra
        }
    )
    return executor


def python_path(run_dir: Path) -> str:
    """PYTHONPATH of a run's processes: its own copy of the code comes first."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(run_dir / "code"), *([before] if before else [])])


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Submit from within a job as from a login node: its nodes and tasks are not the new job's."""
    before, outside = dict(os.environ), slurm.outside_of_a_job()
    for name in before.keys() - outside:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
