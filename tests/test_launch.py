"""Launching: real submitit jobs of a stub in place of the trainer, real signals, real kills."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
from launch_stub import Place

from mcf import cli


def facts(place: Place, rank: int) -> dict:
    return json.loads((place.run / f"facts{rank}.json").read_text())


# --- a run that goes well, and on ---------------------------------------------------------------------------------


def test_two_ranks_run_from_the_copy_and_a_second_launch_goes_on(place, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, out, err = place.launch("optimizer.lr=1e-3", CUDA_VISIBLE_DEVICES="GPU-abc,GPU-def", SLURM_JOB_ID="1")
    assert (status, err) == (0, "")
    assert "effective batch 64 = 2 ranks × micro-batch 16 × accumulation 2" in out
    assert "stub 0 is here: end" in out
    assert "stub 1" not in out
    first, second = facts(place, 0), facts(place, 1)
    assert [(f["RANK"], f["LOCAL_RANK"], f["WORLD_SIZE"]) for f in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    # The launch's own devices, not submitit's numbering; and no trace of a Slurm job around it.
    assert first["CUDA_VISIBLE_DEVICES"] == second["CUDA_VISIBLE_DEVICES"] == "GPU-abc,GPU-def"
    assert first["SLURM_JOB_ID"] is None
    assert first["mcf"] == str(place.run / "code/mcf/__init__.py")
    assert first["cwd"] == str(place.run)

    recipe = cli.load_recipe([f"recipe={place.run / 'recipe.yaml'}"])
    assert (recipe.name, recipe.optimizer.lr) == ("r", 1e-3)
    assert recipe.data.path == str(place.folder / "data")
    assert recipe.output == str(place.folder / "runs")

    (place.run / "code" / "stale").touch()
    status, out, _ = place.launch("optimizer.lr=2e-3", "train.log_every=7")
    assert status == 0
    assert "going on with" in out
    assert "  optimizer.lr: 0.001 → 0.002\n" in out
    assert "  train.log_every: 5 → 7\n" in out
    assert out.count("→") - out.count("half-cosine →") == 3  # the two, and the learning rate's line
    assert not (place.run / "code" / "stale").exists()
    assert facts(place, 0)["CUDA_VISIBLE_DEVICES"] is None


# --- ranks that fail ----------------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_others_and_is_named(place):
    status, out, err = place.launch(roles=("deaf", "die"))
    assert status == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in err
    assert err.count("\n") == 1
    assert "stub 1 is here: die" in out
    place.wait_until_gone()


def test_the_status_of_a_failed_rank_is_that_of_the_launch_and_its_words_are_shown(place):
    status, out, err = place.launch(roles=("deaf", "fail"))
    assert status == 3
    assert "rank 1 ended with status 3" in err
    assert "stub: a reason" in out
    place.wait_until_gone()


@pytest.mark.parametrize(
    ("roles", "line"),
    [
        (("refuse", "refuse"), "error: what is wrong with rank all\n"),
        (("refuse alone", "deaf"), "error: what is wrong with rank 0\n"),
        (("deaf", "refuse alone"), "error: what is wrong with rank 1 (rank 1)\n"),
    ],
)
def test_what_a_rank_refuses_is_the_one_line_of_the_launch(place, roles, line):
    status, out, err = place.launch(roles=roles)
    assert status == 2
    assert err == line
    assert "error:" not in out
    place.wait_until_gone()


def test_a_rank_whose_watcher_is_killed_does_not_go_unnoticed(place):
    process = place.start(roles=("deaf", "deaf"))
    place.wait_until_running()
    victim = next(s for s in _statuses(place) if s["rank"] == 1)
    os.kill(victim["watcher"], signal.SIGKILL)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1
    assert "rank 1 vanished" in err
    place.wait_until_gone()


def _statuses(place: Place) -> list[dict]:
    return [json.loads(path.read_text()) for path in (place.run / "jobs").glob("*_status.json")]


# --- stopping -----------------------------------------------------------------------------------------------------


def test_ctrl_c_lets_the_ranks_save(place):
    process = place.start(roles=("wait", "wait"))
    place.wait_until_running()
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=40)
    assert process.returncode == 130
    assert err == ""
    assert "stopping: the run saves a checkpoint" in out
    assert (place.run / "saved0").exists()
    assert (place.run / "saved1").exists()
    place.wait_until_gone()


def test_a_second_ctrl_c_kills(place):
    process = place.start(roles=("deaf", "deaf"))
    place.wait_until_running()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "killing all ranks" in out
    place.wait_until_gone()


def test_one_job_a_run_and_a_killed_launcher_blocks_nobody(place):
    process = place.start(roles=("deaf", "deaf"))
    place.wait_until_running()
    status, _, err = place.launch()
    assert status == 2
    assert "being trained by process" in err
    assert "launch under another name=" in err

    # The launcher dies; its job goes on, and still owns the directory.
    process.kill()
    process.wait(timeout=10)  # not for the end of its output, which the job has inherited
    assert len(place.ranks()) == 4
    status, _, err = place.launch()
    assert status == 2
    controller = int(err.partition("by process ")[2].split()[0])

    # The job dies as well, and then the directory is nobody's.
    for stub in _statuses(place):
        os.kill(stub["child"], signal.SIGKILL)
    place.wait_for(lambda: not _running(controller), "end of the controller")
    place.wait_until_gone()
    status, _, err = place.launch()
    assert (status, err) == (0, "")


def _running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_ranks_are_told_when_their_controller_dies(place):
    process = place.start(roles=("wait", "wait"))
    place.wait_until_running()
    owner = json.loads((place.run / "lock.json").read_text())
    os.kill(owner["processes"][-1]["pid"], signal.SIGKILL)
    process.communicate(timeout=40)
    place.wait_until_gone()
    assert (place.run / "saved0").exists()
    assert (place.run / "saved1").exists()


# --- on a terminal ------------------------------------------------------------------------------------------------


def read_to_the_end(terminal: int) -> str:
    """All that a terminal shows until the last process has left it."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: nobody holds it any more
        while new := os.read(terminal, 1 << 16):
            shown += new
    os.close(terminal)
    return shown.decode()


def test_on_a_terminal_the_newest_step_is_a_live_line_and_the_log_has_every_line(place):
    pid, terminal = place.start_on_terminal(roles=("steps", "steps"))
    shown = read_to_the_end(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    rows = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    live = [row for row in rows if "step " in row and "━" in row]
    assert len(live) > 1  # it was there before the end
    assert live[-1] == "━━━━━━━━━━ step 100/100 100.0%  loss 7.312  23.3k img/s  ETA 3h12m"
    assert max(map(len, live)) <= 80
    assert not any(row.startswith("step ") for row in rows)
    assert rows.count("checkpoint: step=50 " + "/path" * 40) == 1
    assert rows.count("last words without an end") == 1
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0  # a hidden cursor comes back

    log = next((place.run / "jobs").glob("*_0_log.out")).read_text()
    assert len(re.findall(r"^step \d+/100 .* ETA 3h12m$", log, re.MULTILINE)) == 100


def test_an_error_on_a_terminal_is_the_last_line(place):
    pid, terminal = place.start_on_terminal(roles=("refuse", "refuse"))
    shown = read_to_the_end(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert "\r\nerror: what is wrong with rank all\r\n" in shown


def test_a_terminal_that_is_closed_lets_the_ranks_save(place):
    pid, terminal = place.start_on_terminal(roles=("wait", "wait"))
    place.wait_until_running()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert (place.run / "saved0").exists()
    assert (place.run / "saved1").exists()
    place.wait_until_gone()


# --- who reads it -------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_lets_the_ranks_save(place):
    """`python -m mcf.launch … | head`: no run is left alone without anybody to see it."""
    process = place.start(roles=("talk", "wait"))
    place.wait_until_running()
    process.stdout.close()
    assert process.wait(60) == 130
    assert process.stderr.read() == ""
    assert [(place.run / f"saved{rank}").exists() for rank in (0, 1)] == [True, True]
    place.wait_until_gone()


def test_a_closed_stdout_is_no_matter(place):
    command = shlex.join([sys.executable, "driver.py", str(place.folder / "stub.py"), *place.arguments()])
    (place.folder / "runs" / "roles.json").write_text('["end", "end"]')
    done = subprocess.run(
        f"{command} >&- <&-", shell=True, cwd=place.folder, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
