"""`mcf.convert` and `mcf.export`: what comes out is a plain ViT that an independent one loads strictly and equals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mcf import convert, export


class IndependentBlock(nn.Module):
    """A block written for this test alone, with timm's names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class IndependentViT(nn.Module):
    """What `timm.create_model(…, num_classes=0)` has and does, up to the final norm."""

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(IndependentBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


@pytest.mark.parametrize("branch", ["encoder", "momentum"])
@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pth"])
def test_an_export_loads_strictly_elsewhere_and_computes_the_same(trained, tmp_path, capsys, branch, name):
    run, student, momentum = trained
    out = tmp_path / name
    assert export.main([f"source={run}", f"out={out}", f"branch={branch}"]) == 0
    assert "width 48, depth 3, 3 heads, patches of 8 pixels" in capsys.readouterr().out
    elsewhere = IndependentViT(32, 8, 48, 3, 3)
    elsewhere.load_state_dict(load_file(out) if name.endswith("safetensors") else torch.load(out, weights_only=True))
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = {"encoder": student, "momentum": momentum}[branch].encoder(pixels)
    theirs = elsewhere(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    # Order of float32 sums differs (convolution against matrix product, two attentions): some 1e-6 of values around 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_export_teaches(trained, tmp_path, vit):
    from mcf.config import TeacherConfig
    from mcf.weights import load_teacher

    run, student, _ = trained
    export.main([f"source={run}", f"out={tmp_path / 'vit.safetensors'}"])
    config = TeacherConfig(source="timm", path=str(tmp_path / "vit.safetensors"), heads=3, taps=(1,))
    images = torch.randn(2, 3, 32, 32)
    (ours,) = load_teacher(config, image_size=32).features(images)
    assert torch.equal(ours, student.encoder.features(images, (1,))[0])


@pytest.mark.parametrize("kind", ["auto", "moco_v3"])
def test_convert_keeps_the_encoder_and_nothing_else(golden_dir, tmp_path, capsys, kind):
    out = tmp_path / "teacher.safetensors"
    assert convert.main([f"source={golden_dir / 'teacher.pth'}", f"out={out}", f"kind={kind}", "heads=2"]) == 0
    assert "width 32, depth 12, 2 heads" in capsys.readouterr().out
    stored = torch.load(golden_dir / "teacher.pth", weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    wanted = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix) and ".head." not in k}
    with safe_open(out, framework="pt") as opened:
        assert set(opened.keys()) == set(wanted)
        assert all(torch.equal(opened.get_tensor(k), v) for k, v in wanted.items())
        assert opened.metadata()["heads"] == "2"
    IndependentViT(224, 16, 32, 12, 2).load_state_dict(load_file(out))


@pytest.mark.parametrize("branch", ["encoder", "momentum", "teacher"])
def test_convert_opens_every_branch_of_the_released_layout(golden_dir, tmp_path, branch):
    inside = load_file(golden_dir / "rank0.safetensors")
    released = {k.removeprefix("before."): v for k, v in inside.items() if k.startswith("before.")}
    torch.save({"model": released, "epoch": 16}, tmp_path / "released.pth")
    out = tmp_path / "out.safetensors"
    assert convert.main([f"source={tmp_path / 'released.pth'}", f"out={out}", f"branch={branch}"]) == 0
    prefix = {"encoder": "online_encoder.", "momentum": "target_encoder.", "teacher": "perceptual_loss.model."}[branch]
    written = load_file(out)
    assert written and all(torch.equal(v, released[prefix + k]) for k, v in written.items())
    extra = {"fc", "head"}
    assert {k.removeprefix(prefix) for k in released if k.startswith(prefix)} - set(written) == {
        k.removeprefix(prefix)
        for k in released
        if k.startswith(prefix) and k.removeprefix(prefix).split(".")[0] in extra
    }


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("convert", ["source=nowhere.pth", "out=x.safetensors"], "source=nowhere.pth: no such file"),
        ("convert", ["source={vit}", "out={vit}"], "is the source itself"),
        ("convert", ["source={vit}", "out=x.safetensors", "heads=5"], "heads=5 does not fit the width 48"),
        ("convert", ["source={vit}", "out=missing/x.safetensors"], "its folder does not exist"),
        (
            "convert",
            ["source={vit}", "out=c.xyz"],
            "out=c.xyz: the ending says which kind of file it is; end its name in",
        ),
        ("convert", ["source={vit}", "out=c"], "end its name in .safetensors or .pth"),
        ("convert", ["source={own}", "out=x.safetensors"], "mcf.export"),
        ("export", ["source=nowhere", "out=x.safetensors"], "source=nowhere: no such directory"),
        ("export", ["source={vit}", "out=x.safetensors"], "is a file"),
        ("export", ["source={run}", "out=x.safetensors", "branch=teacher"], "branch"),
    ],
)
def test_mistakes_are_one_line_and_status_2(trained, tmp_path, vit, capsys, monkeypatch, verb, arguments, expected):
    from mcf.weights import files

    monkeypatch.chdir(tmp_path)
    files.write(tmp_path / "vit.safetensors", vit.state(), {})
    places = {"vit": tmp_path / "vit.safetensors", "run": trained[0]}
    places["own"] = trained[0] / "checkpoints" / "step-00000005" / "weights.safetensors"
    assert {"convert": convert, "export": export}[verb].main([a.format(**places) for a in arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and "\n" not in printed
    assert expected in printed
    assert not (tmp_path / "x.safetensors").exists()


def test_both_verbs_run_as_modules():
    for verb in ("convert", "export"):
        done = subprocess.run(
            [sys.executable, "-m", f"mcf.{verb}", "--help"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "branch" in done.stdout
