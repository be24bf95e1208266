"""What a run will do and need, said before it starts: the arithmetic of a recipe.

Effective batch, learning rate, length, negatives and pace of the momentum encoder (METHOD section 1, end); parameters,
memory of a rank and size of the checkpoints, all from shapes alone. Nothing here needs torch, data or a device.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from mcf.checks import keys_per_query, peak_lr
from mcf.config import HeadsConfig, Recipe
from mcf.errors import UserError

FLOAT = 4  # bytes of a float32: parameters, gradients, moments and averages are always that
GIB = 2**30


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. The momentum branch copies encoder and projector; the teacher is frozen."""

    encoder: int
    decoder: int
    projector: int
    predictor: int
    teacher: int

    @property
    def trained(self) -> int:
        """Those with a gradient."""
        return self.encoder + self.decoder + self.projector + self.predictor

    @property
    def momentum(self) -> int:
        """Those of the momentum branch."""
        return self.encoder + self.projector


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one rank, at the peak of a step.

    weights: trained parameters and gradients, and the copies that autocast casts. optimizer: AdamW's moments, and the
    master copy that DeepSpeed keeps for its slice. momentum: momentum branch and its snapshot. teacher: frozen weights.
    activations: what forward keeps for backward, of one micro-batch. images: decoded micro-batches that wait.
    """

    weights: int
    optimizer: int
    momentum: int
    teacher: int
    activations: int
    images: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.optimizer + self.momentum + self.teacher + self.activations + self.images


@dataclass(frozen=True)
class Plan:
    """All numbers of a run that follow from its recipe and the size of its data set.

    samples: in the data set. steps_per_epoch: whole batches in it (the remainder is left out, order.py). steps: length
    of the run. epochs: the same in passes over the data. lr: after the warm-up. warmup_steps: need not be whole.
    keys: a query is compared with, its own included. momentum_updates: of the average, a step. momentum_per_step: what
    they amount to, m^updates. checkpoint_bytes: of one. checkpoints: on disk at the end of the run, at most.
    """

    name: str
    run_dir: Path
    world_size: int
    nodes: int
    gpus_per_node: int
    batch: int
    micro_batch: int
    accumulation: int
    samples: int
    steps_per_epoch: int
    steps: int
    epochs: float
    lr: float
    min_lr: float
    warmup_steps: float
    keys: int
    momentum: float
    momentum_schedule: str
    momentum_updates: int
    parameters: Parameters
    zero_stage: int
    precision: str
    memory: Memory
    checkpoint_bytes: int
    checkpoints: int
    checkpoint_every: int
    metric_records: int
    pictures: int
    notes: tuple[str, ...] = ()

    @property
    def negatives(self) -> int:
        """Negatives of a query."""
        return self.keys - 1

    @property
    def momentum_per_step(self) -> float:
        """m of a whole optimiser step, at the start of the run."""
        return self.momentum**self.momentum_updates

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int = 1000) -> list[str]:
        """The plan as a table for people, at most `width` letters wide."""
        p, m = self.parameters, self.memory
        peak = f"{self.lr:.3g}"
        updates = "once a step" if self.momentum_updates == 1 else f"{self.momentum_updates} times a step"
        moving = f"{self.momentum:g} {updates} = {self.momentum_per_step:.4g} a step"
        rows = [
            ("run", f"{self.name} in {self.run_dir}"),
            ("ranks", f"{self.world_size} = {_count(self.nodes, 'node')} × {self.gpus_per_node}"),
            (
                "effective batch",
                f"{self.batch:,} = {_count(self.world_size, 'rank')} × micro-batch {self.micro_batch} "
                f"× accumulation {self.accumulation}",
            ),
            (
                "length",
                f"{self.steps:,} steps = {self.epochs:.4g} epochs of {self.steps_per_epoch:,} steps "
                f"({self.samples:,} samples)",
            ),
            (
                "learning rate",
                f"0 → {peak} over {self.warmup_steps:,.0f} steps, then half-cosine → {self.min_lr:g}",
            ),
            ("negatives", f"{self.negatives:,} a query ({self.keys:,} keys with its own)"),
            ("momentum", moving + (", rising to 1" if self.momentum_schedule == "cosine" else "")),
            (
                "parameters",
                f"{_millions(p.trained)} trained (encoder {_millions(p.encoder)}, decoder {_millions(p.decoder)}, heads "
                f"{_millions(p.projector + p.predictor)}); momentum branch {_millions(p.momentum)}, "
                f"teacher {_millions(p.teacher) if p.teacher else 'none'}",
            ),
            (
                "memory a rank",
                f"≈ {_size(m.total)}: weights and gradients {_size(m.weights)}, optimiser {_size(m.optimizer)}, momentum "
                f"{_size(m.momentum)}, teacher {_size(m.teacher)}, activations {_size(m.activations)}, "
                f"images {_size(m.images)} (ZeRO {self.zero_stage}, {self.precision})",
            ),
            (
                "checkpoints",
                f"{_size(self.checkpoint_bytes)} each, every {self.checkpoint_every:,} steps; at most "
                f"{_size(self.checkpoint_bytes * (self.checkpoints + 1))} on disk "
                f"({self.checkpoints} kept, one being written)",
            ),
            ("tracking", f"{self.metric_records:,} records of metrics, {self.pictures:,} pictures"),
        ]
        rows += [("NOTE", note) for note in self.notes]
        wrap = textwrap.TextWrapper(width, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False)
        return [line for name, text in rows for line in wrap.wrap(f"{name:<16}{text}")]


def make_plan(recipe: Recipe, samples: int | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: as `mcf.cli.load_recipe` gives it, its checks passed.
        samples: in the data set, if it could be counted; else data.samples is believed.

    Raises:
        UserError: the size of the data set is not known, or under one batch; or the
            warm-up is as long as the run.
    """
    samples = _samples(recipe, samples)
    steps_per_epoch = samples // recipe.batch
    steps = recipe.train.steps or max(1, round(recipe.train.epochs * steps_per_epoch))
    warmup_steps = recipe.optimizer.warmup_epochs * steps_per_epoch
    if warmup_steps >= steps:
        raise UserError(
            f"optimizer.warmup_epochs={recipe.optimizer.warmup_epochs:g} are {warmup_steps:,.0f} steps, and the run has "
            f"only {steps:,}; use less, for example optimizer.warmup_epochs={steps / steps_per_epoch / 16:.3g}"
        )
    accumulation = recipe.batch // (recipe.world_size * recipe.local_batch)
    parameters = count_parameters(recipe)
    check = recipe.checkpoint
    saves = -(-steps // check.every)
    kept = min(saves, check.keep) + (max(0, steps // check.keep_every) if check.keep_every else 0)
    return Plan(
        name=recipe.name,
        run_dir=Path(recipe.output) / recipe.name,
        world_size=recipe.world_size,
        nodes=recipe.nodes,
        gpus_per_node=recipe.gpus_per_node,
        batch=recipe.batch,
        micro_batch=recipe.local_batch,
        accumulation=accumulation,
        samples=samples,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch,
        lr=peak_lr(recipe),
        min_lr=recipe.optimizer.min_lr,
        warmup_steps=warmup_steps,
        keys=keys_per_query(recipe),
        momentum=recipe.momentum.value,
        momentum_schedule=recipe.momentum.schedule,
        momentum_updates=accumulation if recipe.momentum.update == "micro_batch" else 1,
        parameters=parameters,
        zero_stage=recipe.train.zero_stage,
        precision=recipe.train.precision,
        memory=estimate_memory(recipe, parameters),
        checkpoint_bytes=_checkpoint_bytes(recipe, parameters),
        checkpoints=min(kept, saves),
        checkpoint_every=check.every,
        metric_records=-(-steps // recipe.train.log_every),
        pictures=steps // recipe.track.images_every if recipe.track.images_every else 0,
        notes=tuple(_notes(recipe, samples)),
    )


def _samples(recipe: Recipe, counted: int | None) -> int:
    samples = counted if counted is not None else recipe.data.samples
    if samples is None:
        where = f" (no manifest.json in data.path={recipe.data.path})" if recipe.data.path else ""
        raise UserError(
            f"the size of the data set is not known{where}; give data.path=FOLDER that mcf.pack wrote, or "
            "data.samples=NUMBER to plan without it"
        )
    if samples < recipe.batch:
        raise UserError(
            f"the data set has {samples} samples, fewer than batch={recipe.batch}; use a smaller batch (and streams and "
            "micro_batch that divide it), or more data"
        )
    return samples


def _notes(recipe: Recipe, samples: int) -> list[str]:
    notes = []
    if recipe.data.samples not in (None, samples):
        notes.append(f"the data folder has {samples:,} samples, the recipe speaks of {recipe.data.samples:,}")
    if recipe.local_batch < recipe.micro_batch:
        notes.append(
            f"{recipe.world_size} ranks of micro_batch={recipe.micro_batch} would be more than the batch: "
            f"each handles its share, {recipe.local_batch}"
        )
    if recipe.loss.feature and recipe.teacher.source == "random":
        notes.append("the teacher's weights are RANDOM: this shows that a run works, its encoder is worth nothing")
    return notes


# --- sizes from shapes ----------------------------------------------------------------------------------------------


def count_parameters(recipe: Recipe) -> Parameters:
    """Parameters of all parts. A teacher from a file is taken for a ViT of the recipe's teacher.width and depth."""
    model, teacher = recipe.model, recipe.teacher
    decoder = model.decoder
    patch = model.patch_size**2 * 3
    return Parameters(
        encoder=_vit(model.width, model.depth, model.mlp_ratio, patch),
        decoder=_linear(model.width, decoder.width)
        + decoder.width
        + decoder.depth * _block(decoder.width, model.mlp_ratio)
        + 2 * decoder.width
        + _linear(decoder.width, patch),
        projector=_head(model.width, model.projection),
        predictor=_head(model.projection.dim, model.projection),
        teacher=_vit(teacher.width, teacher.depth, 4.0, teacher.patch_size**2 * 3) if recipe.loss.feature else 0,
    )


def _vit(width: int, depth: int, mlp_ratio: float, patch: int) -> int:
    """Patch embedding, class token, blocks, final norm; the position table is no parameter."""
    return _linear(patch, width) + width + depth * _block(width, mlp_ratio) + 2 * width


def _block(width: int, mlp_ratio: float) -> int:
    """Two norms, qkv, projection, MLP."""
    hidden = round(width * mlp_ratio)
    return (
        4 * width + _linear(width, 3 * width) + _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)
    )


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _head(inputs: int, heads: HeadsConfig) -> int:
    """Linear, BatchNorm, ReLU, Linear, without biases; a last BatchNorm has no parameters."""
    return inputs * heads.hidden + 2 * heads.hidden + heads.hidden * heads.dim


def estimate_memory(recipe: Recipe, parameters: Parameters) -> Memory:
    """Memory of a rank: state by ZeRO stage is exact, activations are counted from the tensors that backward needs.

    State of P trained parameters on W ranks, bytes: stage 0: 16P; stage 1: 8P + 12P/W; stage 2: 4P + 16P/W; stage 3:
    20P/W (DeepSpeed's master copy of the slice beside the parameters is in it from stage 1 on).
    """
    p, ranks, stage = parameters.trained, recipe.world_size, recipe.train.zero_stage
    bf16 = recipe.train.precision == "bf16"
    weights = {0: 2 * p, 1: 2 * p, 2: p + p // ranks, 3: 2 * p // ranks}[stage] * FLOAT
    optimizer = {0: 2 * p, 1: 3 * p // ranks, 2: 3 * p // ranks, 3: 3 * p // ranks}[stage] * FLOAT
    image = 3 * recipe.model.image_size**2
    held = recipe.batch // ranks if recipe.contrast.scope != "micro_batch" else 0
    return Memory(
        weights=weights + (2 * p if bf16 else 0),
        optimizer=optimizer,
        momentum=2 * parameters.momentum * FLOAT,
        teacher=parameters.teacher * (2 if bf16 else FLOAT),
        activations=recipe.local_batch * _activations(recipe),
        images=image * (recipe.local_batch * (recipe.data.prefetch + 1) + held),
    )


def _activations(recipe: Recipe) -> int:
    """Bytes that one sample's forward keeps for backward, with an attention that keeps no scores."""
    model, teacher = recipe.model, recipe.teacher
    size = 2 if recipe.train.precision == "bf16" else FLOAT
    visible = 1 + recipe.visible_patches
    per_sample = visible * model.depth * model.width * _per_channel(size, model.mlp_ratio)
    decoder = model.decoder
    per_sample += (1 + model.patches) * decoder.depth * decoder.width * _per_channel(size, model.mlp_ratio)
    if recipe.loss.pixel:
        # What the pseudo image misses, squared in the loss.
        per_sample += model.patches * model.patch_size**2 * 3 * FLOAT
    if recipe.loss.feature:
        tokens = 1 + (model.image_size // teacher.patch_size) ** 2
        deepest = min(teacher.depth, max(teacher.taps) + 1)
        per_sample += tokens * deepest * teacher.width * _per_channel(size, 4.0, frozen=True)
        # Features of image and pseudo image, and their normalised copies.
        per_sample += 4 * tokens * len(teacher.taps) * teacher.width * FLOAT
    return int(per_sample)


def _per_channel(size: int, mlp_ratio: float, frozen: bool = False) -> float:
    """Bytes a block keeps per token and channel: inputs of two norms in float32, q, k, v and the attention's output,
    the GELU's input; with trained weights also the inputs of the four matrix products."""
    kept = 2 * FLOAT + 4 * size + mlp_ratio * size
    if not frozen:
        # The attention's output is its product's input already; fc2's is the GELU's output.
        kept += 2 * size + mlp_ratio * size
    return kept


def _checkpoint_bytes(recipe: Recipe, parameters: Parameters) -> int:
    """Weights, two moments and the momentum branch in float32, with position tables and BatchNorm statistics."""
    model = recipe.model
    encoder_table = (1 + model.patches) * model.width
    decoder_table = (1 + model.patches) * model.decoder.width
    statistics = 2 * (2 * model.projection.hidden + model.projection.dim) + 2 * (
        model.projection.hidden + model.projection.dim
    )
    numbers = 3 * parameters.trained + parameters.momentum + 2 * encoder_table + decoder_table + statistics
    return numbers * FLOAT


# --- words ----------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _size(number: int) -> str:
    """Bytes for people, in binary units."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 2**20:.0f} MiB"
