"""Who a rank is by whatever started it."""

from __future__ import annotations

import os
import stat

import pytest

from mcf.errors import UserError
from mcf.rendezvous import Rendezvous, launch_name, rendezvous

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "2345"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NTASKS": "9",
    "SLURM_LOCALID": "2",
    "SLURM_JOB_NODELIST": "login",
    "SLURM_STEP_NODELIST": "node7",
}
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "4711",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
}


def test_torchrun():
    assert rendezvous(TORCHRUN) == Rendezvous(3, 8, 1, "node7", 2345)


def test_nothing_is_a_world_of_one():
    assert rendezvous({"PATH": "/bin", "MASTER_ADDR": "elsewhere"}) == Rendezvous(0, 1, 0, None, None)


def test_slurm_step():
    place = rendezvous(SLURM)
    assert (place.rank, place.size, place.local_rank, place.address) == (5, 6, 2, "node7")
    # All ranks of a step agree on the port; two steps of a job do not meet.
    assert place.port == rendezvous(SLURM | {"SLURM_PROCID": "0"}).port
    assert place.port != rendezvous(SLURM | {"SLURM_STEP_ID": "1"}).port
    assert 1024 < place.port < 32768
    told = rendezvous(SLURM | {"MASTER_ADDR": "node9", "MASTER_PORT": "1234"})
    assert (told.address, told.port) == ("node9", 1234)


def test_slurm_of_two_nodes_asks_scontrol(tmp_path, monkeypatch):
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-9]" ] && printf "node7\\nnode8\\nnode9\\n"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    env = SLURM | {"SLURM_STEP_NODELIST": "node[7-9]"}
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert rendezvous(env).address == "node7"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"scontrol cannot tell the first host of node\[7-9\].*MASTER_ADDR"):
        rendezvous(env)


def test_submitit_local():
    place = rendezvous(SUBMITIT)
    assert (place.rank, place.size, place.local_rank, place.address) == (1, 2, 1, "127.0.0.1")
    assert place.port == rendezvous(SUBMITIT | {"SUBMITIT_LOCAL_GLOBALID": "0"}).port
    # Inside an allocation the local executor still decides: Slurm's variables speak of another start.
    assert rendezvous(SLURM | SUBMITIT).size == 2
    assert rendezvous(SLURM | SUBMITIT | TORCHRUN).size == 8


def test_a_launch_has_one_name_on_all_ranks_and_another_when_it_is_started_again():
    for env, rank, again in (
        (TORCHRUN, {"RANK": "0", "LOCAL_RANK": "0"}, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (SLURM, {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, {"SLURM_RESTART_COUNT": "1"}),
        (SUBMITIT, {"SUBMITIT_LOCAL_GLOBALID": "0"}, {"SUBMITIT_LOCAL_JOB_ID": "4712"}),
    ):
        assert launch_name(env) == launch_name(env | rank) != launch_name(env | again)
    # A rank alone was started by nobody; its process is what tells one start from another.
    assert launch_name({"PATH": "/bin"}) == f"process {os.getpid()}"


@pytest.mark.parametrize("name", TORCHRUN)
def test_missing_variable_is_named(name):
    with pytest.raises(UserError, match=f"^{name} is not set.* set it"):
        rendezvous({key: value for key, value in TORCHRUN.items() if key != name})


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is no whole number"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, "SLURM_NTASKS=8 .*start it with srun"),
    ],
)
def test_contradictions_are_told(env, message):
    with pytest.raises(UserError, match=message):
        rendezvous(env)
