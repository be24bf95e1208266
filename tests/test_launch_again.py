"""A launch where another one was: what that has left in the run directory, and whether it still lives."""

import json
import os
import signal
import subprocess

import pytest

from mcf.task import JOBS, Status, status_path

CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]  # process numbers of its own, from 1 on


@pytest.fixture
def container():
    """The command before a command that runs it as a container does."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces for this user: unshare --pid is refused")
    return CONTAINER


def test_a_job_s_number_that_comes_again_in_a_container(place, container):
    """A former launch of three ranks, of which one was killed, had the number that this one's job is given."""
    jobs = place.run / JOBS
    jobs.mkdir(parents=True)
    for number in range(2, 300):
        Status(2, 1, code=-9, ended=1.0).write(status_path(jobs, str(number), 2))
        (jobs / f"{number}_2_log.out").touch()
    process = place.start(roles=("steps", "steps"), before=container)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "step 100/100" in out
    assert len(list(jobs.glob("*_status.json"))) == 2
    assert len(list(jobs.glob("*_2_log.out"))) == 298


def test_ranks_that_are_left_when_launcher_and_controller_are_killed_own_the_run(place):
    """They save first, which may take minutes."""
    process = place.start(roles=("deaf", "deaf"))
    place.wait_until_running()
    place.wait_for(
        lambda: len(json.loads((place.run / "lock.json").read_text())["ranks"]) == 2, "two ranks in the lock"
    )
    for owner in json.loads((place.run / "lock.json").read_text())["processes"]:
        os.kill(owner["pid"], signal.SIGKILL)
    process.wait(timeout=10)
    watchers = [json.loads(path.read_text())["watcher"] for path in (place.run / "jobs").glob("*_status.json")]
    status, _, err = place.launch()
    assert status == 2
    assert int(err.partition("being trained by process ")[2].split()[0]) in watchers
    for rank in place.ranks():
        rank.kill()
    place.wait_until_gone()
    status, _, err = place.launch()
    assert (status, err) == (0, "")
