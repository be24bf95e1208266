"""The collectives on two processes and one, and what a rank has of its host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from mcf import distributed
from mcf.distributed import cpu_quota
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE, USER_ERROR


def test_cpu_quota(tmp_path):
    limits = tmp_path / "cpu.max"
    assert cpu_quota(limits) == float("inf")
    limits.write_text("250000 100000\n")
    assert cpu_quota(limits) == 2.5
    limits.write_text("max 100000\n")
    assert cpu_quota(limits) == float("inf")


COLLECTIVES = """
import os, time, torch
from mcf.distributed import *
from mcf.distributed import gather_objects
from mcf.errors import UserError
from mcf.spread import Spread
world = join(timeout=60)
r, n = world.rank, world.size
assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (str(r), str(n), str(world.local_rank))
assert os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"]) > 0
assert world.device.type == "cpu" and world.is_main == (r == 0) and world.local_size == n

keys = torch.full((2, 3), float(r), requires_grad=True)
every = gather(keys)
assert every.shape == (n, 2, 3) and not every.requires_grad
assert torch.equal(every, torch.arange(n).float()[:, None, None].expand(n, 2, 3))
number = gather(torch.tensor(r))
strided = torch.arange(6).view(2, 3).t() + r
assert torch.equal(gather(strided)[-1], torch.arange(6).view(2, 3).t() + n - 1)
assert number.tolist() == list(range(n)) and number.shape == (n,)
assert gather(torch.empty(0, 4)).shape == (n, 0, 4)
assert gather(torch.tensor([r == 0])).tolist() == [[i == 0] for i in range(n)]

# On its way it waits for nobody: the last rank comes a second late, and the others find that out when they ask.
barrier()
began = time.monotonic()
if n > 1 and r == n - 1:
    time.sleep(1)
sent = torch.full((4,), float(r))
gathering = Gathering(sent)
started = time.monotonic() - began
result = gathering.result()
assert torch.equal(result, torch.arange(n).float()[:, None].expand(n, 4)) and gathering.result() is result
if n > 1 and r < n - 1:
    assert started < 0.5 < time.monotonic() - began

x = torch.tensor([1.0, 10.0 * r])
assert mean(x).tolist() == [1.0, 5.0 * (n - 1)] and x.tolist() == [1.0, 10.0 * r]
assert any_rank(r == n - 1) is True and any_rank(False) is False
assert broadcast({"run": r, "name": "a" * 5000})["run"] == 0
assert gather_objects(("rank", r)) == [("rank", i) for i in range(n)]
barrier()

called = []
assert from_main(lambda: called.append(r) or {"by": r}) == {"by": 0} and called == [0] * (r == 0)
def refuse():
    raise UserError("rank 0 says no")
try:
    from_main(refuse)
    raise AssertionError("refused on rank 0 alone")
except UserError as error:
    assert str(error) == "rank 0 says no"

tensors = {
    "matrix": torch.arange(12.0).view(3, 4).t(), "count": torch.tensor(7), "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]), "half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
}
spread = Spread(lambda: tensors if r == 0 else called.append("twice"), world.device)
assert list(spread) == list(tensors) and spread.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
# In any order, so long as it is the same on all; one that nobody asks for is not sent.
for name in ("half", "empty", "matrix", "count", "matrix"):
    got = spread[name]
    assert got.dtype == tensors[name].dtype and torch.equal(got, tensors[name]), name
assert torch.equal(dict(spread)["flags"], tensors["flags"]) and "twice" not in called
try:
    Spread(refuse, world.device)
    raise AssertionError("refused on rank 0 alone")
except UserError:
    pass

cores = len(os.sched_getaffinity(0))
assert 1 <= world.cores <= max(1, cores // n)
assert set_threads(world) == world.cores == torch.get_num_threads()
assert set_threads(world, 1) == 1 == torch.get_num_threads()
leave(); leave()
print("done")
"""


def clean_env() -> dict[str, str]:
    started = ("SLURM_", "SUBMITIT_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(started)}


def run_ranks(code: str, envs: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit code and output of one process an environment, started together."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", "-c", code],
            env=clean_env() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for env in envs
    ]
    try:
        texts = [rank.communicate(timeout=120)[0] for rank in ranks]
        return [(rank.returncode, text) for rank, text in zip(ranks, texts)]
    finally:
        for rank in ranks:
            rank.kill()


def test_collectives_of_one():
    assert run_ranks(COLLECTIVES, [{}]) == [(0, "done\n")]


def test_collectives_of_two_slurm_tasks():
    """Started as srun would, meeting on the host of the step and the port drawn from the job's number."""
    shared = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    envs = [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    assert run_ranks(COLLECTIVES, envs) == [(0, "done\n")] * 2


def test_no_meeting_is_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code = "from mcf.distributed import join\ntry: join(timeout=1)\nexcept Exception as e: print(type(e).__name__, e.status, e)"
    ((status, text),) = run_ranks(code, [env])
    assert status == 0
    assert f"UserError {UNAVAILABLE} rank 1 of 2 could not join the group at 127.0.0.1:{port} over gloo" in text


def test_two_ranks_on_one_gpu_are_told_and_not_tried_again(monkeypatch):
    """In NCCL's words, which comes to it late."""
    monkeypatch.setattr(os, "environ", {**os.environ})  # joining leaves variables
    monkeypatch.setattr(distributed, "_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    said = "NCCL error ... ncclInvalidUsage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"

    def refuse(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(distributed.dist, "init_process_group", refuse)
    with pytest.raises(
        UserError, match=r"two ranks compute on one GPU \(rank 0 on cuda:0\); start as many .*\(gpus_per_node\)"
    ) as error:
        distributed.join()
    assert error.value.status == USER_ERROR


def test_gpus_that_torch_cannot_use_are_no_reason_to_compute_on_the_cpu(tmp_path, caplog, monkeypatch):
    """Sixteen nodes of GPUs would compute on their CPUs until the time is up."""
    (tmp_path / "0000:1b:00.0").mkdir()
    given = [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "GPU-4c1d"},
        {"SLURM_JOB_GPUS": "0-7"},
        {"SLURM_STEP_GPUS": "3"},
    ]
    for env in given:
        with pytest.raises(
            UserError, match=r"was given GPUs \(.*\), but torch .*; mend that, or set CUDA_VIS"
        ) as caught:
            distributed._expect_no_gpu(env, tmp_path)
        assert caught.value.status == UNAVAILABLE
    for hidden in ("", " ", "-1", "NoDevFiles"):  # Slurm's word for none of a node's
        distributed._expect_no_gpu({"CUDA_VISIBLE_DEVICES": hidden, "SLURM_JOB_GPUS": "0"}, tmp_path)
    distributed._expect_no_gpu({}, tmp_path / "nothing")
    assert not caplog.records
    distributed._expect_no_gpu({}, tmp_path)
    (record,) = caplog.records
    assert "has GPUs, but torch" in record.getMessage() and "computing on the CPU" in record.getMessage()
    # It is asked of a process that finds none.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="was given GPUs"):
        distributed._device(0)


@pytest.mark.parametrize(("quota", "share"), [(float("inf"), 2), (9.0, 2), (4.5, 1), (0.5, 1)])
def test_a_rank_s_share_of_cores_is_of_its_own_host(world, monkeypatch, quota, share):
    """Ranks of this host whose cores are others take none of its four, and a container's quota is all ranks' of the host."""
    here = socket.gethostname()
    ranks = [(here, (0, 1, 2, 3)), (here, (2, 3, 4)), (here, (8, 9)), *[("elsewhere", (0, 1, 2, 3))] * 5]
    monkeypatch.setattr(distributed, "gather_objects", lambda _: ranks)
    monkeypatch.setattr(distributed, "available_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(distributed, "cpu_quota", lambda: quota)
    joined = distributed.join()
    assert (joined.local_size, joined.cores) == (3, share)
