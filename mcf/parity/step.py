"""Our step from the golden state, on one rank of one or several, and what float32 leaves open in it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mcf.config import Recipe
from mcf.errors import UserError
from mcf.kernels import rank as rank_noise
from mcf.models import MCF, MomentumBranch, Objective, Teacher, dropped
from mcf.models.momentum import POSITIONS
from mcf.parity.golden import Golden, recipe_of
from mcf.weights.reference import from_reference, theirs


def step(golden: Golden, before: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """Our step from the golden state `before` (released names), in the names of the golden file.

    Images and noise are those of this rank; with several ranks the process group must be up.
    """
    recipe = recipe_of(golden)
    network, branch, objective = build(golden, recipe, before)
    images = golden.tensors["u8"].permute(0, 2, 3, 1).contiguous()
    keep = recipe.visible_patches
    ids_keep, ids_restore = rank_noise(golden.tensors["noise_online"], keep)
    mask = dropped(ids_restore, keep)

    branch.update({**dict(network.named_parameters()), POSITIONS: network.encoder.pos_embed}, recipe.momentum.value)
    k = branch(images, rank_noise(golden.tensors["noise_target"], keep)[0])
    keys = _gather(F.normalize(k, dim=1), world)
    pred, q = network(images, ids_keep, ids_restore)
    terms = objective(images, pred, q, keys, rank * len(q) + torch.arange(len(q)), mask)
    terms["total"].backward()

    result = {"pred": pred, "mask": mask.float(), "q": q, "k": k}
    result |= {"mim": terms["feature"], "con": terms["contrast"], "loss": terms["total"]}
    for name, parameter in network.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if world > 1:
            dist.all_reduce(gradient)
        result["grad." + theirs("student." + name)] = gradient / world
    for name, tensor in branch.state_dict().items():
        result["after." + theirs("momentum." + name)] = tensor
    return {name: tensor.detach() for name, tensor in result.items()}


def build(golden: Golden, recipe: Recipe, before: dict[str, Tensor]) -> tuple[MCF, MomentumBranch, Objective]:
    """The parts of training, with the golden weights in them."""
    try:
        state = from_reference(before)
        network = MCF(recipe.model, attention=recipe.attention)
        branch = MomentumBranch(network)
        network.load_state_dict(state.student)
        branch.load_state_dict(state.momentum)
        teacher = Teacher(
            state.teacher,
            heads=recipe.teacher.heads,
            taps=recipe.teacher.taps,
            image_size=recipe.model.image_size,
            attention=recipe.attention,
        )
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{golden.path}: the state before the step does not fit its configuration: {reason}") from None
    return network, branch, Objective(recipe, teacher)


def _gather(keys: Tensor, world: int) -> Tensor:
    if world == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(world)]
    dist.all_gather(parts, keys)
    return torch.cat(parts)


def one_ulp(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every number of the state but zeros moved to the next that its type can hold, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(state)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            up = torch.rand(tensor.shape, generator=generator) < 0.5
            towards = torch.where(up, math.inf, -math.inf).to(tensor.dtype)
            moved[name] = torch.where(tensor == 0, tensor, torch.nextafter(tensor, towards))
    return moved
