"""Sixteen nodes: one process on each, and the losses of the same run on one."""

import cluster as slurm
import pytest
from runs import Site, require_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_sixteen_nodes_compute_what_one_does(tmp_path):
    """`nodes=16`: ranks of one sample each. One rank accumulates over the same sixteen samples.

    With BatchNorm over all ranks and every key of the step as a negative, ranks change only the order of float32 sums.
    1e-4 relative is what issue 4 promises; a single misplaced sample changes the third digit.
    """
    require_slurm()
    with slurm.Cluster(16) as cluster:
        site = Site(
            cluster, tmp_path, batch=16, data__streams=16, contrast__scope="step", momentum__update="step",
            model__projection__batch_norm="synchronised",
        )  # fmt: skip
        many = site.submit("many", "nodes=16", "micro_batch=1", "train.steps=12")
        site.wait_for_end("many", many, seconds=900)
        assert cluster.job(many)["NumNodes"] == "16"
        one = site.submit("one", "nodes=1", "micro_batch=16", "train.steps=12")
        site.wait_for_end("one", one)
        assert site.starts("many", ranks=16) == site.starts("one", ranks=1) == [list(range(1, 13))]
        assert [event["ranks"] for event in site.events("many", "started")] == [16]
        assert len({status["watcher"] for status in site.statuses("many")}) == 16
        ours, theirs = site.numbers("many"), site.numbers("one")
    assert ours.keys() == theirs.keys()
    for step in ours:
        for term in ("loss/total", "loss/feature", "loss/contrast", "grad_norm"):
            assert ours[step][term] == pytest.approx(theirs[step][term], rel=1e-4), (step, term)
