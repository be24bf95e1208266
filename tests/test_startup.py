"""The start of several ranks: what each opens, and that all see the same code and data.

Opens are counted by strace, which sees those of every library; ranks of this machine are what one node is.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from safetensors.torch import save_file

from mcf import caches, checkpoint, snapshot
from mcf.config import Recipe
from mcf.data.shards import load_manifest, sight
from mcf.startup import Sight, compare
from mcf.track.jsonl import read
from mcf.weights import read_teacher


def run_ranks(
    run_dir: Path, ranks: int, before: list[list[str]] | None = None, env: list[dict[str, str]] | None = None
) -> tuple[list[int], list[str]]:
    """Run the ranks of a run, each with a command before Python's; exit statuses and outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", **(env[rank] if env else {})}
        command = [*(before[rank] if before else []), sys.executable, "-m", "mcf.train", f"run={run_dir}"]
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | shared | own,
                cwd=run_dir,  # where no `mcf` hides that of PYTHONPATH
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        return [process.returncode for process in processes], outputs
    finally:
        for process in processes:
            process.kill()


# --- the same everywhere --------------------------------------------------------------------------------------------


def sights(count: int, **odd: Sight) -> list[Sight]:
    usual = [Sight("torch 2", "c0de", "fingerprint 1 of /x", f"n{rank}", "/mcf") for rank in range(count)]
    return [odd.get(f"rank{rank}", sight) for rank, sight in enumerate(usual)]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"rank2": Sight("torch 1", "c0de", "fingerprint 1 of /x", "n2", "/mcf")},
         "rank 2 on n2 has other versions than rank 0 on n0: torch 1, not torch 2; install the same on all nodes"),
        ({"rank0": Sight("torch 2", "01d", "fingerprint 1 of /x", "n0", "/old")},
         "rank 0 on n0 runs other code than rank 1 on n1: 01d in /old, not c0de in /mcf; start all ranks from one folder"),
        ({f"rank{r}": Sight("torch 2", "c0de", "no such folder", "n", "/mcf") for r in (1, 3)},
         "rank 1 on n (and ranks 3) sees other data than rank 0 on n0: no such folder, not fingerprint 1 of /x; give"),
    ],
)  # fmt: skip
def test_the_odd_rank_is_who_differs_from_most(odd, said):
    complaint = compare(sights(5, **odd))
    assert complaint is not None
    assert complaint.startswith(said)


def test_equal_sights_are_no_complaint_and_in_a_tie_rank_0_is_right():
    assert compare(sights(4)) is None
    other = Sight("torch 2", "c0de", "other", "n1", "/mcf")
    complaint = compare(sights(2, rank1=other))
    assert complaint is not None
    assert complaint.startswith("rank 1 on n1 sees other data")


def test_sight_of_a_folder(tmp_path):
    manifest = tiny.shards(tmp_path / "a", samples=20, per_shard=10)
    whole = sight(tmp_path / "a")
    assert manifest.fingerprint in whole
    (tmp_path / "a" / "shard-00001.index.npy").unlink()
    assert sight(tmp_path / "a") == f"{whole} without shard-00001.index.npy"
    (tmp_path / "a" / "shard-00001.tar").unlink()
    assert sight(tmp_path / "a") == f"{whole} without shard-00001.tar and 1 more"
    (tmp_path / "a" / "manifest.json").write_text("{}")
    assert "damaged manifest" in sight(tmp_path / "a")
    assert "no such folder" in sight(tmp_path / "b")


@pytest.fixture
def run_dir(tmp_path) -> Path:
    tiny.shards(tmp_path / "shards")
    run_dir = tmp_path / "run"
    return tiny.write_recipe(run_dir, tiny.recipe(run_dir, tmp_path / "shards", ranks=2, micro_batch=4))


def refused(run_dir: Path, **how) -> str:
    """The one line with which both of two ranks end."""
    statuses, outputs = run_ranks(run_dir, 2, **how)
    assert statuses == [2, 2], outputs
    lines = {line for out in outputs for line in out.splitlines() if line.startswith("error: ")}
    assert not any("Traceback" in out for out in outputs)
    (line,) = lines
    return line


def test_a_rank_with_other_code_is_refused(run_dir):
    snapshot.take(run_dir)
    other = run_dir.parent / "old"
    shutil.copytree(run_dir / "code", other / "code")
    with (other / "code" / "mcf" / "kernels" / "reference.py").open("a") as file:
        file.write("# what somebody tried on one node\n")
    line = refused(run_dir, env=[{"PYTHONPATH": str(run_dir / "code")}, {"PYTHONPATH": str(other / "code")}])
    host = socket.gethostname()
    assert line.startswith(f"error: rank 1 on {host} runs other code than rank 0 on {host}: ")
    assert f"in {other}/code/mcf, not " in line
    # Copies that are equal are equal, wherever they lie: this gets as far as the data.
    shutil.copytree(run_dir / "code", other / "same")
    tiny.write_recipe(run_dir, tiny.recipe(run_dir, run_dir.parent / "none", ranks=2, micro_batch=4))
    line = refused(run_dir, env=[{"PYTHONPATH": str(run_dir / "code")}, {"PYTHONPATH": str(other / "same")}])
    assert "none: no such folder; pack images with" in line


def test_a_rank_that_sees_other_data_under_the_same_path_is_refused(run_dir):
    """Rank 1 in a mount namespace of its own, as a node that has an old copy of the data has its own file system."""
    data = run_dir.parent / "shards"
    old = run_dir.parent / "old"
    tiny.shards(old, samples=60)
    alone = ["unshare", "--mount", "sh", "-c", f"mount --bind '{old}' '{data}' && exec \"$@\"", "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a mount namespace here")
    line = refused(run_dir, before=[[], alone])
    host = socket.gethostname()
    theirs, ours = load_manifest(old).fingerprint, load_manifest(data).fingerprint
    assert line == (
        f"error: rank 1 on {host} sees other data than rank 0 on {host}: fingerprint {theirs} of {data}, not fingerprint "
        f"{ours} of {data}; give all nodes the same folder of shards"
    )


# --- opens ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_are_opened_no_more_often_on_more_ranks(tmp_path):
    """Resumed runs on 1, 2, 4 ranks, and 2 on two nodes: recipe, manifest, checkpoint and teacher are rank 0's to open,
    and the index of a shard is opened by the rank whose stream reads it. The sums do not depend on the number of ranks;
    a further node looks at the manifest once."""
    if shutil.which("strace") is None or subprocess.run(["strace", "-f", "true"], capture_output=True).returncode:
        if os.environ.get("MCF_REQUIRE_SLURM"):
            pytest.fail("strace is not there or may not trace, and nothing may be skipped for it")
        pytest.skip("needs strace, and the right to trace")
    # A host name of its own is what makes a node.
    node2 = ["unshare", "--uts", "sh", "-c", 'hostname node2 && exec "$@"', "sh"]
    if subprocess.run([*node2, "true"], capture_output=True).returncode:
        pytest.skip("cannot give a process another host name here")
    data, teacher = tmp_path / "shards", tmp_path / "teacher" / "teacher.safetensors"
    # Of 8 streams each reads one of the 8 shards, whole, as one window.
    tiny.shards(data, samples=240, per_shard=30)
    values = tiny.recipe(
        tmp_path / "run", data, batch=8, micro_batch=8, data__streams=8, data__window=1024,
        model__projection__batch_norm="synchronised",
    )  # fmt: skip
    teacher.parent.mkdir()
    tensors = read_teacher(Recipe.model_validate(values).teacher, image_size=tiny.SIZE)
    assert tensors is not None
    save_file(tensors, teacher)
    values["teacher"] |= {"source": "timm", "path": str(teacher)}
    values["train"] |= {"stop_after": 1}
    tiny.write_recipe(tmp_path / "run", values)
    assert tiny.run(tmp_path / "run") == 0, tiny.said(tmp_path / "run")

    total, others = {}, {}
    for size, nodes in ((1, 1), (2, 1), (4, 1), (2, 2)):
        run_dir = tmp_path / f"run-{size}-{nodes}"
        shutil.copytree(tmp_path / "run", run_dir)
        tiny.write_recipe(run_dir, values | {"gpus_per_node": size, "micro_batch": 8 // size})
        traces = [tmp_path / f"trace-{size}-{nodes}-{rank}" for rank in range(size)]
        strace = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=open,openat,openat2", "-o"]
        before = [[*(node2 if rank == nodes - 1 > 0 else []), *strace, str(traces[rank])] for rank in range(size)]
        # The second node's name is in no table of hosts.
        statuses, outputs = run_ranks(run_dir, size, before=before, env=[{"GLOO_SOCKET_IFNAME": "lo"}] * size)
        assert statuses == [0] * size, outputs
        assert [e["step"] for e in read(run_dir / "events.jsonl") if e["kind"] == "resumed"] == [1]
        opens = [opened(trace, run_dir, data, teacher) for trace in traces]
        total[size, nodes] = sum(opens, Counter())
        others[size, nodes] = set().union(*opens[1:])

    first = checkpoint.steps(tmp_path / "run")[0].name
    whole = {"recipe.yaml", "manifest.json", "teacher.safetensors", "shard-00000.index.npy", "shard-00000.tar"}
    whole |= {f"{first}/{name}" for name in ("MANIFEST.json", "run.json", "weights.safetensors")}
    assert whole <= total[1, 1].keys(), "the trace does not see what it should count"
    assert total[2, 1] == total[1, 1]
    assert total[4, 1] == total[1, 1]
    assert total[2, 2] == total[1, 1] + Counter({"manifest.json": 1})
    # Beside their shards the other ranks open nothing of these.
    for ranks in ((2, 1), (4, 1)):
        assert {name.split(".", 1)[1] for name in others[ranks]} == {"index.npy", "tar"}, others[ranks]


def opened(trace: Path, run_dir: Path, data: Path, teacher: Path) -> Counter[str]:
    """How often each shared input was opened, by name: of the data, the teacher, the recipe and the first checkpoint."""
    names: Counter[str] = Counter()
    first = checkpoint.steps(run_dir)[0]
    for line in trace.read_text().splitlines():
        found = re.search(r'open(?:at2?)?\((?:AT_FDCWD, )?"([^"]+)"', line)
        # Folders are opened too, to be listed. A call that another thread's cuts in two has its path in the first half.
        if found is None or "O_DIRECTORY" in line or " = -1 " in line:
            continue
        path = Path(found[1])
        if path.parent == first:
            names[f"{first.name}/{path.name}"] += 1
        elif path.parent == data or path in (teacher, run_dir / "recipe.yaml"):
            names[path.name] += 1
    return names


# --- caches ---------------------------------------------------------------------------------------------------------


def test_caches_lie_on_the_nodes_own_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in caches.CACHES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_CACHE_PATH", "/chosen")
    folder = caches.keep_local()
    assert folder == tmp_path / f"mcf-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert os.environ["CUDA_CACHE_PATH"] == "/chosen"
    assert caches.keep_local() == folder


@pytest.mark.parametrize("trap", ["writable by others", "a link"])
def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch, trap):
    """Compiled kernels are run: what lies in a shared /tmp under the expected name may be somebody else's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in caches.CACHES:
        monkeypatch.delenv(variable, raising=False)
    expected = tmp_path / f"mcf-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "theirs").mkdir()
        expected.symlink_to(tmp_path / "theirs")
    else:
        expected.mkdir()
        expected.chmod(0o777)
    folder = caches.keep_local()
    assert folder != expected
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(folder))


def test_caches_stay_where_they_are_if_nothing_may_be_run_below_tmp(tmp_path, monkeypatch):
    """Triton and inductor load what they have compiled; a mount without execution refuses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in caches.CACHES:
        monkeypatch.delenv(variable, raising=False)
    flags = SimpleNamespace(f_flag=os.statvfs(tmp_path).f_flag | os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda _: flags)
    assert caches.keep_local() is None
    assert not list(tmp_path.iterdir()) and not any(variable in os.environ for variable in caches.CACHES)


def test_triton_and_torch_take_the_caches(tmp_path):
    """What the libraries themselves say, in a process that imports them after the trainer has set the variables."""
    code = (
        "from mcf import caches; folder = caches.keep_local(); "
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; "
        "from torch.utils.cpp_extension import _get_build_directory as build; "
        "print(folder); print(cache_dir()); print(build('x', False))"
    )
    env = {name: value for name, value in os.environ.items() if name not in caches.CACHES}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | {"TMPDIR": str(tmp_path)}, timeout=120
    )
    folder, *places = done.stdout.split()
    assert folder == str(tmp_path / f"mcf-{os.getuid()}"), done.stderr
    assert len(places) == 2
    assert all(cache.startswith(folder) for cache in places)
