"""One rank of the engine's checks: `python engine_checks.py FOLDER WHAT …`, started by tests/test_engine.py.

Trains a toy under every ZeRO stage and saves what happened to FOLDER; the test judges. A step's data are `groups`
micro-batches, dealt to the ranks in turn, so that two ranks with accumulation a see what one rank with 2a sees.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mcf.config import OptimizerConfig, Recipe, TrainConfig
from mcf.distributed import join, leave, set_threads
from mcf.engine import Engine
from mcf.errors import UserError

STAGES = (0, 1, 2, 3)
LR = 1e-2
TIMEOUT = 1234.0
SAMPLES, WIDTH = 4, 5


class Toy(nn.Module):
    """Odd sizes, so that no partition ends where a parameter does; a token of three dimensions; a BatchNorm."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.token = nn.Parameter(torch.randn(1, 1, 7))
        self.body = nn.Linear(WIDTH, 7, bias=False)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        # After the BatchNorm: a shift before it has no gradient but rounding, which Adam would blow up.
        return self.head(torch.tanh(self.norm(self.body(x))) * self.token[0])


def batch(step: int, group: int) -> torch.Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1000 * step + group)) * (1 + group)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    output = output if output.dtype == torch.float64 else output.float()
    target = torch.linspace(-1, 1, output.numel()).view_as(output)
    return (output - target).square().mean()


def recipe(stage: int, precision: str = "fp32") -> Recipe:
    return Recipe(
        micro_batch=SAMPLES,
        # None of them the default, which an engine that reads no recipe might have by itself.
        optimizer=OptimizerConfig(weight_decay=0.1, betas=(0.8, 0.97), eps=1e-3),
        train=TrainConfig(zero_stage=stage, precision=precision),
    )


class Run:
    """An engine and the steps it takes."""

    def __init__(self, world, stage: int | str, groups: int, seed: int = 0, precision: str = "fp32"):
        # Under stage 3 DeepSpeed leaves small parameters whole, which in a toy are all: splitting them is the check.
        persist = None if stage == "persistent" else 0
        stage = 3 if stage == "persistent" else stage
        self.world, self.mine = world, range(world.rank, groups, world.size)
        # A seed of its own on each rank: the engine must make them equal.
        model = Toy(seed + 17 * world.rank)
        self.engine = Engine(model, recipe(stage, precision), accumulation=len(self.mine), world=world, persist=persist)

    def step(self, number: int, poison: tuple[int, int] | None = None, finite: bool = True, stop: bool = False):
        for group in self.mine:
            x = batch(number, group)
            if poison == (number, group):
                x[0, 0] = float("nan")
            # As the momentum branch reads them before every micro-batch: under stage 3 in the middle of a step.
            assert self.engine.local_parameters()["token"].abs().sum() > 0
            self.engine.backward(loss_of(self.engine(x)))
        return self.engine.step(LR, finite=torch.tensor(finite), stop=stop)


def train(world, folder: Path) -> dict:
    """Parameters, norms, refused steps and resumed runs of every stage, for several accumulations."""
    seen: dict = {}
    for groups in (2, 6):
        for stage in STAGES:
            run = Run(world, stage, groups)
            states, norms = [run.engine.state_dict()], []
            for number in range(4):
                result = run.step(number)
                assert result.applied
                norms.append(result.grad_norm)
                states.append(run.engine.state_dict())
            seen[groups, stage] = {
                "states": states,
                "norms": norms,
                "applied_steps": run.engine.applied_steps,
                "deepspeed_stage": run.engine._deepspeed.zero_optimization_stage(),
            }
            seen[groups, stage]["local"] = {n: v.clone() for n, v in run.engine.local_parameters().items()}
            seen[groups, stage]["splits"] = run.engine.splits_parameters
            if world.is_main:
                torch.save(states[2], folder / f"state_{world.size}_{groups}_{stage}.pt")
    seen["timeouts"] = timeouts()
    for stage in STAGES:
        seen["bf16", stage] = half(world, stage)
    for stage in (*STAGES, "persistent"):
        seen["refused", stage] = refused(world, stage)
        seen["resumed", stage] = resumed(
            world, stage, folder, size=world.size, source=3 if stage == "persistent" else stage
        )
    return seen


def timeouts() -> list[float]:
    """Seconds that the default group waits for a rank, and those that DeepSpeed's own do."""
    from deepspeed.utils import groups

    both = (torch.distributed.group.WORLD, groups._get_data_parallel_group())
    assert both[0] is not both[1], "DeepSpeed has no group of its own"
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in both]


def refused(world, stage: int | str) -> dict:
    """Steps 0, 1, 2, between them one with a NaN in the last rank's input, one with its flag down, one given up.

    At the one with its flag down and at step 1 the last rank wants to stop.
    """
    run = Run(world, stage, groups=6)
    run.step(0)
    before = run.engine.state_dict()
    nan = run.step(7, poison=(7, 4 + world.size - 1))
    after_nan = run.engine.state_dict()
    last = world.rank == world.size - 1
    flag = run.step(8, finite=not last, stop=last)
    run.engine.backward(loss_of(run.engine(batch(9, world.rank))))
    run.engine.discard()
    after_all = run.engine.state_dict()
    results = [run.step(1, stop=last), run.step(2)]
    return {
        "nan": nan,
        "flag": flag,
        "before": before,
        "after_nan": after_nan,
        "after_all": after_all,
        "norms": [result.grad_norm for result in results],
        "stops": [result.stop for result in (nan, flag, *results)],
        "final": run.engine.state_dict(),
    }


def resumed(world, stage: int | str, folder: Path, *, size: int, source: int) -> dict:
    """Steps 2 and 3 by a fresh engine that opens what `source` wrote on `size` ranks after steps 0 and 1."""
    run = Run(world, stage, groups=6, seed=5)
    torch.distributed.barrier()
    state = torch.load(folder / f"state_{size}_6_{source}.pt")
    run.engine.load_state_dict(state)
    opened = run.engine.state_dict()
    norms = [run.step(number).grad_norm for number in (2, 3)]
    return {"opened": opened, "norms": norms, "final": run.engine.state_dict()}


def half(world, stage: int) -> dict:
    """One step in bf16: what the layers compute in, and what is kept."""
    run = Run(world, stage, groups=2, precision="bf16")
    with torch.no_grad():
        output = run.engine(batch(0, 0))
    result = run.step(0)
    return {"output": output.dtype, "norm": result.grad_norm, "state": run.engine.state_dict()}


def opened(world, folder: Path) -> dict:
    """What two ranks wrote, opened by this one under another stage; and damaged states, refused."""
    seen: dict = {}
    for source, stage in ((0, 3), (1, 3), (2, 1), (3, 0), (3, 2), (1, 0)):
        seen[source, stage] = resumed(world, stage, folder, size=3 - world.size, source=source)
    return seen


def misused(world, folder: Path) -> dict:
    """States that do not fit, and calls in the wrong order."""
    run = Run(world, 3, groups=2)
    good = run.engine.state_dict()
    short = {name: value for name, value in good.items() if name != "exp_avg.head.bias"}
    wide = good | {"model.body.weight": torch.zeros(7, WIDTH + 1)}
    seen: dict = {}
    for label, bad in (("missing", short), ("shape", wide)):
        with pytest.raises(UserError) as refusal:
            run.engine.load_state_dict(bad)
        seen[label] = str(refusal.value)
    seen["untouched"] = all(torch.equal(good[name], value) for name, value in run.engine.state_dict().items())

    with pytest.raises(RuntimeError, match="step after 0 of 2"):
        run.engine.step(LR)
    for last in (False, True):
        assert run.engine.at_boundary == last
        run.engine.backward(loss_of(run.engine(batch(0, 0))))
    with pytest.raises(RuntimeError, match="call step"):
        run.engine.backward(loss_of(run.engine(batch(0, 0))))
    run.engine.discard()
    assert run.step(0).applied

    frozen = Toy(0)
    frozen.token.requires_grad_(False)
    with pytest.raises(ValueError, match="token is frozen"):
        Engine(frozen, recipe(0), accumulation=1, world=world)
    return seen


def again(world, folder: Path) -> dict:
    """The first gradient norm of every stage, and the groups' patience, after leaving a group of one and joining another."""
    leave()
    world = join(timeout=TIMEOUT)
    return {stage: Run(world, stage, groups=2).step(0).grad_norm for stage in STAGES} | {"timeouts": timeouts()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    here = join(timeout=TIMEOUT)
    set_threads(here, 1)
    for what in sys.argv[2:]:
        seen = {"train": train, "opened": opened, "misused": misused, "again": again}[what](here, folder)
        torch.save(seen, folder / f"{what}_{here.size}_{here.rank}.pt")
    leave()
