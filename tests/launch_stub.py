"""A place to launch in: a stub stands in for the trainer, and whatever was started there is ended."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

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

    def start(
        self, *extra: str, roles=("end", "end"), before: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen:
        """Start a launch; `before` is a command that runs it."""
        (self.folder / "runs" / "roles.json").write_text(json.dumps(roles))
        process = subprocess.Popen(
            [*before, *self.command(*extra)],
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

    def close(self) -> None:
        """End what still runs."""
        for process in [p for p in self.processes if p.poll() is None] + self.ranks():
            with contextlib.suppress(psutil.Error):
                process.kill()
