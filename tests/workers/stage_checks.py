"""Ranks that take whole training steps under every ZeRO stage: `python stage_checks.py FOLDER SIZE WHAT`.

Started by tests/test_stages.py, which judges what is left in FOLDER/WHAT_SIZE_RANK.pt. The first process starts the ranks;
a rank builds the tiny model of tests/tiny.py, and pictures are noise that depends on the position alone, so that a step's
samples are the same on any number of ranks.
"""

from __future__ import annotations

import gc
import itertools
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

from mcf import distributed, linear
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.models import regional
from mcf.plan import make_plan
from mcf.step import Step
from mcf.weights import load_teacher

STAGES = (0, 1, 2, 3)
BATCH, SAMPLES = 16, 120
# Matrices that outweigh vectors as they do in a real model, and BatchNorm that sends something.
LARGE = {
    "model__width": 64, "model__depth": 3, "model__decoder__width": 48, "model__projection__hidden": 64,
    "model__projection__batch_norm": "synchronised",
}  # fmt: skip


def recipe(ranks: int, stage: int, **overrides) -> Recipe:
    """Two micro-batches a step on any number of ranks."""
    own = {"batch": BATCH, "micro_batch": BATCH // ranks // 2, "train__zero_stage": stage, "optimizer__blr": 0.01}
    return Recipe.model_validate(tiny.recipe(Path("runs/r"), Path("data"), ranks=ranks, **(own | overrides)))


def build(world: distributed.World, stage: int, **overrides) -> Step:
    config = recipe(world.size, stage, **overrides)
    teacher = load_teacher(config.teacher, image_size=config.model.image_size, attention=config.attention)
    return Step(config, make_plan(config, SAMPLES), teacher, world)


def batches(step: Step, number: int) -> Iterator[Batch]:
    size = step.recipe.local_batch * step.world.size
    for first in range(number * BATCH, (number + 1) * BATCH, size):
        positions = torch.arange(first, first + size)[step.world.rank :: step.world.size]
        images = [picture(int(position)) for position in positions]
        yield Batch(torch.stack(images), positions, [f"{int(position):06d}" for position in positions])


def picture(position: int) -> Tensor:
    generator = torch.Generator().manual_seed(position)
    return torch.randint(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8, generator=generator)


def state(step: Step) -> dict[str, Tensor]:
    """All that a step changes, whole, on rank 0."""
    parts = {"engine": step.engine.state_dict(), "momentum": step.momentum.full_state_dict()}
    return {f"{part}.{name}": t.detach().clone() for part, tensors in parts.items() for name, t in tensors.items()}


# --- what is checked ----------------------------------------------------------------------------------------------


def losses(world: distributed.World) -> dict:
    """Twenty steps of every stage: losses, gradient norms, and what is there at the end."""
    seen: dict = {}
    for stage in STAGES:
        step, told = build(world, stage), []
        for number in range(20):
            outcome = step(number, batches(step, number))
            assert outcome.applied
            names = ("total", "feature", "contrast")
            own = torch.stack([torch.stack([terms[name] for terms in outcome.terms]).mean() for name in names])
            told.append([*distributed.mean(own).tolist(), outcome.grad_norm])
        branches = {name: {k: t.clone() for k, t in step.encoder(name).items()} for name in ("encoder", "momentum")}
        seen[stage] = {"told": told, "state": state(step), "encoders": branches}
    return seen


def refused(world: distributed.World) -> dict:
    """Steps 0, 1 (refused: a NaN in the last rank's second micro-batch), 2; and a twin that never sees step 1."""
    seen: dict = {}
    for stage in STAGES:
        # At a rate that is not 0 from the first step on: else the average would have nowhere to move.
        step, twin = (build(world, stage, optimizer__warmup_epochs=0) for _ in range(2))
        for one in (step, twin):
            assert one(0, batches(one, 0)).applied
        before, calls = state(step), itertools.count()
        buffers = [buffer.clone() for buffer in step.momentum.buffers()]

        def spoil(_module, _inputs, out, calls=calls):
            bad = next(calls) == 1 and world.rank == world.size - 1
            return out | {"total": out["total"] * torch.nan} if bad else None

        step.objective.register_forward_hook(spoil)
        moved = []
        update = step.momentum.update

        def watched(*arguments, update=update, moved=moved, branch=step.momentum):
            kept = [parameter.clone() for parameter in branch.parameters()]
            update(*arguments)
            moved.append(any(not torch.equal(a, b) for a, b in zip(kept, branch.parameters())))

        step.momentum.update = watched
        refusal = step(1, batches(step, 1))
        seen[stage] = {
            "applied": refusal.applied, "moved": moved, "before": before, "after": state(step),
            "buffers": all(torch.equal(a, b) for a, b in zip(buffers, step.momentum.buffers())),
        }  # fmt: skip
        for one in (step, twin):
            assert one(2, batches(one, 2)).applied
        seen[stage] |= {"final": state(step), "twin": state(twin)}
    return seen


def quick(world: distributed.World) -> dict:
    """Two steps of stages 1 and 3: plain, with every block computed again, with blocks that are traced too, and by oneDNN."""
    # Traced as for inductor, and run as it is written: compiling takes a minute.
    regional.BACKEND = "aot_eager"
    again = {"speed__recompute": ["encoder", "decoder", "teacher"]}
    ways: dict = {
        "plain": {},
        "again": again,
        "both": {"speed__compile": "blocks", **again},
        "onednn": {},
        "onednn again": again,
    }
    seen: dict = {"products": 0}
    multiply, linear.LEAST = linear._backward, 0

    def counted(*arguments):
        seen["products"] += 1
        return multiply(*arguments)

    linear._backward = counted
    for stage in (1, 3):
        for way, overrides in ways.items():
            linear.use("onednn" if "onednn" in way else "torch")
            step = build(world, stage, **overrides)
            told = []
            for number in range(2):
                outcome = step(number, batches(step, number))
                told.append([terms["total"].item() for terms in outcome.terms] + [outcome.grad_norm])
            seen[stage, way] = told
    return seen


def bytes_(world: distributed.World) -> dict:
    """Bytes that a rank keeps and sends, under every stage, in float32."""
    return {stage: bytes_of(world, stage) for stage in STAGES}


def bytes_of(world: distributed.World, stage: int) -> dict:
    # What earlier stages have left: DeepSpeed does not let go of every engine.
    before = alive()
    step = build(world, stage, **LARGE)
    held: list[int] = []
    gradients: list[int] = []
    peaks: list[int] = []
    take = step.engine.step

    def note(*_) -> None:
        if step.engine.applied_steps == 2:
            held.append(alive() - before - frozen(step))

    def measured(*arguments, **named):
        note()
        gradients.append(sum(gradient.numel() for gradient in step.engine._stage.gradients()))
        return take(*arguments, **named)

    step.engine.step = measured
    step.engine.module.register_forward_pre_hook(note)
    step.engine.module.register_forward_hook(lambda *_: peaks.append(whole(step)))
    # Under stage 3 DeepSpeed watches two micro-batches before it fetches ahead.
    for number in range(3):
        assert step(number, batches(step, number)).applied
    calls = Collectives()
    distributed.barrier()
    started = wire()
    with calls:
        step(3, batches(step, 3))
    distributed.barrier()
    sent = wire() - started
    return {
        "held": max(held), "between": alive() - before - frozen(step), "whole": peaks[-1], "calls": calls.seen,
        "wire": sent, "gradients": gradients[-1],
        "parameters": sum(t.numel() for t in step.engine.local_parameters().values()),
        "momentum": sum(p.numel() for p in step.momentum.parameters()),
        "moments": sum(m["exp_avg"].numel() for m in step.engine._stage.moments.values()),
    }  # fmt: skip


def alive() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, Tensor):
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def frozen(step: Step) -> int:
    """Bytes of what no ZeRO stage touches: teacher, position tables, BatchNorm's statistics and their copies."""
    tensors = [*step.objective.state_dict().values()]
    tensors += [buffer for module in (step.engine.module, step.momentum) for buffer in 2 * [*module.buffers()]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def whole(step: Step) -> int:
    """Elements of parameters that are whole on this rank now."""
    return sum(parameter.numel() for parameter in step.engine.module.parameters())


class Collectives(TorchDispatchMode):
    """Notes every collective of this process: its name, and the bytes of its largest tensor."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            flat, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
            sizes = [t.numel() * t.element_size() for t in flat if isinstance(t, Tensor)]
            self.seen.append((function._overloadpacket.__name__, max(sizes, default=0)))
        return function(*args, **(kwargs or {}))


def wire() -> int:
    """Bytes that have passed the loopback device: of these ranks alone, where they have a network of their own."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def main(folder: Path, size: int, what: str) -> int:
    """Start the ranks, or be one."""
    if "RANK" in os.environ:
        world = distributed.join()
        distributed.set_threads(world, 1)
        seen = {"losses": losses, "refused": refused, "bytes": bytes_, "quick": quick}[what](world)
        torch.save(seen, folder / f"{what}_{size}_{world.rank}.pt")
        distributed.leave()
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | meeting | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
    try:
        return max(rank.wait(timeout=1300) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
