"""What all tests share: real data where it is at hand, quiet third parties, one process group at most."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mcf import distributed

# A machine's GPUs are for the tests that ask for one (`make test-gpu`): several ranks could not share one, and a run on a
# GPU is not equal to the last bit of one on a CPU.
if not os.environ.get("MCF_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Before anything imports them: MLflow and DALI speak at import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import torch

# Some tests send it to what they start, which ignores it where this was started in a shell's background.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports Triton, which decides at the decoration of a kernel. Without a GPU, kernels run in its
# interpreter where a test asks for them by name; `auto` stays the reference on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's tests first, since they wait more than they work, and of them the file that takes longest.

    Tests of a GPU are skipped, and say so, where there is none; and those of float8 where torch has no such products.
    """
    items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, item.path.stem != "test_slurm_survive"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    _skip_float8(items)


def _skip_float8(items: list[pytest.Item]) -> None:
    """torch has float8 products by rows on a CPU in releases later than 2.11; a GPU has them of its own."""
    marked = [item for item in items if item.get_closest_marker("float8")]
    if marked:
        from mcf.models import float8

        if why := float8.unavailable(torch.device("cpu")):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=why))


def _beside(folder: str) -> Path:
    path = SHARED / folder
    if not path.exists():
        if os.environ.get("MCF_REQUIRE_SHARED"):
            pytest.fail(f"{path} is not there, and MCF_REQUIRE_SHARED says that nothing may be skipped for it")
        pytest.skip(f"needs {folder} of ../shared, which is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real faces: ../shared/data (never part of the repository)."""
    return _beside("data")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """One step of the reference as numbers: ../shared/golden."""
    return _beside("golden")


@pytest.fixture(scope="module")
def world() -> Iterator[distributed.World]:
    """A world of one on one thread, and afterwards the environment as it was: other tests start processes."""
    from mcf import distributed

    before, threads = dict(os.environ), torch.get_num_threads()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    yield distributed.join()
    distributed.leave()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def place(tmp_path):
    """A place to launch in, with a stub for the trainer; what was started there ends with the test."""
    from launch_stub import Place

    place = Place(tmp_path)
    yield place
    place.close()
