"""Which rank this process is and where the ranks meet, as whoever started it says: torchrun, submitit, a Slurm step, nobody."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from mcf.errors import UserError

# Dynamic ports of Linux start at 32768: below it no outgoing connection of somebody else sits on ours by chance.
PORTS = (20_000, 32_000)


@dataclass(frozen=True)
class Rendezvous:
    """What the environment says: where this rank stands and where the ranks meet (None for a world of one)."""

    rank: int
    size: int
    local_rank: int
    address: str | None
    port: int | None


def rendezvous(env: Mapping[str, str]) -> Rendezvous:
    """Read rank and meeting point from torchrun's variables, submitit's local ones, a Slurm step's, or none.

    Raises:
        UserError: a variable is missing or no number, or a Slurm batch script started us without srun.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        kind = "torchrun"
    elif env.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in env:
        names = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
        kind = "submitit"
    elif "SLURM_PROCID" in env:
        if "SLURM_STEP_ID" not in env and env.get("SLURM_NTASKS", "1") != "1":
            raise UserError(
                f"this is a Slurm job of SLURM_NTASKS={env['SLURM_NTASKS']} tasks, but only this process was started: "
                "start it with srun, one process a task"
            )
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
        kind = "slurm"
    else:
        return Rendezvous(0, 1, 0, None, None)

    rank, size, local_rank = (_number(env, name) for name in names)
    if not 0 <= rank < size:
        raise UserError(f"{names[0]}={rank} is not below {names[1]}={size}")
    if size == 1:
        return Rendezvous(rank, size, local_rank, env.get("MASTER_ADDR"), None)
    address = env.get("MASTER_ADDR") or _address(env, kind)
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else _port(env, kind)
    return Rendezvous(rank, size, local_rank, address, port)


def launch_name(env: Mapping[str, str]) -> str:
    """A name of this start of the ranks: the same on all of them, another one when they are started again.

    Where the ranks meet, and which job of Slurm or torchrun they are, the restarts counted.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "SUBMITIT_LOCAL_JOB_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
             "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")  # fmt: skip
    said = "/".join(env.get(name, "") for name in names)
    return said if any(env.get(name) for name in names) else f"process {os.getpid()}"


def _number(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise UserError(f"{name} is not set, but other variables of a distributed start are; set it, or unset them all")
    try:
        return int(env[name])
    except ValueError:
        raise UserError(f"{name}={env[name]!r} is no whole number") from None


def _address(env: Mapping[str, str], kind: str) -> str:
    """Host of rank 0: the first of the job's nodes."""
    if kind == "submitit":
        return "127.0.0.1"
    if kind == "torchrun":
        raise UserError("MASTER_ADDR is not set, but WORLD_SIZE is above 1; set it to the host of rank 0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not nodes:
        raise UserError("SLURM_JOB_NODELIST is not set, so the host of rank 0 is unknown; set MASTER_ADDR to it")
    if not set(nodes) & set("[,"):
        return nodes
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol cannot tell the first host of {nodes} ({error}); set MASTER_ADDR to it") from None
    if done.returncode or not done.stdout.split():
        raise UserError(f"scontrol cannot tell the first host of {nodes} ({done.stderr}); set MASTER_ADDR to it")
    return done.stdout.split()[0]


def _port(env: Mapping[str, str], kind: str) -> int:
    """A port that all ranks of a job agree on without talking: drawn from the job's (and step's) number."""
    if kind == "torchrun":
        raise UserError("MASTER_PORT is not set, but WORLD_SIZE is above 1; set it to a free port of MASTER_ADDR")
    names = ("SUBMITIT_LOCAL_JOB_ID",) if kind == "submitit" else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return random.Random("/".join(env.get(name, "") for name in names)).randrange(*PORTS)
