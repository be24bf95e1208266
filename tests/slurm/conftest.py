"""One Slurm cluster for all tests of it; where its programs are missing they are skipped, or fail if CI says so."""

from __future__ import annotations

import cluster as slurm
import pytest
from runs import Site, require_slurm


@pytest.fixture(scope="session")
def cluster():
    """Four nodes."""
    require_slurm()
    with slurm.Cluster(4) as running:
        yield running


@pytest.fixture(scope="session")
def site(cluster, tmp_path_factory) -> Site:
    """The folder that most tests share."""
    return Site(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def unbroken(site) -> str:
    """Name of a run on two nodes that nothing happened to."""
    job = site.submit("unbroken", "nodes=2")
    site.wait_for_end("unbroken", job)
    return "unbroken"
