"""What `mcf.export` writes beside plain encoders: the decoder, transformers' layout, ONNX, and model cards."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from mcf import export
from mcf.config import Recipe
from mcf.downstream import saved
from mcf.downstream.config import HeadConfig
from mcf.downstream.network import Backbone, Decoder, Network
from mcf.downstream.saved import is_finetuned
from mcf.errors import UserError
from mcf.models.vit import VisionTransformer

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture
def logged(trained):
    """The run, with lines of metrics before and after its checkpoint of step 5."""
    run, student, momentum = trained
    lines = [
        {"step": step, "samples": step * 4096, "time": 1.0, "loss/total": 10.0 - step, "rate/images_per_s": 77.0}
        for step in (2, 4, 6)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run, student, momentum


def test_the_decoder_goes_out_under_maes_names_and_computes_the_same(trained, tmp_path):
    run, student, momentum = trained
    for branch, module in (("encoder", student), ("momentum", momentum)):
        out = tmp_path / f"{branch}.safetensors"
        assert export.main([f"source={run}", f"out={out}", f"branch={branch}", "decoder=true"]) == 0
        w = load_file(out)
        assert torch.equal(w["cls_token"], module.encoder.cls_token)
        # MAE's own names; heads are in no tensor.
        assert {name.split(".")[0] for name in w} == {
            "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "mask_token", "decoder_embed", "decoder_pos_embed",
            "decoder_blocks", "decoder_norm", "decoder_pred",
        }  # fmt: skip
        with safe_open(out, framework="pt") as opened:
            assert (opened.metadata()["heads"], opened.metadata()["decoder_heads"]) == ("3", "2")

    tokens, order = torch.randn(2, 1 + 4, 48), torch.stack([torch.randperm(16), torch.randperm(16)])
    with torch.no_grad():
        ours = student.decoder(tokens, order)
    # MAE's decoder, written down again (He et al. 2022): one block of two heads of 16.
    x = F.linear(tokens, w["decoder_embed.weight"], w["decoder_embed.bias"])
    full = torch.cat([x[:, 1:], w["mask_token"].expand(2, 12, -1)], dim=1)
    x = torch.cat([x[:, :1], full.gather(1, order[..., None].expand(-1, -1, 32))], dim=1) + w["decoder_pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    block = "decoder_blocks.0"
    q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / 4).softmax(-1) @ v
    x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
    x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    theirs = linear(norm(x, "decoder_norm")[:, 1:], "decoder_pred")
    # Float32 sums in another order, values around 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_file_with_a_decoder_is_an_encoder_to_us(trained, tmp_path):
    from mcf.weights.sources import read_file

    run, student, _ = trained
    out = tmp_path / "both.safetensors"
    export.main([f"source={run}", f"out={out}", "decoder=true"])
    encoder = read_file(out, "auto", where="weights")
    assert encoder.heads == 3
    assert all(torch.equal(tensor, encoder.tensors[name]) for name, tensor in student.encoder.state_dict().items())


@pytest.mark.parametrize("branch", ["encoder", "momentum"])
def test_transformers_opens_the_folder_strictly_and_computes_the_same(trained, vit, tmp_path, branch):
    from transformers import AutoModel, ViTModel

    run, student, momentum = trained
    out = tmp_path / "hub"
    assert export.main([f"source={run}", f"out={out}", "format=transformers", f"branch={branch}"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    assert not is_finetuned(out), "a fine-tuned model has a file of that name too"
    model, told = ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not any(told.values()), told
    assert model.config.layer_norm_eps == 1e-6, "no output shows it clearly"
    assert isinstance(AutoModel.from_pretrained(out), ViTModel)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model.eval()(pixel_values=images).last_hidden_state
        encoder = {"encoder": student, "momentum": momentum}[branch].encoder
        ours = encoder(images)
        state = encoder.state_dict()
        independent = vit.forward(state, images)
    # Float32 sums in another order, values around 1.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, independent, rtol=1e-4, atol=1e-5)


def test_the_folder_says_how_pictures_become_input(trained, tmp_path):
    from mcf.models.patches import normalise

    run, _, _ = trained
    export.main([f"source={run}", f"out={tmp_path / 'hub'}", "format=transformers"])
    said = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert said["size"] == {"height": 32, "width": 32} and said["do_rescale"] and said["do_normalize"]
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    by_hand = (pixels.numpy() * said["rescale_factor"] - np.array(said["image_mean"])) / np.array(said["image_std"])
    torch.testing.assert_close(
        normalise(pixels).permute(0, 2, 3, 1).double(), torch.from_numpy(by_hand), rtol=0, atol=1e-6
    )


def test_an_onnx_encoder_computes_the_same(trained, vit, tmp_path, capsys):
    import onnxruntime

    run, _, momentum = trained
    out = tmp_path / "vit.onnx"
    assert export.main([f"source={run}", f"out={out}", "format=onnx", "branch=momentum"]) == 0
    assert "onnxruntime differs by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["branch"] == "momentum"
    state = momentum.encoder.state_dict()
    for batch in (1, 4):
        images = torch.rand(batch, 3, 32, 32)
        (theirs,) = session.run(["tokens"], {"images": images.numpy()})
        ours = vit.forward(state, (images - MEAN) / STD)
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-4)


@pytest.fixture
def finetuned(tmp_path):
    """Makes a run directory of a fine-tuned model of a task, as far as an export reads it."""

    def make(task: str):
        torch.manual_seed(5)
        vit = VisionTransformer(image_size=48, patch_size=8, width=32, depth=4, heads=2)
        head = HeadConfig(channels=16)
        network = Network(Backbone(vit, (0, 1, 2, 3), 48), Decoder(32, 5, head)).eval()
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor.is_floating_point() and tensor.ndim:
                    tensor += 0.1 * torch.rand_like(tensor)  # not negative: variances are among them
        description = saved.Description(
            task=task, dataset="csv", outputs=5, classes=("background", *"abcd") if task == "parsing" else (),
            crop="box", scale=1.0, warp=0.0, warp_size=48, input_size=48, patch_size=8, width=32, depth=4, heads=2,
            mlp_ratio=4.0, taps=(0, 1, 2, 3), head=head.model_dump(mode="json"), epoch=7,
        )  # fmt: skip
        run = tmp_path / f"run-{task}"
        run.mkdir()
        saved.write(run / saved.FILE, network, description)
        scores = {"epoch": 7, "by": "last epoch", "nme": 3.25}
        (run / "metrics.json").write_text(json.dumps({"selected": scores, "best_on_test": scores, "history": []}))
        return run

    return make


@pytest.mark.parametrize("task", ["alignment", "parsing"])
def test_an_onnx_head_computes_the_same(finetuned, tmp_path, task):
    import onnxruntime

    run, out = finetuned(task), tmp_path / "head.onnx"
    assert export.main([f"source={run}", f"out={out}", "format=onnx"]) == 0
    network, description = saved.load(str(run), task)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    carried = json.loads(session.get_modelmeta().custom_metadata_map[saved.KEY])
    assert carried["task"] == task and carried["classes"] == list(description.classes)
    images = torch.rand(3, 3, 48, 48)
    (theirs,) = session.run(["logits"], {"images": images.numpy()})
    ours = network(images)
    assert ours.shape == (3, 5, 24, 24) and ours.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-4 * max(1.0, float(ours.abs().max())))
    card = (tmp_path / "README.md").read_text()
    assert "| `selected/nme` | 3.25 |" in card and f"Face {task} as on csv" in card
    assert {"alignment": "keypoint-detection", "parsing": "image-segmentation"}[task] in card.split("---")[1]


def test_an_onnx_file_that_computes_something_else_is_not_written(tmp_path):
    from mcf.weights import onnx

    class Drifting(torch.nn.Module):
        """Gives other numbers at every call, so that no file can agree with it."""

        calls = 0

        def forward(self, images):
            self.calls += 1
            return images.mean((1, 2, 3)) + 0.01 * self.calls

    with pytest.raises(UserError, match="onnxruntime computes something else"):
        onnx.write(tmp_path / "bad.onnx", Drifting().eval(), 16, ["out"], {})
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_recipe_step_metrics_and_terms(logged, tmp_path, capsys):
    run, _, _ = logged
    export.main([f"source={run}", f"out={tmp_path / 'vit.safetensors'}"])
    assert str(tmp_path / "README.md") in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other" and "mcf" in front["tags"]
    assert "| step | 5 |" in card
    assert "step 4" in card and "| `loss/total` | 6 |" in card, "the last line that the checkpoint has seen"
    assert "rate/" not in card and "samples`" not in card
    assert "CC BY-NC 4.0" in card, "MoCo v3's terms: the recipe names it as the teacher"
    told = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert not {"output", "slurm", "track"} & set(told), "what belongs to a cluster is not passed on"
    recipe = Recipe.model_validate(told)
    assert recipe.model.width == 48 and recipe.model.decoder.depth == 1


def test_the_use_that_the_card_shows_is_right(trained, tmp_path, monkeypatch):
    run, student, _ = trained
    monkeypatch.chdir(tmp_path)
    export.main([f"source={run}", "out=hub", "format=transformers"])
    code = (tmp_path / "hub" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    images = torch.randn(1, 3, 32, 32)
    names = {"pixel_values": images}
    exec(code.replace("this folder", "hub"), names)
    torch.testing.assert_close(names["tokens"], student.encoder(images), rtol=1e-4, atol=1e-5)


def test_a_readme_of_something_else_stays(trained, tmp_path):
    run, _, _ = trained
    (tmp_path / "README.md").write_text("my project\n")
    for _ in range(2):
        export.main([f"source={run}", f"out={tmp_path / 'vit.safetensors'}"])
    assert (tmp_path / "README.md").read_text() == "my project\n"
    assert sorted(path.name for path in tmp_path.glob("*README.md")) == ["README.md", "vit.safetensors.README.md"]


def test_a_folder_of_something_else_is_refused_and_stays(trained, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    (drawn / "images").mkdir(parents=True)
    keys = [f"source={trained[0]}", f"out={drawn}", "format=transformers"]
    assert export.main(keys) == 2
    error = f"error: out={drawn}: holds other files than an export's; give the name of a new or an empty folder\n"
    assert capsys.readouterr().err == error
    assert [path.name for path in drawn.iterdir()] == ["images"]
    (drawn / "images").rmdir()
    assert export.main(keys) == export.main([*keys, "branch=momentum"]) == 0  # empty, and an earlier export
    assert (drawn / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["source={run}", "out=vit.onnx"], "format=timm writes a file; end its name in .safetensors"),
        (["source={run}", "out=vit.pth", "format=onnx"], "end its name in .onnx"),
        (["source={run}", "out=vit.pth", "format=transformers"], "writes a folder"),
        (["source={run}", "out={run}", "format=transformers"], "is a run directory"),
        (["source={run}", "out=missing/vit.onnx", "format=onnx"], "its folder does not exist"),
        (["source={run}", "out=hub", "format=transformers", "decoder=true"], "use format=timm"),
        (["source={head}", "out=vit.pth"], "only format=onnx writes"),
        (["source={head}", "out=vit.onnx", "format=onnx", "branch=momentum"], "has no branches"),
    ],
)
def test_mistakes_are_one_line(trained, finetuned, tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    places = {"run": trained[0], "head": finetuned("alignment")}
    before = set(tmp_path.rglob("*"))
    assert export.main([argument.format(**places) for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and "\n" not in printed and expected in printed
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(trained, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert export.main([f"source={trained[0]}", f"out={tmp_path / 'vit.onnx'}", "format=onnx"]) == 2
    assert f"{package} is not installed, and format=onnx needs it: pip install {package}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.onnx"))


def test_a_decoder_that_is_not_finite_is_refused(trained, tmp_path, capsys):
    from mcf import checkpoint, state

    run, student, momentum = trained
    broken = {f"model.{name}": tensor.clone() for name, tensor in student.state_dict().items()}
    broken["model.decoder.pred.bias"][0] = float("nan")
    recipe = Recipe.model_validate(json.loads((checkpoint.latest(run) / "run.json").read_text())["recipe"])
    with checkpoint.save(run, 9, keep=2) as folder:
        state.write(folder, recipe, state.Progress(step=9), broken, momentum.state_dict())
    out = tmp_path / "vit.safetensors"
    assert export.main([f"source={run}", f"out={out}", "decoder=true"]) == 2
    assert "decoder.pred.bias holds NaN" in capsys.readouterr().err and not out.exists()
