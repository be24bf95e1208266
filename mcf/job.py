"""What the batch script of a Slurm job does before and after srun, once a start of the job.

    python -m mcf.job run=RUN             do all nodes see the run? Its ranks' statuses of an earlier start are removed
    srun … one task a rank (task.py)
    python -m mcf.job run=RUN status=$?   done, hopeless, or back to the queue

Back to the queue go runs that were told to stop and saved (Slurm's warning before the time limit, preemption), and runs
of which a rank died, whatever killed it: with a cap (slurm.max_requeues), and not for ever where nothing is gained.
What a user has to mend, a run that is done, and one that a user has stopped, stay.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from mcf import cli, slurm
from mcf.config import Recipe, Section
from mcf.ending import TOLD, describe_end, finished, first_to_fail, has_told, newest_step, told
from mcf.errors import UserError
from mcf.exits import SAVED, USER_ERROR
from mcf.output import ERROR
from mcf.settings import read_recipe, validate
from mcf.task import JOBS, read_statuses, restarts
from mcf.track.jsonl import EVENTS, Writer, read

IN_VAIN = 3  # failures in a row without a new checkpoint, after which the job is not tried again


class JobConfig(Section):
    """What a batch script does around srun: without status before it, with srun's exit status after it."""

    run: str = Field(description="run directory")
    status: int | None = Field(None, description="exit status of srun")


@cli.main
def main(argv: list[str]) -> int:
    """Begin or end a start of the job; the exit status that the batch script has to end with."""
    config = cli.parse(JobConfig, argv, verb="job")
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("SLURM_JOB_ID is not set: this is no Slurm job; start runs with python -m mcf.launch")
    if config.status is None:
        return begin(Path(config.run), os.environ)
    return end(Path(config.run), config.status, os.environ)


def begin(run_dir: Path, env: Mapping[str, str]) -> int:
    """Prepare one start of the job. Raises UserError if a node does not see the run directory, or Python."""
    for path in (run_dir / JOBS).glob(f"{env['SLURM_JOB_ID']}_*_status.json"):
        path.unlink()
    if blind := blind_nodes(int(env["SLURM_JOB_NUM_NODES"]), run_dir, Path(sys.executable)):
        raise UserError(
            f"not all nodes see {run_dir} and {sys.executable}: {', '.join(blind)} does not; both must lie on a file "
            "system that every node mounts: set output=, or keep these nodes out with slurm.extra.exclude="
        )
    return 0


def blind_nodes(nodes: int, run_dir: Path, python: Path) -> list[str]:
    """Names of the job's nodes that do not see the run directory or the interpreter; [] where srun cannot find out.

    A node that fails just then is a failure like any other, which the ranks' own srun meets next.
    """
    if nodes == 1:
        return []  # this very process sees them
    look = 'test -r "$0/recipe.yaml" && test -w "$0" && test -x "$1" || echo "$SLURMD_NODENAME"'
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1", "--chdir=/"]
    done = subprocess.run([*step, "sh", "-c", look, str(run_dir), str(python)], capture_output=True, text=True)
    if done.returncode:
        print(f"what the nodes see is not known: {done.stderr.strip() or done.returncode}", flush=True)
        return []
    return sorted(done.stdout.split())


def end(run_dir: Path, status: int, env: Mapping[str, str]) -> int:
    """End one start of the job: send it back to the queue, or leave with its exit status."""
    job, start = env["SLURM_JOB_ID"], restarts(env)
    statuses = read_statuses(run_dir / JOBS, job)
    saved = status == 0 and any(s.code == SAVED for s in statuses)
    if status == 0 and not saved:
        return 0
    if status == USER_ERROR and not any(s.code for s in statuses):
        return USER_ERROR  # which no rank could write down: a full disk
    first = first_to_fail(statuses)
    why = "saved" if saved else f"srun ended with status {status}"
    if not saved and first is not None:
        said = told(run_dir / JOBS / f"{job}_{first.rank}_log.out") if first.code in TOLD else ""
        if first.code == USER_ERROR:
            # The rank has said what is to be done; here, too, where rank 0 has not.
            if said and not has_told(run_dir / JOBS / f"{job}_0_log.out", said):
                print(f"{said} (rank {first.rank})", flush=True)
            return USER_ERROR
        if first.code == -signal.SIGINT:
            return status  # asked to end before it could save
        why = said.removeprefix(ERROR) or describe_end(first)[0]
    if not saved and (step := finished(run_dir, statuses)):
        print(f"{why}, but after the run's last step, {step}, was saved: it is done", flush=True)
        return 0
    # Told to stop before it could listen (Python takes a while to start): no fault of the run's.
    failed = not saved and not (first and first.code in (-signal.SIGUSR2, -signal.SIGTERM))
    if reason := _left_alone(job, start):
        print(f"{why}; {reason}", flush=True)
        return status
    step = newest_step(run_dir)
    if refusal := _refusal(run_dir, job, failed, start, step):
        raise UserError(f"{why}; {refusal}")
    print(f"{why}; job {job} goes back to the queue, to go on from step {step}", flush=True)
    _note(run_dir, {"job": job, "start": start, "why": why, "failed": failed, "step": step})
    slurm.requeue(job)
    time.sleep(60)  # Slurm ends this process
    return 0


def _left_alone(job: str, start: int) -> str:
    """Why the job is not to be touched; "" if it is this start's and runs, or has come to its time limit."""
    deadline = time.monotonic() + 1800
    while True:
        try:
            found = slurm.show(job)
            break
        except slurm.NoAnswer as error:
            if time.monotonic() > deadline:
                return f"Slurm does not answer ({error}): launch again to go on"
            print(f"Slurm does not answer ({error}); asked again until it does", flush=True)
            time.sleep(slurm.RETRY)
    if int(found.get("Restarts", start)) != start:
        return "a later start of this job goes on"
    if found.get("JobState") == "RUNNING" or found.get("Reason") == "TimeLimit":
        return ""
    return "Slurm has ended this start of the job, or requeues it itself"


def _refusal(run_dir: Path, job: str, failed: bool, start: int, step: int) -> str:
    """Why the job does not go back to the queue, and what to do; "" if it does."""
    # Without the checks across keys, which the launcher has made: they are of pre-training, and this may be fine-tuning.
    most = validate(Recipe, read_recipe(str(run_dir / "recipe.yaml")), "job").slurm.max_requeues
    if start >= most:
        return f"not requeued again: slurm.max_requeues={most}; launch again to go on from step {step}"
    if not failed:
        return ""
    ours = [event for event in read(run_dir / EVENTS) if event["kind"] == "requeued" and event.get("job") == job]
    in_vain = [event for event in ours[-(IN_VAIN - 1) :] if event["failed"] and event["step"] == step]
    if len(in_vain) == IN_VAIN - 1:
        return f"not requeued: it failed {IN_VAIN} times in a row at step {step} without a new checkpoint; see {run_dir / JOBS}"
    return ""


def _note(run_dir: Path, fields: dict) -> None:
    """Add an event; a disk that refuses it does not keep a run from going on."""
    try:
        writer = Writer(run_dir / EVENTS)
        writer.append({"kind": "requeued", "time": time.time(), **fields})
        writer.close()
    except OSError as error:
        print(f"events.jsonl: {error.strerror}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
