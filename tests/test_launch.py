"""Launching: real submitit jobs of a stub in place of the trainer, real signals, real kills."""

import contextlib
import errno
import json
import marshal
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mcf import cli, launch, lock, snapshot, submit
from mcf.errors import UserError

# What stands in for mcf.train: says where it is, then does what the file RUN/role says for its rank.
STUB = """
import json, os, pathlib, signal, sys, time
import mcf
import mcf.recipes  # the copy is whole
run = pathlib.Path(sys.argv[1].removeprefix("run="))
rank = int(os.environ["RANK"])
told = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda n, _frame: told.append(n))
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
facts = {n: os.environ.get(n) for n in names} | {"mcf": mcf.__file__, "cwd": os.getcwd()}
(run / f"facts{rank}.json").write_text(json.dumps(facts))
role = json.loads((run.parent / "roles.json").read_text())[rank]
print(f"stub {rank} is here: {role}", flush=True)
if role.startswith("refuse"):
    print("error: what is wrong with rank", rank if role == "refuse alone" else "all", file=sys.stderr, flush=True)
    sys.exit(2)
if role == "steps":
    for step in range(1, 101):
        numbers = "loss 7.312  feature 4.31e-6  contrast 2.998  lr 2.4e-3  grad 0.8100  23.3k img/s  wait 3%  ETA 3h12m"
        print(f"step {step}/100 {step}.0%  {numbers}", flush=True)
        if step == 50:
            print("checkpoint: step=50 " + "/path" * 40, flush=True)
        time.sleep(0.01)
    sys.stdout.write("last words without an end")
if role == "fail":
    print("stub: a reason", file=sys.stderr, flush=True)
    sys.exit(3)
if role == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while role in ("wait", "deaf", "talk"):
    time.sleep(0.02)
    if role == "talk":
        print("still here", flush=True)
    if told and role != "deaf":
        (run / f"saved{rank}").touch()
        sys.exit(0)
"""

DRIVER = """
import sys
from mcf import cli, launch
@cli.main
def main(argv):
    return launch.launch(argv[1:], (sys.executable, "-u", argv[0]), grace=0.5)
sys.exit(main())
"""


class Place:
    """A folder with packed data (as far as the launcher looks), the stub, and runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run = folder / "runs" / "r"
        (folder / "data").mkdir()
        (folder / "data" / "manifest.json").write_text('{"samples": 1200}')
        (folder / "stub.py").write_text(STUB)
        (folder / "driver.py").write_text(DRIVER)
        (folder / "runs").mkdir()
        self.processes: list[subprocess.Popen] = []

    def arguments(self, *extra: str) -> list[str]:
        fixed = ["recipe=demo", "name=r", "output=runs", "data.path=data", "micro_batch=16", "gpus_per_node=2"]
        return [*fixed, *([] if any(a.startswith("mode=") for a in extra) else ["mode=local"]), *extra]

    def command(self, *extra: str) -> list[str]:
        return [sys.executable, "driver.py", str(self.folder / "stub.py"), *self.arguments(*extra)]

    def start_on_terminal(self, *extra: str, roles=("end", "end"), columns: int = 80) -> tuple[int, int]:
        """Process number of a launch on a terminal of its own, and the terminal's other side."""
        (self.folder / "runs" / "roles.json").write_text(json.dumps(roles))
        pid, terminal = pty.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.chdir(self.folder)
                os.environ |= {"TERM": "xterm", "COLUMNS": str(columns)}
                os.execv(sys.executable, self.command(*extra))
            os._exit(127)
        return pid, terminal

    def start(self, *extra: str, roles=("end", "end"), **environment: str) -> subprocess.Popen:
        (self.folder / "runs" / "roles.json").write_text(json.dumps(roles))
        process = subprocess.Popen(
            self.command(*extra),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            # A group of its own, as a shell gives a command in the foreground.
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def launch(self, *extra: str, roles=("end", "end"), **environment: str) -> tuple[int, str, str]:
        process = self.start(*extra, roles=roles, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def ranks(self) -> list[psutil.Process]:
        """Living processes of the newest job: watchers and stubs."""
        found = []
        for path in (self.run / "jobs").glob("*_status.json"):
            status = json.loads(path.read_text())
            for pid in (status["watcher"], status["child"]):
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if (
                        pid
                        and process.status() != psutil.STATUS_ZOMBIE
                        and str(self.folder) in " ".join(process.cmdline())
                    ):
                        found.append(process)
        return found

    def wait_for(self, condition, what: str, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s"
            time.sleep(0.05)

    def wait_until_running(self) -> None:
        self.wait_for(lambda: all((self.run / f"facts{r}.json").exists() for r in (0, 1)), "two ranks")

    def wait_until_gone(self) -> None:
        self.wait_for(lambda: not self.ranks(), "end of all processes")


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    for process in [p for p in place.processes if p.poll() is None] + place.ranks():
        with contextlib.suppress(psutil.Error):
            process.kill()


def facts(place: Place, rank: int) -> dict:
    return json.loads((place.run / f"facts{rank}.json").read_text())


# --- a run that goes well, and on ---------------------------------------------------------------------------------


def test_two_ranks_run_from_the_copy_and_a_second_launch_goes_on(place):
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


def test_the_copy_is_complete_and_knows_its_version(tmp_path):
    code = snapshot.take(tmp_path)
    # Compiled already, each file with the path it has now: 128 ranks that start from it have nothing to write.
    compiled = {file: file.stat().st_mtime_ns for file in code.rglob("*.pyc")}
    assert len(compiled) == len(list(code.rglob("*.py"))) > 50
    probe = (
        "import mcf, mcf.cli, mcf.kernels.reference, mcf.snapshot, pathlib;"
        "print(mcf.__file__, mcf.kernels.__file__, len(mcf.cli.recipe_names()), mcf.snapshot.take(pathlib.Path('again')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert {file: file.stat().st_mtime_ns for file in code.rglob("*.pyc")} == compiled
    (launcher,) = (file for file in compiled if file.name.startswith("launch."))
    assert marshal.loads(launcher.read_bytes()[16:]).co_filename == str(code / "mcf" / "launch.py")
    package, kernels, recipes, again = done.stdout.split()
    assert package == str(code / "mcf/__init__.py")
    assert kernels == str(code / "mcf/kernels/__init__.py")
    assert int(recipes) == len(cli.recipe_names())
    # A copy of the copy has the same version, though there is no git around it.
    assert (tmp_path / again / "VERSION").read_text() == (code / "VERSION").read_text()


def test_a_disk_too_full_for_the_copy_is_one_line(tmp_path, monkeypatch):
    def copy(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    # The default of copytree's copy_function, which it took when it was defined.
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, copy, False, False))
    with pytest.raises(UserError, match=r"No space left on device.*set output="):
        snapshot.take(tmp_path)


def test_version_tells_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert snapshot.version(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert snapshot.version(tmp_path) == commit
    (tmp_path / "new").touch()
    assert snapshot.version(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert snapshot.version(tmp_path) == commit + "+changes"


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


# --- the lock -----------------------------------------------------------------------------------------------------


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


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    return place


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["nodes=2", "data.streams=16"], ["nodes=2 with mode=local", "use nodes=1", "mode=slurm"]),
        (["data.path=nowhere", "data.samples=1200"], ["nowhere: no such folder", "python -m mcf.pack"]),
        (["data.path=nowhere"], ["nowhere: no such folder", "python -m mcf.pack"]),
        (["data.path=nowhere", "mode=print"], ["no manifest.json in", "nowhere", "data.samples=NUMBER"]),
        (["data.path=stub.py"], ["stub.py is a file", "python -m mcf.pack"]),
        (["batch=1600", "data.streams=16"], ["1200 samples, fewer than batch=1600"]),
        (["data.path=runs", "data.samples=1200"], ["no manifest.json in it", "python -m mcf.pack"]),
        (["data.path=null", "data.samples=1200"], ["data.path is not set"]),
        (["teacher.source=timm", "teacher.path=no.pth", "teacher.allow_random=false"], ["no.pth: no such file"]),
        (["start.path=no.pth"], ["start.path=", "no.pth: no such file"]),
        (["probe.every=5", "probe.data=none"], ["probe.data=", "none: no such folder"]),
        (["probe.every=5"], ["probe.every=5 needs probe.data"]),
        (["output=driver.py"], ["cannot be made"]),
        (["mode=slurm"], ["sbatch and srun are not on this machine", "mode=local"]),
        (["moed=local"], ["did you mean mode?"]),
    ],
)
def test_refused_before_anything_starts(inside, monkeypatch, capsys, argv, parts):
    monkeypatch.setenv("PATH", "/nonexistent")
    given = {a.partition("=")[0] for a in argv}
    status = launch.main([*(a for a in inside.arguments(*argv) if a in argv or a.partition("=")[0] not in given)])
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not list(inside.folder.glob("runs/r/jobs/*"))


def test_a_damaged_manifest(inside, capsys):
    (inside.folder / "data/manifest.json").write_text('{"samples"')
    assert launch.main(inside.arguments()) == 2
    assert "damaged manifest" in capsys.readouterr().err


def test_paths_are_made_absolute_and_uris_are_not(inside):
    recipe = cli.load_recipe(
        ["recipe=vit_b_20m", "data.path=~/x", "teacher.path=s3://bucket/t.pth", "track.mlflow=sqlite:///a.db",
         "start.path=w.pth", "probe.data=faces"]
    )  # fmt: skip
    made = launch.absolute_paths(recipe)
    assert made.data.path == str(Path.home() / "x")
    assert made.teacher.path == "s3://bucket/t.pth"
    assert (made.start.path, made.probe.data) == (f"{inside.folder}/w.pth", f"{inside.folder}/faces")
    assert made.track.mlflow == f"sqlite:///{inside.folder}/a.db"
    assert made.output == str(inside.folder / "runs")
    assert launch.absolute_paths(made) == made
    for uri in ("local", "off", "http://host:5000", "sqlite:////abs.db"):
        changed = recipe.model_copy(update={"track": recipe.track.model_copy(update={"mlflow": uri})})
        assert launch.absolute_paths(changed).track.mlflow == uri


# --- Slurm --------------------------------------------------------------------------------------------------------


def test_print_shows_plan_and_script_and_touches_nothing(tmp_path):
    code = (
        "import sys; from mcf import launch; status = launch.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules]); sys.exit(status)"
    )
    argv = [
        "recipe=vit_b_20m", "nodes=4", "mode=print", "slurm.partition=gpu", "slurm.account=a1", "slurm.time=600",
        "slurm.mem=512G", "slurm.extra.exclusive=true", "slurm.extra.requeue=false", "slurm.warn_seconds=90",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    assert done.stdout.splitlines()[-1] == "[]"
    assert "4,096 = 32 ranks × micro-batch 64 × accumulation 2" in done.stdout
    script = done.stdout[done.stdout.index("#!/bin/bash") :]
    run = tmp_path / "runs/vit_b_20m"
    for line in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=16", "--partition=gpu", "--account=a1",
        "--time=600", "--mem=512G", "--signal=USR2@90", "--exclusive", "--job-name=vit_b_20m", f"--chdir={run}",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --requeue" not in script
    assert f"export PYTHONPATH={run}/code" in script
    assert "--kill-on-bad-exit=1" in script
    assert f"-m submitit.core._submit {run}/jobs" in script
    assert subprocess.run(["bash", "-n"], input=script.rpartition("\n[")[0], text=True).returncode == 0


def test_missing_submitit_is_one_line(monkeypatch):
    # None in sys.modules is how Python itself notes a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^submitit is not installed, and launching needs it: pip install submitit$"):
        submit.need_submitit()
