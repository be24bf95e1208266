"""How the watcher of a rank learns that it has ended (at once, so that of several ranks the first to end is known), and
how others learn it from the watcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from mcf import job
from mcf.ending import report
from mcf.exits import USER_ERROR
from mcf.task import JOBS, _ends_within, status_path

LONG = 60.0  # seconds: what a wait for the next look would take


WATCHER = """
import sys
from pathlib import Path
from mcf import task
task.FIRST = 1.0
task.Rank(tuple(sys.argv[2:]), Path(sys.argv[1]), grace=0.5)()
"""


def watch(run_dir: Path, *command: str, ranks: int = 1) -> subprocess.Popen:
    """Rank 0 of the local job 7, which runs `command`."""
    variables = {"JOB_ID": "7", "GLOBALID": "0", "LOCALID": "0", "NTASKS": str(ranks)}
    environment = {"SUBMITIT_EXECUTOR": "local"} | {f"SUBMITIT_LOCAL_{name}": of for name, of in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(run_dir), *command],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_end_is_seen_at_once_and_not_at_the_next_look():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not _ends_within(child, 0.05)
    child.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert _ends_within(child, LONG)
    assert time.monotonic() - began < LONG / 4  # a machine may be busy
    assert child.returncode == -signal.SIGKILL
    assert _ends_within(child, LONG)  # one that ended before is not waited for
    assert time.monotonic() - began < LONG / 2
    child.stdin.close()


def test_a_stopped_process_has_not_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(signal.SIGSTOP)
    assert not _ends_within(child, 0.2)
    child.kill()
    assert _ends_within(child, LONG)
    child.stdin.close()


def test_a_rank_that_never_says_a_word_ends_the_others(tmp_path, capsys):
    """Its watcher was killed while Python started."""
    (tmp_path / JOBS).mkdir()
    rank = watch(tmp_path, sys.executable, "-c", "import time; time.sleep(20)", ranks=2)
    rank.communicate(timeout=60)
    assert rank.returncode == 128 + signal.SIGKILL
    assert json.loads(status_path(tmp_path / JOBS, "7", 0).read_text())["because"] == 1
    assert report(tmp_path, "7", "after 9 s", asked=False) == 1
    assert "rank 0 was ended, because rank 1 was gone" in capsys.readouterr().err


# --- on a full disk -------------------------------------------------------------------------------------------------

FILL = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for size in (65536, 1):
    try:
        while True:
            os.write(file, bytes(size))
    except OSError:
        pass
"""
# A rank that fills the disk and refuses to go on.
REFUSES = FILL + "sys.exit(2)"


@contextlib.contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_how_a_rank_ended_gets_out_of_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk"):
        run_dir = tmp_path / "disk" / "run"
        (run_dir / JOBS).mkdir(parents=True)
        rank = watch(run_dir, sys.executable, "-c", REFUSES, str(run_dir / "ballast"))
        assert (rank.communicate(timeout=60)[1], rank.returncode) == ("", USER_ERROR)
        with pytest.raises(OSError, match="No space left"):
            (run_dir / "more").write_bytes(bytes(4096))
        assert json.loads(status_path(run_dir / JOBS, "7", 0).read_text())["code"] == USER_ERROR
        assert report(run_dir, "7", "after 9 s", asked=False) == USER_ERROR
        assert job.end(run_dir, USER_ERROR, {"SLURM_JOB_ID": "7"}) == USER_ERROR


def test_a_disk_that_is_full_from_the_start_hides_no_exit_status(tmp_path):
    with small_disk(tmp_path / "disk"):
        run_dir = tmp_path / "disk" / "run"
        (run_dir / JOBS).mkdir(parents=True)
        tiny.write_recipe(run_dir, {})
        subprocess.run([sys.executable, "-c", FILL, str(run_dir / "ballast")], check=True)
        rank = watch(run_dir, sys.executable, "-c", "raise SystemExit(2)")
        assert (rank.communicate(timeout=60)[1], rank.returncode) == ("", USER_ERROR)
        assert job.end(run_dir, USER_ERROR, {"SLURM_JOB_ID": "7"}) == USER_ERROR
