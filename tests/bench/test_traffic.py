"""What is counted without a GPU: by hand for one block, by torch's counter for the operations of all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mcf.bench import alone, blocks, traffic
from mcf.bench.traffic import Launch, Launches, TrafficConfig, at_batch, bound, count
from mcf.costs import count_flops
from mcf.models.vit import Block

SMALL = {**blocks.SHAPE, "size": 32, "depth": 2, "width": 48, "heads": 3, "decoder": (32, 1, 2), "taps": (0, 1)}
KEYS = [
    "model.image_size=32", "model.depth=2", "model.width=48", "model.heads=3", "model.decoder.width=32", "model.decoder.depth=1",
    "model.decoder.heads=2", "teacher.depth=2", "teacher.width=48", "teacher.heads=3", "teacher.taps=[0,1]",
]  # fmt: skip
B, N, D, HEADS = 4, 17, 96, 3
T = B * N


def by_kind(launches: Sequence[Launch]) -> Counter[str]:
    return Counter(launch.kind for launch in launches)


def frozen_block(attention: str) -> Block:
    """A block as the teacher has them: no gradients of weights, which are in bfloat16."""
    block = Block(D, HEADS, attention=attention).requires_grad_(False)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return block


def passes(block: Block, counter: Launches, compiled: bool) -> tuple[list[Launch], list[Launch]]:
    """Launches of a forward pass and of the backward pass."""
    if compiled:
        torch._dynamo.reset()
        block.compile(backend=counter.backend(), dynamic=False)
    x, gradient = torch.randn(B, N, D, requires_grad=True), torch.ones(B, N, D)
    with counter:
        with torch.autocast("cpu", torch.bfloat16), counter.paused() if compiled else torch.enable_grad():
            out = block(x)
        forward, counter.found = counter.found, []
        out.backward(gradient)
    return forward, counter.found


def test_a_compiled_block_by_hand():
    forward, backward = passes(frozen_block("sdpa"), Launches(), compiled=True)
    # Norm; norm behind the first sum; GELU; the second sum. Four linear layers, and attention.
    assert by_kind(forward) == {"between": 4, "products": 4, "attention": 1}
    # The gradient in bfloat16; that of GELU; twice that of a norm with the sum; those of q, k and v put together.
    assert by_kind(backward) == {"between": 5, "products": 4, "attention": 1}
    total = {kind: sum(launch.bytes for launch in forward if launch.kind == kind) for kind in traffic.KINDS}
    norm = 8 * D + 8 * T  # weight and bias; mean and deviation of each token, kept for the way back
    assert total["between"] == (
        4 * T * D + 2 * T * D + norm  # the stream, float32, and what the linear layer takes, bfloat16
        + (4 + 2) * T * D + (4 + 2) * T * D + norm  # the stream, and what is added to it; both sums
        + 2 * 8 * T * D  # four times as wide
        + (4 + 2) * T * D + 4 * T * D
    )  # fmt: skip
    weights = 2 * 12 * D * D + 2 * (3 + 1 + 4 + 1) * D
    assert total["products"] == weights + 2 * T * D * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    assert total["attention"] == 2 * T * D * (3 + 1) + 4 * T * HEADS  # the sums of the softmax, for the way back
    products = [launch.flops for launch in forward if launch.kind == "products"]
    assert sorted(products) == sorted(2 * T * D * D * width for width in (3, 1, 4, 4))
    attention = 2 * 2 * B * HEADS * N * N * (D // HEADS)
    assert [launch.flops for launch in forward if launch.kind == "attention"] == [attention]
    assert [launch.flops for launch in backward if launch.kind == "attention"] == [2.5 * attention]


def test_compiled_it_moves_less_and_multiplies_the_same():
    for attention in ("math", "sdpa"):
        eager = passes(frozen_block(attention), Launches(), compiled=False)
        compiled = passes(frozen_block(attention), Launches(), compiled=True)
        for one, other in zip(eager, compiled):
            assert sum(launch.flops for launch in one) == sum(launch.flops for launch in other) > 0
            assert by_kind(one)["products"] == by_kind(other)["products"] == 4
            assert by_kind(one)["between"] > by_kind(other)["between"]
            assert sum(launch.bytes for launch in one) > sum(launch.bytes for launch in other)


def test_a_view_moves_nothing_and_what_is_broadcast_is_read_once():
    counter = Launches()
    x, row = torch.randn(8, 16), torch.randn(16)
    with counter:
        y = x.view(2, 4, 16).transpose(0, 1)[1:].detach()
        torch.empty(1000)
        y + row.expand(3, 2, 16)
        x.mul_(2)
    assert counter.found == [Launch("between", 0, 4 * (96 + 16 + 96)), Launch("between", 0, 4 * (128 + 128))]


def test_operations_are_those_that_torch_counts():
    with FlopCounterMode(display=False) as counter:
        blocks.build(SMALL, torch.device("cpu"), blocks.NONE).step(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), 16)
    assert sum(launch.flops for launch in count(SMALL, blocks.NONE, 2)) == counter.get_total_flops()


@pytest.mark.parametrize("compiled", [False, True])
def test_two_batches_tell_those_of_any(compiled):
    levers = {**blocks.NONE, "compile": compiled}
    two, four, eight = (count(SMALL, levers, images) for images in (2, 4, 8))
    assert at_batch(two, four, 8) == eight
    with pytest.raises(ValueError, match="a larger batch makes other launches"):
        at_batch(two, four[1:], 8)


def test_a_bound_by_hand():
    config = TrafficConfig(batch=1, tflops=2.0, terabytes=0.5, launch_us=10)
    launches = [Launch("products", 8e12, 1e12), Launch("products", 1e12, 3e12), Launch("between", 0, 1e12)]
    found = bound(launches, config)
    assert found["of_kind"] == {"products": 4 + 6, "attention": 0, "between": 2}
    assert (found["seconds"], found["host_seconds"], found["launches"]) == (12, pytest.approx(3e-5), 3)


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(traffic, "VARIANTS", {name: traffic.VARIANTS[name] for name in ("none", "all")})
    assert traffic.main([*KEYS, "batch=64", f"json_file={tmp_path / 'counts.json'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "counted, not measured" in said[0] and [row.split()[0] for row in said[2:]] == ["none", "all"]
    rows = json.loads((tmp_path / "counts.json").read_text())["rows"]
    assert rows["all"]["bytes"] < rows["none"]["bytes"] and rows["all"]["launches"] < rows["none"]["launches"]
    for row in rows.values():
        assert row["mfu"] == pytest.approx(rows["none"]["flops"] / row["seconds"] / 790e12)
        assert row["seconds"] == pytest.approx(sum(row["of_kind"].values()))


def test_a_recipes_networks_are_counted_as_the_plan_counts_them():
    """Another encoder than teacher, another mask, other taps."""
    keys = [
        "model.width=64",
        "model.heads=4",
        "model.depth=3",
        "model.image_size=64",
        "mask.ratio=0.5",
        "teacher.taps=[1]",
    ]
    named = {key.partition("=")[0] for key in keys}
    others = [key for key in KEYS if key.partition("=")[0] not in named]
    recipe, _ = alone.load([*others, *keys], TrafficConfig, "traffic")
    shape = traffic.shape_of(recipe)
    assert shape["teacher"] == (48, 2, 3) and (shape["width"], shape["keep"]) == (64, 8)
    found = count(shape, blocks.NONE, 2)
    expected = count_flops(recipe)
    heads = recipe.model.projection
    projector = 2 * (64 * heads.hidden + heads.hidden * heads.dim)  # the momentum branch's, which is left out
    parts = expected.encoder + expected.decoder + expected.momentum - projector + expected.teacher
    assert sum(launch.flops for launch in found) == 2 * parts


@pytest.mark.parametrize("key", ["loss.feature=0", "model.variant=clip", "mask.momentum=none", "teacher.patch_size=8"])
def test_what_is_not_counted_is_refused(key, capsys):
    assert traffic.main([*KEYS, key]) == 2
    error = capsys.readouterr().err
    assert f"differs in {key.partition('=')[0]} from what is counted" in error and error.count("\n") == 1


def test_nothing_is_lost_by_a_pause():
    counter = Launches()
    with counter:
        torch.ones(2) + 1
        with counter.paused():
            torch.ones(2) + 1
        out: Tensor = torch.ones(2) * 2
    assert len(counter.found) == 4 and out.tolist() == [2, 2]
