"""DeepSpeed as this project has it: imported without its guesses, and told everything that it would choose itself."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mcf.config import Recipe
from mcf.errors import missing_package
from mcf.zero import bucket, persistent


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, kept from guessing, compiling and talking."""
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        if (error.name or "").split(".")[0] != "deepspeed":
            raise
        raise missing_package("deepspeed", "training") from error
    # On the CPU it would compile its shared-memory collectives at first use, which needs g++, ninja and Python's
    # headers and saves nothing beside gloo here. Writing the table also spares the probing of all other extensions.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        # With it, a GPU that CUDA_VISIBLE_DEVICES names otherwise than by a number is an error.
        deepspeed.accelerator.cuda_accelerator.pynvml = None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It calls collectives by names that torch has since replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def give_group(seconds: float) -> None:
    """Give DeepSpeed its own group of all ranks, which it would keep for ever and let wait for torch's ten minutes.

    Collective. A process may have left the default group that an earlier engine of it stood in, and joined another:
    what DeepSpeed kept of that one would fail at its first collective. `seconds`: how long this one waits for a rank.
    """
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is not None:
        try:
            dist.get_global_rank(groups._WORLD_GROUP, 0)
        except ValueError:  # not a group of this default group
            groups._WORLD_GROUP = None
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=seconds))


def deepspeed_config(
    recipe: Recipe, model: nn.Module, stage: int, accumulation: int, persist: int | None
) -> dict[str, Any]:
    size = sum(parameter.numel() for parameter in model.parameters())
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket(size)}
    if stage in (1, 2):
        # The norm is ours; DeepSpeed's would cost a second pass and a host synchronisation a parameter group.
        zero["compute_grad_norm"] = False
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": persistent(size) if persist is None else persist,
            # Its defaults keep whole whatever comes back within 10⁹ elements, and fetch ahead as much: of the models
            # here everything, from the first forward to the last backward, and nothing were saved by splitting.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * bucket(size),
            "stage3_prefetch_bucket_size": bucket(size),
        }
    return {
        "train_micro_batch_size_per_gpu": recipe.local_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        # Not the bf16 section, which would cast parameters and break BatchNorm. No module is "safe" for gradients
        # reduced in bfloat16: all are reduced in float32.
        "torch_autocast": {
            "enabled": recipe.train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "communication_data_type": "fp32",
        # Its default is 1: the reference does not clip.
        "gradient_clipping": 0.0,
        # Its throughput timer synchronises the device at every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
