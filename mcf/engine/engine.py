"""The optimiser step over all ranks.

    pred, q = engine(images, ids_keep, ids_restore)       bf16 autocast if the recipe says so; state stays float32
    engine.backward(loss)                                 once a micro-batch; gradients are averaged over micro-batches and ranks
    result = engine.step(lr)                              once a step; refuses a non-finite gradient, on all ranks alike

Two habits differ from DeepSpeed's own. Whether a step is applied is decided here, before the optimiser is touched: one
number (the gradient norm) and two flags are agreed by all ranks in one all-reduce and one host synchronisation. And state
is saved in a layout that knows neither ranks nor ZeRO stages, because DeepSpeed's own files open only where they were
written. What reaches into DeepSpeed's optimisers stands in `mcf.engine.stages`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcf.config import Recipe
from mcf.distributed import World
from mcf.engine.library import deepspeed_config, give_group, import_deepspeed
from mcf.engine.reduction import Reduction
from mcf.engine.stages import MOMENTS, STAGES, Sharded, Stage
from mcf.errors import UserError
from mcf.spread import Spread


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    applied: whether weights, moments and counters changed. grad_norm: L2 norm of the averaged gradient over all
    parameters, float32 accuracy, the same on all ranks; inf or nan where that is why the step was refused. stop: whether
    any rank wants to stop.
    """

    applied: bool
    grad_norm: float
    stop: bool = False


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
        deepspeed = import_deepspeed(world.device)
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
        config = deepspeed_config(recipe, model, self.stage, accumulation, persist)
        give_group(world.timeout)
        self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.module: nn.Module = self._deepspeed.module
        self._parameters = dict(self.module.named_parameters())
        self._reduction: Reduction | None = None
        if self.stage == 0:
            # Alone, there is nobody to average with, and DeepSpeed would still copy all gradients together and apart again.
            self._deepspeed.enable_backward_allreduce = False
            if world.size > 1:
                self._reduction = Reduction(list(self._parameters.values()), world.size)
        self._stage: Stage = STAGES[self.stage](self._deepspeed, list(self._parameters.values()), world)
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
        reduction = self._reduction if self.at_boundary else None
        if reduction is not None:
            reduction.begin()
        self._deepspeed.backward(loss)
        if reduction is not None:
            reduction.finish()
        self._micro_step += 1

    def step(self, lr: float, finite: Tensor | bool = True, stop: bool = False) -> StepResult:
        """Apply the step at learning rate `lr`, or nothing where the gradient or a rank's `finite` flag forbids it.

        A refused step changes neither parameters nor moments, buffers or counters, and the next one starts clean. A norm
        beyond 1e19 overflows float32 and counts as not finite. One host synchronisation (stage 3 has more of its own);
        collective.

        Args:
            lr: learning rate of all parameters.
            finite: whether this rank saw only finite losses: bool tensor of any shape (on the device), or a bool.
            stop: whether this rank wants to stop, which all ranks hear; it changes nothing about the step.
        """
        if self._micro_step != self.accumulation:
            raise RuntimeError(f"step after {self._micro_step} of {self.accumulation} micro-batches")
        device = self.world.device
        refused = torch.as_tensor(finite, device=device).logical_not().any().double()
        # A rank may have none; torch's norm of none would lie on the CPU, and be waited for on its way from there.
        gradients = list(self._stage.gradients()) or [torch.zeros((), device=device)]
        square = torch.nn.utils.get_total_norm(gradients).to(device).double().square()
        verdict = torch.stack([square, refused, square.new_full((), float(stop))])
        dist.all_reduce(verdict)
        square_sum, refusals, stops = verdict.tolist()
        norm = math.sqrt(square_sum) if square_sum >= 0 else math.nan
        if refusals or not math.isfinite(norm):
            self.discard()
            return StepResult(False, norm, stops > 0)
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._stage.apply(norm)
        self._keep_buffers()
        self._micro_step = 0
        self.applied_steps += 1
        return StepResult(True, norm, stops > 0)

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
        return isinstance(self._stage, Sharded) and self.world.size > 1

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
