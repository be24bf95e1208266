"""Every operation and shape that is measured: inputs, what computes it, and what it must cost at least.

Bytes count each input once and each output once, as they lie in memory; operations count the multiplications and
additions of matrix products (everything else hides behind the memory). Letters as in `mcf.kernels.reference`; S is an
image's side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcf import kernels
from mcf.kernels import reference
from mcf.kernels.bench import baselines

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
T = 0.2

OPERATIONS = ("mask", "patch_gather", "token_restore", "feature_tap", "feature_loss", "info_nce", "info_nce_statistics")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """What one pass must do: bytes moved, operations of matrix products, and the time that is asked of it."""

    bytes: int
    operations: int = 0
    accept_us: float | None = None
    """The accepted time on an H200 in microseconds (issue 3)."""
    accept_floor: float | None = None
    """The accepted time in multiples of the floor."""

    def floor_us(self, bandwidth: float, throughput: float) -> float:
        """Microseconds that a machine needs at least, of so many bytes/s and operations/s."""
        return 1e6 * max(self.bytes / bandwidth, self.operations / throughput)


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], tuple[Any, ...]]
    """Arguments of the operation, on the generator's device."""
    truth: Function
    """The reference; it is called with float64 where the arguments are floating point."""
    functions: dict[str, Function]
    """What is measured, by name; `triton` first. All but that one are baselines."""
    forward: Work
    backward: Work | None = None
    learn: tuple[int, ...] = ()
    """Which arguments get a gradient."""
    weight: float = 1.0
    """The gradient from above of scalar outputs."""
    ungated: frozenset[str] = field(default_factory=frozenset)
    """Baselines that compute something of the same kind, but not the same."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def passes(self) -> dict[str, Work]:
        """The passes that are timed, each with its work."""
        if self.backward is None:
            return {"forward": self.forward}
        both = Work(self.forward.bytes + self.backward.bytes, self.forward.operations + self.backward.operations)
        return {"forward": self.forward, "backward": self.backward, "both": both}


def cases(sizes: str, dtype: torch.dtype) -> list[Case]:
    """All cases; `full` ones have the shapes of training on a large GPU, the accepted first, `small` ones run anywhere.

    Args:
        sizes: "small" or "full".
        dtype: of activations: bfloat16 as in training, float32 where Triton is interpreted.
    """
    if sizes == "full":
        return [
            _nce(1024, 65536, 256, dtype, accept_us=180),
            _nce(1024, 4096, 256, dtype, accept_us=25),
            # One tap a case: four of them make a step.
            _feature(1024, 197, 768, dtype),
            _patches(1024, 224, 16, 49, dtype, accept_us=45),
            _restore(1024, 196, 49, 512, dtype, accept_us=90),
            _mask(1024, 196, 49, accept_us=15),
            _image_patches(1024, 224, 16, None, dtype),
            _patches(1024, 224, 16, None, dtype),
            _feature(1024, 197, 768, dtype, axis="channels"),
            _nce(512, 4096, 256, dtype),
            _nce(1024, 16384, 256, dtype),
            _nce(4096, 65536, 256, dtype),
            _nce(1024, 4096, 256, dtype, statistics=True),
            _nce(1024, 512, 256, dtype, groups=8),
            _feature(1024, 197, 768, dtype, op="feature_loss"),
            _feature(256, 197, 768, dtype),
            _feature(512, 257, 1280, dtype),
            _patches(1024, 224, 14, 64, dtype),
            _image_patches(1024, 224, 16, 49, dtype),
            _patches(256, 448, 16, 196, dtype),
            _restore(1024, 196, 49, 512, dtype, stream=torch.float32),
            _restore(1024, 256, 64, 512, dtype),
            _restore(256, 784, 196, 512, dtype),
            _mask(4096, 196, 49),
            _mask(1024, 1024, 256),
        ]  # fmt: skip
    return [
        _mask(5, 63, 15),
        _patches(5, 56, 14, 4, dtype),
        _patches(3, 64, 16, None, dtype),
        _image_patches(3, 64, 16, None, dtype),
        _image_patches(3, 56, 14, 5, dtype),
        _restore(5, 63, 15, 96, dtype),
        _feature(3, 63, 80, dtype),
        _feature(3, 63, 80, dtype, axis="channels"),
        _feature(2, 197, 63, dtype, op="feature_loss"),
        _nce(63, 197, 64, dtype),
        _nce(100, 1000, 256, dtype),
        _nce(40, 63, 96, dtype, groups=4),
        _nce(63, 197, 512, dtype, statistics=True),
    ]


def _mask(batch: int, patches: int, keep: int, accept_us: float | None = None) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        # Positions beyond 2³², as late in a long run.
        start = int(torch.randint(2**40, (), generator=generator, device=generator.device))
        positions = torch.arange(start, start + batch, device=generator.device)
        return 7, positions, kernels.ENCODER, patches, keep

    return Case(
        op="mask",
        shape=f"B={batch} L={patches} K={keep}",
        dtype=torch.int64,
        make=make,
        truth=reference.mask,
        functions={
            "triton": partial(kernels.mask, implementation="triton"),
            "eager": reference.mask,
            "compile": baselines.compiled(reference.mask),
            "library": baselines.mask_by_sorting,
        },
        forward=Work(8 * batch * (1 + patches + keep), accept_us=accept_us),
        ungated=frozenset({"library"}),
    )


def _patches(
    batch: int, side: int, patch: int, keep: int | None, dtype: torch.dtype, accept_us: float | None = None
) -> Case:
    patches = (side // patch) ** 2
    width = 3 * patch * patch
    count = patches if keep is None else keep

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        device = generator.device
        images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device, generator=generator)
        return images, _kept(device, batch, patches, keep), patch, MEAN, STD

    def plain(*arguments: Any) -> Tensor:
        return reference.patch_gather(*arguments).to(dtype)

    return Case(
        op="patch_gather",
        shape=f"uint8 B={batch} S={side} P={patch} K={count}",
        dtype=dtype,
        make=make,
        truth=reference.patch_gather,
        functions={
            "triton": partial(kernels.patch_gather, dtype=dtype, implementation="triton"),
            "eager": plain,
            "compile": baselines.compiled(plain),
        },
        forward=Work(batch * count * ((0 if keep is None else 8) + width * (1 + dtype.itemsize)), accept_us=accept_us),
    )


def _image_patches(batch: int, side: int, patch: int, keep: int | None, dtype: torch.dtype) -> Case:
    patches = (side // patch) ** 2
    count = patches if keep is None else keep

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        return _normal(generator, dtype, batch, 3, side, side), _kept(generator.device, batch, patches, keep), patch

    picked = batch * count * 3 * patch * patch * dtype.itemsize
    image = batch * 3 * side * side * dtype.itemsize
    ids = 0 if keep is None else 8 * batch * count
    functions: dict[str, Function] = {
        "triton": partial(kernels.patch_gather, implementation="triton"),
        "eager": reference.patch_gather,
        "compile": baselines.compiled(reference.patch_gather),
    }
    if keep is None:
        functions["library"] = baselines.patches_by_unshuffle
    return Case(
        op="patch_gather",
        shape=f"float B={batch} S={side} P={patch} K={count}",
        dtype=dtype,
        make=make,
        truth=reference.patch_gather,
        functions=functions,
        forward=Work(2 * picked + ids),
        # The gradient of a whole image is written, zeros too.
        backward=Work(picked + image + ids),
        learn=(0,),
    )


def _restore(
    batch: int,
    patches: int,
    keep: int,
    width: int,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    accept_us: float | None = None,
) -> Case:
    stream = stream or dtype  # the type of the position table, and so of the result

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        device = generator.device
        ids = reference.mask(0, torch.arange(batch, device=device), 0, patches, keep)[1]
        tokens = _normal(generator, dtype, batch, 1 + keep, width)
        # A parameter, which is float32 whatever the activations are.
        mask_token = _normal(generator, torch.float32, 1, 1, width)
        return tokens, mask_token, _normal(generator, stream, 1, 1 + patches, width), ids

    rows = batch * width
    moved = Work(
        rows * ((1 + keep) * dtype.itemsize + (1 + patches) * stream.itemsize) + 8 * batch * patches,
        accept_us=accept_us,
    )
    onto = "" if stream == dtype else f" onto_{str(stream).removeprefix('torch.')}"
    return Case(
        op="token_restore",
        shape=f"B={batch} L={patches} K={keep} D={width}{onto}",
        dtype=dtype,
        make=make,
        truth=reference.token_restore,
        functions={
            "triton": partial(kernels.token_restore, implementation="triton"),
            "eager": reference.token_restore,
            "compile": baselines.compiled(reference.token_restore),
        },
        forward=moved,
        backward=moved,
        learn=(0, 1),
    )


def _feature(
    batch: int, tokens: int, width: int, dtype: torch.dtype, axis: str = "tokens", op: str = "feature_tap"
) -> Case:
    tap = op == "feature_tap"
    kernel, plain = (getattr(module, op) for module in (kernels, reference))

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        return _normal(generator, dtype, batch, tokens, width), _normal(generator, dtype, batch, tokens, width), axis

    one = batch * tokens * width * dtype.itemsize
    # The loss's gradient is then about as large as the stream's, a standard normal, and both are seen to be right.
    weight = batch * tokens * width * (tokens if axis == "tokens" else width) / 2.0
    return Case(
        op=op,
        shape=f"B={batch} L+1={tokens} C={width} {axis}",
        dtype=dtype,
        make=make,
        truth=plain,
        functions={
            "triton": partial(kernel, implementation="triton"),
            "eager": plain,
            "compile": baselines.compiled(plain),
        },
        # Both features are read for the loss; for the gradient again, with a tap the stream's too, and one is written.
        forward=Work(2 * one, accept_floor=1.3),
        backward=Work((4 if tap else 3) * one, accept_floor=1.3),
        learn=(0,),
        weight=weight,
    )


def _nce(
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype,
    accept_us: float | None = None,
    groups: int | None = None,
    statistics: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        k = F.normalize(_normal(generator, torch.float32, groups or 1, keys, width), dim=2).to(dtype)
        labels = keys // 3 + torch.arange(queries // (groups or 1), device=generator.device)
        # Every other query is near its own key, as after some training, and the rest is anywhere.
        noise = _normal(generator, torch.float32, groups or 1, len(labels), width)
        near = (torch.arange(len(labels), device=generator.device) % 2 == 0)[:, None]
        q = torch.where(near, k[:, labels].float() + 0.05 * noise, noise).flatten(0, 1).to(dtype)
        return q, k if groups else k[0], labels.repeat(groups or 1), T

    op = "info_nce_statistics" if statistics else "info_nce"
    kernel, plain = (getattr(module, op) for module in (kernels, reference))
    functions: dict[str, Function] = {"triton": partial(kernel, implementation="triton")}
    if not statistics and not groups and dtype == torch.bfloat16:
        functions |= {"eager": baselines.nce_half, "compile": baselines.compiled(baselines.nce_half)}
    else:
        functions |= {"eager": plain, "compile": baselines.compiled(plain)}
    if not statistics and not groups:
        functions["library"] = baselines.nce_flash
    of_groups = f" G={groups}" if groups else ""
    return Case(
        op=op,
        shape=f"N={queries} M={keys} D={width}{of_groups}",
        dtype=dtype,
        make=make,
        truth=plain,
        functions=functions,
        # q·kᵀ and p·k, both in the forward pass; the backward pass scales the gradient that was kept.
        forward=Work(
            dtype.itemsize * width * (2 * queries + keys * (groups or 1)),
            4 * queries * keys * width,
            accept_us=accept_us,
        ),
        backward=Work(2 * queries * width * dtype.itemsize),
        learn=(0,),
    )


def _kept(device: torch.device, batch: int, patches: int, keep: int | None) -> Tensor | None:
    """Ids of the patches that a mask keeps; None for all patches."""
    return None if keep is None else reference.mask(0, torch.arange(batch, device=device), 0, patches, keep)[0]


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=generator.device, dtype=torch.float32, generator=generator).to(dtype)
