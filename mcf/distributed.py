"""The process group: who this rank is, which device it has, and the few collectives the project needs.

`join` meets the other ranks where the environment says (mcf/rendezvous.py), starts the group (NCCL with a GPU, gloo
without), and leaves every variable behind that DeepSpeed looks for.
Collectives work on the default group, carry no gradient, and do the same at world size 1 as at any other.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcf.errors import UserError
from mcf.exits import UNAVAILABLE
from mcf.rendezvous import rendezvous

log = logging.getLogger(__name__)

T = TypeVar("T")
# torch 2.13 renamed the collective and warns about the old name, which 2.10 alone knows.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Seconds that a collective of a watched run waits for a rank: longer than the watchdog, which knows more and says more.
PATIENCE = 3 * 3600.0


@dataclass(frozen=True)
class World:
    """This rank among all.

    rank: 0 … size−1. size: number of ranks. local_rank: number among the ranks of this host. local_size: ranks on this
    host. device: where tensors of this rank live. host: name of the machine. cores: CPU cores that are this rank's
    share (cores it may run on, divided by the ranks of this host that may run on them too; at least 1). timeout: seconds
    after which a collective that not all ranks reach ends the run, for groups that others make.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host: str
    cores: int
    timeout: float = PATIENCE

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0


def join(backend: str | None = None, timeout: float = 1800.0) -> World:
    """Join the process group that the environment describes; a world of one where it describes none.

    Args:
        backend: torch's name of a backend; default nccl with a CUDA device, gloo without.
        timeout: seconds after which a collective that not all ranks reach ends the run. Long, since the first step
            compiles kernels on some ranks while others wait; DeepSpeed's own default of 10 minutes is not used.

    Raises:
        UserError: variables that contradict each other or are missing, no device for this rank, or no meeting.
    """
    place = rendezvous(os.environ)
    device = _device(place.local_rank)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        # DeepSpeed takes LOCAL_RANK for the number of the device, which is 0 for all where each sees one GPU only.
        LOCAL_RANK=str(device.index or 0) if device.type == "cuda" else str(place.local_rank),
        MASTER_ADDR=place.address or "127.0.0.1",
        MASTER_PORT=str(place.port or 29500),
    )
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout)
        try:
            if place.size == 1:
                # A store inside the process: no port, hence nothing that two runs on one machine could fight over.
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
            else:
                if backend == "nccl":
                    os.environ.setdefault("NCCL_DEBUG", "WARN")  # what goes wrong there, NCCL alone can tell
                dist.init_process_group(backend, init_method="env://", timeout=limit)
            gather_objects(None)  # NCCL connects here, and not before
        except (RuntimeError, ValueError) as error:
            if "Duplicate GPU" in str(error):
                raise UserError(
                    f"{socket.gethostname()}: two ranks compute on one GPU (rank {place.rank} on {device}); start as many ranks a "
                    "node as it has GPUs (gpus_per_node)"
                ) from error
            raise UserError(
                f"rank {place.rank} of {place.size} could not join the group at {place.address}:{place.port} over "
                f"{backend}: {error}; check that all ranks started and that MASTER_ADDR is reachable from each",
                UNAVAILABLE,
            ) from error
    host = socket.gethostname()
    # A list of pairs, one a rank: ranks of one host share cores where their affinities overlap.
    everyone = gather_objects((host, tuple(sorted(available_cores()))))
    here = [set(cores) for other, cores in everyone if other == host]
    mine = available_cores()
    sharers = sum(1 for cores in here if cores & mine)
    share = max(1, int(min(len(mine) / sharers, cpu_quota() / len(here))))
    return World(place.rank, place.size, place.local_rank, len(here), device, host, share, timeout)


def leave() -> None:
    """Leave the group; harmless where none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        _expect_no_gpu(os.environ)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise UserError(
            f"local rank {local_rank} has no GPU: this process sees {count}; start as many ranks a node as it has GPUs "
            "(gpus_per_node)"
        )
    device = torch.device("cuda", local_rank if local_rank < count else 0)
    torch.cuda.set_device(device)
    return device


def _expect_no_gpu(env: Mapping[str, str], there: Path = Path("/proc/driver/nvidia/gpus")) -> None:
    """Refuse to compute on the CPU where this process was given GPUs that torch cannot use; say so where there are some."""
    shown = env.get("CUDA_VISIBLE_DEVICES", "").strip()
    given = shown or env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS")
    why = (
        f"torch {torch.__version__} is a build without CUDA" if torch.version.cuda is None else
        f"torch {torch.__version__} cannot use them, which nvidia-smi may explain (CUDA 13 needs a driver from 580 on)"
    )  # fmt: skip
    if "CUDA_VISIBLE_DEVICES" in env and shown in ("", "-1", "NoDevFiles"):
        return
    if given:
        raise UserError(
            f"{socket.gethostname()}: this process was given GPUs ({given}), but {why}; mend that, or set "
            "CUDA_VISIBLE_DEVICES to nothing to compute on the CPU",
            UNAVAILABLE,
        )
    if any(there.glob("*")):
        log.warning("%s has GPUs, but %s: computing on the CPU", socket.gethostname(), why)


def available_cores() -> set[int]:
    """Numbers of the CPU cores this process may run on."""
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:  # no such call on macOS
        return set(range(os.cpu_count() or 1))


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores' worth of time that a container's cgroup grants to all its processes together; infinite without a limit."""
    try:
        quota, period = path.read_text().split()[:2]
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def set_threads(world: World, threads: int | None = None) -> int:
    """Give torch this many CPU threads (train.threads), or the rank's share of cores; returns the number."""
    number = threads or world.cores
    torch.set_num_threads(number)
    return number


def gather(tensor: Tensor) -> Tensor:
    """`tensor` of every rank: [W, …] in the order of ranks, without gradient.

    Args:
        tensor: […], the same shape on all ranks, on the group's device.
    """
    return Gathering(tensor).result()


class Gathering:
    """A `gather` on its way: what is computed until its result is asked for does not wait for other ranks."""

    def __init__(self, tensor: Tensor):
        tensor = tensor.detach().contiguous()
        self._result = tensor.new_empty((dist.get_world_size(), *tensor.shape))
        self._work: Any = None
        # Flat views: gloo and NCCL then agree on what a tensor without dimensions, or an empty one, means.
        if tensor.numel():
            self._work = _all_gather(self._result.view(-1), tensor.view(-1), async_op=True)

    def result(self) -> Tensor:
        """[W, …], as `gather` gives it. On a GPU the stream waits for it, and not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


def gather_on(tensor: Tensor, rank: int) -> Tensor | None:
    """`gather` for what one rank alone has room for: [W, …] on `rank`, None on the others."""
    tensor = tensor.detach().contiguous()
    size, here = dist.get_world_size(), dist.get_rank() == rank
    parts = [torch.empty_like(tensor) for _ in range(size)] if here else None
    dist.gather(tensor, parts, dst=rank)
    return torch.stack(parts) if parts is not None else None


def gather_objects(value: T) -> list[T]:
    """Any picklable value of every rank, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` (floating point) over the ranks, as a new tensor, the same on all."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank: the same answer on all."""
    agreed = torch.tensor(int(flag), device=_group_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return bool(agreed.item())


def broadcast(value: T) -> T:
    """Rank 0's value (picklable) on every rank; what other ranks pass is ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_group_device())
    return box[0]


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0 (picklable), on every rank; the others do not call it.

    For files that all ranks need: one reads them. A UserError on rank 0 is raised on all.
    """
    made: T | UserError | None = None
    if dist.get_rank() == 0:
        try:
            made = make()
        except UserError as error:
            made = error
    made = broadcast(made)
    if isinstance(made, UserError):
        raise made
    return made  # type: ignore[return-value]  # None only where `make` returned it


def barrier() -> None:
    """Wait until all ranks are here."""
    any_rank(False)


def _group_device() -> torch.device:
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
