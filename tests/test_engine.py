"""The engine under every ZeRO stage, on one and two ranks, against AdamW written out in float64.

Three starts of tests/workers/engine_checks.py (one rank; two ranks; one again, to open what two wrote) do all the work
once, and the tests judge what they left. The worker holds the toy, the data and the loss.
"""

from __future__ import annotations

import importlib.util
import math
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from mcf.config import Recipe
from mcf.engine import parameter_groups
from mcf.engine.library import deepspeed_config, import_deepspeed
from mcf.errors import UserError

WORKER = Path(__file__).parent / "workers" / "engine_checks.py"
_spec = importlib.util.spec_from_file_location("engine_checks", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

# Four steps of 1e-2 in float32 end within 3e-7 of float64, all stages alike; a wrong average, decay or bias correction
# shows from 1e-4 upwards.
TOLERANCE = 2e-6
SIZES, GROUPS, STAGES = (1, 2), (2, 6), worker.STAGES


def start(folder: Path, size: int, *what: str) -> None:
    """Run `size` ranks of the worker; their output must be empty. A single one finds nothing in its environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    # Nothing may be compiled: no compiler, no ninja on the path, and a folder that must stay away.
    env |= {"CXX": "/bin/false", "PATH": "/bin", "TORCH_EXTENSIONS_DIR": str(folder / "built"), "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(size)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *what],
            env=env | (meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(texts)
    assert texts == [""] * size
    assert not (folder / "built").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the workers saw: WHAT_SIZE_RANK.pt."""
    folder = tmp_path_factory.mktemp("engine")
    start(folder, 1, "train", "again")
    start(folder, 2, "train", "opened")
    start(folder, 1, "opened", "misused")
    return folder


def seen_by_ranks(folder: Path, what: str) -> dict[int, list[dict]]:
    return {
        size: [torch.load(folder / f"{what}_{size}_{rank}.pt", weights_only=False) for rank in range(size)]
        for size in SIZES
    }


@pytest.fixture(scope="module")
def trained(folder) -> dict[int, list[dict]]:
    return seen_by_ranks(folder, "train")


@pytest.fixture(scope="module")
def crossed(folder) -> dict[int, list[dict]]:
    return seen_by_ranks(folder, "opened")


@cache
def reference(groups: int, steps: int = 4):
    """States after 0 … `steps` steps and gradient norms: plain AdamW, decoupled decay, in float64 on all groups."""
    model = worker.Toy(0).double()
    named = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    optimizer = worker.recipe(stage=0).optimizer
    (beta1, beta2), eps = optimizer.betas, optimizer.eps
    states, norms = [{name: p.detach().clone() for name, p in named.items()}], []
    for number in range(steps):
        model.zero_grad()
        for group in range(groups):
            (worker.loss_of(model(worker.batch(number, group).double())) / groups).backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in named.values())))
        with torch.no_grad():
            for name, p in named.items():
                first, second = moments[name]
                first.mul_(beta1).add_((1 - beta1) * p.grad)
                second.mul_(beta2).add_((1 - beta2) * p.grad**2)
                decay = 0.0 if name in ("norm.weight", "norm.bias", "head.bias") else 0.1
                p.mul_(1 - worker.LR * decay)
                corrected = first / (1 - beta1 ** (number + 1))
                p.sub_(worker.LR * corrected / ((second / (1 - beta2 ** (number + 1))).sqrt() + eps))
        states.append({name: p.detach().clone() for name, p in named.items()})
    return states, norms, moments


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_adamw_in_float64(trained, size, stage, groups):
    states, _, moments = reference(groups)
    got = trained[size][0][groups, stage]
    assert got["applied_steps"] == 4
    for number, (expected, state) in enumerate(zip(states, got["states"])):
        for name, value in expected.items():
            torch.testing.assert_close(
                state[f"model.{name}"].double(), value, rtol=0, atol=TOLERANCE, msg=f"step {number}: {name}"
            )
    for name, (first, second) in moments.items():
        for moment, value in (("exp_avg", first), ("exp_avg_sq", second)):
            assert got["states"][-1][f"{moment}.{name}"].dtype == torch.float32
            torch.testing.assert_close(got["states"][-1][f"{moment}.{name}"].double(), value, rtol=1e-5, atol=1e-7)
    assert max((states[4][name] - states[0][name]).abs().max() for name in states[0]) > 1e-2


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_gradient_norm_is_global_and_agreed(trained, size, stage, groups):
    """No rank's part missing or counted twice, no padding: a factor sqrt(2) would show; float32 gives 1e-5."""
    for rank in trained[size]:
        assert rank[groups, stage]["norms"] == pytest.approx(reference(groups)[1], rel=1e-5)
        assert rank[groups, stage]["norms"] == trained[size][0][groups, stage]["norms"]


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_splits_nothing(trained, stage):
    assert trained[1][0][2, stage]["deepspeed_stage"] == 0
    assert trained[2][0][2, stage]["deepspeed_stage"] == stage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_local_parameters_are_the_saved_ones_or_pieces_of_them(trained, size, stage):
    saved = trained[size][0][6, stage]["states"][-1]
    local = [rank[6, stage]["local"] for rank in trained[size]]
    assert {rank[6, stage]["splits"] for rank in trained[size]} == {stage == 3 and size > 1}
    for name in ("token", "body.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"):
        whole, held = saved[f"model.{name}"], [rank.pop(name) for rank in local]
        assert {value.dtype for value in held} == {torch.float32}
        if stage == 3 and size > 1:
            assert {value.shape for value in held} == {(-(-whole.numel() // size),)}
            assert torch.equal(torch.cat(held)[: whole.numel()].view(whole.shape), whole), name
        else:
            assert all(torch.equal(value, whole) for value in held), name
    assert local == [{}] * size


@pytest.mark.parametrize("size", SIZES)
def test_deepspeeds_own_group_waits_as_long_as_ours(trained, size):
    """It would take torch's default: with NCCL ten minutes, after which a rank that is only slow ends the others."""
    assert trained[size][0]["timeouts"] == [worker.TIMEOUT] * 2


def test_a_process_that_left_its_group_trains_in_another(folder, trained):
    """As in a notebook; ranks of several processes would have to meet elsewhere than at the first time."""
    got = torch.load(folder / "again_1_0.pt", weights_only=False)
    assert got.pop("timeouts") == [worker.TIMEOUT] * 2
    assert got == {stage: trained[1][0][2, stage]["norms"][0] for stage in STAGES}


@pytest.mark.parametrize("stage", (*STAGES, "persistent"))
@pytest.mark.parametrize("size", SIZES)
def test_refused_step_changes_nothing(trained, size, stage):
    for rank in trained[size]:
        got = rank["refused", stage]
        assert not got["nan"].applied and not math.isfinite(got["nan"].grad_norm)
        assert not got["flag"].applied and math.isfinite(got["flag"].grad_norm)
        assert got["stops"] == [False, True, True, False], "one rank's wish to stop is heard by all, applied or not"
    got = trained[size][0]["refused", stage]
    for after in ("after_nan", "after_all"):
        assert_equal_bitwise(got[after], got["before"])
    # Steps 1 and 2 then go as if steps 7, 8 and 9 had never been.
    plain = trained[size][0][6, 3 if stage == "persistent" else stage]
    assert got["norms"] == plain["norms"][1:3]
    assert_equal_bitwise(got["final"], plain["states"][3])


@pytest.mark.parametrize("stage", (*STAGES, "persistent"))
@pytest.mark.parametrize("size", SIZES)
def test_resumed_run_is_bitwise_the_unbroken_one(trained, size, stage):
    unbroken = trained[size][0][6, 3 if stage == "persistent" else stage]
    resumed = trained[size][0]["resumed", stage]
    assert_equal_bitwise(resumed["opened"], unbroken["states"][2])
    assert_equal_bitwise(resumed["final"], unbroken["states"][4])
    for rank in trained[size]:
        assert rank["resumed", stage]["norms"] == unbroken["norms"][2:]


@pytest.mark.parametrize("size", SIZES)
def test_state_opens_under_other_ranks_and_stages(trained, crossed, size):
    pairs = [key for key in crossed[size][0] if isinstance(key, tuple)]
    assert len(pairs) == 6
    for source, stage in pairs:
        wrote = trained[3 - size][0][6, source]["states"]
        got = crossed[size][0][source, stage]
        # What was opened is what was written, bit by bit; what follows sums gradients in another order.
        assert_equal_bitwise(got["opened"], wrote[2])
        for name, value in wrote[4].items():
            if name.startswith("model.norm.") and name.removeprefix("model.norm.") not in ("weight", "bias"):
                continue  # buffers: of rank 0's micro-batches alone, which are others on another number of ranks
            torch.testing.assert_close(got["final"][name], value, rtol=0, atol=3e-7, msg=f"{source}→{stage} {name}")
        assert got["norms"] == pytest.approx(trained[3 - size][0][6, source]["norms"][2:], rel=1e-6)


def test_layout_knows_no_ranks_and_no_stage(trained):
    parameters = {"token", "body.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    names = {f"model.{name}" for name in parameters | buffers} | {"applied_steps"}
    names |= {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in parameters}
    for size in SIZES:
        for stage in STAGES:
            for state in trained[size][0][2, stage]["states"]:
                assert set(state) == names
                assert all(value.device.type == "cpu" for value in state.values())
                assert state["model.token"].shape == (1, 1, 7)
    assert trained[2][1][2, 1]["states"] == [{}] * 5  # ranks other than 0 hold none


def test_state_that_does_not_fit_is_refused_whole(folder):
    got = torch.load(folder / "misused_1_0.pt")
    assert "exp_avg.head.bias" in got["missing"] and "use the recipe" in got["missing"]
    assert "model.body.weight has shape [7, 6], the model needs [7, 5]" in got["shape"]
    assert got["untouched"]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_for_matrix_work_only(trained, stage):
    exact = trained[2][0][2, stage]["norms"][0]
    first = trained[2][0]["bf16", 0]["norm"]
    for rank in trained[2]:
        got = rank["bf16", stage]
        assert got["output"] == torch.bfloat16
        # bfloat16 keeps 8 bits: the norm moves, by about 2^-8; with gradients reduced in float32 stages agree far better.
        assert got["norm"] != exact and got["norm"] == pytest.approx(exact, rel=2e-2)
        assert got["norm"] == pytest.approx(first, rel=1e-5)
    state = trained[2][0]["bf16", stage]["state"]
    for name, value in state.items():
        assert value.dtype == (torch.int64 if name.endswith(("tracked", "steps")) else torch.float32), name
    # Gradients that had passed through bfloat16 would fit into 8 bits; those of the sum of two ranks in float32 do not.
    gradient = state["exp_avg.body.weight"] / (1 - 0.8)
    assert not torch.allclose(gradient, gradient.bfloat16().float(), rtol=1e-5)


def test_decay_spares_biases_and_vectors_but_not_tokens():
    model = worker.Toy(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.05)
    assert {names[p] for p in decayed["params"]} == {"token", "body.weight", "head.weight"}
    assert {names[p] for p in free["params"]} == {"norm.weight", "norm.bias", "head.bias"}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)


def test_missing_deepspeed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"deepspeed is not installed.*pip install deepspeed"):
        import_deepspeed(torch.device("cpu"))


def test_deepspeed_is_told_not_to_clip():
    """Its default clips at 1; the reference does not clip."""
    assert deepspeed_config(Recipe(), worker.Toy(0), stage=1, accumulation=1, persist=None)["gradient_clipping"] == 0


def assert_equal_bitwise(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
