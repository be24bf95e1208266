"""The truth of every operation in plain PyTorch.

Tests and benchmarks compare against this file, and without a GPU it is what runs. Shapes: B images, L patches an
image (a g·g grid, row by row), K of them kept, P patch side in pixels, D token width, C feature width, N queries and
M keys. Everything is differentiable by autograd, computes in float32 at least (float64 stays float64), and is not
touched by an autocast around it.

Random numbers are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is
the seed, the counter is (sample position, patch, view), so that a number is a pure function of what it is for and
never of the device, the number of ranks, or what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ENCODER, MOMENTUM, FLIP = 0, 1, 2
"""Views: the third part of a counter. Masks of the two branches, and the coin of the horizontal flip."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words for each counter: Philox4x32 with 10 rounds.

    Args:
        counter: four int64 tensors of shapes that broadcast, each value a 32-bit word in [0, 2³²).
        key: two 32-bit words.

    Returns:
        Four int64 tensors of the common shape, values in [0, 2³²).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # A product of two words wraps around in int64, but its 64 bits are right; the masks undo the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _words(seed: int, positions: Tensor, patches: Tensor, view: int) -> Tensor:
    """Word 0 of the samples' and patches' counters, int64 in the common shape."""
    counter = (positions & _WORD, positions >> 32 & _WORD, patches, torch.full_like(patches, view))
    return philox(counter, (seed & _WORD, seed >> 32 & _WORD))[0]


def mask(seed: int, positions: Tensor, view: int, patches: int, keep: int) -> tuple[Tensor, Tensor]:
    """Random masks: which patches of each sample stay visible (METHOD 1, "Mask").

    Every patch draws a 32-bit key; the patches in the order of their keys (ties by patch index) are the shuffled
    order, and its first `keep` stay.

    Args:
        seed: the run's seed, any non-negative integer (64 bits of it are used).
        positions: samples seen before each sample, int64 [B].
        view: ENCODER or MOMENTUM.
        patches: number of patches L.
        keep: number of patches that stay visible, 1 to L.

    Returns:
        ids_keep int64 [B, keep], the visible patches in the order of their keys; ids_restore int64 [B, L], the rank
        of each patch's key (a patch is dropped where it is ≥ keep).
    """
    if not 0 < keep <= patches:
        raise ValueError(f"mask: keep={keep} is not in 1..{patches}")
    index = torch.arange(patches, device=positions.device)
    return rank(_words(seed, positions[:, None], index[None], view), keep)


def rank(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The masks that a noise [B, L] stands for: ids_keep [B, keep] and ids_restore [B, L], as `mask` gives them."""
    order = torch.argsort(noise, dim=1, stable=True)
    index = torch.arange(noise.shape[1], device=noise.device).expand_as(order)
    return order[:, :keep], torch.empty_like(order).scatter_(1, order, index)


def uniform(seed: int, positions: Tensor, view: int) -> Tensor:
    """One number in [0, 1) for each position: float32 [B], a multiple of 2⁻²⁴ (exact, so that 1 is never rounded to)."""
    word = _words(seed, positions, torch.zeros_like(positions), view)
    return (word >> 8).to(torch.float32) * 2.0**-24


def patch_gather(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The patches of images as vectors, in the order of a convolution's weight (channel, row, column).

    Args:
        images: uint8 [B, H, W, 3], which are normalised here: (x/255 − mean)/std; or floating point [B, 3, H, W],
            taken as they are (gradients flow back into them).
        ids: the patches that are wanted, int64 [B, K]; None for all, in order.
        patch_size: P, which divides H and W.
        mean, std: of the three channels, for uint8 images.
        dtype: of the result; None: float32 for uint8 images, else the images' type.

    Returns:
        [B, K, 3·P·P].
    """
    if images.dtype == torch.uint8:
        batch, height, width, channels = images.shape
        rows, columns = height // patch_size, width // patch_size
        grid = images.view(batch, rows, patch_size, columns, patch_size, channels).transpose(2, 3)
        flat = grid.reshape(batch, rows * columns, patch_size * patch_size * channels)
        picked = flat if ids is None else flat.gather(1, ids[:, :, None].expand(-1, -1, flat.shape[-1]))
        pixels = picked.view(batch, picked.shape[1], patch_size * patch_size, channels).to(torch.float32) / 255
        # Filled on the device: for a list to be copied there, the host would wait for it.
        means, stds = (torch.stack([pixels.new_full((), value) for value in values]) for values in (mean, std))
        pixels = (pixels - means) / stds
        return pixels.transpose(2, 3).flatten(2).to(dtype or torch.float32)
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    flat = grid.reshape(batch, rows * columns, channels * patch_size * patch_size)
    picked = flat if ids is None else flat.gather(1, ids[:, :, None].expand(-1, -1, flat.shape[-1]))
    return picked.to(dtype or images.dtype)


def token_restore(tokens: Tensor, mask_token: Tensor, position: Tensor, ids_restore: Tensor) -> Tensor:
    """The decoder's input: visible tokens back in their places, the mask token elsewhere, positions added.

    Args:
        tokens: [B, 1+K, D], class token first, then the visible patches in shuffled order.
        mask_token: D values in any shape.
        position: position embedding of class token and patches, [1, 1+L, D] or [1+L, D].
        ids_restore: int64 [B, L], the place of each patch in the shuffled order.

    Returns:
        [B, 1+L, D], in the type that tokens and position promote to: float32 where the table is.
    """
    keep = tokens.shape[1] - 1
    # Dropped patches read the last visible row, which `where` then throws away: their gradient into it is zero.
    index = ids_restore.clamp(max=keep - 1) + 1
    rows = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))
    rows = torch.where((ids_restore < keep)[:, :, None], rows, mask_token.reshape(1, 1, -1).to(rows.dtype))
    return torch.cat([tokens[:, :1], rows], dim=1) + position


def feature_loss(features: Tensor, target: Tensor, axis: str = "tokens", eps: float = 1e-12) -> Tensor:
    """Mean-square difference of L2-normalised features (METHOD 1, "Feature loss").

    Args:
        features, target: [B, 1+L, C], class token included; the target gets no gradient.
        axis: "tokens" normalises each channel over the tokens (the reference), "channels" each token over its channels.
        eps: lower bound of a norm.

    Returns:
        A scalar in [0, 4/(1+L)] for "tokens" and [0, 4/C] for "channels", float32 at least.
    """
    dim = {"tokens": 1, "channels": 2}[axis]
    with torch.autocast(features.device.type, enabled=False):
        ours = F.normalize(_precise(features), dim=dim, eps=eps)
        theirs = F.normalize(_precise(target.detach()), dim=dim, eps=eps)
        return F.mse_loss(ours, theirs)


def feature_tap(features: Tensor, target: Tensor, axis: str = "tokens", eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """`feature_loss` where the features pass: (features, for whatever comes after; the loss). Arguments as there."""
    return features, feature_loss(features, target, axis, eps)


def info_nce(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The contrastive loss 2T · cross-entropy(q̂·kᵀ/T, label) (METHOD 1; MoCo v3's scale, one direction).

    Args:
        queries: [N, D], not yet normalised.
        keys: [M, D], of length 1, without gradient. Or [G, M, D]: the queries are then G runs of N/G, each of which
            meets keys of its own.
        labels: the key that belongs to each query, int64 [N] in [0, M).
        temperature: T > 0.

    Returns:
        A scalar, float32 at least.
    """
    return F.cross_entropy(_cosines(queries, keys) / temperature, labels) * (2 * temperature)


class InfoNCE(NamedTuple):
    """The contrastive loss, and of what it is made; means over the queries. The loss alone has a gradient."""

    loss: Tensor
    positive: Tensor
    """Cosine of a query and its own key."""
    negative: Tensor
    """Cosine of a query and the other keys; 0 where there are none."""
    entropy: Tensor
    """Of the softmax over the keys, nats, in [0, log M]: log M where all keys look alike."""
    accuracy: Tensor
    """Share of queries that are nearer to their own key than to any other by more than rounding, a cosine of 1e-5."""


def info_nce_statistics(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> InfoNCE:
    """`info_nce` with its statistics, scalars of the loss's type. Arguments as there."""
    cosines = _cosines(queries, keys)
    logits = cosines / temperature
    loss = F.cross_entropy(logits, labels) * (2 * temperature)
    with torch.no_grad():
        own = cosines.gather(1, labels[:, None])
        others = cosines.scatter(1, labels[:, None], -torch.inf)
        return InfoNCE(
            loss,
            positive=own.mean(),
            negative=(cosines.sum() - own.sum()) / (len(cosines) * max(cosines.shape[1] - 1, 1)),
            entropy=torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean(),
            accuracy=(own > others.amax(dim=1, keepdim=True) + 1e-5).to(cosines.dtype).mean(),
        )


def _cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Of every query and every key that it meets, [N, M]."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(_precise(queries), dim=1)
        keys = keys.detach().to(queries.dtype)
        if keys.dim() == 3:
            runs = queries.view(len(keys), -1, queries.shape[1])
            return torch.einsum("gnd,gmd->gnm", runs, keys).flatten(0, 1)
        # einsum and not @: its gradient is added up as the reference's, to the last bit.
        return torch.einsum("nd,md->nm", queries, keys)


def _precise(x: Tensor) -> Tensor:
    """float32 at least: half precisions are widened, float64 is left alone (gradients are checked in it)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
