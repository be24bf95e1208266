"""One optimiser step, as the paper's algorithm reads (METHOD 1).

    keys:      momentum encoder on mask B, gathered from all ranks behind the queries' way forward, no gradient
    queries:   encoder on mask A → decoder → pseudo image; class token → projector → predictor
    loss:      teacher's features of pseudo image and image, contrast of queries and keys
    step:      applied if all ranks found it finite; else nothing has changed
    momentum:  p ← m·p + (1−m)·p_encoder, before every micro-batch's keys or after the step

With `contrast.scope: step` or `group`, the keys of all micro-batches come first: keys carry no gradient, so every query
can be held against the whole effective batch, and accumulation changes nothing but time.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcf import distributed, kernels, schedule
from mcf.attention import resolve
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.distributed import World
from mcf.engine import Engine
from mcf.errors import UserError
from mcf.kernels.dispatch import unavailable
from mcf.models import float8
from mcf.models.mcf import MCF, Objective, build_student, dropped
from mcf.models.momentum import MomentumBranch
from mcf.models.regional import compile_blocks, recompute_blocks
from mcf.models.teacher import Teacher
from mcf.plan import Plan

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of a step: whether it was applied, the gradient's norm, whether to stop, and this rank's part of the rest.

    terms: named loss terms and statistics of each micro-batch. keys: of the samples. draw: makes the picture's parts.
    """

    applied: bool = False
    grad_norm: float = float("nan")
    stop: bool = False
    terms: list[dict[str, Tensor]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    draw: Callable[[], tuple[Tensor, ...]] = tuple

    @property
    def picture(self) -> tuple[Tensor, ...]:
        """Of the last micro-batch: images uint8 [b, H, W, 3], mask bool [b, L], pred [b, L, P·P·3] in ImageNet's units.

        Worked out when it is asked for: few steps are drawn.
        """
        return self.draw()


class Step:
    """The network, its momentum branch, its objective and its optimiser, put together for one rank.

    `mark` is told of each phase that a step enters: loading, keys, forward, backward, step. `start` are tensors that the
    encoder starts from, by timm's names.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        teacher: Teacher | None,
        world: World,
        mark: Callable[[str], None] = lambda phase: None,
        start: Mapping[str, Tensor] | None = None,
    ):
        if recipe.kernels == "triton" and (why := unavailable(world.device)):
            raise UserError(f"kernels=triton: {why}; use kernels=auto")
        if recipe.train.precision == "auto":
            raise ValueError("train.precision=auto: mcf.precision.choose has to say first which it is")
        if recipe.attention != "auto":
            # To be refused here: of a compiled block one would hear that it could not be compiled.
            dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
            for width, heads in _attended(recipe, teacher):
                resolve(recipe.attention, world.device.type, dtype, head_dim=width // heads, gradient=True)
        if _in_float8(recipe) and (why := float8.unavailable(world.device)):
            raise UserError(f"teacher.products=float8: {why}; use teacher.products=bfloat16")
        self.recipe, self.plan, self.world, self.mark = recipe, plan, world, mark
        self.masks = Masks(recipe)
        student = build_student(recipe)
        if start is not None:
            student.encoder.load_state_dict(start)
        student.to(world.device)
        # Before the engine, which splits the student's parameters under ZeRO-3.
        self.momentum = MomentumBranch(student).to(world.device)
        self.objective = Objective(recipe, teacher).to(world.device)
        self.engine = Engine(student, recipe, accumulation=plan.accumulation, world=world)
        if self.engine.splits_parameters:
            self.momentum.split(world.rank, world.size)
        self._quicken(student)

    def _quicken(self, student: MCF) -> None:
        """Compile and recompute blocks as the recipe says."""
        parts: dict[str, nn.Module | None] = {
            "encoder": student.encoder, "decoder": student.decoder, "teacher": self.objective.teacher
        }  # fmt: skip
        speed = self.recipe.speed
        recompute_blocks(*(part for name, part in parts.items() if part is not None and name in speed.recompute))
        if speed.compile == "none":
            return
        if self.engine.splits_parameters:
            # Their weights come and go around each layer, which a compiled block knows nothing of.
            log.info("speed.compile=blocks: under ZeRO-3 the teacher's alone")
            parts = {"teacher": self.objective.teacher}
        else:
            parts["momentum"] = self.momentum
        compile_blocks(*(part for part in parts.values() if part is not None))

    def __call__(self, step: int, batches: Iterator[Batch], stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Step number `step` (from 0) on the next micro-batches. Collective.

        stop: asked when the gradient is there; the outcome tells all ranks if one of them says yes.
        """
        outcome = Outcome()
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        m = self.momentum_at(step)
        self.momentum.snapshot()

        per_chunk = 1 if self.recipe.contrast.scope == "micro_batch" else self.plan.accumulation
        for _ in range(self.plan.accumulation // per_chunk):
            self.mark("loading")
            chunk = list(itertools.islice(batches, per_chunk))
            self.mark("keys")
            keys = self.keys(chunk, m)
            for index, batch in enumerate(chunk):
                ids_keep, ids_restore = self.masks.of_encoder(batch)
                mask = dropped(ids_restore, ids_keep.shape[1])
                self.mark("forward")
                pred, q = self.engine(batch.images, ids_keep, ids_restore)
                terms = self.objective(batch.images, pred, q, *self.negatives(keys(), index), mask)
                self.mark("backward")
                self.engine.backward(terms["total"])

                finite &= terms["total"].detach().isfinite()
                outcome.terms.append({name: value.detach() for name, value in terms.items()})
                outcome.keys += batch.keys
                outcome.draw = functools.partial(self.objective.picture, batch.images, mask, pred.detach())

        self.mark("step")
        result = self.engine.step(self.learning_rate_at(step), finite=finite, stop=stop())
        outcome.applied, outcome.grad_norm, outcome.stop = result.applied, result.grad_norm, result.stop
        if not result.applied:
            self.momentum.restore()
        elif self.recipe.momentum.update == "step":
            self.update_momentum(m)
        return outcome

    @torch.no_grad()
    def keys(self, chunk: list[Batch], m: float) -> Callable[[], Tensor]:
        """Start to gather the keys of a chunk of micro-batches; what is returned waits for them.

        They come from all ranks, of length 1, in the order of positions: [samples, dim].
        """
        keys = []
        for batch in chunk:
            if self.recipe.momentum.update == "micro_batch":
                self.update_momentum(m)
            with self.autocast():
                k = self.momentum(batch.images, self.masks.of_momentum(batch))
            keys.append(F.normalize(k.float(), dim=-1))
        gathering = distributed.Gathering(torch.cat(keys))
        # The i-th sample of rank r is the one at position W·i + r.
        return lambda: gathering.result().transpose(0, 1).flatten(0, 1)

    def negatives(self, keys: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """What micro-batch `index` of a chunk is held against: keys, and the row of each sample's own among them.

        Keys are [M, dim]; under contrast.scope=group [groups, group_size, dim], where each group meets an equal share
        of the queries, in order. Labels int64 [B] count within the keys that a query meets.
        """
        size = self.recipe.local_batch
        first = self.world.size * index * size
        rows = first + self.world.size * torch.arange(size, device=keys.device) + self.world.rank
        group = self.recipe.contrast.group_size
        if self.recipe.contrast.scope != "group" or group is None:
            return keys, rows
        last = first + self.world.size * size - 1
        return keys.view(-1, group, keys.shape[-1])[first // group : last // group + 1], rows % group

    def update_momentum(self, m: float) -> None:
        """p ← m·p + (1−m)·p_encoder, each rank on what it holds: under ZeRO-3 on its pieces."""
        self.momentum.update(self.engine.local_parameters(), m)

    def encoder(self, branch: str) -> dict[str, Tensor]:
        """Whole tensors of the encoder, or of the momentum encoder, by timm's names: on every rank, to be read only.

        Collective under ZeRO-3.
        """
        return self.momentum.whole_encoder() if branch == "momentum" else self.engine.whole("encoder.")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        return schedule.learning_rate(step, self.plan, self.recipe.optimizer)

    def momentum_at(self, step: int) -> float:
        """m of a step."""
        return schedule.momentum(step, self.plan.steps, self.recipe.momentum)

    def autocast(self) -> torch.autocast:
        """Matrix work in bfloat16 if the recipe says so; the engine and the objective do the same by themselves."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16")


def _attended(recipe: Recipe, teacher: Teacher | None) -> Iterator[tuple[int, int]]:
    """Width and heads of every network that attends."""
    yield recipe.model.width, recipe.model.heads
    yield recipe.model.decoder.width, recipe.model.decoder.heads
    if teacher is not None:
        yield teacher.vit.width, recipe.teacher.heads


def _in_float8(recipe: Recipe) -> bool:
    """Whether the teacher's products are: like its stream, only where the matrix work is not in float32."""
    return bool(recipe.loss.feature) and recipe.teacher.products == "float8" and recipe.train.precision == "bf16"


class Masks:
    """Which patches each branch sees: a pure function of (seed, sample position)."""

    def __init__(self, recipe: Recipe):
        self.seed = recipe.seed
        self.mode = recipe.mask.momentum
        self.patches = recipe.model.patches
        self.keep = recipe.visible_patches
        self.kernels = recipe.kernels

    def of_encoder(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(ids_keep int64 [B, K], ids_restore int64 [B, L]) of mask A."""
        return self._draw(batch, kernels.ENCODER)

    def of_momentum(self, batch: Batch) -> Tensor | None:
        """ids_keep int64 [B, K] of mask B, or None for all patches (mask.momentum)."""
        if self.mode == "none":
            return None
        return self._draw(batch, kernels.ENCODER if self.mode == "same" else kernels.MOMENTUM)[0]

    def _draw(self, batch: Batch, view: int) -> tuple[Tensor, Tensor]:
        return kernels.mask(self.seed, batch.positions, view, self.patches, self.keep, implementation=self.kernels)
