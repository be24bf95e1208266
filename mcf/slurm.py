"""What Slurm says of a job and what it is asked to do, through its own commands (squeue, scontrol).

Only the commands are asked: they are on every login and compute node, and accounting (sacct) is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

from mcf.errors import UserError

PATIENCE = 60.0  # seconds for one answer: a busy controller may take that long
# What begins so in the environment of a job describes that job; where Slurm's configuration lies is no such thing.
_OF_A_JOB = ("SLURM", "SRUN_", "SBATCH_", "SUBMITIT_", "PMI")
_KEPT = ("SLURM_CONF",)
RETRY = 5.0  # seconds between two tries to reach a controller


class NoAnswer(Exception):
    """Slurm's controller does not answer, or its commands are not on this machine: one line."""


def available() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def state(job: str) -> str:
    """State of a job that waits or runs ("pending", "running", "completing", …); "" if it is over or unknown to Slurm.

    Raises NoAnswer.
    """
    return standing(job).partition(" ")[0]


def standing(job: str) -> str:
    """The state, and why the job waits or where it runs: "pending (Priority)", "running n[1-2]"; "" if it is over.

    Raises NoAnswer.
    """
    done = _run("squeue", "--noheader", f"--jobs={job}", "--format=%T %R")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise NoAnswer(_last_line(done.stderr))
    state, _, more = done.stdout.strip().partition(" ")
    return f"{state.lower()} {more}".strip()


def show(job: str) -> dict[str, str]:
    """Fields of a job by Slurm's names (JobState, Reason, Restarts, ExitCode, …); {} where Slurm has forgotten it.

    Raises NoAnswer.
    """
    done = _run("scontrol", "show", "job", job, "--oneliner")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise NoAnswer(_last_line(done.stderr))
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))


def sbatch(script: str, *arguments: str) -> str:
    """Submit a batch script, from within a job as from a login node; the new job's number.

    Raises UserError, with Slurm's own words if it refuses.
    """
    if not available():
        raise UserError("sbatch and srun are not on this machine; use mode=print, or a login node")
    try:
        done = _run("sbatch", "--parsable", *arguments, given=script, environment=outside_of_a_job())
    except NoAnswer as error:
        raise UserError(f"Slurm took no job: {error}; try again") from None
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines())
        raise UserError(f"Slurm refused the job: {said or 'no reason given'}; see slurm.* in --help")
    return done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER


def outside_of_a_job() -> dict[str, str]:
    """This process's environment without what describes the job that it runs in."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_OF_A_JOB)}


def requeue(job: str, patience: float = 1800.0) -> None:
    """Send a job back to the queue; Slurm ends it, this process included.

    A controller that is down is waited for, `patience` seconds. Raises UserError with Slurm's own words if it refuses.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            done = _run("scontrol", "requeue", job)
            said = _last_line(done.stderr)
            if done.returncode == 0:
                return
            if not re.search(r"[Uu]nable to contact|[Cc]ommunication|[Tt]imed out|[Tt]ry again", said):
                raise UserError(f"scontrol requeue {job}: {said}; launch again to go on")
        except NoAnswer as error:
            said = str(error)
        if time.monotonic() > deadline:
            raise UserError(f"scontrol requeue {job}: {said}; launch again to go on")
        time.sleep(RETRY)


def comment(job: str) -> str:
    """The comment that a job carries; "" if it has none or Slurm does not answer."""
    try:
        said = _run("squeue", "--noheader", f"--jobs={job}", "--format=%k").stdout.strip()
    except NoAnswer:
        return ""
    return "" if said == "(null)" else said


def set_comment(job: str, text: str) -> bool:
    """Have a job carry a comment, which squeue shows (%k); whether Slurm took it."""
    try:
        return _run("scontrol", "update", f"JobId={job}", f"Comment={text}").returncode == 0
    except NoAnswer:
        return False


def _run(
    *command: str, given: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise NoAnswer(f"{command[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} had no answer for {PATIENCE:.0f} s") from None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no answer"
