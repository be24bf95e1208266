"""Checks of a recipe across its keys: what can be known to be impossible before data or devices are touched.

Each check is one function that raises UserError with the keys, their values and values that would work.
"""

from __future__ import annotations

import re

from mcf.config import Recipe
from mcf.errors import UserError


def check(recipe: Recipe) -> None:
    """Raise UserError for the first impossible combination of keys."""
    for part in (_batch, _streams, _mask, _losses, _contrast, _teacher, _schedule, _probe, _rest):
        part(recipe)


def _batch(r: Recipe) -> None:
    """batch = ranks × micro_batch × accumulation, with a whole accumulation."""
    ranks = r.world_size
    who = f"nodes={r.nodes} × gpus_per_node={r.gpus_per_node} = {ranks} ranks"
    if r.batch % ranks:
        works = [n for n in divisors(r.batch) if r.data.streams % n == 0]
        raise UserError(
            f"batch={r.batch} cannot be shared by {who}; use a number of ranks that divides it: "
            f"{_nearest(ranks, works)}, or a batch like {_nearest(r.batch, _multiples(ranks, r.batch))}"
        )
    share = r.batch // ranks
    if share % r.local_batch:
        raise UserError(
            f"batch={r.batch} cannot be reached by {who} of micro_batch={r.micro_batch}: batch = ranks × "
            f"micro_batch × accumulation; use micro_batch={_nearest(r.micro_batch, divisors(share))}"
        )


def _streams(r: Recipe) -> None:
    """Streams divide the batch, ranks divide the streams (DESIGN, the data order)."""
    ranks, streams = r.world_size, r.data.streams
    if r.batch % streams:
        works = [n for n in divisors(r.batch) if n % ranks == 0]
        raise UserError(
            f"data.streams={streams} does not divide batch={r.batch}; use data.streams={_nearest(streams, works)} "
            "(another number of streams is another order of the data)"
        )
    if streams % ranks:
        works = [n for n in divisors(r.batch) if n % ranks == 0]
        remedy = f"ranks that divide it: {_nearest(ranks, [n for n in divisors(streams) if r.batch % n == 0])}"
        raise UserError(
            f"{ranks} ranks (nodes × gpus_per_node) do not divide data.streams={streams}; use {remedy}, "
            f"or data.streams={_nearest(streams, works)} (another number of streams is another order of the data)"
        )


def _mask(r: Recipe) -> None:
    if r.visible_patches < 1:
        raise UserError(
            f"mask.ratio={r.mask.ratio} keeps none of the {r.model.patches} patches of a {r.model.image_size} pixel "
            f"image; use at most {1 - 1 / r.model.patches:.4g}"
        )


def _losses(r: Recipe) -> None:
    loss = r.loss
    if not (loss.feature or loss.contrast or loss.pixel):
        raise UserError("loss.feature, loss.contrast and loss.pixel are all 0: nothing is trained; set one of them")
    if loss.pixel_normalise and not loss.pixel:
        raise UserError(
            "loss.pixel_normalise=true without a pixel loss; set loss.pixel=1, or leave pixel_normalise out"
        )


def _contrast(r: Recipe) -> None:
    contrast, ranks = r.contrast, r.world_size
    together = ranks * r.local_batch
    size = contrast.group_size
    if contrast.scope != "group" and size is not None:
        raise UserError(
            f"contrast.group_size={size} has no meaning with contrast.scope={contrast.scope}; "
            "set contrast.scope=group, or leave group_size out"
        )
    if contrast.scope == "group":
        works = [g for g in divisors(r.batch) if g > 1 and g % ranks == 0 and (g % together == 0 or together % g == 0)]
        if size is None:
            raise UserError(f"contrast.scope=group needs contrast.group_size; with this batch: {_nearest(512, works)}")
        if size not in works:
            raise UserError(
                f"contrast.group_size={size} must divide batch={r.batch}, be a multiple of the {ranks} ranks, and divide "
                f"or be a multiple of the {together} samples handled at once (ranks × micro_batch); "
                f"use {_nearest(size, works) or 'another micro_batch'}"
            )
    if not r.loss.contrast:
        return
    if keys_per_query(r) < 2:
        raise UserError(
            f"a micro-batch of {r.local_batch} on {ranks} ranks leaves a query without negatives; use a larger micro_batch, "
            "contrast.scope=step, or loss.contrast=0"
        )
    if r.model.projection.batch_norm == "per_rank" and r.local_batch < 2:
        raise UserError(
            f"one sample a rank leaves the heads' BatchNorm nothing to normalise with (micro_batch={r.micro_batch}, {ranks} ranks, "
            f"batch={r.batch}); use micro_batch=2 or more, fewer ranks, "
            "or model.projection.batch_norm=synchronised"
        )


def _teacher(r: Recipe) -> None:
    teacher = r.teacher
    if not r.loss.feature:
        return
    source = teacher.source
    if source == "none":
        raise UserError(
            f"teacher.source=none, but loss.feature={r.loss.feature:g} needs a teacher; set loss.feature=0 (and "
            "loss.pixel=1 to train by pixels), or a teacher.source"
        )
    if not teacher.taps or list(teacher.taps) != sorted(set(teacher.taps)):
        raise UserError(f"teacher.taps={list(teacher.taps)}: expected block numbers in rising order, like [2,5,8,11]")
    if source == "random":
        if not teacher.allow_random:
            raise UserError(
                "teacher.source=random teaches nothing and is for trying things out; give teacher.source=moco_v3 "
                "teacher.path=FILE, or teacher.allow_random=true if that is what you want"
            )
        if teacher.taps[-1] >= teacher.depth:
            raise UserError(
                f"teacher.taps={list(teacher.taps)} reach beyond teacher.depth={teacher.depth} blocks (counted from 0); "
                f"use taps up to {teacher.depth - 1}"
            )
        if teacher.width % teacher.heads:
            raise UserError(f"teacher.width={teacher.width} is not divisible by teacher.heads={teacher.heads}")
        if r.model.image_size % teacher.patch_size:
            raise UserError(
                f"model.image_size={r.model.image_size} is no multiple of teacher.patch_size={teacher.patch_size}"
            )
    elif teacher.path is None:
        what = "a run directory or checkpoint" if source == "checkpoint" else "the file of its weights"
        raise UserError(f"teacher.source={source} needs teacher.path: {what}")


def _schedule(r: Recipe) -> None:
    if r.train.steps is None and r.optimizer.warmup_epochs >= r.train.epochs:
        raise UserError(
            f"optimizer.warmup_epochs={r.optimizer.warmup_epochs:g} is as long as the run (train.epochs="
            f"{r.train.epochs:g}); use fewer, for example optimizer.warmup_epochs={r.train.epochs / 16:g}"
        )
    if r.optimizer.min_lr > peak_lr(r):
        raise UserError(f"optimizer.min_lr={r.optimizer.min_lr:g} is above the learning rate {peak_lr(r):g}; lower it")


def _probe(r: Recipe) -> None:
    if r.probe.every and r.probe.data is None:
        raise UserError(
            f"probe.every={r.probe.every} needs probe.data: a folder of labelled faces; set it, or probe.every=0"
        )
    check_group(r.probe.group, "probe.group")


def check_group(group: str | None, key: str) -> None:
    """Refuse a pattern for groups of faces that is no regular expression, or captures nothing."""
    if group is None:
        return
    try:
        captures = re.compile(group).groups
    except re.error as error:
        raise UserError(f"{key}={group}: no regular expression ({error}); use one like ^(.*)_") from None
    if not captures:
        raise UserError(f"{key}={group}: captures nothing; put what names a group in brackets, like ^(.*)_")


def _rest(r: Recipe) -> None:
    every, keep_every = r.checkpoint.every, r.checkpoint.keep_every
    if keep_every % every:
        raise UserError(
            f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}, so that few or none of "
            f"those checkpoints are ever written; use {max(1, keep_every // every) * every}"
        )
    if r.slurm.warn_seconds >= 60 * r.slurm.time:
        raise UserError(
            f"slurm.warn_seconds={r.slurm.warn_seconds} is not before the end of slurm.time={r.slurm.time} minutes; "
            "use less, for example 120"
        )


def peak_lr(r: Recipe) -> float:
    """Learning rate after the warm-up: optimizer.lr, or blr · batch / 256 (METHOD section 1)."""
    return r.optimizer.blr * r.batch / 256 if r.optimizer.lr is None else r.optimizer.lr


def keys_per_query(r: Recipe) -> int:
    """Keys a query is compared with: its own and the negatives."""
    sizes = {"micro_batch": r.world_size * r.local_batch, "step": r.batch, "group": r.contrast.group_size or 0}
    return sizes[r.contrast.scope]


def fitting(r: Recipe, samples: int) -> str:
    """Keys of a smaller batch that so few samples fill, as `batch=128 data.streams=128`; empty if there is none.

    Of the ranks' doubles the largest, and beside it the nearest smaller numbers that pass all checks.
    """
    ranks, size = r.world_size, r.contrast.group_size
    for batch in reversed([ranks << k for k in range(samples.bit_length()) if ranks << k <= samples]):
        share = batch // ranks
        streams = max(n for n in divisors(batch) if n <= max(r.data.streams, ranks) and n % ranks == 0)
        micro_batch = r.micro_batch if r.micro_batch >= share else max(n for n in divisors(share) if n <= r.micro_batch)
        for group in [None] if size is None else [n for n in reversed(divisors(batch)) if n <= size]:
            parts = {
                "data": r.data.model_copy(update={"streams": streams}),
                "contrast": r.contrast.model_copy(update={"group_size": group}),
            }
            smaller = r.model_copy(update={"batch": batch, "micro_batch": micro_batch, **parts})
            try:
                check(smaller)
            except UserError:
                continue
            words = [f"batch={batch}"]
            words += [f"data.streams={streams}"] if streams != r.data.streams else []
            words += [f"micro_batch={micro_batch}"] if micro_batch != r.micro_batch else []
            words += [f"contrast.group_size={group}"] if group != size else []
            return " ".join(words)
    return ""


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _multiples(of: int, near: int) -> list[int]:
    below = near // of * of
    return [n for n in (below, below + of) if n]


def _nearest(value: int, candidates: list[int], count: int = 3) -> str:
    """The candidates nearest to a value by ratio, rising: `16, 32`."""
    chosen = sorted(candidates, key=lambda c: max(c, value) / max(min(c, value), 1))[:count]
    return ", ".join(map(str, sorted(chosen)))
