"""Whose a run is: locks of other hosts and containers, broken ones, numbers of processes that were given away again, and
clocks that are set."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mcf import heartbeat, lock
from mcf.errors import UserError

CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]  # process numbers of its own, from 1 on
# Owns a run, and beats as a rank does.
OWNER = """
import os, sys, time
from pathlib import Path
from mcf import heartbeat
from mcf.lock import RunLock
run = Path(sys.argv[1])
with RunLock(run):
    for beats in range(10_000):
        heartbeat.write(run, heartbeat.Beat(0, "1", "host", heartbeat.machine(), os.getpid(), beats))
        time.sleep(0.2)
"""


def test_a_lock_of_another_host_is_believed(tmp_path):
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "processes": [{"pid": 1, "started": 0}]}))
    with (
        pytest.raises(UserError, match=r"being trained on elsewhere \(if that is long over, delete .*lock.json\)"),
        lock.RunLock(tmp_path),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_an_empty_or_broken_lock_is_none(tmp_path, content):
    (tmp_path / lock.LOCK).write_text(content)
    with lock.RunLock(tmp_path):
        pass


def test_a_process_number_that_was_given_away_again_owns_nothing(tmp_path):
    me = {"pid": os.getpid(), "started": psutil.Process().create_time() - 100}
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": socket.gethostname(), "processes": [me]}))
    with lock.RunLock(tmp_path), pytest.raises(UserError, match=f"by process {os.getpid()}"), lock.RunLock(tmp_path):
        pass
    with lock.RunLock(tmp_path):
        pass


def test_a_number_that_was_given_away_again_is_known_by_the_kernel_s_count(tmp_path):
    me = lock._identity(os.getpid())
    owner = {
        "host": socket.gethostname(),
        "machine": heartbeat.machine(),
        "processes": [{**me, "ticks": me["ticks"] - 1}],
    }
    (tmp_path / lock.LOCK).write_text(json.dumps(owner))
    with lock.RunLock(tmp_path):
        pass


def test_a_clock_that_is_set_makes_no_owner_a_dead_one(tmp_path):
    """What the kernel says of the boot's time moves with the clock, and with it the starts of all processes."""
    stat = Path("/proc/stat").read_text()
    booted = int(re.search(r"btime (\d+)", stat)[1])
    (tmp_path / "stat").write_text(stat.replace(f"btime {booted}", f"btime {booted + 10}"))
    set_clock = ["unshare", "--mount", "sh", "-c", f"mount --bind '{tmp_path}/stat' /proc/stat && exec \"$@\"", "sh"]
    if subprocess.run([*set_clock, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces for this user: unshare --mount is refused")
    code = "import sys; from pathlib import Path; from mcf import cli, lock\n"
    code += "cli.main(lambda argv: lock.RunLock(Path(argv[0])).__enter__() and 0)()"
    with lock.RunLock(tmp_path):
        done = subprocess.run([*set_clock, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert f"being trained by process {os.getpid()} on this machine" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_owner_in_another_container_of_this_host_lives_as_long_as_its_ranks_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEATS", 2.0)
    monkeypatch.setattr(lock, "START", 3.0)
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces for this user: unshare --pid is refused")
    owner = subprocess.Popen([*CONTAINER, sys.executable, "-c", OWNER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not heartbeat.path_of(tmp_path, 0).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(UserError, match="being trained in another container of"), lock.RunLock(tmp_path):
            pass
    finally:
        owner.kill()
        owner.wait()
    with lock.RunLock(tmp_path):  # its last heartbeat says that it runs, and stays as it is
        pass


def test_a_container_that_has_just_been_started_is_given_time_for_its_first_heartbeat(tmp_path, monkeypatch, capsys):
    owner = {"host": socket.gethostname(), "machine": "elsewhere", "processes": [{"pid": 1, "started": 0.0}]}
    (tmp_path / lock.LOCK).write_text(json.dumps({**owner, "since": time.time()}))
    monkeypatch.setattr(lock, "START", 2.0)
    began = time.monotonic()
    with lock.RunLock(tmp_path):
        assert time.monotonic() - began > 1.5
    assert "looking whether it still lives" in capsys.readouterr().err


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_a_file_system_without_flock_has_record_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock.RunLock(tmp_path):
        with pytest.raises(UserError, match=f"by process {os.getpid()}"), lock.RunLock(tmp_path):
            pass
        with lock._open(tmp_path / lock.LOCK):
            code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            other = [sys.executable, "-c", code, str(tmp_path / lock.LOCK)]
            assert "BlockingIOError" in subprocess.run(other, capture_output=True, text=True).stderr


def test_a_file_system_without_any_locks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(
        UserError, match=r"lock.json: its file system has no locks .*; mount it with them .*, or set output="
    ):
        lock.RunLock(tmp_path).__enter__()
