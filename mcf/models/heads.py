"""Projector and predictor of the contrastive branch, and their BatchNorm.

class token ──► projector (both branches) ──► predictor (the trained branch only) ──► query
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcf.config import HeadsConfig
from mcf.errors import UserError
from mcf.models.vit import Linear


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over [B, width] in float32, also under autocast, with the statistics of this rank or of all ranks.

    Synchronised, the sums, squares and counts of all ranks are added up by one all-reduce (one more in the backward
    pass), on any device and backend; as in PyTorch's own, gradients are those of the sum of all ranks' losses, which
    averaging over ranks turns into those of the mean.

    Raises:
        UserError: in training, fewer than two samples to take statistics of.
    """

    def __init__(self, width: int, *, affine: bool = True, synchronised: bool = False):
        super().__init__(width, affine=affine)
        self.synchronised = synchronised

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            if self.training and self.synchronised and _ranks() > 1:
                return self._over_all_ranks(x)
            if self.training and len(x) < 2:
                raise _too_few("this rank")
            return super().forward(x)

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        # One vector of sums, squares and count; in float64, where E[x²] − E[x]² loses nothing that float32 had. What is
        # as long as x stays in float32: sums are of what is left beside this rank's mean, which no square cancels.
        middle = x.detach().mean(0)
        rest, shift = x - middle, middle.double()
        total, count = rest.sum(0, dtype=torch.float64), len(x)
        squares = rest.square().sum(0, dtype=torch.float64) + shift * (2 * total + count * shift)
        sums = torch.cat([total + count * shift, squares, squares.new_full((1,), count)])
        total, squares, count = _AllReduce.apply(sums).split([self.num_features, self.num_features, 1])
        # A tensor still: to know its value, the host would have to wait for the device.
        samples = count.detach()
        if len(x) < 2 and float(samples) < 2:
            raise _too_few("all ranks together")
        mean = total / samples
        variance = (squares / samples - mean.square()).clamp(min=0)
        self._track(mean.detach(), variance.detach() * (samples / (samples - 1)))
        out = (x - mean.float()) * (variance + self.eps).rsqrt().float()
        return out * self.weight + self.bias if self.affine else out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; PyTorch's keep the unbiased variance."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_(variance.float(), self.momentum)


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; every rank's result depends on every rank's input, so gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def projector(width: int, config: HeadsConfig) -> nn.Sequential:
    """Class token [B, width] → [B, dim]: Linear, BatchNorm, ReLU, Linear, BatchNorm without affine; no biases."""
    return nn.Sequential(
        *_hidden(width, config), BatchNorm(config.dim, affine=False, synchronised=_synchronised(config))
    )


def predictor(config: HeadsConfig) -> nn.Sequential:
    """Projection [B, dim] → query [B, dim]: Linear, BatchNorm, ReLU, Linear; no biases."""
    return nn.Sequential(*_hidden(config.dim, config))


def _hidden(width: int, config: HeadsConfig) -> list[nn.Module]:
    return [
        Linear(width, config.hidden, bias=False),
        BatchNorm(config.hidden, synchronised=_synchronised(config)),
        nn.ReLU(inplace=True),
        Linear(config.hidden, config.dim, bias=False),
    ]


def _synchronised(config: HeadsConfig) -> bool:
    return config.batch_norm == "synchronised"


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _too_few(who: str) -> UserError:
    return UserError(
        f"BatchNorm of the heads: {who} has a single sample, which has no variance; raise micro_batch to 2 or more, "
        "or set model.projection.batch_norm=synchronised over several ranks"
    )
