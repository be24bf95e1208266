"""`python -m mcf.launch` on the real Slurm: what it asks for, what it says, what it refuses."""

import re
import shlex
import signal
import subprocess
import sys

import cluster as slurm
import pytest
from runs import Site, require_slurm

pytestmark = pytest.mark.slurm


# --- a job, from its submission to its end ------------------------------------------------------------------------


@pytest.mark.slow
def test_it_returns_at_once_is_stopped_and_resumed_by_the_commands_it_names(site, unbroken):
    asked = ["nodes=2", "slurm.partition=main", "slurm.constraint=h200", "slurm.mem=300M", "slurm.time=7"]
    asked += ["checkpoint.every=1000", "slurm.extra.comment=mine"]
    done = site.launch("first", *asked, pace=0.4)
    assert (done.returncode, done.stderr) == (0, "")
    job, run = site.job_of("first"), site.runs / "first"
    found = site.cluster.job(job)
    assert found["JobState"] in ("PENDING", "RUNNING")
    assert (found["JobName"], found["Partition"], found["Features"], found["TimeLimit"]) == (
        "first",
        "main",
        "h200",
        "00:07:00",
    )
    assert (found["NumNodes"].rstrip("-2"), found["NumTasks"], found["CPUs/Task"]) in {("", "2", "1"), ("1", "2", "1")}
    assert (found["MinMemoryNode"], found["TresPerNode"], found["Comment"]) == ("300M", "gres:gpu:1", "mine")
    assert (found["WorkDir"], found["Requeue"]) == (str(run), "1")
    assert "effective batch 8 = 2 ranks × micro-batch 2 × accumulation 2" in done.stdout
    assert "mode            slurm (sbatch is there)\n" in done.stdout
    assert f"\nSlurm job {job}: {run}\n  follow  python -m mcf.follow run={run}\n" in done.stdout

    second = site.launch("first", *asked)
    assert second.returncode == 2
    assert re.fullmatch(
        rf"error: {run}: Slurm job {job} of this run is \w+; .*launch under another name=…\n", second.stderr
    )

    site.wait_for_step("first", 5)
    stop = re.search(r"  stop    (.*?)    \(", done.stdout)[1]
    assert stop == f"scancel --signal=INT {job}"
    site.cluster.run(*shlex.split(stop))
    site.wait_for_end("first", job)
    (stopped,) = site.events("first", "stopped")
    assert 5 <= stopped["step"] < 24
    assert site.newest("first") == stopped["step"]
    assert site.cluster.job(job)["Restarts"] == "0"

    resume = re.search(r"  resume  (.*)", done.stdout)[1]
    again = site.cluster.attempt(*shlex.split(resume), cwd=site.folder, env=site.environment(0))
    assert again.returncode == 0, again.stderr
    assert f"going on with {run}" in again.stdout
    assert site.job_of("first") != job
    site.wait_for_end("first", site.job_of("first"))
    assert site.numbers("first") == site.numbers(unbroken)


def test_the_ranks_run_the_copy_of_the_code_and_are_given_the_right_samples(site):
    job = site.submit("copy", "nodes=2", "train.steps=6", pace=0)
    site.wait_for_end("copy", job)
    assert site.starts("copy") == [[1, 2, 3, 4, 5, 6]]
    assert f'"mcf": "{site.runs}/copy/code/mcf/__init__.py"' in (site.runs / "copy/keys-1.jsonl").read_text()


def test_followed_to_the_end(site):
    done = site.launch("followed", "nodes=1", "train.steps=6", "follow=true")
    assert (done.returncode, done.stderr) == (0, "")
    job = site.job_of("followed")
    assert re.search(rf"^job {job}: running n[1-4]$", done.stdout, re.MULTILINE)
    assert re.search(r"^step 6/6 100\.0%  loss ", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("ended after")
    # And again, when all is over.
    after = site.cluster.attempt(sys.executable, "-m", "mcf.follow", f"run={site.runs / 'followed'}")
    assert (after.returncode, after.stderr) == (0, "")
    assert "step 6/6 100.0%" in after.stdout


def test_no_longer_following_ends_nothing(site):
    job = site.submit("left", "nodes=1", "train.steps=1000", pace=0.2)
    command = [sys.executable, "-u", "-m", "mcf.follow", f"run={site.runs / 'left'}"]
    process = subprocess.Popen(command, env=site.cluster.environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith(f"job {job}: ")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"the job goes on; to end it: scancel --signal=INT {job}" in said
    assert site.cluster.job(job)["JobState"] in ("PENDING", "RUNNING")
    site.cluster.run("scancel", job)
    site.wait_for_end("left", job, "CANCELLED")


def test_the_printed_script_is_the_one_that_is_submitted(site):
    printed = site.launch("printed", "nodes=2", "mode=print")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert not (site.runs / "printed").exists()
    job = site.submit("printed", "nodes=2", "slurm.extra.hold=true")
    submitted = (site.runs / f"printed/jobs/{job}_submission.sh").read_text()
    assert submitted.replace("#SBATCH --hold\n", "") == printed.stdout[printed.stdout.index("#!/bin/bash") :].rstrip(
        "\n"
    )
    waits = site.launch("printed", "nodes=2")
    assert f"Slurm job {job} of this run is pending" in waits.stderr
    site.cluster.run("scancel", job)


# --- back to the queue, or not ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cap_on_requeues(site):
    job = site.submit("capped", "nodes=1", "slurm.max_requeues=0", pace=0.4)
    site.wait_for_step("capped", 3)
    site.cluster.run("scancel", "--signal=USR2", job)
    site.wait_for_end("capped", job, "FAILED")
    step = site.newest("capped")
    said = f"error: saved; not requeued again: slurm.max_requeues=0; launch again to go on from step {step}\n"
    assert said in site.said("capped")
    follow = site.cluster.attempt(sys.executable, "-m", "mcf.follow", f"run={site.runs / 'capped'}")
    assert follow.returncode == 130
    assert "launch again to go on" in follow.stdout


def test_a_run_that_fails_again_and_again_is_left_alone(site):
    environment = site.environment(0) | {"MCF_TEST_DIES": "1"}
    done = site.cluster.attempt(
        sys.executable, "-m", "mcf.launch", "recipe=tiny.yaml", "name=vain", cwd=site.folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    job = site.job_of("vain")
    site.wait_for_end("vain", job, "FAILED")
    assert site.cluster.job(job)["Restarts"] == "2"
    assert [event["why"][:27] for event in site.events("vain", "requeued")] == ["rank 0 was killed by SIGKIL"] * 2
    assert "not requeued: it failed 3 times in a row at step 0 without a new checkpoint" in site.said("vain")
    follow = site.cluster.attempt(sys.executable, "-m", "mcf.follow", f"run={site.runs / 'vain'}")
    assert follow.returncode == 128 + signal.SIGKILL
    assert "error: rank 0 was killed by SIGKILL" in follow.stderr


def test_what_a_user_has_to_mend_is_told_and_not_tried_again(site, unbroken):
    done = site.launch(unbroken, "nodes=2", "loss.feature=10", "follow=true")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "loss.feature=10.0 (was 1000.0)" in done.stderr
    assert site.cluster.job(site.job_of(unbroken))["Restarts"] == "0"


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["slurm.partition=nope"], "Slurm refused the job: invalid partition specified: nope"),
        (["slurm.partition=closed", "slurm.account=bad"], "Slurm refused the job: .*[Aa]ccount"),
        (["slurm.constraint=h300"], "Slurm refused the job: .*[Ff]eature"),
        (["slurm.extra.gpus-per-node=gpu:9"], "Slurm refused the job: .*Requested node configuration is not available"),
        (["nodes=3"], "batch=8"),
    ],
)
def test_refused_in_one_line_and_the_name_is_free_again(site, asked, said):
    for _ in range(2):
        done = site.launch("refused", *asked)
        assert done.returncode == 2
        assert re.fullmatch(rf"error: .*{said}.*\n", done.stderr), done.stderr


def test_nodes_without_gpus(site):
    done = site.launch("cpu", "mode=print", "slurm.extra.gpus-per-node=false")
    assert done.returncode == 0, done.stderr
    assert "gpus-per-node" not in done.stdout.partition("#!/bin/bash")[2]


def test_nodes_that_do_not_see_the_run(tmp_path):
    """n2 has a view of its own, a mount namespace, in which the folder of the runs is empty."""
    require_slurm()
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    (tmp_path / "runs").mkdir()
    with slurm.Cluster(2, blind={"n2": tmp_path / "runs"}) as cluster:
        site = Site(cluster, tmp_path)
        # The job's first node sees it and looks for the others.
        done = site.launch("blind", "nodes=2", "follow=true")
        assert done.returncode == 2
        line = rf"error: not all nodes see {site.runs / 'blind'} and \S+: n2 does not; .*set output=.*\n"
        assert re.fullmatch(line, done.stderr)
        assert re.search(line, (site.runs / f"blind/jobs/{site.job_of('blind')}_0_log.out").read_text())
        # It does not: the job cannot say anything anywhere, and who follows it can.
        done = site.launch("blind", "nodes=1", "slurm.extra.nodelist=n2", "follow=true")
        assert done.returncode == 1
        assert re.search(
            rf"error: job \d+ ended as FAILED.*: n2 does not see {site.runs / 'blind'}; output= must", done.stderr
        )


def test_no_slurm_job_to_follow_and_no_slurm_job_around(site, tmp_path):
    for verb, said in (
        ("follow", "no Slurm job has this run"),
        ("job", "this is no Slurm job"),
        ("task", "no task of a Slurm"),
    ):
        done = site.cluster.attempt(sys.executable, "-m", f"mcf.{verb}", f"run={tmp_path}")
        assert done.returncode == 2
        assert re.fullmatch(rf"error: .*{said}.*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_the_nodes_see_may_stay_unknown(site, tmp_path):
    """srun fails: no verdict on the nodes, and no end of the job for it."""
    code = f"from mcf.job import *; print(blind_nodes(2, Path({str(tmp_path)!r}), Path(sys.executable)))"
    done = site.cluster.attempt(sys.executable, "-c", code, env={"SLURM_CONF": str(tmp_path / "none")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("what the nodes see is not known: srun: ")
    assert done.stdout.endswith("\n[]\n")
