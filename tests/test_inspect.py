"""mcf.inspect shows what training gets: the same faces, flips and masks, by the trainer's own parts."""

import io

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from mcf import inspect
from mcf.config import Recipe
from mcf.data.loader import Loader
from mcf.data.shards import load_manifest
from mcf.inspect import main
from mcf.step import Masks


@pytest.fixture
def folder(tmp_path):
    tiny.shards(tmp_path / "data")
    return tmp_path / "data"


def write(tmp_path, folder, **overrides) -> Recipe:
    values = tiny.recipe(tmp_path / "run", folder, **overrides)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return Recipe.model_validate(values)


@pytest.mark.parametrize("momentum", ["independent", "same", "none"])
def test_a_step_shows_what_two_ranks_of_that_step_train_on(tmp_path, folder, momentum):
    recipe = write(tmp_path, folder, mask__momentum=momentum)
    step, shown = 19, inspect.faces(recipe, 19, 0, recipe.batch)
    assert [face["position"] for face in shown] == list(range(18 * 8, 19 * 8))
    of_trainer = Masks(recipe)
    for rank in range(2):
        loader = Loader(
            recipe.data, batch=8, micro_batch=2, seed=recipe.seed, image_size=tiny.SIZE, rank=rank, world_size=2,
            device="cpu", start=(step - 1) * 8,
        )  # fmt: skip
        for _, batch in zip(range(2), loader):
            ids = [of_trainer.of_encoder(batch)[0], of_trainer.of_momentum(batch)]
            for i, position in enumerate(batch.positions.tolist()):
                face = shown[position - 18 * 8]
                assert face["key"] == batch.keys[i]
                assert np.array_equal(face["image"], batch.images[i].numpy())
                for kept, seen in zip(ids, (face["encoder"], face["momentum"])):
                    visible = np.ones(16, bool) if kept is None else np.isin(np.arange(16), kept[i].numpy())
                    patches = seen.reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
                    wanted = face["image"].reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
                    assert np.array_equal(patches[visible], wanted[visible])
                    assert (patches[~visible] == 190).all()
        loader.close()


def test_flips_and_places_are_true(tmp_path, folder):
    recipe = write(tmp_path, folder)
    manifest, flipped = load_manifest(folder), 0
    names = [shard.name for shard in manifest.shards]
    for step in (1, 5):
        for face in inspect.faces(recipe, step, 0, 8):
            index = manifest.index(names.index(face["shard"]))
            assert index["key"][face["row"]].decode() == face["key"]
            with Image.open(io.BytesIO(tiny.jpeg(int(face["key"])))) as image:
                plain = np.asarray(image).astype(int)
            distances = [np.abs(face["image"].astype(int) - p).max() for p in (plain, plain[:, ::-1])]
            assert distances[face["flipped"]] <= 3 < distances[not face["flipped"]]
            flipped += face["flipped"]
    assert 0 < flipped < 16


def test_any_stretch_of_a_step_can_be_shown(tmp_path, folder):
    recipe = write(tmp_path, folder, batch=24, data__streams=4)
    whole = inspect.faces(recipe, 2, 0, 24)
    for first, count in ((0, 1), (5, 9), (23, 1), (7, 17)):
        part = inspect.faces(recipe, 2, first, count)
        assert [face["key"] for face in part] == [face["key"] for face in whole[first : first + count]]


def test_the_command_writes_a_picture_and_a_line_for_each_face(tmp_path, folder, capsys):
    write(tmp_path, folder)
    out = tmp_path / "step.png"
    assert main([f"recipe={tmp_path / 'recipe.yaml'}", "step=3", f"out={out}", "count=5", "first=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["18", "19", "20", "21", "22"]
    with Image.open(out) as image:
        assert image.size[0] == 6 * 132 - 4


def test_a_bad_sample_is_told(tmp_path, capsys):
    tiny.shards(tmp_path / "data", bad={7: b"\xff\xd8\xff broken"})
    recipe = write(tmp_path, tmp_path / "data", data__max_bad=0.5)
    found = [face for step in range(1, 16) for face in inspect.faces(recipe, step, 0, 8) if face["key"] == "000007"]
    assert len(found) == 1 and "no JPEG header" in found[0]["reason"] and found[0]["substitute"] == "000008"


def test_a_folder_is_told_in_figures_and_shown(tmp_path, folder, capsys):
    out = tmp_path / "sheet.png"
    assert main([f"data={folder}", f"out={out}", "count=30"]) == 0
    said = capsys.readouterr().out
    assert "120 samples in 3 shards" in said and load_manifest(folder).fingerprint in said
    with Image.open(out) as image:
        assert image.size == (12 * 132 - 4, 3 * 132 - 4)
    chosen = inspect.some(load_manifest(folder), 30, 0)
    assert len({key for key, _ in chosen}) == 30
    assert all(content == tiny.jpeg(int(key)) for key, content in chosen)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "data is missing"),
        (["data=nowhere"], "error: data=nowhere: no such folder"),
        (["recipe=demo"], "step is missing"),
        (["recipe=R", "step=0"], "expected a whole number > 0"),
        (["recipe=R", "step=1", "first=8"], "a step has 8 samples"),
        (["recipe=R", "step=1", "out=nowhere/x.png"], "cannot be written"),
        (["data=D", "out=x.unknown"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(tmp_path, folder, argv, words, capsys):
    write(tmp_path, folder)
    argv = [a.replace("=R", f"={tmp_path / 'recipe.yaml'}").replace("=D", f"={folder}") for a in argv]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
