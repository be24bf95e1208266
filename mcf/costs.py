"""What a step costs: floating point operations, bytes on the network, and seconds on a described machine.

The formulas and their reasons are in docs/scaling.md; tests count the operations of the real modules and the bytes of
real collectives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mcf.config import Recipe
from mcf.machine import Machine
from mcf.sizes import FLOAT, count_parameters, split_size, zero_stage
from mcf.zero import bucket

STATISTIC = 8  # bytes: BatchNorm's sums travel in float64


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one image in a step, forward and backward, 2 a multiply-add, matrix products alone.

    encoder, decoder, heads: of the student. momentum: the keys, forward alone. teacher: forward on image and pseudo
    image, and backward to the pseudo image's pixels.
    """

    encoder: float
    decoder: float
    heads: float
    momentum: float
    teacher: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimiser step, by what they are for.

    A collective over W ranks on n bytes is counted as its ring: a gather or a reduce-scatter sends n·(W−1)/W, an
    all-reduce twice that.

    gradients: reduced. parameters: gathered, of the student. momentum: gathered, of the momentum branch (stage 3).
    keys: of the contrastive loss. statistics: of a synchronised BatchNorm.
    """

    gradients: float = 0.0
    parameters: float = 0.0
    momentum: float = 0.0
    keys: float = 0.0
    statistics: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Times:
    """Estimated seconds of an optimiser step; the parts are added up, as if nothing overlapped.

    compute: matrix products. update: AdamW and the moving average, which wait for memory. communication: of Traffic.
    """

    compute: float
    update: float
    communication: float

    @property
    def step(self) -> float:
        """Sum of all."""
        return self.compute + self.update + self.communication


# --- operations -----------------------------------------------------------------------------------------------------


def count_flops(recipe: Recipe) -> Flops:
    """Operations of an image from the shapes of the recipe (a teacher of a file counts as the recipe's width and depth).

    A backward pass multiplies twice as much as the forward pass: towards the inputs and towards the weights. Frozen
    weights need the first alone, but attention, which has no weights, both.
    """
    model, decoder, heads, teacher = recipe.model, recipe.model.decoder, recipe.model.projection, recipe.teacher
    patch = 3 * model.patch_size**2
    seen, everything = 1 + recipe.visible_patches, 1 + model.patches
    unmasked = recipe.mask.momentum == "none"

    embed = _linear(seen - 1, patch, model.width)
    encoder = _blocks(seen, model.width, model.depth, model.mlp_ratio)
    keys = seen if not unmasked else everything
    momentum = _linear(keys - 1, patch, model.width) + sum(_blocks(keys, model.width, model.depth, model.mlp_ratio))
    decoding = _linear(seen, model.width, decoder.width) + _linear(model.patches, decoder.width, patch)
    decoding += sum(_blocks(everything, decoder.width, decoder.depth, model.mlp_ratio))
    projector = _linear(1, model.width, heads.hidden) + _linear(1, heads.hidden, heads.dim)
    predictor = 2 * _linear(1, heads.dim, heads.hidden)

    taught = 0.0
    if recipe.loss.feature:
        patches = (model.image_size // teacher.patch_size) ** 2
        matrices, attention = _blocks(1 + patches, teacher.width, max(teacher.taps) + 1, 4.0)
        matrices += _linear(patches, 3 * teacher.patch_size**2, teacher.width)
        taught = 3 * matrices + 4 * attention
    return Flops(
        # Images need no gradient.
        encoder=2 * embed + 3 * sum(encoder),
        decoder=3 * decoding,
        heads=3 * (projector + predictor),
        momentum=momentum + projector,
        teacher=taught,
    )


def _linear(tokens: int, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def _blocks(tokens: int, width: int, depth: int, mlp_ratio: float) -> tuple[float, float]:
    """Forward operations of transformer blocks: (products with weights, attention)."""
    hidden = round(width * mlp_ratio)
    matrices = 4 * _linear(tokens, width, width) + 2 * _linear(tokens, width, hidden)
    return depth * matrices, depth * 4.0 * tokens**2 * width


# --- bytes ----------------------------------------------------------------------------------------------------------


def count_traffic(recipe: Recipe) -> Traffic:
    """What a rank sends in a step, by the ZeRO stage, as DeepSpeed 0.19 does it.

    Stages 0 and 1 reduce gradients once a step, 2 and 3 with every micro-batch. Stages 0 to 2 reduce them to all ranks,
    though 1 and 2 need a slice; 1 and 2 gather the new parameters after the step. Stage 3 scatters gradients, and gathers
    parameters in every forward and backward pass.
    """
    ranks, stage = recipe.world_size, zero_stage(recipe)
    if ranks == 1:
        return Traffic()
    micro_batches = recipe.batch // (ranks * recipe.local_batch)
    parameters = count_parameters(recipe)
    trained, split = parameters.trained, split_size(recipe)
    gathered = {0: 0, 1: trained, 2: trained}.get(stage)
    if gathered is None:
        # What the end of the forward pass and the beginning of the backward pass share stays; small parameters are
        # whole on every rank, and gathered once, after the step.
        gathered = micro_batches * (2 * split - min(bucket(trained), split)) + trained - split
    reductions = {0: 2, 1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]

    heads = recipe.model.projection
    hidden, dim = 2 * heads.hidden + 1, 2 * heads.dim + 1
    # Sums, squares and count: of the student's three layers both ways, of the momentum branch's two forward.
    statistics = 2 * (2 * hidden + dim) + hidden + dim if heads.batch_norm == "synchronised" else 0

    once = (ranks - 1) / ranks
    return Traffic(
        gradients=once * reductions * trained * FLOAT,
        parameters=once * gathered * FLOAT,
        momentum=once * (micro_batches * parameters.momentum if stage == 3 else 0) * FLOAT,
        keys=once * recipe.batch * heads.dim * FLOAT,
        statistics=once * 2 * micro_batches * statistics * STATISTIC,
    )


# --- seconds --------------------------------------------------------------------------------------------------------


def estimate_times(recipe: Recipe, machine: Machine) -> Times:
    """Seconds of a step on the recipe's nodes, each such a machine.

    A ring over all GPUs enters and leaves each node once: what a rank sends passes a GPU's links and, where there are
    several nodes, a node's network.
    """
    ranks, stage = recipe.world_size, zero_stage(recipe)
    peak = machine.flops.bf16 if recipe.train.precision != "fp32" else machine.flops.fp32
    parameters = count_parameters(recipe)
    updates = recipe.batch // (ranks * recipe.local_batch) if recipe.momentum.update == "micro_batch" else 1
    # AdamW reads weight, gradient and two moments and writes all but the gradient; the average reads two and writes one.
    touched = 7 * parameters.trained / (ranks if stage else 1)
    touched += 3 * updates * parameters.momentum / (ranks if stage == 3 else 1)
    bandwidth = machine.intra_node if recipe.nodes == 1 else min(machine.intra_node, machine.inter_node)
    return Times(
        compute=recipe.batch / ranks * count_flops(recipe).total / (peak * machine.reached),
        update=touched * FLOAT / machine.memory_bandwidth,
        communication=count_traffic(recipe).total / bandwidth,
    )
