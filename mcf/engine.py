"""The optimiser step over all ranks: the one place that knows DeepSpeed.

    pred, q = engine(images, ids_keep, ids_restore)       bf16 autocast if the recipe says so; state stays float32
    engine.backward(loss)                                 once a micro-batch; gradients are averaged over micro-batches and ranks
    result = engine.step(lr)                              once a step; refuses a non-finite gradient, on all ranks alike

Two habits differ from DeepSpeed's own. Whether a step is applied is decided here, before the optimiser is touched: one
number (the gradient norm) and one flag are agreed by all ranks in one all-reduce and one host synchronisation. And state
is saved in a layout that knows neither ranks nor ZeRO stages, because DeepSpeed's own files open only where they were
written. Everything that reaches into DeepSpeed's optimisers stands in the three `_Stage…` classes at the end.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcf.config import Recipe
from mcf.distributed import World
from mcf.errors import UserError, missing_package
from mcf.spread import Spread
from mcf.zero import bucket, persistent

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    applied: whether weights, moments and counters changed. grad_norm: L2 norm of the averaged gradient over all
    parameters, float32 accuracy, the same on all ranks; inf or nan where that is why the step was refused.
    """

    applied: bool
    grad_norm: float


class Engine:
    """Trains a module with AdamW under ZeRO stage 0, 1, 2 or 3; on one rank always 0 (`stage` says which).

    The weights of rank 0 are copied to all ranks at construction. What copies the module (the momentum branch) is built
    before it, from the same seed on all ranks, since stage 3 leaves each rank only its pieces. Every parameter must be
    trainable; what is not trained stays outside.

    Args:
        model: the trained module, float32; it is moved to the rank's device.
        recipe: its optimizer, train.precision, train.zero_stage and local_batch are read.
        accumulation: micro-batches a step; `backward` counts them.
        world: this rank; the process group must stand (`mcf.distributed.join`).
        persist: parameters of up to this many elements are not split under stage 3; `mcf.zero.persistent` if None.
        groups: AdamW's groups instead of `parameter_groups`; a group's `lr_scale` multiplies the rate of each step.

    Raises:
        UserError: DeepSpeed is not installed.
        ValueError: a parameter that is not float32 or not trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        accumulation: int,
        world: World,
        persist: int | None = None,
        groups: list[dict[str, Any]] | None = None,
    ):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name} is frozen or not float32: the engine trains all, in float32")
        deepspeed = _import_deepspeed(world.device)
        self.world = world
        self.accumulation = accumulation
        self.applied_steps = 0
        self._micro_step = 0
        model.to(world.device)
        # Fused: one pass over the flat state, on the CPU too (elementwise, so repeatable), and no host
        # synchronisation for the step counter on a GPU.
        optimizer = torch.optim.AdamW(
            groups or parameter_groups(model, recipe.optimizer.weight_decay),
            lr=0.0,  # told at every step
            betas=recipe.optimizer.betas,
            eps=recipe.optimizer.eps,
            fused=True,
        )
        # One rank has nobody to split with: stages 1 to 3 would only keep a second copy of its weights.
        self.stage = recipe.train.zero_stage if world.size > 1 else 0
        config = _deepspeed_config(recipe, model, self.stage, accumulation, persist)
        self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if world.size == 1:
            # There is nobody to average with, and DeepSpeed would still copy all gradients together and apart again.
            self._deepspeed.enable_backward_allreduce = False
        self.module: nn.Module = self._deepspeed.module
        self._parameters = dict(self.module.named_parameters())
        self._stage: _Stage = _STAGES[self.stage](self._deepspeed, list(self._parameters.values()), world)
        self._keep_buffers()

    @property
    def at_boundary(self) -> bool:
        """Whether the next micro-batch is the last of its step."""
        return self._micro_step == self.accumulation - 1

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward, under autocast where train.precision is bf16. Collective under stage 3.

        Forward and backward alternate: one `backward` for one forward with gradient. Forwards under `torch.no_grad`
        may stand between them.
        """
        return self._deepspeed(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss (a scalar, the mean over this rank's samples) to the step's.

        Do not divide the loss by anything: the gradient that is applied is the mean over the step's micro-batches and
        over ranks. Collective.
        """
        if self._micro_step == self.accumulation:
            raise RuntimeError(f"backward after all {self.accumulation} micro-batches of the step: call step() first")
        # Set by hand rather than left to DeepSpeed's counter, which a discarded step would leave in the middle.
        self._deepspeed.set_gradient_accumulation_boundary(self.at_boundary)
        self._deepspeed.backward(loss)
        self._micro_step += 1

    def step(self, lr: float, finite: Tensor | bool = True) -> StepResult:
        """Apply the step at learning rate `lr`, or nothing where the gradient or a rank's `finite` flag forbids it.

        A refused step changes neither parameters nor moments, buffers or counters, and the next one starts clean. A norm
        beyond 1e19 overflows float32 and counts as not finite. One host synchronisation (stage 3 has more of its own);
        collective.

        Args:
            lr: learning rate of all parameters.
            finite: whether this rank saw only finite losses: bool tensor of any shape (on the device), or a bool.
        """
        if self._micro_step != self.accumulation:
            raise RuntimeError(f"step after {self._micro_step} of {self.accumulation} micro-batches")
        device = self.world.device
        refused = torch.as_tensor(finite, device=device).logical_not().any().double()
        square = torch.nn.utils.get_total_norm(self._stage.gradients()).to(device).double().square()
        verdict = torch.stack([square, refused])
        dist.all_reduce(verdict)
        square_sum, refusals = verdict.tolist()
        norm = math.sqrt(square_sum) if square_sum >= 0 else math.nan
        if refusals or not math.isfinite(norm):
            self.discard()
            return StepResult(False, norm)
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._stage.apply(norm)
        self._keep_buffers()
        self._micro_step = 0
        self.applied_steps += 1
        return StepResult(True, norm)

    def discard(self) -> None:
        """Forget the micro-batches since the last step, on all ranks: gradients, and what buffers took from them."""
        self._stage.clear_gradients()
        # A batch with one NaN would otherwise stay in BatchNorm's running statistics for ever.
        for buffer, kept in zip(self.module.buffers(), self._kept_buffers):
            buffer.detach().copy_(kept)
        self._micro_step = 0

    @property
    def splits_parameters(self) -> bool:
        """Whether this rank holds only pieces of the parameters (stage 3 on several ranks)."""
        return isinstance(self._stage, _StageSharded) and self.world.size > 1

    def local_parameters(self) -> dict[str, Tensor]:
        """Name → what this rank holds of the float32 parameter, to be read and not to be written; no communication.

        The whole parameter, or where the engine `splits_parameters` this rank's piece: flat, ⌈n / ranks⌉ long, the last
        one padded.
        """
        return {name: self._stage.local(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def whole(self, prefix: str) -> dict[str, Tensor]:
        """Whole float32 parameters and buffers of the part of the module that `prefix` (`encoder.`) opens, without it.

        On every rank, to be read and not to be written. Collective under stage 3.
        """
        parts = {name: self._stage.read(p, None) for name, p in self._parameters.items() if name.startswith(prefix)}
        parts |= {name: buffer for name, buffer in self._buffers().items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor.detach() for name, tensor in parts.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All state of training, full and on the CPU on rank 0; empty elsewhere. Collective.

        `model.NAME` holds float32 parameters and buffers, `exp_avg.NAME` and `exp_avg_sq.NAME` AdamW's moments,
        `applied_steps` (int64) its step count. Buffers are rank 0's: with per-rank BatchNorm the running statistics of
        the others are given up, which training never reads (batch statistics are used), so losses go on unchanged.
        """
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for moment in (None, *MOMENTS):
                full = self._stage.read(parameter, moment)
                if self.world.is_main:
                    state[f"{moment or 'model'}.{name}"] = full.detach().to("cpu", copy=True)
        if self.world.is_main:
            for name, buffer in self._buffers().items():
                state[f"model.{name}"] = buffer.detach().to("cpu", copy=True)
            state["applied_steps"] = torch.tensor(self.applied_steps)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, under any number of ranks and any ZeRO stage. Collective.

        Every rank passes the whole mapping of CPU tensors; with a `Spread`, which all ranks then ask in the same order,
        one rank reads and the others hold one tensor at a time.
        Pending gradients are discarded.

        Raises:
            UserError: a name is missing or too many, or a shape differs; nothing is changed then.
        """
        buffers = self._buffers()
        shapes = {f"model.{name}": tuple(buffer.shape) for name, buffer in buffers.items()}
        for name, parameter in self._parameters.items():
            shapes |= {f"{prefix}.{name}": self._stage.shape(parameter) for prefix in ("model", *MOMENTS)}
        _check_layout(state, shapes | {"applied_steps": ()})

        self.discard()
        for name, parameter in self._parameters.items():
            self._stage.write(parameter, None, state[f"model.{name}"])
            for moment in MOMENTS:
                self._stage.write(parameter, moment, state[f"{moment}.{name}"])
        for name, buffer in buffers.items():
            buffer.copy_(state[f"model.{name}"])
        self.applied_steps = int(state["applied_steps"])
        self._stage.set_step_count(self.applied_steps)
        self._stage.publish()
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        """Remember the buffers (BatchNorm's statistics, a few kB) for a step that is refused."""
        self._kept_buffers = [buffer.detach().clone() for buffer in self.module.buffers()]

    def _buffers(self) -> dict[str, Tensor]:
        kept = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: `weight_decay`, and none for biases and whatever has one dimension or less.

    The rule is the reference's (timm's for MAE): class and mask token, of shape [1, 1, width], are decayed.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _check_layout(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = state.shapes if isinstance(state, Spread) else {name: tuple(state[name].shape) for name in state}
    missing, surplus = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or surplus:
        raise UserError(
            f"the checkpoint does not fit the model of the recipe: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3]) or 'none'}), {len(surplus)} are unknown ({', '.join(surplus[:3]) or 'none'}); "
            "use the recipe it was written with"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise UserError(
                f"the checkpoint does not fit the model of the recipe: {name} has shape {list(found[name])}, "
                f"the model needs {list(shape)}; use the recipe it was written with"
            )


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, kept from guessing, compiling and talking."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It calls collectives by names that torch has since replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def _deepspeed_config(
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


class _Stage:
    """ZeRO stage 0: every rank holds everything, and gradients are averaged where autograd leaves them."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter], world: World):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.parameters = parameters
        self.world = world
        # AdamW makes its state at the first step. Made here, a checkpoint has one layout whatever the step, and
        # memory that does not suffice shows before the first batch.
        for flat in self.optimised():
            self.moments[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in MOMENTS},
            }

    @property
    def moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's state, by the tensors that it updates."""
        return self.engine.basic_optimizer.state

    def optimised(self) -> list[Tensor]:
        """The tensors AdamW updates on this rank."""
        return list(self.parameters)

    def gradients(self) -> list[Tensor]:
        """This rank's part of the averaged gradient: over all ranks, every element stands in it exactly once."""
        # Full and equal on all ranks after the reduction, so that one rank speaks for all.
        return [p.grad for p in self.parameters if p.grad is not None] if self.world.is_main else []

    def clear_gradients(self) -> None:
        self.engine.zero_grad()

    def apply(self, norm: float) -> None:
        """Run the optimiser on the gradients; `norm` is theirs, finite."""
        self.engine.step()

    def local(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter."""
        return parameter.detach()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return tuple(parameter.shape)

    def read(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """Full parameter (None) or moment of it; collective."""
        return parameter if moment is None else self.moments[parameter][moment]

    def write(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Set a full parameter (None) or moment of it."""
        (parameter if moment is None else self.moments[parameter][moment]).copy_(value)

    def set_step_count(self, steps: int) -> None:
        """Set AdamW's count of steps."""
        for flat in self.optimised():
            self.moments[flat]["step"].fill_(steps)

    def publish(self) -> None:
        """Make parameters that were written known to the forward pass."""


class _StageSplit(_Stage):
    """ZeRO stages 1 and 2: each rank optimises a slice of the two flat groups; parameters are whole everywhere."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter], world: World):
        super().__init__(engine, parameters, world)
        # Left to itself DeepSpeed ties the moments to their parameters after the first step.
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def optimised(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def gradients(self) -> list[Tensor]:
        # Slices are padded with zeros, which no norm feels.
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group]

    def clear_gradients(self) -> None:
        # What DeepSpeed does itself when a float16 step overflows.
        self.optimizer.zero_grad(set_to_none=True)
        for buffers in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
            for group in buffers:
                buffers[group] = None
        self.optimizer.micro_step_id = -1

    def read(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return parameter if moment is None else safe_get_full_optimizer_state(parameter, moment)

    def write(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moment is None:
            parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)


class _StageSharded(_Stage):
    """ZeRO stage 3: of every parameter each rank holds one piece of equal length, the last one padded."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter], world: World):
        super().__init__(engine, parameters, world)
        self._norm = math.nan
        # DeepSpeed has no switch for its own norm under this stage (a collective and a host synchronisation a group).
        self.optimizer._get_norm_groups = lambda: [torch.tensor(self._norm)]

    def optimised(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def gradients(self) -> list[Tensor]:
        pieces = []
        for group, gradients in self.optimizer.averaged_gradients.items():
            for parameter, piece in zip(self.optimizer.fp16_groups[group], gradients):
                real = parameter.ds_numel - self.world.rank * piece.numel()
                pieces.append(piece.view(-1)[: max(0, real)])
        return pieces

    def clear_gradients(self) -> None:
        # The beginning of DeepSpeed's own step and its way out of an overflow.
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.averaged_gradients = {}
        self.optimizer._post_step(set())

    def apply(self, norm: float) -> None:
        self._norm = norm
        super().apply(norm)

    def local(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor.detach()

    def shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def read(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    def write(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        length = parameter.ds_tensor.numel()
        piece = value.flatten()[self.world.rank * length :][:length]
        piece = nn.functional.pad(piece, (0, length - piece.numel()))
        if moment is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, moment)

    def publish(self) -> None:
        self.optimizer._partition_all_parameters()
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer._post_step(set())


_STAGES = {0: _Stage, 1: _StageSplit, 2: _StageSplit, 3: _StageSharded}
