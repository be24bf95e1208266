"""The transformer: MAE's table, timm's names, initial weights, and visible patches alone being embedded."""

import math

import pytest
import torch

from mcf import kernels
from mcf.models.decoder import Decoder
from mcf.models.patches import MEAN, STD, normalise, patchify, unpatchify
from mcf.models.vit import Block, VisionTransformer, sincos_positions

SHAPE = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}


def test_positions_are_the_formula():
    width, grid = 16, 5
    table = sincos_positions(width, grid)
    assert table.shape == (1 + grid * grid, width) and not table[0].any()
    for row in range(grid):
        for column in range(grid):
            for i in range(width // 4):
                angle = 10000 ** (-i / (width // 4))
                got = table[1 + row * grid + column]
                expected = [
                    math.sin(column * angle), math.cos(column * angle), math.sin(row * angle), math.cos(row * angle)
                ]  # fmt: skip
                assert got[[i, i + 4, i + 8, i + 12]].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_are_those_of_the_golden_file(golden_dir):
    from safetensors import safe_open

    with safe_open(golden_dir / "rank0.safetensors", "pt") as file:
        theirs = file.get_tensor("before.online_encoder.pos_embed")
    # Written once from float64: each value is rounded once, at magnitude 1.
    torch.testing.assert_close(sincos_positions(48, 14)[None], theirs, rtol=0, atol=6e-8)


def test_state_dict_has_timms_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in VisionTransformer(**SHAPE).state_dict().items()}
    expected = {
        "cls_token": (1, 1, 24), "pos_embed": (1, 17, 24), "norm.weight": (24,), "norm.bias": (24,),
        "patch_embed.proj.weight": (24, 3, 8, 8), "patch_embed.proj.bias": (24,),
    }  # fmt: skip
    for i in range(2):
        for name, shape in {
            "norm1.weight": (24,), "norm1.bias": (24,), "norm2.weight": (24,), "norm2.bias": (24,),
            "attn.qkv.weight": (72, 24), "attn.qkv.bias": (72,), "attn.proj.weight": (24, 24), "attn.proj.bias": (24,),
            "mlp.fc1.weight": (96, 24), "mlp.fc1.bias": (96,), "mlp.fc2.weight": (24, 96), "mlp.fc2.bias": (24,),
        }.items():  # fmt: skip
            expected[f"blocks.{i}.{name}"] = shape
    assert shapes == expected


def test_initial_weights_are_maes():
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, width=128, depth=1, heads=2)
    for weight in (vit.patch_embed.proj.weight.flatten(1), vit.blocks[0].attn.qkv.weight, vit.blocks[0].mlp.fc2.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        # Uniform in ±bound: the largest of thousands is close to it, the deviation is bound/√3 within sampling error.
        assert 0.99 * bound < weight.abs().max() <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    decoder = Decoder(tokens_width=128, grid=4, patch_size=8, width=128, depth=1, heads=2)
    for token in (vit.cls_token, decoder.mask_token):
        # The deviation of 128 numbers is known to 1/√256 of it: 0.25 is four times that.
        assert float(token.detach().std()) == pytest.approx(0.02, rel=0.25)
    for module in (vit, decoder):
        assert not any(p.any() for name, p in module.named_parameters() if name.endswith("bias"))


def test_visible_patches_alone_are_as_good_as_all_then_dropped(images):
    torch.manual_seed(0)
    vit = VisionTransformer(**SHAPE).double()
    ids, _ = kernels.mask(0, torch.arange(5), 0, 16, 4)
    floats = normalise(images).double()
    tokens = vit.patch_embed(floats) + vit.pos_embed[:, 1:]
    kept = torch.stack([row[i] for row, i in zip(tokens, ids)])
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(5, -1, -1), kept], dim=1)
    for block in vit.blocks:
        x = block(x)
    # The encoder reads uint8 and normalises in float32, which alone costs 6e-7 of a pixel.
    torch.testing.assert_close(vit.float()(images, ids).double(), vit.double().norm(x), rtol=0, atol=2e-5)


def test_dropped_patches_are_not_looked_at(images):
    vit = VisionTransformer(**SHAPE)
    ids, restore = kernels.mask(0, torch.arange(5), 0, 16, 4)
    before = vit(images, ids)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    visible = unpatchify((restore < 4)[:, :, None].float().expand(-1, -1, 192), 8).permute(0, 2, 3, 1) > 0
    assert torch.equal(vit(torch.where(visible, images, noise), ids), before)


def test_patch_projection_on_a_row_of_patches_is_the_convolution(images):
    vit = VisionTransformer(**SHAPE)
    proj = vit.patch_embed.proj
    whole = torch.nn.functional.conv2d(normalise(images), proj.weight, proj.bias, stride=8).flatten(2).transpose(1, 2)
    ids, _ = kernels.mask(3, torch.arange(5), 0, 16, 7)
    picked = torch.stack([row[i] for row, i in zip(whole, ids)])
    torch.testing.assert_close(vit.patch_embed(images, ids), picked, rtol=0, atol=2e-6)


def test_patches_of_autocast_are_those_it_would_have_cast(images):
    embed = VisionTransformer(**SHAPE).patch_embed
    ids, _ = kernels.mask(3, torch.arange(5), 0, 16, 7)
    pseudo = normalise(images).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for pixels, wanted in ((images, ids), (images, None), (pseudo, None)):
            cast_there = embed.proj(kernels.patch_gather(pixels, wanted, 8, MEAN, STD))
            assert torch.equal(embed(pixels, wanted), cast_there) and cast_there.dtype == torch.bfloat16
        embed(pseudo).float().square().sum().backward()
    assert pseudo.grad.dtype == torch.float32 and pseudo.grad.isfinite().all() and pseudo.grad.any()


def test_features_are_outputs_of_the_named_blocks(images):
    vit = VisionTransformer(image_size=32, patch_size=8, width=24, depth=4, heads=3)
    seen = []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    taps = vit.features(images, (1, 2))
    assert len(seen) == 3 and torch.equal(taps[0], seen[1]) and torch.equal(taps[1], seen[2])


def test_block_is_pre_norm_with_exact_gelu():
    torch.manual_seed(0)
    block, x = Block(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    norm = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    q, k, v = (norm @ block.attn.qkv.weight.T).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
    y = x + mixed.transpose(1, 2).reshape(2, 5, 8) @ block.attn.proj.weight.T
    h = torch.nn.functional.layer_norm(y, (8,), eps=1e-6) @ block.mlp.fc1.weight.T
    gelu = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(block(x), y + gelu @ block.mlp.fc2.weight.T, rtol=1e-9, atol=1e-9)


def test_pixels_and_patches_go_there_and_back(images):
    black_to_white = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    ends = [[-0.485 / 0.229, 0.515 / 0.229], [-0.456 / 0.224, 0.544 / 0.224], [-0.406 / 0.225, 0.594 / 0.225]]
    # Three roundings of float32 at magnitude 3.
    torch.testing.assert_close(normalise(black_to_white)[0, :, 0], torch.tensor(ends), rtol=0, atol=1e-6)
    floats = normalise(images)
    patches = patchify(floats, 8)
    assert torch.equal(unpatchify(patches, 8), floats)
    # Patch 6 of a 4 × 4 grid is in row 1, column 2; its vector runs over row, column, channel.
    assert torch.equal(patches[2, 6].view(8, 8, 3), floats[2, :, 8:16, 16:24].permute(1, 2, 0))
