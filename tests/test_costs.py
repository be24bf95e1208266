"""What a step costs: operations counted in the real modules, times worked out by hand, machines of every file.

The bytes of real collectives are counted in tests/test_stages.py.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from mcf import cli, kernels
from mcf.costs import Flops, count_flops, count_traffic, estimate_times
from mcf.errors import UserError
from mcf.machine import load_machine, machine_names
from mcf.plan import make_plan

sys.path.insert(0, str(Path(__file__).parent))
from test_plan import SHAPES, build


def recipe(*argv: str):
    return cli.load_recipe(list(argv))


# --- operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts", "total"),
    [
        # KERNELS 3.3, worked out independently: GFLOP of encoder, decoder, momentum branch, teacher.
        ("vit_s_384", (2.20 + 4.37, 10.73 + 21.45, 2.20, 106.82), 147.8),
        ("vit_b_20m", (8.64 + 17.23, 10.75 + 21.49, 8.64, 106.82), 173.6),
        ("vit_l_20m", (30.52 + 60.97, 10.76 + 21.52, 30.52, 106.82), 261.1),
        ("vit_h_16", (63.42 + 126.74, 10.77 + 21.54, 63.42, 106.82), 392.8),
    ],
)
def test_operations_of_the_models_of_the_paper(name, parts, total):
    argv = {
        "vit_s_384": ["recipe=vit_b_20m", "model.width=384", "model.heads=6"],
        "vit_h_16": ["recipe=vit_h_20m", "model.patch_size=16"],
    }.get(name, [f"recipe={name}"])
    flops = count_flops(recipe(*argv))
    counted = (flops.encoder, flops.decoder, flops.momentum - flops.heads / 3 * 2 / 3, flops.teacher)
    assert [value / 1e9 for value in counted] == pytest.approx(parts, rel=2e-3)
    # The table leaves the heads at two digits.
    assert flops.total / 1e9 == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    "extra",
    [[], ["mask.momentum=none"], ["loss.feature=0", "loss.pixel=1"], ["model.mlp_ratio=2", "teacher.taps=[0]"]],
    ids=["all", "unmasked keys", "no teacher", "other ratio, one tap"],
)
def test_operations_are_those_of_the_modules(extra):
    """Every matrix product that torch runs is counted, forward and backward, in each part alone."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = recipe(*[s for s in SHAPES if s.partition("=")[0] not in [e.partition("=")[0] for e in extra]], *extra)
    config = config.model_copy(update={"attention": "math"})
    student, momentum, objective = build(config, attention="math")
    batch, patches, size = 2, config.model.patches, config.model.image_size
    images = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    keep, restore = kernels.mask(0, torch.arange(batch), kernels.ENCODER, patches, config.visible_patches)

    def counted(function) -> float:
        counter = FlopCounterMode(display=False)
        with counter:
            function()
        return counter.get_total_flops() / batch

    expected = count_flops(config)
    unmasked = config.mask.momentum == "none"
    assert counted(lambda: momentum(images, None if unmasked else keep)) == pytest.approx(expected.momentum, rel=1e-6)
    assert counted(lambda: student.encoder(images, keep).sum().backward()) == pytest.approx(expected.encoder, rel=1e-6)
    token = torch.zeros(batch, config.model.width, requires_grad=True)
    heads = counted(lambda: student.predictor(student.projector(token)).sum().backward())
    assert heads == pytest.approx(expected.heads, rel=1e-6)
    tokens = torch.zeros(batch, 1 + config.visible_patches, config.model.width, requires_grad=True)
    decoder = counted(lambda: student.decoder(tokens, restore).sum().backward())
    assert decoder == pytest.approx(expected.decoder, rel=1e-6)
    if config.loss.feature:
        pred = torch.zeros(batch, patches, config.model.patch_size**2 * 3, requires_grad=True)
        teacher = counted(lambda: objective.feature(images, pred).backward())
        assert teacher == pytest.approx(expected.teacher, rel=1e-6)
    else:
        assert expected.teacher == 0


# --- bytes --------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """ViT-B on two nodes of 8, accumulation 4; P parameters and M of the momentum branch."""
    p, m = 117_963_520, 89_849_856
    argv = ["recipe=vit_b_20m", "nodes=2"]
    plan = make_plan(recipe(*argv))
    assert (plan.parameters.trained, plan.parameters.momentum, plan.accumulation) == (p, m, 4)
    once = 15 / 16 * 4
    stages = [count_traffic(recipe(*argv, f"train.zero_stage={stage}")) for stage in range(4)]
    assert [t.gradients for t in stages] == pytest.approx([2 * p * once, 2 * p * once, 8 * p * once, 4 * p * once])
    assert [t.parameters for t in stages[:3]] == pytest.approx([0, p * once, p * once])
    # Forward and backward, four times; 0.3 % of the elements are whole, and an eighth of them stays at the turn.
    assert stages[3].parameters == pytest.approx(8 * p * once * 15 / 16, rel=0.01)
    assert [t.momentum for t in stages] == pytest.approx([0, 0, 0, 4 * m * once])
    assert {t.keys for t in stages} == {4096 * 256 * once}
    assert {t.statistics for t in stages} == {0}
    assert count_traffic(recipe("recipe=vit_b_20m", "gpus_per_node=1")).total == 0


# --- seconds ------------------------------------------------------------------------------------------------------


def test_time_of_a_step_by_hand():
    h200 = load_machine("h200")
    assert h200 is not None
    one = estimate_times(recipe("recipe=vit_b_20m", "gpus_per_node=1", "train.zero_stage=1"), h200)
    assert one.compute == pytest.approx(4096 * 173.6e9 / (989e12 * 0.35), rel=1e-3)
    assert one.communication == 0
    # AdamW: 28 bytes a parameter; the average: 12, before each of 64 micro-batches.
    assert one.update == pytest.approx((28 * 118.0e6 + 64 * 12 * 89.85e6) / 4.8e12, rel=1e-3)
    node = estimate_times(recipe("recipe=vit_b_20m"), h200)
    assert node.compute == pytest.approx(one.compute / 8)
    assert node.communication == pytest.approx(3 * 118.0e6 * 4 * 7 / 8 / 450e9, rel=5e-3)  # and the keys: 0.3 %
    many = estimate_times(recipe("recipe=vit_b_20m", "nodes=16"), h200)
    assert many.communication == pytest.approx(3 * 118.0e6 * 4 * 127 / 128 / 400e9, rel=5e-3)
    assert many.step == many.compute + many.update + many.communication
    full = estimate_times(recipe("recipe=vit_b_20m", "train.precision=fp32"), h200)
    assert full.compute == pytest.approx(node.compute * 989 / 67)


def test_an_average_that_moves_once_a_step_is_read_once():
    h200 = load_machine("h200")
    assert h200 is not None
    once = estimate_times(recipe("recipe=vit_b_20m", "gpus_per_node=1", "momentum.update=step"), h200)
    assert once.update == pytest.approx((28 * 118.0e6 + 12 * 89.85e6) / 4.8e12, rel=1e-3)


@pytest.mark.parametrize(("within", "between"), [(1e11, 4e11), (4e11, 1e11)])
def test_a_ring_over_nodes_is_as_fast_as_its_slowest_link(within, between):
    h200 = load_machine("h200")
    assert h200 is not None
    machine = h200.model_copy(update={"intra_node": within, "inter_node": between})
    many = estimate_times(recipe("recipe=vit_b_20m", "nodes=16"), machine)
    # Gradients both ways and parameters, and the keys: 0.3 %.
    assert many.communication == pytest.approx(3 * 118.0e6 * 4 * 127 / 128 / 1e11, rel=5e-3)


def test_the_plan_says_time_and_bytes():
    lines = {
        line.split(maxsplit=1)[0]: line
        for line in make_plan(
            recipe("recipe=vit_b_20m", "nodes=16", "machine=h200"), machine=load_machine("h200")
        ).lines()
    }
    assert "173.6 GFLOP an image, 711.1 TFLOP a step: teacher 62%" in lines["work"]
    assert (
        "≈ 1.3 GiB that a rank sends a step: gradients 893 MiB, parameters 446 MiB, keys 4 MiB"
        in lines["communication"]
    )
    assert "≈ 19.8 ms a step on h200: compute 16 ms" in lines["time"]
    assert "communication 3.52 ms, one after the other; 206,862 images/s, 25.8 minutes for the run" in lines["time"]
    assert "NOTE" in lines  # of the micro-batch, not of memory
    assert "a GPU of" not in lines["NOTE"]


def test_one_rank_is_said_to_train_at_stage_0():
    text = str(make_plan(recipe("recipe=vit_b_20m", "gpus_per_node=1", "train.zero_stage=2")))
    assert "(ZeRO 0: one rank has nothing to split, stage 2 is for several, bf16)" in text
    assert "communication   none: one rank" in text
    assert "time  " not in text
    assert "(ZeRO 2, bf16)" in str(make_plan(recipe("recipe=vit_b_20m", "train.zero_stage=2")))


def test_a_model_that_does_not_fit_is_noted():
    config = recipe("recipe=vit_h_20m", "micro_batch=512", "machine=a100")
    text = str(make_plan(config, machine=load_machine("a100")))
    # 8 ranks share the batch of 4,096.
    assert "a GPU of machine=a100 has 74.5 GiB: use micro_batch=256, which fits, or more ranks" in text


# --- machines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_is_one(name):
    machine = load_machine(name)
    assert machine is not None
    # The order of magnitude in which a unit is lost: bits for bytes, GB for bytes.
    assert 1e13 < machine.flops.fp32 < machine.flops.bf16 < 1e16
    assert 1e10 < machine.memory < 1e12 < machine.memory_bandwidth < 1e13
    assert 1e11 < machine.inter_node <= machine.intra_node * 8 < 1e13


def test_machines_of_ones_own_and_mistakes(tmp_path):
    file = tmp_path / "ours.yaml"
    text = "flops: {bf16: 1e14, fp32: 1e13}\nreached: 0.5\nmemory: 16e9\nmemory_bandwidth: 1e12\nintra_node: 1e10\n"
    file.write_text(text + "inter_node: 1e9\n")
    machine = load_machine(str(file))
    assert machine is not None
    assert (machine.flops.bf16, machine.inter_node) == (1e14, 1e9)
    assert load_machine(None) is None
    for content, said in (
        (text, "inter_node is missing"),
        (text + "internode: 1e9\n", r"ours.yaml:6: internode: unknown key, did you mean inter_node\?"),
        (text + "inter_node: fast\n", "ours.yaml:6: inter_node=fast: expected a number > 0"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            load_machine(str(file))
    with pytest.raises(UserError, match=r"machine=h20: no such machine, did you mean h200\? there are: .*h100"):
        load_machine("h20")
    with pytest.raises(UserError, match=r"machine=no.yaml: no such file"):
        load_machine("no.yaml")


def test_every_part_is_in_the_total():
    flops = count_flops(recipe("recipe=vit_b_20m"))
    assert flops.total == sum(dataclasses.astuple(flops))
    assert Flops(1, 2, 4, 8, 16).total == 31
