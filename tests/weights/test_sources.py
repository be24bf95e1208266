"""Each known file gives the encoder it holds, and nothing that merely looks like one is let through."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcf.errors import UserError
from mcf.weights.sources import read_file


def _prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def known_files(tmp_path, vit):
    """Kind → (file, tensors of its encoder): as each of them is published, with what else they hold."""
    state, other = vit.state(0), vit.state(1)
    head = {"head.weight": torch.randn(10, vit.width), "head.bias": torch.randn(10)}
    moco_head = {"head.0.weight": torch.randn(64, vit.width), "head.1.running_mean": torch.randn(64)}
    optimiser = {"state": {0: {"exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    moco = {
        **_prefixed("module.base_encoder.", {**state, **moco_head}),
        **_prefixed("module.momentum_encoder.", {**other, **moco_head}),
        "module.predictor.0.weight": torch.randn(8, 8),
    }
    decoder = {
        "decoder_embed.weight": torch.randn(8, vit.width),
        "mask_token": torch.randn(1, 1, 8),
        "decoder_norm.bias": torch.randn(8),
    }
    released = {
        **_prefixed("online_encoder.", {**state, "fc.0.weight": torch.randn(8, vit.width)}),
        **_prefixed("target_encoder.", {**other, "fc.0.weight": torch.randn(8, vit.width)}),
        **_prefixed("perceptual_loss.model.", {**vit.state(2), **head}),
        **decoder,
        "predictor.0.weight": torch.randn(8, 8),
    }
    for name, content in {
        "moco_v3.pth.tar": {"epoch": 300, "arch": "vit", "state_dict": moco, "optimizer": optimiser},
        "timm.pth": {**state, **head},
        "timm-model.pth": {"model": state},
        "timm-state.pth": {"state_dict": {**state, **head}, "epoch": 1},
        "timm-parallel.pth": _prefixed("module.", state),
        "mae.pth": {"model": {**state, **decoder}},
        "mcf.pth": {"model": released, "epoch": 16, "optimizer": optimiser},
    }.items():
        torch.save(content, tmp_path / name)
    save_file({**state, **head}, tmp_path / "timm.safetensors")
    return tmp_path, state, other


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("moco_v3.pth.tar", "moco_v3"), ("timm.pth", "timm"), ("timm-model.pth", "timm"), ("timm-state.pth", "timm"),
        ("timm-parallel.pth", "timm"), ("timm.safetensors", "timm"), ("mae.pth", "mae"), ("mae.pth", "timm"),
        ("timm-model.pth", "mae"), ("mcf.pth", "mcf"),
    ],
)  # fmt: skip
def test_each_kind_gives_exactly_its_encoder(known_files, vit, name, kind):
    folder, state, _ = known_files
    for asked in (kind, "auto"):
        encoder = read_file(folder / name, asked, where=name)
        assert encoder.tensors.keys() == state.keys()
        assert all(torch.equal(encoder.tensors[key], state[key]) for key in state)
        shape = encoder.shape
        assert (shape.width, shape.depth, shape.patch_size, shape.grid) == (vit.width, vit.depth, vit.patch, vit.grid)
        assert shape.hidden == 4 * vit.width and shape.image_size == vit.image_size
        assert encoder.heads is None


def test_each_branch_of_the_released_checkpoint(known_files, vit, one_line):
    folder, _, other = known_files
    assert torch.equal(
        read_file(folder / "mcf.pth", "mcf", where="", branch="momentum").tensors["pos_embed"], other["pos_embed"]
    )
    teacher = read_file(folder / "mcf.pth", "mcf", where="", branch="teacher")
    assert torch.equal(teacher.tensors["norm.bias"], vit.state(2)["norm.bias"])
    with pytest.raises(UserError) as error:
        read_file(folder / "mae.pth", "auto", where="source=mae.pth", branch="momentum")
    assert "branch=momentum" in one_line(error.value)


@pytest.mark.parametrize(
    ("name", "asked", "remedy"),
    [
        ("moco_v3.pth.tar", "timm", "is a moco_v3 file, not timm; set teacher.source=moco_v3"),
        ("timm.pth", "moco_v3", "is a timm file, not moco_v3; set teacher.source=timm"),
        ("mae.pth", "moco_v3", "is a mae file, not moco_v3; set teacher.source=mae"),
        ("mcf.pth", "timm", "is a mcf file, not timm; set teacher.source=mcf"),
    ],
)
def test_another_kind_is_refused_with_its_name(known_files, one_line, name, asked, remedy):
    with pytest.raises(UserError) as error:
        read_file(known_files[0] / name, asked, where="teacher.path=x", key="teacher.source")
    assert remedy in one_line(error.value)


def _broken(state: dict) -> dict[str, tuple[str, dict]]:
    """What the message must name → a state dict that must be refused."""

    def without(*names: str) -> dict:
        return {k: v for k, v in state.items() if k not in names}

    nan, infinite, swapped = (dict(state) for _ in range(3))
    nan["blocks.1.attn.proj.weight"] = state["blocks.1.attn.proj.weight"].clone()
    nan["blocks.1.attn.proj.weight"][3, 5] = float("nan")
    infinite["norm.bias"] = torch.full_like(state["norm.bias"], float("inf"))
    swapped["blocks.0.mlp.fc2.weight"] = state["blocks.0.mlp.fc2.weight"].mT.contiguous()
    return {
        "norm.weight is missing": without("norm.weight"),
        "blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias, blocks.2.attn.qkv.bias are": without(*(f"blocks.{i}.attn.qkv.bias" for i in range(3))),
        "blocks.1.attn.proj.weight and 9 more are missing": {k: v for k, v in state.items() if not k.startswith("blocks.1.")},
        "pos_embed missing": without("pos_embed"),
        "blocks.0.ls1.gamma is not part": {**state, "blocks.0.ls1.gamma": torch.ones(48)},
        "fc_norm.weight is not part": {**state, "fc_norm.weight": torch.ones(48)},
        "pos_embed has 16 rows": {**state, "pos_embed": state["pos_embed"][:, 1:]},
        "pos_embed has 18 rows": {**state, "pos_embed": torch.randn(1, 18, 48)},
        "[width, 3, patch, patch]": {**state, "patch_embed.proj.weight": torch.randn(48, 1, 8, 8)},
        "patch_embed.proj.weight has shape [48, 192], expected 4": {**state, "patch_embed.proj.weight": torch.randn(48, 192)},
        "blocks.0.mlp.fc2.weight has shape [192, 48], expected [48, 192]": swapped,
        "norm.weight has shape [96], expected [48], norm.bias has shape [96], expected [48]; the": {
            **state, "norm.weight": torch.zeros(96), "norm.bias": torch.zeros(96),
        },
        "blocks.0.norm2.weight has shape [1], expected [48] and 9 more are wrong": {
            k: torch.zeros(1) if "norm" in k and k.startswith("blocks") else v for k, v in state.items()
        },
        "norm_pre.weight, norm_pre.bias are not part": {**state, "norm_pre.weight": torch.ones(48), "norm_pre.bias": torch.ones(48)},
        "cls_token has shape [1, 1, 24]": {**state, "cls_token": torch.randn(1, 1, 24)},
        "blocks.1.attn.proj.weight holds NaN": nan,
        "norm.bias holds NaN or infinite": infinite,
        "norm.bias is torch.int64": {**state, "norm.bias": torch.zeros(48, dtype=torch.int64)},
        "no blocks.*": {k: v for k, v in state.items() if not k.startswith("blocks.")},
    }  # fmt: skip


def test_anything_but_a_whole_finite_plain_vit_is_refused(tmp_path, vit, one_line):
    for i, (expected, state) in enumerate(_broken(vit.state()).items()):
        path = tmp_path / f"{i}.pth"
        torch.save({"state_dict": _prefixed("module.base_encoder.", state)}, path)
        with pytest.raises(UserError) as error:
            read_file(path, "moco_v3", where=f"teacher.path={path}")
        assert expected in one_line(error.value)
        assert str(error.value).startswith(f"teacher.path={path}: ")


def test_files_of_something_else_name_what_they_hold(tmp_path, one_line):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "log.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    for name, kind, expected in (("log.pth", "timm", "epoch, loss"), ("resnet.pth", "timm", "layer1.0.conv1.weight"),
                                 ("resnet.pth", "auto", "layer1.0.conv1.weight")):  # fmt: skip
        with pytest.raises(UserError) as error:
            read_file(tmp_path / name, kind, where=name)
        assert expected in one_line(error.value)


def test_half_precision_is_widened_and_the_file_let_go(tmp_path, vit):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in vit.state().items()}
    path = tmp_path / "half.pth"
    torch.save(state, path)
    encoder = read_file(path, "timm", where="half")
    path.write_bytes(bytes(path.stat().st_size))
    for name, tensor in encoder.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float()), "the tensors must not be mapped from the file any more"


def test_heads_are_taken_from_our_own_metadata(tmp_path, vit):
    save_file(vit.state(), tmp_path / "own.safetensors", metadata={"heads": "3"})
    assert read_file(tmp_path / "own.safetensors", "timm", where="own").heads == 3


def test_the_golden_teacher_is_read_with_its_own_position_table(golden_dir):
    encoder = read_file(golden_dir / "teacher.pth", "moco_v3", where="teacher.pth")
    stored = torch.load(golden_dir / "teacher.pth", weights_only=True)["state_dict"]["module.base_encoder.pos_embed"]
    inside = load_file(golden_dir / "rank0.safetensors")
    assert torch.equal(encoder.tensors["pos_embed"], stored)
    prefix = "before.perceptual_loss.model."
    ours = json.dumps(sorted(encoder.tensors))
    theirs = json.dumps(sorted(n.removeprefix(prefix) for n in inside if n.startswith(prefix) and ".head." not in n))
    assert ours == theirs
    assert all(torch.equal(t, inside[prefix + n]) for n, t in encoder.tensors.items())
