"""What `speed` and `teacher.stream` do to a step: the numbers stay, or differ by no more than is said; nothing is compiled
twice; nothing waits for the device; memory does not grow."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from syncs import Syncs, there
from torch import Tensor
from torch._dynamo.utils import counters

from mcf import distributed, memory
from mcf.config import Recipe
from mcf.data.loader import Batch
from mcf.models import Teacher, regional
from mcf.models.vit import Block, VisionTransformer
from mcf.plan import make_plan
from mcf.step import Outcome, Step
from mcf.train import Training
from mcf.weights import load_teacher

BATCH, MICRO = 8, 4
PARTS = ("encoder", "decoder", "teacher")


def build(world: distributed.World, **overrides) -> Step:
    recipe = Recipe.model_validate(tiny.recipe(Path("runs/r"), Path("data"), **overrides))
    teacher = load_teacher(recipe.teacher, image_size=recipe.model.image_size, kernels=recipe.kernels)
    return Step(recipe, make_plan(recipe, 120), teacher, world)


def batches(number: int, device: torch.device) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(number)
    for first in range(number * BATCH, (number + 1) * BATCH, MICRO):
        images = torch.randint(0, 256, (MICRO, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8, generator=generator)
        keys = [str(position) for position in range(first, first + MICRO)]
        yield Batch(images.to(device), torch.arange(first, first + MICRO, device=device), keys)


def run(step: Step, steps: int = 3) -> list[list[float]]:
    """Loss terms of each micro-batch and the gradient's norm of each step."""
    told = []
    for number in range(steps):
        outcome = step(number, batches(number, step.world.device))
        assert outcome.applied
        told += [[*(value.item() for value in terms.values()), outcome.grad_norm] for terms in outcome.terms]
    return told


# ------------------------------------------------------------------------------------------- computed again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parts", [[part] for part in PARTS] + [list(PARTS)], ids="+".join)
def test_blocks_computed_again_give_the_same_bits(world, parts, precision):
    plain = build(world, train__precision=precision)
    again = build(world, train__precision=precision, speed__recompute=parts)
    networks = {
        "encoder": again.engine.module.encoder, "decoder": again.engine.module.decoder, "teacher": again.objective.teacher
    }  # fmt: skip
    passes = dict.fromkeys(PARTS, 0)
    for name, network in networks.items():
        for block in (module for module in network.modules() if isinstance(module, Block)):

            def count(*_, name=name):
                passes[name] += torch.is_grad_enabled()

            block.register_forward_pre_hook(count)
    assert run(again) == run(plain)
    left, right = again.engine.state_dict(), plain.engine.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)
    # Three steps of two micro-batches; the tiny network has 2, 1 and 2 blocks.
    blocks = {"encoder": 2, "decoder": 1, "teacher": 2}
    assert passes == {name: 6 * n * (2 if name in parts else 1) for name, n in blocks.items()}


# ------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def traced(monkeypatch):
    """Traced and differentiated as for inductor, and then run as it is written: compiling takes a minute."""
    monkeypatch.setattr(regional, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [[], ["teacher", "encoder"]], ids=["kept", "recomputed"])
def test_nothing_is_compiled_after_the_first_step(world, traced, recompute):
    """Nor after a checkpoint has been read, and nothing of a block is left out of its graph."""
    overrides = {"speed__recompute": recompute}
    compiled, plain = build(world, speed__compile="blocks", **overrides), build(world, **overrides)
    expected = run(plain, 4)
    assert not counters["stats"]
    told = run(compiled, 1)
    # Of the encoder with gradient and the momentum branch without, of the decoder, and of the teacher on the image
    # without and on the pseudo image with gradient.
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 5 and not counters["graph_break"]
    compiled.engine.load_state_dict(compiled.engine.state_dict())
    compiled.momentum.load_full_state_dict(compiled.momentum.full_state_dict())
    told += [row for number in (1, 2, 3) for row in rows(compiled(number, batches(number, world.device)))]
    assert counters["stats"]["unique_graphs"] == graphs, "something was compiled in a later step"
    # Autograd's formulas for LayerNorm and GELU, taken apart: roundings, which BatchNorm over four samples multiplies.
    for ours, theirs in zip(told, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    # A checkpoint does not know of it.
    assert compiled.engine.state_dict().keys() == plain.engine.state_dict().keys()


def rows(outcome: Outcome) -> list[list[float]]:
    return [[*(value.item() for value in terms.values()), outcome.grad_norm] for terms in outcome.terms]


def test_a_compiled_block_computes_what_the_block_does(world, monkeypatch):
    """By inductor itself, forward and backward, in float32; what it chooses does not hang on the clock."""
    torch._dynamo.reset()
    inductor, chosen = importlib.import_module("torch._inductor.compile_fx"), []
    compile_fx = inductor.compile_fx

    def noted(*arguments, **named):
        asked = named.get("config_patches") or {}  # with which it calls itself
        chosen.append(asked.get("deterministic", torch._inductor.config.deterministic))
        return compile_fx(*arguments, **named)

    monkeypatch.setattr(inductor, "compile_fx", noted)
    torch.manual_seed(0)
    block = Block(32, 2)
    x = torch.randn(4, 17, 32)

    def gradients() -> list[Tensor]:
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        block(inputs).square().sum().backward()
        return [inputs.grad, *(parameter.grad for parameter in block.parameters())]

    plain = gradients()
    regional.compile_blocks(block)
    # Sums of a few hundred numbers in another order.
    for ours, theirs in zip(gradients(), plain):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6
    assert chosen and all(chosen)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- the teacher's stream


def test_a_stream_in_bfloat16_moves_features_by_a_few_roundings():
    """Against float32 throughout, beside what autocast alone does."""
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, width=64, depth=12, heads=4)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    cotangents = torch.randn(3, 4, 17, 64)

    def teacher() -> Teacher:
        return Teacher(vit.state_dict(), heads=4, taps=(2, 5, 11))

    def found(teacher: Teacher, autocast: bool) -> tuple[list[Tensor], Tensor]:
        pixels = (images.permute(0, 3, 1, 2).float() / 64 - 2).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = teacher.features(pixels)
        torch.stack([(f.float() * c).sum() for f, c in zip(features, cotangents)]).sum().backward()
        return [f.detach().double() for f in features], pixels.grad.double()

    exact, gradient = found(teacher(), autocast=False)
    cast, _ = found(teacher().to_autocast(torch.bfloat16), autocast=True)
    stream, moved = found(teacher().to_stream(torch.bfloat16), autocast=True)

    def apart(ours: list[Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(ours, exact)]

    # A rounding to bfloat16 is 2⁻⁹ = 2e-3 at most. Autocast rounds what is added, a part of the stream; the stream itself
    # is rounded twice a block, which adds up like a random walk: √(2·12)·2e-3/√3 = 6e-3 after twelve blocks.
    assert all(error < 6e-3 for error in apart(cast)), apart(cast)
    assert all(error < 1.2e-2 for error in apart(stream)), apart(stream)
    assert apart(stream)[-1] > apart(cast)[-1], "the stream is not in bfloat16"
    cosine = float((moved * gradient).sum() / moved.norm() / gradient.norm())
    assert cosine > 0.999, cosine
    assert all(f.dtype == torch.bfloat16 for f in teacher().to_stream(torch.bfloat16).features(images))


# ------------------------------------------------------------------------------------------- no hidden stalls


WAYS: dict[str, dict] = {
    "plain": {},
    "a group, bf16": {"contrast__scope": "group", "contrast__group_size": 2, "train__precision": "bf16"},
    "the whole step": {"contrast__scope": "step", "momentum__update": "step", "loss__pixel": 1.0},
    "synchronised": {"model__projection__batch_norm": "synchronised"},
    "recomputed": {"speed__recompute": list(PARTS), "mask__momentum": "none"},
    "float8": {"train__precision": "bf16", "teacher__products": "float8"},
}


# The engine's verdict whether the step is finite.
ONCE = ["tolist"]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.float8) if way == "float8" else way for way in WAYS]
)
def test_a_step_waits_for_the_device_once(world, way, accumulation, monkeypatch):
    # So that a synchronised BatchNorm does what it does among several.
    monkeypatch.setattr("mcf.models.heads._ranks", lambda: 2)
    step = build(there(world), batch=MICRO * accumulation, **WAYS[way])
    assert step.plan.accumulation == accumulation
    run(step, 1)
    taken = list(batches(1, step.world.device))
    with Syncs() as syncs:
        outcome = step(1, iter(taken))
    assert outcome.applied
    assert syncs.found == ONCE


# Each takes three numbers on the device of a step. Methods are asked for when they are called: `Syncs` puts others there.
WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t[0].item(),
    "float": lambda t: float(t[0]),
    "int": lambda t: int(t[0]),
    "bool": lambda t: bool(t[0]),
    "is_nonzero": lambda t: torch.is_nonzero(t[0]),
    "if": lambda t: 1 if t.isnan().any() else 0,
    "text": lambda t: f"{t}",
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.numpy(),
    "numpy's array": np.asarray,
    "to the host": lambda t: t.to("cpu"),
    "to the host, by name": lambda t: t.to(device=torch.device("cpu"), non_blocking=True),
    "where": lambda t: torch.where(t > 0),
    "nonzero": Tensor.nonzero,
    "argwhere": torch.argwhere,
    "masked_select": lambda t: t.masked_select(t > 0),
    "by a mask": lambda t: t[t > 0],
    "into a mask": lambda t: t.clone().index_put_((t > 0,), t[0]),
    "up to": lambda t: t[: t.long()[0]],
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "unique": Tensor.unique,
    "unique_consecutive": Tensor.unique_consecutive,
    "unique of rows": lambda t: t.unique(dim=0),
    "bincount": lambda t: t.long().bincount(),
    "one_hot": lambda t: torch.nn.functional.one_hot(t.long(), 8),
    "repeat_interleave": lambda t: t.repeat_interleave(t.long()),
    "inverse": lambda t: torch.linalg.inv(t.diag()),
    "numbers": lambda t: torch.tensor([1.0, 2.0]).to(torch.device("cpu", 0)),
    "numbers made there": lambda t: torch.tensor([1.0, 2.0], device=torch.device("cpu", 0)),
    "a number": lambda t: torch.as_tensor(True, device=t.device),
    "new_tensor": lambda t: t.new_tensor([1.0, 2.0]),
    "numpy's numbers": lambda t: torch.from_numpy(np.ones(2)),
    "by a list": lambda t: t[[0, 1]],
    "made on the host": lambda t: torch.arange(3).float().to(torch.device("cpu", 0)),
    "drawn on the host": lambda t: torch.as_tensor(torch.rand(3), device=torch.device("cpu", 0)),
}


@pytest.mark.parametrize("spoil", WAITS.values(), ids=WAITS)
def test_a_wait_in_a_step_is_found(world, spoil):
    step = build(there(world))

    def wait(_module, _inputs, out):
        spoil(out["total"].detach().abs().clamp(1, 2).expand(3).contiguous())

    step.objective.register_forward_hook(wait)
    taken = list(batches(0, step.world.device))  # which are made on the host
    with Syncs() as syncs:
        step(0, iter(taken))
    assert len(syncs.found) >= 2 + len(ONCE), "one a micro-batch"
    assert syncs.found[-1:] == ONCE


def test_what_does_not_wait_is_not_found():
    """Else a step would be built around the watch, and not around the device."""
    device = torch.device("cpu", 0)
    t = torch.rand(3, device=device)
    elsewhere: list = []
    with Syncs() as syncs:
        t.to(device).to(torch.float64).to(t)
        torch.as_tensor(t > 0, device=device).logical_not().any().double()
        torch.arange(3, device=device) + torch.full((), 2.0)
        t.repeat_interleave(t.long(), output_size=0).repeat_interleave(2)
        torch.where(t > 0, t, 0.0).masked_fill(t > 0, 1.0)[t.long()].isfinite().all()
        other = threading.Thread(target=lambda: elsewhere.append(t.tolist()))
        other.start()
        other.join()
    t.tolist()
    assert syncs.found == [] and elsewhere


@pytest.mark.parametrize("log_every", [100, 1], ids=["not told", "told"])
def test_the_loop_waits_for_no_more_than_the_step(world, tmp_path, log_every):
    """From the moment a step begins in `mcf.train` to the next: with its loader, meters and guard, on one rank."""
    tiny.shards(tmp_path / "data")
    overrides = {"train__log_every": log_every, "checkpoint__every": 100, "optimizer__warmup_epochs": 0.0}
    values = tiny.recipe(tmp_path / "run", tmp_path / "data", train__steps=3, **overrides)
    syncs, began = Syncs(), []

    with contextlib.ExitStack() as ends:

        def mark(phase: str, step: int | None = None) -> None:
            if step is not None:
                began.append(step)
                if step == 2:
                    watched.enter_context(syncs)
                if step == 3:
                    watched.close()

        training = Training(Recipe.model_validate(values), tmp_path / "run", there(world), mark)
        ends.callback(training.loader.close)
        watched = ends.enter_context(contextlib.ExitStack())
        assert training.step.engine.stage == 0 and training.plan.accumulation == 2
        assert training.run(SimpleNamespace(received=False, for_good=False))
    assert began == [1, 2, 3] and training.progress.bad_steps == 0
    if log_every == 1:  # the meters are read
        assert len(syncs.found) > len(ONCE) and syncs.found[:1] == ONCE
    else:
        assert syncs.found == ONCE


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_the_gpu_is_waited_for_once_a_step(world, way, monkeypatch):
    """For the verdict whether the step is finite, and for nothing else: torch itself refuses to wait."""
    step = build(world, **WAYS[way])
    run(step, 2)
    taken = list(batches(2, world.device))
    verdicts = []
    tolist = Tensor.tolist

    def verdict(tensor: Tensor):
        verdicts.append(tensor.shape)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Tensor, "tolist", verdict)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = step(2, iter(taken))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcome.applied and verdicts == [(3,)]


STEPS = """
import gc, json, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_step_speed as here
from mcf import distributed, memory
memory.keep_freed_memory()
torch.set_num_threads(1)
world = distributed.join()
step = here.build(world)
found = []
for number in range(60):
    step(number % 20, here.batches(number, world.device))
    if number == 0:
        memory.leave_out_of_collections()
    if number in (14, 59):
        gc.collect()
        resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        found.append([sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), resident])
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fifty_steps_hold_no_more_memory_than_ten():
    """As `mcf.train` has it: freed memory kept, and objects that stay left out of collections."""
    command = [sys.executable, "-c", STEPS, str(Path(__file__).parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    (early, began), (late, ended) = json.loads(done.stdout.splitlines()[-1])
    assert late == early, "tensors are left behind"
    # The network's tensors are kilobytes: what a step allocates, kept of every tenth, would be 2 MB after fifty.
    assert ended - began < 1e6, (began, ended)


def test_what_stays_is_left_out_of_collections():
    import gc

    gc.unfreeze()
    before = gc.get_freeze_count()
    cycle: list = []
    cycle.append(cycle)
    identity, cycle = id(cycle), []
    try:
        memory.leave_out_of_collections()
        assert gc.get_freeze_count() > before + 100_000, "torch alone is more"
        assert not any(id(o) == identity and o == [o] for o in gc.get_objects()), "garbage was frozen"
        assert len(gc.get_objects()) < 10_000
    finally:
        gc.unfreeze()
