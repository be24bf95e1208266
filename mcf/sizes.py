"""Sizes of a run from its shapes alone: parameters, memory of a rank, size of a checkpoint.

Nothing here needs torch, data or a device; tests hold it against the real modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcf.config import HeadsConfig, Recipe
from mcf.zero import bucket, overlapped, persistent

FLOAT = 4  # bytes of a float32: parameters, gradients, moments and averages are always that


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
    master copy that DeepSpeed keeps for its slice. momentum: momentum branch and its snapshot. buffers: what is reduced
    and gathered at a time. teacher: frozen weights. activations: what forward keeps for backward, of one micro-batch.
    images: decoded micro-batches that wait.
    """

    weights: int
    optimizer: int
    momentum: int
    buffers: int
    teacher: int
    activations: int
    images: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return (
            self.weights + self.optimizer + self.momentum + self.buffers + self.teacher + self.activations + self.images
        )


def zero_stage(recipe: Recipe) -> int:
    """The ZeRO stage that runs: one rank has nobody to split with, and trains at 0 whatever the recipe says."""
    return recipe.train.zero_stage if recipe.world_size > 1 else 0


def count_parameters(recipe: Recipe) -> Parameters:
    """Parameters of all parts. A teacher from a file is taken for a ViT of the recipe's teacher.width and depth."""
    return Parameters(**{part: sum(sizes) for part, sizes in parameter_sizes(recipe).items()})


def parameter_sizes(recipe: Recipe) -> dict[str, list[int]]:
    """Elements of each parameter tensor, by part."""
    model, teacher = recipe.model, recipe.teacher
    decoder = model.decoder
    patch = model.patch_size**2 * 3
    return {
        "encoder": _vit(model.width, model.depth, model.mlp_ratio, patch, clip=model.variant == "clip"),
        "decoder": [
            *_linear(model.width, decoder.width),
            decoder.width,
            *decoder.depth * _block(decoder.width, model.mlp_ratio),
            *2 * [decoder.width],
            *_linear(decoder.width, patch),
        ],
        "projector": _head(model.width, model.projection),
        "predictor": _head(model.projection.dim, model.projection),
        "teacher": _vit(teacher.width, teacher.depth, 4.0, teacher.patch_size**2 * 3, clip=teacher.source == "farl")
        if recipe.loss.feature
        else [],
    }


def trained_sizes(recipe: Recipe) -> list[int]:
    """Elements of each trained parameter tensor."""
    return [size for part, sizes in parameter_sizes(recipe).items() if part != "teacher" for size in sizes]


def _vit(width: int, depth: int, mlp_ratio: float, patch: int, *, clip: bool = False) -> list[int]:
    """Patch embedding, class token, blocks, final norm (and CLIP's first one); the position table is no parameter."""
    norms = 4 if clip else 2
    return [*_linear(patch, width), width, *depth * _block(width, mlp_ratio), *norms * [width]]


def _block(width: int, mlp_ratio: float) -> list[int]:
    """Two norms, qkv, projection, MLP."""
    hidden = round(width * mlp_ratio)
    layers = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    return 4 * [width] + [size for layer in layers for size in _linear(*layer)]


def _linear(inputs: int, outputs: int) -> list[int]:
    return [inputs * outputs, outputs]


def _head(inputs: int, heads: HeadsConfig) -> list[int]:
    """Linear, BatchNorm, ReLU, Linear, without biases; a last BatchNorm has no parameters."""
    return [inputs * heads.hidden, heads.hidden, heads.hidden, heads.hidden * heads.dim]


def split_size(recipe: Recipe) -> int:
    """Elements of the trained parameters that stage 3 splits; the small rest is whole on every rank."""
    sizes = trained_sizes(recipe)
    return sum(size for size in sizes if size > persistent(sum(sizes)))


def estimate_memory(recipe: Recipe, parameters: Parameters) -> Memory:
    """Memory of a rank: state by ZeRO stage is exact, activations are counted from the tensors that backward needs.

    State of P trained parameters on W ranks, bytes: stage 0: 16P; stage 1: 8P + 12P/W; stage 2: 4P + 16P/W; stage 3:
    20P/W, and small parameters whole (DeepSpeed's master copy of the slice beside the parameters is in it from stage 1
    on). Stage 3 splits the momentum branch too.
    """
    p, ranks, stage = parameters.trained, recipe.world_size, zero_stage(recipe)
    bf16 = recipe.train.precision != "fp32"
    split = split_size(recipe)
    weights = {0: 2 * p, 1: 2 * p, 2: p + p // ranks, 3: 2 * p // ranks + p - split}[stage] * FLOAT
    optimizer = {0: 2 * p, 1: 3 * p // ranks, 2: 3 * p // ranks, 3: 3 * p // ranks}[stage] * FLOAT
    buffers = (overlapped(p) if stage == 0 else bucket(p)) * FLOAT if ranks > 1 else 0
    if stage == 3:
        # Twice a bucket is fetched ahead, and what is needed now comes on top.
        buffers += min(2 * bucket(p) + max(trained_sizes(recipe)), split) * FLOAT
    image = 3 * recipe.model.image_size**2
    held = recipe.batch // ranks if recipe.contrast.scope != "micro_batch" else 0
    return Memory(
        weights=weights + (2 * p if bf16 else 0),
        optimizer=optimizer,
        momentum=2 * parameters.momentum * FLOAT // (ranks if stage == 3 else 1),
        buffers=buffers,
        teacher=parameters.teacher * (2 if bf16 else FLOAT),
        activations=recipe.local_batch * _activations(recipe),
        images=image * (recipe.local_batch * (recipe.data.prefetch + 1) + held),
    )


def largest_micro_batch(recipe: Recipe, memory: float, parameters: Parameters) -> int | None:
    """The largest micro-batch that splits a rank's share of the batch evenly and takes at most `memory` bytes; None: none does.

    At least 2, which BatchNorm needs.
    """
    share = recipe.batch // recipe.world_size
    fitting = (
        size
        for size in range(share, 1, -1)
        if share % size == 0
        and estimate_memory(recipe.model_copy(update={"micro_batch": size}), parameters).total <= memory
    )
    return next(fitting, None)


def _activations(recipe: Recipe) -> int:
    """Bytes that one sample's forward keeps for backward, with an attention that keeps no scores."""
    model, teacher = recipe.model, recipe.teacher
    size = 2 if recipe.train.precision != "fp32" else FLOAT
    visible = 1 + recipe.visible_patches
    decoder, again = model.decoder, recipe.speed.recompute
    # (part, tokens · width, blocks, bytes that one keeps a token and channel, bytes of its input)
    parts = [
        ("encoder", visible * model.width, model.depth, _per_channel(size, model.mlp_ratio), FLOAT),
        ("decoder", (1 + model.patches) * decoder.width, decoder.depth, _per_channel(size, model.mlp_ratio), FLOAT),
    ]
    per_sample = 0.0
    if recipe.loss.pixel:
        # What the pseudo image misses, squared in the loss.
        per_sample += model.patches * model.patch_size**2 * 3 * FLOAT
    if recipe.loss.feature:
        tokens = 1 + (model.image_size // teacher.patch_size) ** 2
        deepest = min(teacher.depth, max(teacher.taps) + 1)
        stream = size if teacher.stream == "bfloat16" else FLOAT
        parts.append(
            ("teacher", tokens * teacher.width, deepest, _per_channel(size, 4.0, frozen=True, stream=stream), stream)
        )
        # Features of image and pseudo image, and their normalised copies.
        per_sample += 4 * tokens * len(teacher.taps) * teacher.width * stream
    per_sample += sum(n * depth * (own if name in again else kept) for name, n, depth, kept, own in parts)
    # Of the blocks that are computed again, one at a time is whole.
    per_sample += max((n * kept for name, n, _, kept, _ in parts if name in again), default=0)
    return int(per_sample)


def _per_channel(size: int, mlp_ratio: float, frozen: bool = False, stream: int = FLOAT) -> float:
    """Bytes a block keeps per token and channel: inputs of two norms in the stream's type, q, k, v and the attention's
    output, the GELU's input; with trained weights also the inputs of the four matrix products."""
    kept = 2 * stream + 4 * size + mlp_ratio * size
    if not frozen:
        # The attention's output is its product's input already; fc2's is the GELU's output.
        kept += 2 * size + mlp_ratio * size
    return kept


def checkpoint_bytes(recipe: Recipe, parameters: Parameters) -> int:
    """Weights, two moments and the momentum branch in float32, with position tables and BatchNorm statistics."""
    model = recipe.model
    encoder_table = (1 + model.patches) * model.width
    decoder_table = (1 + model.patches) * model.decoder.width
    statistics = 2 * (2 * model.projection.hidden + model.projection.dim) + 2 * (
        model.projection.hidden + model.projection.dim
    )
    numbers = 3 * parameters.trained + parameters.momentum + 2 * encoder_table + decoder_table + statistics
    return numbers * FLOAT
