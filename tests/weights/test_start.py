"""Weights that a run starts from: each known file reaches encoder and momentum encoder, and only where it fits."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_names import DEPTH, PATCH, SIDE, WIDTH, farl_file, tower
from safetensors.torch import load_file, save_file

from mcf import checkpoint, export
from mcf.config import Recipe, TeacherConfig
from mcf.errors import UserError
from mcf.models.mcf import MCF
from mcf.sizes import count_parameters
from mcf.weights import load_teacher, read_start
from mcf.weights.sources import read_file

sys.path.append(str(Path(__file__).parents[1]))
import tiny


def recipe(vit, path, **start) -> Recipe:
    """A recipe whose encoder is of the small ViT's shape."""
    return Recipe.model_validate({"model": vit.model, "start": {"path": str(path), **start}})


@pytest.fixture
def known(tmp_path, vit):
    """Name → (keys of start, seed of the weights inside): MoCo v3, MAE, timm, and both branches of the released MCF."""
    one, two = vit.state(0), vit.state(1)
    decoder = {"decoder_embed.weight": torch.randn(8, vit.width), "mask_token": torch.randn(1, 1, 8)}
    heads = {"fc.0.weight": torch.randn(8, vit.width)}
    torch.save({"state_dict": {f"module.base_encoder.{k}": v for k, v in one.items()}}, tmp_path / "moco.pth.tar")
    torch.save({"model": {**one, **decoder}}, tmp_path / "mae.pth")
    save_file(one, tmp_path / "timm.safetensors", {"heads": str(vit.heads)})
    released = {f"online_encoder.{k}": v for k, v in {**one, **heads}.items()}
    released |= {f"target_encoder.{k}": v for k, v in {**two, **heads}.items()}
    torch.save({"model": {**released, **decoder}}, tmp_path / "mcf.pth")
    return tmp_path, {
        "moco.pth.tar": [({}, 0), ({"source": "moco_v3"}, 0)],
        "mae.pth": [({}, 0), ({"source": "mae"}, 0)],
        "timm.safetensors": [({}, 0), ({"source": "timm"}, 0)],
        "mcf.pth": [({}, 0), ({"branch": "momentum"}, 1), ({"source": "mcf", "branch": "momentum"}, 1)],
    }


def test_each_known_file_gives_its_encoder(known, vit):
    folder, cases = known
    for name, asked in cases.items():
        for keys, seed in asked:
            found = read_start(recipe(vit, folder / name, **keys))
            assert found.keys() == vit.state().keys()
            assert all(torch.equal(found[k], v) for k, v in vit.state(seed).items()), (name, keys)
    assert read_start(Recipe()) is None


def test_a_run_of_our_own_gives_either_branch(trained, vit):
    run, student, momentum = trained
    for branch, module in (("encoder", student), ("momentum", momentum)):
        found = read_start(recipe(vit, run, branch=branch))
        assert all(torch.equal(found[k], v) for k, v in module.encoder.state_dict().items())


def test_mae_and_both_branches_of_the_released_mcf_teach(known, vit):
    folder, _ = known
    images = torch.randn(2, 3, vit.image_size, vit.image_size)
    for name, source, branch, seed in (("mae.pth", "mae", "encoder", 0), ("mcf.pth", "mcf", "encoder", 0),
                                       ("mcf.pth", "mcf", "momentum", 1)):  # fmt: skip
        config = TeacherConfig(source=source, path=str(folder / name), branch=branch, heads=vit.heads, taps=(0, 2))
        truth = vit.blocks(vit.state(seed), images)
        for ours, theirs in zip(load_teacher(config, image_size=vit.image_size).features(images), truth[::2]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_the_position_table_follows_the_resolution(known, vit):
    folder, _ = known
    small = recipe(vit, folder / "timm.safetensors")
    large = small.model_copy(update={"model": small.model.model_copy(update={"image_size": 3 * vit.image_size})})
    found, table = read_start(large)["pos_embed"], vit.state()["pos_embed"]
    maps = table[0, 1:].T.view(1, vit.width, 4, 4)
    wide = F.interpolate(maps, size=(12, 12), mode="bicubic", align_corners=False)
    assert torch.equal(found[0, 0], table[0, 0])
    torch.testing.assert_close(found[0, 1:], wide[0].flatten(1).T, rtol=1e-6, atol=1e-6)
    MCF(large.model).encoder.load_state_dict(read_start(large))


def test_another_shape_is_refused_with_every_key_that_differs(known, tmp_path, vit, one_line):
    folder, _ = known
    wrong = recipe(vit, folder / "timm.safetensors")
    model = wrong.model.model_copy(update={"width": 96, "depth": 12, "heads": 6, "mlp_ratio": 2.0})
    with pytest.raises(UserError) as error:
        read_start(wrong.model_copy(update={"model": model}))
    for part in (
        "model.width=48 (not 96)",
        "model.depth=3 (not 12)",
        "model.heads=3 (not 6)",
        "model.mlp_ratio=4.0 (not 2.0)",
    ):
        assert part in one_line(error.value)
    farl_file(tmp_path / "farl.pth", tower())
    with pytest.raises(UserError, match=r"model.variant=clip \(not plain\)"):
        read_start(recipe(vit, tmp_path / "farl.pth"))
    (folder / "part.pth").write_bytes(b"")
    torch.save({k: v for k, v in vit.state().items() if "blocks.1." not in k}, folder / "part.pth")
    for name, keys, said in (("part.pth", {}, "and 9 more are missing"), ("mae.pth", {"source": "farl"}, "set start.source=mae"),
                             ("none.pth", {}, "start.path="), ("mae.pth", {"branch": "momentum"}, "branch=momentum")):  # fmt: skip
        with pytest.raises(UserError) as error:
            read_start(recipe(vit, folder / name, **keys))
        assert said in one_line(error.value)


def clip_recipe(run_dir, data, **keys) -> dict:
    values = tiny.recipe(run_dir, data, **keys)
    values["model"] |= {
        "width": WIDTH,
        "depth": DEPTH,
        "heads": 2,
        "variant": "clip",
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return values


def test_a_run_starts_from_farl_and_goes_on_without_its_file(tmp_path, capsys):
    """On two ranks under ZeRO-3, whose pieces are cut from what rank 0 has read; out again by mcf.export."""
    tiny.shards(tmp_path / "shards", samples=40)
    farl_file(tmp_path / "farl.pth", tower())
    keys = {"ranks": 2, "micro_batch": 2, "train__zero_stage": 3, "start__path": str(tmp_path / "farl.pth"),
            "train__steps": 2, "train__stop_after": 1, "optimizer__lr": 1e-12}  # fmt: skip
    run = tmp_path / "run"
    tiny.write_recipe(run, clip_recipe(run, tmp_path / "shards", **keys))
    assert tiny.run(run, 2) == 0, tiny.said(run)
    assert "the encoder starts from the farl file" in tiny.said(run)
    start = read_file(tmp_path / "farl.pth", "farl", where="x").tensors
    folder = checkpoint.latest(run)
    for file in ("weights", "momentum"):
        saved = {k.removeprefix("encoder."): v for k, v in load_file(folder / f"{file}.safetensors").items()}
        for name, tensor in start.items():
            # One step at a rate of 10⁻¹² moves nothing by more than rounding.
            torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-9)

    (tmp_path / "farl.pth").unlink()
    keys.pop("train__stop_after")
    tiny.write_recipe(run, clip_recipe(run, tmp_path / "shards", **keys))
    assert tiny.run(run, 2) == 0, tiny.said(run)
    assert checkpoint.step_of(checkpoint.latest(run)) == 2

    out = tmp_path / "out.safetensors"
    assert export.main([f"source={run}", f"out={out}"]) == 0
    again = read_file(out, "auto", where="out")
    assert again.shape.clip and again.heads == 2
    card = (tmp_path / "README.md").read_text()
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0].replace('"out.safetensors"', f'"{out}"'), scope)
    assert torch.equal(scope["model"].norm_pre.weight, again.tensors["norm_pre.weight"])
    capsys.readouterr()
    for keys, said in ((["format=transformers", f"out={tmp_path}/hub"], "which ViTModel has no place for"),
                       ([f"out={tmp_path}/x.pth"], "use .safetensors")):  # fmt: skip
        assert export.main([f"source={run}", *keys]) == 2
        assert said in capsys.readouterr().err
    shutil.rmtree(run)


def test_the_plan_counts_the_variant():
    values = clip_recipe(Path("runs/r"), Path("data"))
    encoder = MCF(Recipe.model_validate(values).model).encoder
    assert count_parameters(Recipe.model_validate(values)).encoder == sum(p.numel() for p in encoder.parameters())
