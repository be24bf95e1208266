"""What else a training script could call for the same result: the expressions that the kernels must beat.

Each takes the arguments of its operation in mcf.kernels and returns the same outputs, to its own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """torch.compile of a function: one graph without breaks, for the shapes that it is called with."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def mask_by_sorting(seed: int, positions: Tensor, view: int, patches: int, keep: int) -> tuple[Tensor, Tensor]:
    """MAE's masks (He et al., CVPR 2022): noise of the device's generator and two argsorts; other ids than ours."""
    noise = torch.rand(len(positions), patches, device=positions.device)
    order = torch.argsort(noise, dim=1)
    return order[:, :keep], torch.argsort(order, dim=1)


def patches_by_unshuffle(images: Tensor, ids: None, patch_size: int) -> Tensor:
    """All patches of float images by `pixel_unshuffle`, whose channels have the order of a convolution's weight."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2).contiguous()


def nce_half(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The contrastive loss as bf16 autocast runs it: half-precision logits, softmax in float32."""
    logits = F.normalize(queries.float(), dim=1).to(keys.dtype) @ keys.T
    return F.cross_entropy(logits.float() / temperature, labels) * (2 * temperature)


class _FlashNce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
        norm = queries.float().norm(dim=1, keepdim=True)
        unit = queries.float() / norm
        q, k = unit.to(keys.dtype)[None, None], keys[None, None]
        if queries.is_cuda:
            flash = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=1 / temperature)
        else:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=1 / temperature)
        mean, lse = flash[0][0, 0].float(), flash[1][0, 0]
        positive = keys[labels].float()
        loss = (lse - (unit * positive).sum(1) / temperature).mean() * (2 * temperature)
        # dL/dq̂ = 2/N (Σ p·k − k₊), and its part along q̂ falls away with the normalisation.
        grad = (mean - positive) * (2 / len(queries))
        grad = (grad - (grad * unit).sum(1, keepdim=True) * unit) / norm
        ctx.save_for_backward(grad.to(queries.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None


def nce_flash(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The contrastive loss through flash attention with v = k.

    The strongest library equivalent: FlashAttention-2 (Dao, arXiv 2307.08691; PyTorch's own build of it) returns
    Σ p·k and the logarithm of Σ exp, of which loss and gradient are made; nothing of size N×M is stored. It splits its
    work over the rows of q alone.
    """
    return _FlashNce.apply(queries, keys, labels, temperature)
