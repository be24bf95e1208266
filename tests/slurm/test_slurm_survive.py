"""What befalls a run on the real Slurm, and that it comes through: the same samples, the same losses, little lost.

Each test lets one thing happen to a run of two nodes, waits until the run has ended by itself, and holds it against
the run that nothing happened to.
"""

import itertools
import os
import re
import signal

import cluster as slurm
import psutil
import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

EVERY = 4  # steps between two checkpoints of the tests' recipe
PACE = 0.4  # seconds a step: long enough to strike at a known step


def check_unharmed(site, name: str, unbroken: str, starts: int, lost: int = EVERY) -> None:
    """Every number is the unbroken run's; each start lost at most `lost` steps, and none was left out or done twice.

    `starts` are those that did a step at all.
    """
    assert site.numbers(name) == site.numbers(unbroken)
    ran = site.starts(name)
    assert len(ran) == starts, site.said(name)
    assert len(site.events(name, "finished")) == 1, site.said(name)
    resumed = {event["step"] for event in site.events(name, "resumed")}
    for before, after in itertools.pairwise(ran):
        step = after[0] - 1
        assert step in resumed
        assert before[-1] - step <= lost


@pytest.mark.parametrize("number", ["USR2", "TERM"])
def test_told_to_stop_it_saves_and_goes_back_to_the_queue(site, unbroken, number):
    job = site.submit(number, "nodes=2", "checkpoint.every=1000", "track.mlflow=local", pace=PACE)
    site.wait_for_step(number, 6)
    site.cluster.run("scancel", f"--signal={number}", job)
    site.wait_for_end(number, job)
    check_unharmed(site, number, unbroken, starts=2, lost=0)
    assert site.cluster.job(job)["Restarts"] == "1"
    (event,) = site.events(number, "requeued")
    assert (event["why"], event["job"], event["step"]) == ("saved", job, site.events(number, "stopped")[0]["step"])
    assert one_mlflow_run(site, number)


def one_mlflow_run(site, name: str) -> bool:
    """Whether MLflow has one run of that name, which is finished and has every step."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{site.runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mcf")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    told = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss/total")}
    assert told == {step: numbers["loss/total"] for step, numbers in site.numbers(name).items()}
    return run.info.status == "FINISHED"


def test_the_time_limit(site, unbroken):
    """A real one, of two minutes; the run takes longer, and starts in less even on a busy machine.

    What a busy machine does not end in time Slurm ends after the save: that is no loss either, and no start of its own
    in the list of steps where the time was up before the first step, or behind the last one.
    """
    job = site.submit("limit", "nodes=2", "slurm.time=2", "slurm.warn_seconds=45", "checkpoint.every=1000", pace=5)
    site.wait_for_end("limit", job, seconds=560)
    returns = site.events("limit", "requeued")
    assert returns[0]["why"] == "saved"
    between = {event["step"] for event in returns} - {0, max(site.numbers("limit"))}
    assert between
    check_unharmed(site, "limit", unbroken, starts=len(between) + 1, lost=0)


def test_requeued_by_somebody(site, unbroken):
    """`scontrol requeue`, as preemption does it: SIGTERM, and KillWait seconds to save."""
    job = site.submit("requeued", "nodes=2", "checkpoint.every=1000", pace=PACE)
    site.wait_for_step("requeued", 6)
    site.cluster.run("scontrol", "requeue", job)
    site.wait_for_end("requeued", job)
    check_unharmed(site, "requeued", unbroken, starts=2, lost=0)
    # Slurm has done it: the job has not asked for it beside.
    assert not site.events("requeued", "requeued")


def test_a_rank_that_aborts_behind_the_end(site, unbroken):
    """What a library does while it tidies up does not start a run again that is done and saved."""
    job = site.submit("aborts", "nodes=2", MCF_TEST_ABORTS="1")
    site.wait_for_end("aborts", job)
    check_unharmed(site, "aborts", unbroken, starts=1)
    assert {status["code"] for status in site.statuses("aborts")} & {-signal.SIGABRT}
    assert re.search(r"rank \d .*, but after the run's last step, 24, was saved: it is done", site.said("aborts"))
    assert site.cluster.job(job)["Restarts"] == "0"


def test_a_killed_rank(site, unbroken):
    job = site.submit("rank", "nodes=2", pace=PACE)
    site.wait_for_step("rank", 10)
    os.kill(site.statuses("rank")[1]["child"], signal.SIGKILL)
    site.wait_for_end("rank", job)
    check_unharmed(site, "rank", unbroken, starts=2)
    (event,) = site.events("rank", "requeued")
    # Told by the one that watched it, as a rule, or by rank 0, to which it no longer answers.
    assert re.fullmatch(r"rank 1 (was killed by SIGKILL \(out of memory\?\)|\(.*\) has died; .*)", event["why"])


def test_a_stuck_rank(site, unbroken):
    """The watchdog of a rank that waits for it ends the job, stopped process included, and names it."""
    job = site.submit("stuck", "nodes=2", "watchdog.timeout=20", "watchdog.slow_timeout=240", pace=PACE)
    site.wait_for_step("stuck", 10)
    stopped = psutil.Process(site.statuses("stuck")[1]["child"])
    stopped.send_signal(signal.SIGSTOP)
    slurm.wait_for(lambda: not stopped.is_running(), "end of the stuck rank", 120)
    site.wait_for_end("stuck", job)
    check_unharmed(site, "stuck", unbroken, starts=2)
    (event,) = site.events("stuck", "requeued")
    assert event["failed"]
    assert event["why"].startswith("rank 1")


def test_a_node_that_is_lost_while_its_processes_live_on(site, unbroken):
    """slurmd is killed, and nothing else: after SlurmdTimeout the run starts elsewhere, and its former start has to go.

    One node with both ranks: no other node's end would end them.
    """
    job = site.submit("lost", "nodes=1", "gpus_per_node=2", pace=5)
    site.wait_for_step("lost", 3)
    node = site.cluster.job(job)["NodeList"]
    former = [psutil.Process(status["child"]) for status in site.statuses("lost")]
    site.cluster.kill(node)
    try:
        slurm.wait_for(lambda: site.cluster.job(job).get("Restarts") == "1", "requeue after SlurmdTimeout", 120)
        assert all(process.is_running() for process in former), "they died before they could do harm: nothing is proved"
        site.wait_for_end("lost", job)
        assert site.cluster.job(job)["NodeList"] != node
        slurm.wait_for(lambda: not any(process.is_running() for process in former), "end of the former start", 30)
    finally:
        site.cluster.start(node)
        slurm.wait_for(lambda: site.cluster.states()[node] == "idle", f"{node} back", 120)
    check_unharmed(site, "lost", unbroken, starts=2)


def test_a_lost_node_of_two(site, unbroken):
    """The batch script's own node falls silent; the run outlasts SlurmdTimeout, which ends the ranks of the other one."""
    job = site.submit("half", "nodes=2", pace=4)
    site.wait_for_step("half", 2)
    node = site.cluster.job(job)["BatchHost"]
    site.cluster.kill(node)
    try:
        site.wait_for_end("half", job)
        nodes = site.cluster.job(job)["NodeList"]
        assert node not in site.cluster.run("scontrol", "show", "hostnames", nodes).split()
    finally:
        site.cluster.start(node)
        slurm.wait_for(lambda: site.cluster.states()[node] == "idle", f"{node} back", 120)
    check_unharmed(site, "half", unbroken, starts=2)


def test_a_controller_that_dies_and_comes_back(site, unbroken):
    """The run goes on without it; told to stop meanwhile, it saves and waits until it can go back to the queue."""
    job = site.submit("controller", "nodes=2", "checkpoint.every=1000", pace=1)
    site.wait_for_step("controller", 4)
    site.cluster.kill("slurmctld")
    try:
        site.wait_for_step("controller", 8)
        for status in site.statuses("controller"):
            os.kill(status["watcher"], signal.SIGUSR2)
        slurm.wait_for(lambda: "Slurm does not answer" in site.said("controller"), "a job that waits for Slurm", 120)
        # A second launch does not take silence for death.
        second = site.launch("controller", "nodes=2")
        assert second.returncode == 2
        assert f"whether Slurm job {job} of this run lives is not known" in second.stderr
    finally:
        site.cluster.start("slurmctld")
    site.wait_for_end("controller", job)
    check_unharmed(site, "controller", unbroken, starts=2, lost=0)
