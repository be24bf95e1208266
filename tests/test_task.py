"""A rank's task: what Slurm and submitit tell it, whose run it is, and the signals that reach a trainer twice."""

import json
import multiprocessing
import os
import signal
import sys
import time

import psutil
import pytest

from mcf import lock, task
from mcf.errors import UserError
from mcf.stop import AGAIN, StopSignal

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "4711",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
}


# --- where it stands ----------------------------------------------------------------------------------------------


def test_a_slurm_step():
    here = task.place(STEP)
    assert (here.job, here.start, here.rank, here.local) == ("77", 0, 5, False)
    port = here.environment.pop("MASTER_PORT")
    assert here.environment == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7"}
    assert 20_000 <= int(port) < 32_000
    # All ranks meet at one port; a later start does not meet what a former one has left behind.
    assert task.place(STEP | {"SLURM_PROCID": "0"}).environment["MASTER_PORT"] == port
    again = task.place(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert again.start == 1
    assert again.environment["MASTER_PORT"] != port


def test_a_local_job():
    here = task.place(STEP | LOCAL)
    assert (here.job, here.rank, here.local) == ("4711", 1, True)
    assert here.environment == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"])
def test_no_step_at_all(name):
    with pytest.raises(UserError, match=f"{name} is not set.*python -m mcf.launch"):
        task.place({key: value for key, value in STEP.items() if key != name})


# --- whose run it is ----------------------------------------------------------------------------------------------


def test_the_newest_start_of_a_job_owns_the_run(tmp_path):
    lock.claim(tmp_path, "12", 0)
    assert lock.holds(tmp_path, "12", 0)
    lock.claim(tmp_path, "12", 1)
    assert lock.holds(tmp_path, "12", 1)
    assert not lock.holds(tmp_path, "12", 0)
    assert not lock.holds(tmp_path, "13", 1)
    assert lock.owning_job(tmp_path) == "12"
    # The launch that has submitted the job writes its number again, and knows no starts.
    (tmp_path / lock.LOCK).write_text('{"slurm_job": "12"}')
    assert lock.holds(tmp_path, "12", 1)
    # A file that is just being written, or that a file system does not give out, takes nothing away from anybody.
    (tmp_path / lock.LOCK).write_text("")
    assert lock.holds(tmp_path, "12", 1)


def test_a_launch_elsewhere_is_not_robbed(tmp_path):
    me = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "processes": [me]}))
    with pytest.raises(UserError, match="being trained on elsewhere"):
        lock.claim(tmp_path, "12", 0, patience=0.3)


def test_a_job_that_starts_before_its_launch_has_named_it(tmp_path):
    """Submission and start may be the same instant: the launch still stands in the file, alone."""
    owner = {"host": "login", "processes": [{"pid": 1, "started": 0.0}]}
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps(owner))
    claimer = multiprocessing.get_context("spawn").Process(target=lock.claim, args=(tmp_path, "12", 0))
    claimer.start()
    time.sleep(0.5)
    with lock._open(path) as file:
        lock._write(file, {**owner, "slurm_job": "12"})
    claimer.join(60)
    assert claimer.exitcode == 0
    assert json.loads(path.read_text())["start"] == 0


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_sigint_that_comes_twice_is_one(handlers):
    """Slurm signals a task and its child, and the task passes it on: only a later one is a second ctrl-C."""
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert (stop.received, stop.for_good) == (True, False)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.for_good
    time.sleep(AGAIN + 0.1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_behind_the_end_of_its_child_does_not_kill_the_task(handlers, monkeypatch, tmp_path):
    """Slurm's warning may come while Python tidies up: then it has given its own handlers back to the system."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    (tmp_path / task.JOBS).mkdir()
    assert task.Rank((sys.executable, "-c", "pass"), tmp_path)() == 0
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(number) is signal.SIG_IGN
