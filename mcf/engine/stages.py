"""What the engine does under each ZeRO stage: everything that reaches into DeepSpeed's optimisers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mcf.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class Stage:
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


class Split(Stage):
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


class Sharded(Stage):
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


STAGES = {0: Stage, 1: Split, 2: Split, 3: Sharded}
