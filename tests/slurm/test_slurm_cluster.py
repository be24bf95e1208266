"""The throw-away cluster itself: it computes, and it is gone with the test that wanted it, however that ends."""

import contextlib
import subprocess
import sys
from pathlib import Path

import cluster as slurm
import psutil
import pytest

pytestmark = pytest.mark.slurm

HOLD = """
import sys, time
sys.path.insert(0, {folder!r})
import cluster
with cluster.Cluster(2) as running:
    running.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=trap '' TERM; srun sleep 1000")
    print(running.guardian.pid, flush=True)
    {then}
"""


def test_two_nodes_run_two_tasks(cluster):
    said = cluster.run(
        "srun", "--nodes=2", "--ntasks=2", "--output=-", "sh", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME"
    )
    ranks = dict(line.split() for line in said.splitlines())
    assert sorted(ranks) == ["0", "1"]
    assert len(set(ranks.values())) == 2


@pytest.mark.parametrize("then", ["sys.stdin.read(); raise SystemExit('the test failed')", "time.sleep(1000)"])
def test_nothing_is_left_behind(cluster, then):
    """A test that fails, and one that is killed: its daemons, its job's script and its tasks are gone."""
    code = HOLD.format(folder=str(Path(slurm.__file__).parent), then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        guardian = psutil.Process(int(process.stdout.readline()))
        expected = {"munged", "slurmctld", "slurmd", "slurmstepd", "slurm_script", "srun", "sleep"}
        found: set[psutil.Process] = set()

        def all_are_there() -> bool:
            with contextlib.suppress(psutil.Error):
                now = guardian.children(recursive=True)
                found.update(now)
                # Of these objects, not of those found earlier: a process keeps its first name in psutil.
                return expected <= {process.name() for process in now}
            return False

        slurm.wait_for(all_are_there, "all processes", 120)
        if "fail" in then:
            process.communicate("", timeout=60)
            assert process.returncode == 1
    finally:
        process.kill()
        process.wait(60)
    slurm.wait_for(lambda: not any(p.is_running() for p in [guardian, *found]), "end of all processes")
