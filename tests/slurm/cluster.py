"""A whole Slurm on this machine for the time of a test: munged, slurmctld, and slurmd for as many nodes as wanted.

Everything lies in a folder of its own and listens on the loopback; nothing of an installed Slurm is touched or needed
but the programs. guardian.py is the parent of all processes and ends them with the test, however that ends.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# cred_expire: a requeued job waits that long before it starts again (120 s by default). KillWait: between SIGTERM and
# SIGKILL. SlurmdTimeout: how long a node may be silent; generous, for a machine that others use too.
CONFIGURATION = """
ClusterName=mcf
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=2
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
KillWait=30
OverTimeLimit=0
SlurmdTimeout=15
MessageTimeout=30
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=16000 Gres=gpu:2 Feature=h200 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=ALL AllowAccounts=good MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """A running cluster of `nodes` nodes n1, n2, …; a context manager.

    Args:
        nodes: how many.
        blind: nodes that do not see a folder: {name: folder}. It is empty and read-only there (a mount namespace).
    """

    def __init__(self, nodes: int, blind: dict[str, Path] | None = None):
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.blind = blind or {}
        # Not pytest's folder: a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="mcf-slurm-"))
        self.pids: dict[str, int] = {}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.guardian = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("guardian.py")), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self.start("munged")
            wait_for((self.folder / "munge.socket").exists, "munged's socket")
            self.start("slurmctld")
            for name in self.names:
                self.start(name)
            wait_for(lambda: self.states() == dict.fromkeys(self.names, "idle"), "idle nodes", seconds=120)
        except BaseException as error:
            logs = "".join(f"\n--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))
            self.close()
            raise AssertionError(f"the cluster did not start{logs}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster and of its jobs."""
        assert self.guardian.stdin is not None
        self.guardian.stdin.close()
        self.guardian.wait(60)

    def _configure(self) -> None:
        for name in ("state", "devices"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o600)
        # The directories above munged's socket must let nobody else write.
        self.folder.chmod(0o755)
        devices = [self.folder / "devices" / f"gpu{i}" for i in range(2)]
        for device in devices:
            device.touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/devices/gpu[0-1]\n")
        (self.folder / "cgroup.conf").touch()
        port = _free_ports(len(self.names) + 1)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, user=getpass.getuser(), port=port, first=port + 1, last=port + len(self.names),
                nodes=len(self.names),
            )
        )  # fmt: skip

    # --- daemons ---

    def start(self, name: str) -> None:
        """Start a daemon: munged, slurmctld, or the slurmd of a node."""
        here = str(self.folder)
        if name == "munged":
            files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log",
                     "pid-file": "munged.pid", "seed-file": "munged.seed"}  # fmt: skip
            argv = ["munged", "--foreground", "--force", *(f"--{k}={here}/{v}" for k, v in files.items())]
        elif name == "slurmctld":
            argv = ["slurmctld", "-D", "-i", "-f", f"{here}/slurm.conf"]
        else:
            argv = ["slurmd", "-D", "-N", name, "-f", f"{here}/slurm.conf"]
            if name in self.blind:
                hide = 'mount -t tmpfs -o ro,size=4k none "$0" && exec "$@"'
                argv = ["unshare", "--mount", "sh", "-c", hide, str(self.blind[name]), *argv]
        asked = {"argv": argv, "env": self.environment, "log": f"{here}/{name}.out.log", "cwd": here}
        assert self.guardian.stdin is not None and self.guardian.stdout is not None
        self.guardian.stdin.write(json.dumps(asked) + "\n")
        self.guardian.stdin.flush()
        self.pids[name] = int(self.guardian.stdout.readline())

    def kill(self, name: str) -> None:
        """SIGKILL for one daemon; what it has started lives on."""
        os.kill(self.pids[name], signal.SIGKILL)

    # --- commands ---

    def run(self, *command: str, **more: object) -> str:
        """What a command prints, with this cluster's configuration; it must succeed."""
        done = self.attempt(*command, **more)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *command: str, env: dict[str, str] | None = None, **more: object) -> subprocess.CompletedProcess:
        """A command, with this cluster's configuration."""
        return subprocess.run(
            command, env=self.environment | (env or {}), capture_output=True, text=True, timeout=300, **more
        )

    def states(self) -> dict[str, str]:
        """State of each node by its name; {} if the controller does not answer."""
        done = self.attempt("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t")
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job (JobState, Restarts, NodeList, …); {} if the controller does not answer or know it."""
        done = self.attempt("scontrol", "show", "job", number, "--oneliner")
        return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60, poll: float = 0.2) -> None:
    """Wait until the condition holds. Times are for a machine that is four times slower than alone."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(poll)


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that are free, below the dynamic ones."""
    for _ in range(200):
        first = random.SystemRandom().randrange(12_000, 19_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
