"""The beginning of a run on one rank: its parts, put together and brought to where the run stands.

    data         rank 0 reads the manifest, and every node sees the same       mcf/data/shards.py, mcf/startup.py
    checkpoint   the newest whole one: of this recipe, these data, or refused   mcf/checkpoint.py, mcf/state.py
    teacher      its weights, which must be those that the run began with       mcf/weights
    step         network, objective and optimiser, with a checkpoint's tensors  mcf/step.py

What can be refused is refused before anything large is built.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mcf import checkpoint, distributed, precision, startup, state
from mcf.config import Recipe
from mcf.data.loader import Loader
from mcf.data.shards import Manifest, load_manifest
from mcf.models.teacher import Teacher
from mcf.plan import Plan, make_plan
from mcf.probing.probe import Probe
from mcf.spread import Spread
from mcf.step import Step
from mcf.watchdog import Mark
from mcf.weights import build_teacher, read_start, read_teacher

log = logging.getLogger(__name__)


@dataclass
class Begun:
    """A run that can take its next step. resumed: it goes on from a checkpoint. recipe: with `auto` precision made one."""

    recipe: Recipe
    plan: Plan
    manifest: Manifest
    progress: state.Progress
    step: Step
    loader: Loader
    probe: Probe | None
    resumed: bool


def begin(recipe: Recipe, run_dir: Path, world: distributed.World, mark: Mark) -> Begun:
    """Put a run together. Collective; `mark` is told of each phase.

    Raises UserError for data, a checkpoint or a teacher that are not the run's, or cannot be read.
    """
    mark("reading data")
    distributed.from_main(lambda: checkpoint.make_run_dir(run_dir))
    startup.check_same_everywhere(world, recipe.data.path or "")
    manifest = distributed.from_main(
        lambda: load_manifest(recipe.data.path or "", lost=recipe.data.max_bad if checkpoint.steps(run_dir) else 0.0)
    )
    plan = make_plan(recipe, manifest.samples)
    mark("reading checkpoint")
    found = distributed.from_main(lambda: checkpoint.take_up(run_dir))
    recipe = _resolved(recipe, found, world)
    progress = state.Progress(data=manifest.fingerprint)
    if found is not None:
        progress = distributed.from_main(lambda: state.check_same_run(found, recipe, manifest.fingerprint))
    mark("reading teacher")
    teacher = _teacher(recipe, world)
    identity = distributed.from_main(lambda: state.fingerprint(teacher))
    if found is not None:
        state.check_same_teacher(progress, identity, recipe)
    progress.teacher = identity
    mark("reading probe")
    probe = Probe(recipe.probe, world, recipe.model.image_size) if recipe.probe.every else None
    mark("building")
    start = Spread(lambda: read_start(recipe) or {}, world.device) if found is None else {}
    step = Step(recipe, plan, teacher, world, mark, dict(start) or None)
    if found is not None:
        _go_on_from(found, step, world)
        log.info("going on from %s: %d samples seen", found, progress.samples_seen)
    loader = Loader(
        recipe.data,
        batch=recipe.batch,
        micro_batch=recipe.local_batch,
        seed=recipe.seed,
        image_size=recipe.model.image_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        start=progress.samples_seen,
        threads=world.cores,
        local_ranks=world.local_size,
        manifest=manifest,
    )
    return Begun(recipe, plan, manifest, progress, step, loader, probe, resumed=found is not None)


def _resolved(recipe: Recipe, found: Path | None, world: distributed.World) -> Recipe:
    """The recipe with `train.precision: auto` made one: the checkpoint's, or what rank 0 finds faster. Collective."""
    if recipe.train.precision != "auto":
        return recipe

    def chosen() -> str:
        return precision.choose(world.device) if found is None else state.saved_precision(found)

    train = recipe.train.model_copy(update={"precision": distributed.from_main(chosen)})
    return recipe.model_copy(update={"train": train})


def _teacher(recipe: Recipe, world: distributed.World) -> Teacher | None:
    """The teacher, whose file rank 0 reads for all. Collective."""
    config, size = recipe.teacher, recipe.model.image_size
    tensors = Spread(lambda: read_teacher(config, image_size=size, seed=recipe.seed) or {}, world.device)
    if not tensors:
        return None
    return build_teacher(dict(tensors), config, image_size=size, attention=recipe.attention, kernels=recipe.kernels)


def _go_on_from(found: Path, step: Step, world: distributed.World) -> None:
    """Take over the tensors of a checkpoint, which rank 0 reads for all. Collective."""
    tensors, momentum = state.read(found) if world.is_main else ({}, {})
    step.engine.load_state_dict(Spread(lambda: tensors, world.device))
    step.momentum.load_full_state_dict(dict(Spread(lambda: momentum, world.device)))
