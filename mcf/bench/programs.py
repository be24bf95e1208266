"""The programs that the benchmark of the step takes steps of: the step of `mcf.train`, and the reference's plain one.

Both are functions of the recipe alone: the same first weights, images and masks, in whatever process they are built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mcf import kernels, memory
from mcf.bench.alone import prepare
from mcf.bench.plain import PlainMCF
from mcf.bench.work import AVERAGES, Work
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.distributed import World
from mcf.models import MomentumBranch, Teacher, build_student
from mcf.models.patches import normalise
from mcf.plan import Plan, make_plan
from mcf.schedule import learning_rate
from mcf.step import Step
from mcf.weights import load_teacher
from mcf.weights.reference import theirs, to_reference

LOSSES = ("feature", "contrast")

# Takes the step of a number; its unweighted losses, and `total`.
Program = Callable[[int], dict[str, float]]


def ours(recipe: Recipe, world: World) -> tuple[Step, Program]:
    """The step that `mcf.train` runs, set up as it sets it up."""
    prepare(recipe, world.device)
    step = Step(recipe, _plan(recipe), _teacher(recipe), world)
    batch = _batches(recipe, world)

    def take(index: int) -> dict[str, float]:
        terms = step(index, iter([batch(index)])).terms[0]
        if index == 0:
            memory.leave_out_of_collections()
        return {name: float(terms[name]) for name in (*LOSSES, "total") if name in terms}

    return step, take


def keep_first_gradients(step: Step, kept: list[bytes]) -> None:
    """Have the next step put its gradients there: float32 of all parameters, one after the other."""
    apply = step.engine.step

    def first(*arguments: Any, **named: Any) -> Any:
        if not kept:
            parts = [p.grad.flatten().cpu() for p in step.engine.module.parameters() if p.grad is not None]
            kept.append(torch.cat(parts).numpy().tobytes())
        return apply(*arguments, **named)

    step.engine.step = first  # type: ignore[method-assign]


def watch(step: Step) -> Work:
    """Look on while the step works, from here on."""
    network, apply = step.engine.module, step.engine.step
    parameters = {theirs(f"student.{name}"): p for name, p in network.named_parameters() if p.requires_grad}
    averages = {theirs(f"momentum.{name}"): p for name, p in step.momentum.named_parameters()}
    work = Work(parameters | averages)

    def first(*arguments: Any, **named: Any) -> Any:
        work.note_gradients(parameters.items())
        step.engine.step = apply  # type: ignore[method-assign]
        return apply(*arguments, **named)

    step.engine.step = first  # type: ignore[method-assign]
    return work


def reference(recipe: Recipe, world: World) -> tuple[Work, Program]:
    """The released code's way (`mcf.bench.plain`), from the weights that `ours` starts from; and who looks on."""
    if recipe.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # of its convolution; ours has none, and they are to be equal
    teacher, patches = recipe.teacher, recipe.model.patches
    grid = recipe.model.image_size // teacher.patch_size
    model = PlainMCF(recipe, (grid**2, teacher.patch_size, teacher.width, teacher.depth, teacher.heads))
    model.load_released(_first_weights(recipe))
    model = model.to(world.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.optimizer.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=1e-6, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps)
    plan = _plan(recipe)
    named = dict(model.named_parameters())
    gradients = {name: p for name, p in named.items() if p.requires_grad}
    averages = {n: p for n, p in named.items() if n.startswith(AVERAGES) and not n.endswith("pos_embed")}
    work = Work(gradients | averages)
    batch = _batches(recipe, world)
    # Its data loader's workers normalise, so that is not in its step; ours does it inside.
    pixels = normalise(batch(0).images).contiguous()

    def take(index: int) -> dict[str, float]:
        positions = batch(index).positions
        # Noise of the same order gives the same masks.
        noise, noise_target = (
            kernels.mask(recipe.seed, positions, view, patches, model.keep)[1].float()
            for view in (kernels.ENCODER, kernels.MOMENTUM)
        )
        with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            losses = model(pixels, noise, noise_target)
        losses["total"].backward()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(index, plan, recipe.optimizer)
        if index == 0:
            work.note_gradients(gradients.items())
        optimiser.step()
        optimiser.zero_grad()
        return {name: float(losses[name].detach()) for name in (*LOSSES, "total")}

    return work, take


def _plan(recipe: Recipe) -> Plan:
    return make_plan(recipe, recipe.data.samples or 1_000_000)


def _batches(recipe: Recipe, world: World) -> Callable[[int], Batch]:
    """Micro-batches of the same noise, each at the positions of its number."""
    size = recipe.model.image_size
    generator = torch.Generator().manual_seed(recipe.seed)
    images = torch.randint(0, 256, (recipe.batch, size, size, 3), dtype=torch.uint8, generator=generator)
    images = images.to(world.device)

    def batch(index: int) -> Batch:
        positions = index * recipe.batch + torch.arange(recipe.batch, device=world.device)
        first = index * recipe.batch
        return Batch(images, positions, [str(position) for position in range(first, first + recipe.batch)])

    return batch


def _teacher(recipe: Recipe) -> Teacher | None:
    return load_teacher(
        recipe.teacher,
        image_size=recipe.model.image_size,
        attention=recipe.attention,
        kernels=recipe.kernels,
        seed=recipe.seed,
    )


def _first_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What `ours` starts from, by the released checkpoint's names."""
    student, teacher = build_student(recipe), _teacher(recipe)
    assert teacher is not None
    return to_reference(student.state_dict(), MomentumBranch(student).state_dict(), teacher.vit.state_dict())
