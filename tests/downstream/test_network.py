"""The network against an independent writing-down of UPerNet, and the small parts by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mcf.downstream.config import HeadConfig
from mcf.downstream.network import (
    Average,
    Backbone,
    Decoder,
    Network,
    UPerHead,
    build_decoder,
    default_taps,
    resized_table,
)
from mcf.models.vit import VisionTransformer, sincos_positions


def vit(depth: int = 4, image_size: int = 32) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size=image_size, patch_size=8, width=16, depth=depth, heads=2)


def test_the_published_taps():
    assert default_taps(12) == (3, 5, 7, 11)
    assert default_taps(24) == (7, 11, 15, 23)
    assert default_taps(32) == (8, 14, 20, 31)
    assert default_taps(4) == (0, 1, 2, 3)
    assert all(
        len(default_taps(d)) == 4 and default_taps(d)[-1] == d - 1 and min(default_taps(d)) >= 0 for d in range(1, 40)
    )


def test_the_backbone_gives_patch_tokens_as_maps():
    model = vit()
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    tokens = model.features((images - mean[:, None, None]) / std[:, None, None], (0, 1, 2, 3))
    maps = Backbone(copy.deepcopy(model), (0, 1, 2, 3), 32)(images)
    for t, m in zip(tokens, maps):
        assert m.shape == (2, 16, 4, 4)
        for row, column in ((0, 0), (1, 3), (3, 2)):
            torch.testing.assert_close(m[:, :, row, column], t[:, 1 + 4 * row + column])


def test_only_what_is_used_is_kept_and_the_table_is_trained():
    backbone = Backbone(vit(depth=6), (0, 1, 2, 3), 64)
    names = {name for name, _ in backbone.named_parameters()}
    assert "vit.pos_embed" in names
    assert not any(name.startswith(("vit.norm", "vit.blocks.4", "vit.blocks.5")) for name in names)
    assert dict(backbone.named_parameters())["vit.pos_embed"].shape == (1, 65, 16)
    loss = sum(m.square().mean() for m in backbone(torch.rand(1, 3, 64, 64)))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −0.75, which torch's bicubic uses."""
    a, x = -0.75, np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@pytest.mark.parametrize(("old", "new"), [(14, 28), (7, 5)])
def test_the_position_table_is_interpolated_by_bicubic_weights(old, new):
    table = torch.cat([torch.full((1, 8), 7.0), sincos_positions(8, old)[1:]])[None]
    resized = resized_table(table, new)
    assert torch.equal(resized[:, 0], table[:, 0])
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for i, centre in enumerate(centres):
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(np.array(centre - j))
    maps = table[0, 1:].numpy().reshape(old, old, 8)
    expected = np.einsum("iy,jx,yxc->ijc", weights, weights, maps).reshape(new * new, 8)
    assert resized[0, 1:].numpy() == pytest.approx(expected, abs=1e-5)


def written_again(head: UPerHead, maps: list[torch.Tensor]) -> torch.Tensor:
    """UPerNet in functions, from the paper and mmsegmentation's description, in evaluation mode."""

    def block(layers, x):
        conv, norm = layers[0], layers[1]
        x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
        shape = (1, -1, 1, 1)
        x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
        return F.relu(x * norm.weight.view(shape) + norm.bias.view(shape))

    def up(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    coarse = maps[3]
    parts = [coarse]
    for side, pool in zip((1, 2, 3, 6), head.pools):
        parts.append(up(block(pool[1], F.adaptive_avg_pool2d(coarse, side)), coarse))
    p3 = block(head.pooled, torch.cat(parts, 1))
    p2 = block(head.lateral[2], maps[2]) + up(p3, maps[2])
    p1 = block(head.lateral[1], maps[1]) + up(p2, maps[1])
    p0 = block(head.lateral[0], maps[0]) + up(p1, maps[0])
    outs = [block(head.smooth[0], p0), block(head.smooth[1], p1), block(head.smooth[2], p2), p3]
    fused = block(head.fuse, torch.cat([outs[0], *(up(o, outs[0]) for o in outs[1:])], 1))
    return F.conv2d(fused, head.out.weight, head.out.bias)


def test_the_head_is_upernet():
    torch.manual_seed(1)
    head = UPerHead(16, 5, HeadConfig(channels=12)).eval()
    with torch.no_grad():
        for name, value in [*head.named_parameters(), *head.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1 if "var" in name else torch.randn_like(value) * 0.3)
        maps = [torch.randn(2, 16, side, side) for side in (28, 14, 7, 3)]
        ours, theirs = head(maps), written_again(head, maps)
    assert ours.shape == (2, 5, 28, 28)
    # Sums of some hundred float32 products in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_network_ends_at_four_times_the_grid():
    network = Network(Backbone(vit(), (0, 1, 2, 3), 48), Decoder(16, 7, HeadConfig(channels=8)))
    assert network(torch.rand(2, 3, 48, 48)).shape == (2, 7, 24, 24)
    trained = Decoder(16, 7, HeadConfig(channels=8))
    loss = trained(*[torch.randn(2, 16, 4, 4) for _ in range(4)]).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_a_decoder_is_a_function_of_its_seed():
    states = [build_decoder(seed, 16, 3, HeadConfig(channels=8)).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_the_average_is_over_parameters_and_float_buffers():
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = Average(module, 0.9)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.add_(1)
    average.update(module)
    for name, value in average.module.state_dict().items():
        if "num_batches" in name:
            assert value == 1
        else:
            torch.testing.assert_close(value, before[name] + 0.1)
    assert not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())
