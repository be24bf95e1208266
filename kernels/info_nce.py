"""The contrastive loss, its gradient and its statistics in one pass over the keys: nothing of size N×M exists.

Keys have length 1 and get no gradient. With cosines s_j = q̂·k_j of a query, p = softmax(s/T) over the keys and l its
own key,

    loss = 2T·(−log p_l)           d loss / d q = 2/‖q‖ · (I − q̂q̂ᵀ)·(Σ_j p_j k_j − k_l)          (mean over N queries)

and Σ p_j k_j is attention with the keys for values, so that one tile of keys, loaded once, serves both products
(FlashAttention's forward pass: Dao et al. 2022). Beside it only Z = Σ exp(s_j/T) is kept. The own key is left out of
both sums and comes back at the end, from float32: with Z⁻ and m⁻ = Σ p⁻_j k_j of the others alone,

    −log p_l = log(1 + Z⁻/e_l)     Σ_j p_j k_j − k_l = (1 − p_l)·(m⁻ − k_l)                        e_l = exp(s_l/T)

which keeps its digits when the model is sure (p_l → 1), whatever the precision of the products. Queries go into the
product as they are and the cosine is divided out of its result, so that no query is rounded a second time.

    _pass      one program = a block of queries × a run of the keys ──► Z⁻, max s, Σ s, Σ exp(s/T)·k   (partial)
    _combine   one program = a query: adds the partial sums of all runs; loss, gradient, statistics

Since |s| ≤ 1 the constant 1/T will do for the softmax's maximum, and partial sums simply add. The smallest term is then
exp(−2/T), which float32 holds up to 2/T = 85; for a smaller T the maximum is followed as it goes (ONLINE). Runs are
added in their order, never atomically: the result is the same to the bit every time.

Floor: 4·N·M·D operations, for one read of the keys (M·D values). The runs' sums, S·N·D float32, stay in the L2 cache.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mcf.kernels import reference
from mcf.kernels.dispatch import choose, expect_device, expect_dtype, expect_shape
from mcf.kernels.reference import InfoNCE
from mcf.kernels.triton_or_none import tl, triton
from mcf.kernels.tuning import Config, Variant, chip_of, config, type_of

WIDEST = 512
"""Dimensions of the widest keys: a program holds a block of queries and a tile of keys whole."""
NARROWEST = 64
"""Narrower keys are padded to this; matrix instructions want that much."""
CONSTANT_MAXIMUM = 85.0
"""The largest 2/T whose exp(−2/T) is a normal float32."""


@triton.jit
def _block(p_rows, o_rows, o_d, m_rows, width, FULL: tl.constexpr, DOT: tl.constexpr):
    """Rows of a matrix, columns o_d of them, in the type of the products; FULL: none is missing, of none a part."""
    offsets = o_rows[:, None] * width + o_d[None, :]
    if FULL:
        rows = tl.load(p_rows + offsets)
    else:
        rows = tl.load(p_rows + offsets, mask=m_rows[:, None] & (o_d < width)[None, :], other=0.0)
    return rows.to(DOT)


@triton.jit(do_not_specialize=["queries", "keys", "runs", "tiles"])
def _pass(
    p_queries,
    p_keys,
    p_labels,
    p_sums,
    p_means,
    queries,
    keys,
    width,
    runs,
    tiles,
    scale,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    FULL: tl.constexpr,
    ONLINE: tl.constexpr,
    DOT: tl.constexpr,
):
    blocks = tl.cdiv(queries, N)
    i_program = tl.program_id(0)
    i_block, i_run, i_group = i_program % blocks, i_program // blocks % runs, i_program // (blocks * runs)
    o_n, o_m, o_d = i_block * N + tl.arange(0, N), tl.arange(0, M), tl.arange(0, D)
    m_n = o_n < queries
    o_rows = i_group * queries + o_n
    label = tl.load(p_labels + o_rows, mask=m_n, other=-1).to(tl.int32)
    q = _block(p_queries, o_rows.to(tl.int64), o_d, m_n, width, False, tl.float32)
    # exp(s/T) = 2^(product·factor); the constant maximum in the same units is `scale`.
    factor = scale / tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12)
    q = q.to(DOT)

    z, total = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    best = tl.full([N], float("-inf"), tl.float32)
    mean = tl.zeros([N, D], tl.float32)
    first = i_run * tiles
    p_tile = p_keys + (i_group.to(tl.int64) * keys + first.to(tl.int64) * M) * width
    for i_tile in range(first, tl.minimum(first + tiles, tl.cdiv(keys, M))):
        o_keys = i_tile * M + o_m
        m_m = o_keys < keys
        k = _block(p_tile, o_m, o_d, m_m, width, FULL, DOT)
        if STEP == D:
            product = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        else:
            # In float32 the queries' block alone would take all registers: a few columns at a time, from the cache.
            product = tl.zeros([N, M], tl.float32)
            for d in range(0, D, STEP):
                o_step = d + tl.arange(0, STEP)
                b_q = _block(p_queries, o_rows.to(tl.int64), o_step, m_n, width, False, DOT)
                b_k = _block(p_tile, o_m, o_step, m_m, width, FULL, DOT)
                product = tl.dot(b_q, tl.trans(b_k), product, input_precision="tf32x3")
        total += tl.sum(product, 1)
        product = tl.where(o_keys[None, :] == label[:, None], float("-inf"), product)
        if not FULL:
            product = tl.where(m_m[None, :], product, float("-inf"))
        above = tl.maximum(best, tl.max(product, 1))
        if ONLINE:
            # 0 where there was nothing but the own key so far: −inf − −inf is no number.
            top = tl.where(above > float("-inf"), above * factor, 0.0)
            shrink = tl.exp2(best * factor - top)
            z, mean = z * shrink, mean * shrink[:, None]
            p = tl.exp2(product * factor[:, None] - top[:, None])
        else:
            p = tl.exp2(product * factor[:, None] - scale)
        z += tl.sum(p, 1)
        mean = tl.dot(p.to(DOT), k, mean, input_precision="tf32x3")
        best = above
        p_tile += M * width

    rows = tl.num_programs(0) // (blocks * runs) * queries
    o_out = i_run * rows + o_rows
    tl.store(p_sums + o_out, z, mask=m_n)
    tl.store(p_sums + runs * rows + o_out, best, mask=m_n)
    tl.store(p_sums + 2 * runs * rows + o_out, total, mask=m_n)
    p_out = p_means + o_out.to(tl.int64)[:, None] * width + o_d[None, :]
    tl.store(p_out, mean, mask=m_n[:, None] & (o_d < width)[None, :])


@triton.jit(do_not_specialize=["rows", "queries", "keys", "runs"])
def _combine(
    p_queries,
    p_keys,
    p_labels,
    p_sums,
    p_means,
    p_values,
    p_grad,
    rows,
    queries,
    keys,
    width,
    runs,
    scale,
    temperature,
    share,
    share_others,
    D: tl.constexpr,
    RUNS: tl.constexpr,
    ONLINE: tl.constexpr,
):
    i_row = tl.program_id(0)
    o_d, o_r = tl.arange(0, D), tl.arange(0, RUNS)
    m_d = o_d < width
    label = tl.load(p_labels + i_row)
    known = (label >= 0) & (label < keys)
    q = tl.load(p_queries + i_row.to(tl.int64) * width + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_own = p_keys + ((i_row // queries).to(tl.int64) * keys + label) * width
    own = tl.load(p_own + o_d, mask=m_d & known, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(q * q, 0))
    inverse = 1 / tl.maximum(norm, 1e-12)
    factor = scale / tl.maximum(norm, 1e-12)
    cosine = tl.sum(q * own, 0) * inverse

    # Many runs at a time, so that their loads wait for memory together.
    best, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, runs, RUNS):
        m_r = first + o_r < runs
        p_run = p_sums + (first + o_r) * rows + i_row
        best = tl.maximum(best, tl.max(tl.load(p_run + runs * rows, mask=m_r, other=float("-inf")), 0))
        total += tl.sum(tl.load(p_run + 2 * runs * rows, mask=m_r, other=0.0), 0)
    top = tl.where(best > float("-inf"), best * factor, 0.0) if ONLINE else scale
    z, mean = tl.full([], 0.0, tl.float32), tl.zeros([D], tl.float32)
    for first in range(0, runs, RUNS):
        m_r = first + o_r < runs
        p_run = p_sums + (first + o_r) * rows + i_row
        p_mean = p_means + ((first + o_r).to(tl.int64) * rows + i_row)[:, None] * width + o_d[None, :]
        b_z = tl.load(p_run, mask=m_r, other=0.0)
        b_mean = tl.load(p_mean, mask=m_r[:, None] & m_d[None, :], other=0.0)
        if ONLINE:
            b_best = tl.load(p_run + runs * rows, mask=m_r, other=float("-inf"))
            weight = tl.exp2(b_best * factor - top)
            b_z, b_mean = b_z * weight, b_mean * weight[:, None]
        z += tl.sum(b_z, 0)
        mean += tl.sum(b_mean, 0)

    # log(Z⁻/e_l), and from it the loss and 1 − p_l; without any other key both are 0.
    odds = 0.6931471805599453 * (tl.log2(z) + top - cosine * scale)
    loss = tl.maximum(odds, 0.0) + tl.log(1 + tl.exp(-tl.abs(odds)))
    others = 1 / (1 + tl.exp(-odds))
    direction = others * (mean / tl.where(z > 0, z, 1.0) - own)
    along = tl.sum(q * direction, 0) * inverse
    # A norm under the bound is a constant.
    removed = tl.where(norm < 1e-12, 0.0, along * inverse)
    grad = (direction - removed * q) * (2 * share * inverse)
    tl.store(p_grad + i_row.to(tl.int64) * width + o_d, grad, mask=m_d)

    # A label that is none: no number, since nobody may stop the device to look.
    loss = tl.where(known, loss, float("nan"))
    tl.store(p_values + i_row, loss * (2 * temperature * share))
    tl.store(p_values + rows + i_row, cosine * share)
    tl.store(p_values + 2 * rows + i_row, (total * inverse - cosine) * share_others)
    tl.store(p_values + 3 * rows + i_row, (loss - along / temperature) * share)
    tl.store(p_values + 4 * rows + i_row, tl.where(cosine > best * inverse + 1e-5, share, 0.0))


# ---------------------------------------------------------------------------------------------------------- launching


def _cut(kind: str, width: int, chip: str) -> tuple[dict[str, Any], int, Config]:
    """Constexprs of `_pass` that follow from types and sizes, programs that one multiprocessor runs at once, the row."""
    padded = max(NARROWEST, triton.next_power_of_2(width))
    row = config("info_nce/pass", f"{kind} {padded}", chip)
    sizes = {"N": row.blocks["N"], "M": row.blocks["M"], "D": padded, "STEP": row.blocks.get("STEP", padded)}
    # The interpreter multiplies bfloat16 as if it were integers.
    dot = tl.bfloat16 if kind == "bf16" and chip != "interpreter" else tl.float32
    return {**sizes, "DOT": dot}, row.blocks["PROGRAMS"], row


@cache
def _multiprocessors(device: torch.device) -> int:
    return 4 if chip_of(device) == "interpreter" else torch.cuda.get_device_properties(device).multi_processor_count


@torch.library.custom_op("mcf::info_nce", mutates_args=())
def _info_nce(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; positive, negative, entropy, accuracy [4]; d loss / d queries [N, D]. All float32."""
    dtype = torch.bfloat16 if torch.bfloat16 in (queries.dtype, keys.dtype) else torch.float32
    queries, keys, labels = queries.to(dtype).contiguous(), keys.to(dtype).contiguous(), labels.contiguous()
    rows, width = queries.shape
    count, groups = keys.shape[-2], keys.shape[0] if keys.dim() == 3 else 1
    chip = chip_of(queries.device)
    constexprs, at_once, row = _cut(type_of(dtype), width, chip)
    # As many runs of the keys as keep the device busy, each of whole tiles.
    blocks, tiles = triton.cdiv(rows // groups, constexprs["N"]) * groups, triton.cdiv(count, constexprs["M"])
    wanted = max(1, min(tiles, _multiprocessors(queries.device) * at_once // blocks))
    tiles = triton.cdiv(tiles, wanted)
    runs = triton.cdiv(count, tiles * constexprs["M"])

    full = count % constexprs["M"] == 0 and width == constexprs["D"]
    online = 2 / temperature > CONSTANT_MAXIMUM
    scale = 1.4426950408889634 / temperature
    sums = queries.new_empty(3, runs, rows, dtype=torch.float32)
    means = queries.new_empty(runs, rows, width, dtype=torch.float32)
    values, grad = queries.new_empty(5, rows, dtype=torch.float32), queries.new_empty(rows, width, dtype=torch.float32)
    with torch.cuda.device_of(queries):
        _pass[(blocks * runs,)](
            queries, keys, labels, sums, means, rows // groups, count, width, runs, tiles, scale,
            **constexprs, FULL=full, ONLINE=online, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
        row = config("info_nce/combine", "any", chip)
        _combine[(rows,)](
            queries, keys, labels, sums, means, values, grad, rows, rows // groups, count, width, runs,
            scale, temperature, 1 / rows, 1 / (max(count - 1, 1) * rows), D=constexprs["D"], **row.blocks, ONLINE=online,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return values[0].sum(), values[1:].sum(dim=1), grad


@_info_nce.register_fake
def _(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    loss, values, grad = (queries.new_empty(size, dtype=torch.float32) for size in ((), (4,), queries.shape))
    return loss, values, grad


@torch.library.custom_op("mcf::info_nce_backward", mutates_args=())
def _scaled(grad_loss: Tensor, kept: Tensor, queries: Tensor) -> Tensor:
    """The gradient that was kept, times the one from above, in the queries' type.

    An operator, and of the queries, so that a second derivative is refused: what was kept would pass for a constant.
    """
    return (kept * grad_loss).to(queries.dtype)


@_scaled.register_fake
def _(grad_loss: Tensor, kept: Tensor, queries: Tensor) -> Tensor:
    return queries.new_empty(queries.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], inputs[0])


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
    return _scaled(grad_loss, *ctx.saved_tensors), None, None, None


_info_nce.register_autograd(_differentiate, setup_context=_keep)


# ---------------------------------------------------------------------------------------------------------- functions


def info_nce(
    queries: Tensor, keys: Tensor, labels: Tensor, temperature: float, *, implementation: str = "auto"
) -> Tensor:
    """The contrastive loss: `reference.info_nce`, by whichever implementation."""
    return info_nce_statistics(queries, keys, labels, temperature, implementation=implementation).loss


def info_nce_statistics(
    queries: Tensor, keys: Tensor, labels: Tensor, temperature: float, *, implementation: str = "auto"
) -> InfoNCE:
    """The contrastive loss and what is worth logging of it.

    Args:
        queries, keys, labels, temperature: as of `reference.info_nce`. In Triton everything is multiplied in bfloat16
            if queries or keys are, and the length of keys is believed: longer ones than 1 may overflow.
        implementation: "auto", "triton" or "reference".

    Returns:
        The loss, which alone has a gradient, and the statistics; all scalars, float32 at least. In Triton a label
        outside of [0, M) makes the loss NaN, where the reference raises IndexError.

    Raises:
        ValueError, TypeError: shapes, types or devices that do not fit, T no number above 0, nothing in a tensor.
    """
    op = "info_nce"
    expect_dtype(op, "queries", queries)
    expect_dtype(op, "keys", keys)
    expect_dtype(op, "labels", labels, torch.int64)
    expect_shape(op, "queries", queries, queries.dim() == 2 and queries.numel() > 0, "[N, D], none of them 0")
    expect_shape(
        op, "keys", keys, keys.dim() in (2, 3) and keys.shape[-1] == queries.shape[1] and keys.numel() > 0,
        f"[M, {queries.shape[1]}] or [G, M, {queries.shape[1]}], none of them 0",
    )  # fmt: skip
    groups = keys.shape[0] if keys.dim() == 3 else 1
    expect_shape(
        op, "queries", queries, len(queries) % groups == 0, f"of {groups} equal runs, one for each group of keys"
    )
    expect_shape(op, "labels", labels, labels.shape == queries.shape[:1], f"one for each query: [{len(queries)}]")
    expect_device(op, queries=queries, keys=keys, labels=labels)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature={temperature} must be a number above 0")
    unless = f"the kernel is for keys of up to {WIDEST} dimensions" if queries.shape[1] > WIDEST else ""
    if choose(op, implementation, queries, keys, unless=unless) == "reference":
        return reference.info_nce_statistics(queries, keys, labels, temperature)
    loss, statistics, _ = _info_nce(queries, keys.detach(), labels, temperature)
    return InfoNCE(loss, *statistics.detach().unbind())


def variants(chip: str) -> list[Variant]:
    """What the launchers choose on a chip: 64 to 512 dimensions, whole tiles or not, T = 0.2 or small."""
    found = []
    counts = dict.fromkeys(("queries", "keys", "width", "runs"), "i32")
    for kind, width in itertools.product(("bf16", "fp32"), (64, 128, 256, 512)):
        constexprs, _, row = _cut(kind, width, chip)
        for full, online in itertools.product((True, False), (False, True)):
            flags = {"FULL": full, "ONLINE": online}
            signature = {
                **dict.fromkeys(("p_queries", "p_keys"), f"*{kind}"), "p_labels": "*i64", "p_sums": "*fp32",
                "p_means": "*fp32", **counts, "tiles": "i32", "scale": "fp32",
                **dict.fromkeys((*constexprs, *flags), "constexpr"),
            }  # fmt: skip
            words = ("" if full else " ragged") + (" online" if online else "")
            found.append(Variant(
                f"info_nce/pass {kind} D={width}{words}", _pass, signature, {**constexprs, **flags},
                row.num_warps, row.num_stages, wants_tensor_cores=kind == "bf16", divisible=("width",),
            ))  # fmt: skip
        row = config("info_nce/combine", "any", chip)
        for online in (False, True):
            constants = {"D": constexprs["D"], **row.blocks, "ONLINE": online}
            signature = {
                **dict.fromkeys(("p_queries", "p_keys"), f"*{kind}"), "p_labels": "*i64",
                **dict.fromkeys(("p_sums", "p_means", "p_values", "p_grad"), "*fp32"), "rows": "i32", **counts,
                **dict.fromkeys(("scale", "temperature", "share", "share_others"), "fp32"),
                **dict.fromkeys(constants, "constexpr"),
            }  # fmt: skip
            found.append(Variant(
                f"info_nce/combine {kind} D={width}" + (" online" if online else ""), _combine, signature, constants,
                row.num_warps, row.num_stages, divisible=("width",),
            ))  # fmt: skip
    return found
