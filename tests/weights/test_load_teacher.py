"""The teacher of each source computes what its file says, and nothing is drawn or guessed that the file must give."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mcf import checkpoint
from mcf.config import Recipe, TeacherConfig
from mcf.errors import UserError
from mcf.weights import load_teacher

# Two float32 programs of one network: rounding differs in order only, some 1e-6 of values around 1 after three blocks.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _teacher(**keys) -> TeacherConfig:
    return TeacherConfig(**{"source": "timm", "taps": (0, 2), "heads": 3, **keys})


@pytest.fixture
def run_dir(tmp_path, vit):
    """A run with two checkpoints, in the files that training writes, of which step 20 is the newest."""
    recipe = Recipe.model_validate({"model": vit.model}).model_dump(mode="json")
    for step in (10, 20):
        with checkpoint.save(tmp_path / "run", step, keep=5) as folder:
            for file, seed in (("weights", step), ("momentum", step + 1)):
                tensors = {f"encoder.{name}": tensor for name, tensor in vit.state(seed).items()}
                save_file(tensors | {"projector.0.weight": torch.randn(4, 4)}, folder / f"{file}.safetensors")
            (folder / "run.json").write_text(json.dumps({"format": 1, "progress": {"step": step}, "recipe": recipe}))
    return tmp_path / "run"


@pytest.fixture
def images(vit):
    return torch.randn(2, 3, vit.image_size, vit.image_size, generator=torch.Generator().manual_seed(5))


def _agrees(teacher, vit, state, images) -> None:
    truth = vit.blocks(state, images)
    for ours, theirs in zip(teacher.features(images), (truth[0], truth[2]), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_none_is_none():
    assert load_teacher(TeacherConfig(source="none"), image_size=224) is None


def test_files_teach_what_they_hold(tmp_path, vit, images):
    state = vit.state()
    torch.save({"state_dict": {f"module.base_encoder.{k}": v for k, v in state.items()}}, tmp_path / "moco.pth.tar")
    save_file(state, tmp_path / "timm.safetensors")
    for source, name in (("moco_v3", "moco.pth.tar"), ("timm", "timm.safetensors")):
        teacher = load_teacher(_teacher(source=source, path=str(tmp_path / name)), image_size=vit.image_size)
        _agrees(teacher, vit, state, images)
        assert not any(p.requires_grad for p in teacher.parameters())


def test_heads_matter_and_come_from_the_recipe(tmp_path, vit, images):
    save_file(vit.state(), tmp_path / "timm.safetensors")
    other = load_teacher(_teacher(path=str(tmp_path / "timm.safetensors"), heads=6), image_size=vit.image_size)
    difference = other.features(images)[1] - vit.blocks(vit.state(), images)[2]
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize(("branch", "seed"), [("encoder", 20), ("momentum", 21)])
def test_the_latest_checkpoint_of_a_run_teaches(run_dir, vit, images, branch, seed):
    config = _teacher(source="checkpoint", path=str(run_dir), branch=branch)
    _agrees(load_teacher(config, image_size=vit.image_size), vit, vit.state(seed), images)


def test_one_checkpoint_of_a_run_teaches(run_dir, vit, images):
    config = _teacher(source="checkpoint", path=str(run_dir / "checkpoints" / "step-00000010"))
    _agrees(load_teacher(config, image_size=vit.image_size), vit, vit.state(10), images)


def test_a_damaged_newest_checkpoint_falls_back(run_dir, vit, images):
    newest = run_dir / "checkpoints" / "step-00000020"
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = _teacher(source="checkpoint", path=str(run_dir))
    _agrees(load_teacher(config, image_size=vit.image_size), vit, vit.state(10), images)
    with pytest.raises(UserError, match="damaged"):
        load_teacher(config.model_copy(update={"path": str(newest)}), image_size=vit.image_size)


def test_a_checkpoint_knows_its_heads(run_dir, vit, one_line):
    with pytest.raises(UserError) as error:
        load_teacher(_teacher(source="checkpoint", path=str(run_dir), heads=6), image_size=vit.image_size)
    assert "teacher.heads=6" in one_line(error.value) and "set teacher.heads=3" in str(error.value)


def test_another_image_size_interpolates_the_position_table(tmp_path, vit):
    state = vit.state()
    # A table that depends on the row alone, so that one column shows all.
    rows = torch.arange(4.0).repeat_interleave(4)
    state["pos_embed"] = torch.cat(
        [torch.full((1, 1, vit.width), 9.0), rows[None, :, None].expand(1, 16, vit.width)], 1
    )
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "timm.safetensors")
    larger = load_teacher(_teacher(path=str(tmp_path / "timm.safetensors")), image_size=2 * vit.image_size)
    nothing = torch.zeros(1, 3, 2 * vit.image_size, 2 * vit.image_size)
    table = larger.vit.embed(nothing)[0] - torch.cat(
        [state["cls_token"][0], state["patch_embed.proj.bias"].expand(64, -1)]
    )
    torch.testing.assert_close(table[0], torch.full((vit.width,), 9.0), **CLOSE)
    column = table[1:, 0].reshape(8, 8)[:, 3]

    # Pillow's bicubic filter is the one that timm's resampling of positions follows.
    expected = Image.fromarray(rows.reshape(4, 4).numpy(), mode="F").resize((8, 8), Image.Resampling.BICUBIC)
    torch.testing.assert_close(column, torch.from_numpy(np.array(expected))[:, 3], **CLOSE)


def test_random_is_a_function_of_the_seed_and_says_so(caplog):
    config = TeacherConfig(source="random", width=48, depth=3, heads=3, patch_size=8, taps=(0, 2))
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first, again, other = (load_teacher(config, image_size=32, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state()), "loading must not move the caller's random numbers"
    assert sum("RANDOM" in r.message and r.levelno == logging.WARNING for r in caplog.records) == 3
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first.features(images)[1], again.features(images)[1])
    assert not torch.allclose(first.features(images)[1], other.features(images)[1])


def test_a_teacher_from_a_file_moves_no_random_numbers(tmp_path, vit):
    save_file(vit.state(), tmp_path / "timm.safetensors")
    state = torch.get_rng_state()
    load_teacher(_teacher(path=str(tmp_path / "timm.safetensors")), image_size=vit.image_size)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"path": None}, "teacher.path is not set"),
        ({"heads": 5}, "teacher.heads=5 does not fit the width 48"),
        ({"heads": 12}, "(possible: 1, 2, 3, 4, 6)"),
        ({"taps": (0, 3)}, "teacher.taps=[0, 3]: timm file"),
        ({"source": "random", "width": 50, "heads": 3}, "teacher.heads=3 does not fit the width 50"),
        ({"source": "random", "width": 48, "depth": 2}, "has blocks 0 to 1"),
        ({"source": "random", "patch_size": 7}, "teacher.patch_size=7 does not divide"),
        ({"source": "checkpoint"}, "is a file; give the run directory"),
        ({"source": "checkpoint"}, "a file of weights is read with teacher.source=timm, or what else it is (mae, "),
        ({"source": "checkpoint", "path": "/nowhere/at/all"}, "no such directory"),
        ({"source": "moco_v3"}, "set teacher.source=timm"),
        ({"path": "/"}, "is a directory"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, vit, one_line, keys, expected):
    save_file(vit.state(), tmp_path / "timm.safetensors")
    with pytest.raises(UserError) as error:
        load_teacher(_teacher(**{"path": str(tmp_path / "timm.safetensors"), **keys}), image_size=vit.image_size)
    assert expected in one_line(error.value)


def test_an_image_its_patches_do_not_divide_is_one_line(tmp_path, vit, one_line):
    save_file(vit.state(), tmp_path / "timm.safetensors")
    with pytest.raises(UserError) as error:
        load_teacher(_teacher(path=str(tmp_path / "timm.safetensors")), image_size=36)
    assert "model.image_size=36" in one_line(error.value)


@pytest.mark.parametrize("branch", ["encoder", "momentum"])
def test_a_fine_tuned_run_is_called_so(tmp_path, one_line, branch):
    """In the files that fine-tuning writes; the run that it began from is named."""
    with checkpoint.save(tmp_path / "runs/alignment-faces", 16, keep=1) as folder:
        for name in ("weights", "optimizer", "average"):
            save_file({"backbone.vit.norm.weight": torch.ones(3)}, folder / f"{name}.safetensors")
        content = {"format": 1, "progress": {"step": 16}, "finetune": {"task": "alignment", "weights": "runs/began"}}
        (folder / "run.json").write_text(json.dumps(content))
    path = tmp_path / "runs/alignment-faces"
    with pytest.raises(UserError) as error:
        load_teacher(_teacher(source="checkpoint", path=str(path), branch=branch), image_size=32)
    expected = "a fine-tuned model, not a run of pre-training; give the one that it began from (runs/began)"
    assert one_line(error.value) == f"teacher.path={path}: {expected}"


@pytest.mark.parametrize("damage", ["no recipe", "no momentum", "empty run"])
def test_incomplete_checkpoints_are_one_line(run_dir, tmp_path, vit, one_line, damage):
    path = run_dir
    if damage == "empty run":
        path = tmp_path / "other"
        path.mkdir()
    else:
        with checkpoint.save(run_dir, 30, keep=5) as folder:
            if damage == "no recipe":
                save_file({f"encoder.{k}": v for k, v in vit.state().items()}, folder / "momentum.safetensors")
            save_file({f"encoder.{k}": v for k, v in vit.state().items()}, folder / "weights.safetensors")
    with pytest.raises(UserError) as error:
        load_teacher(_teacher(source="checkpoint", path=str(path), branch="momentum"), image_size=vit.image_size)
    expected = {"no recipe": "run.json", "no momentum": "momentum.safetensors", "empty run": "no whole checkpoint"}
    assert expected[damage] in one_line(error.value)


def test_the_golden_teacher_gives_the_golden_loss(golden_dir):
    """The feature loss of the reference, from its own prediction, through our reading of its teacher's file."""
    from mcf.models.patches import normalise, unpatchify

    numbers = load_file(golden_dir / "rank0.safetensors")
    config = TeacherConfig(source="moco_v3", path=str(golden_dir / "teacher.pth"), heads=2)
    teacher = load_teacher(config, image_size=224)
    images = normalise(numbers["u8"].permute(0, 2, 3, 1).contiguous())
    pairs = zip(teacher.features(unpatchify(numbers["pred"], 16)), teacher.features(images), strict=True)
    normalised = ((a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)) for a, b in pairs)
    loss = sum(((a - b) ** 2).mean() for a, b in normalised)
    assert abs(float(loss) / float(numbers["mim"]) - 1) < 1e-5
