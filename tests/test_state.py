"""What makes two launches one run: recipe, data and teacher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

import mcf
from mcf import state
from mcf.config import Recipe
from mcf.errors import UserError


def recipe(**overrides) -> Recipe:
    return Recipe.model_validate(tiny.recipe(Path("runs/r"), Path("data"), **overrides))


def saved(folder: Path, run: Recipe) -> Path:
    engine = {"model.w": torch.arange(6.0).view(2, 3), "exp_avg.w": torch.ones(2, 3), "applied_steps": torch.tensor(7)}
    state.write(folder, run, state.Progress(step=7, data="abc", teacher="t"), engine, {"w": torch.zeros(3)})
    return folder


def test_what_is_written_is_read(tmp_path):
    engine, momentum = state.read(saved(tmp_path, recipe()))
    assert set(engine) == {"model.w", "exp_avg.w", "applied_steps"}
    assert torch.equal(engine["model.w"], torch.arange(6.0).view(2, 3))
    assert engine["applied_steps"].item() == 7
    assert torch.equal(momentum["w"], torch.zeros(3))
    assert state.read_progress(tmp_path)[0].step == 7


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    saved(tmp_path, recipe())
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_checkpoint_of_fine_tuning_is_no_run_to_go_on_with(tmp_path):
    (saved(tmp_path, recipe()) / state.RUN).write_text('{"format": 1, "progress": {"step": 3}, "finetune": {}}')
    for look in (lambda: state.check_same_run(tmp_path, recipe(), "abc"), lambda: state.saved_precision(tmp_path)):
        with pytest.raises(UserError, match="a checkpoint of fine-tuning, not of pre-training; give another name="):
            look()


# Where a run is, how fast, and what is told of it: by hand, so that a key which becomes free is a decision here too.
FREE = (
    "output", "nodes", "gpus_per_node", "machine", "micro_batch", "kernels", "attention", "teacher.path", "start.path",
    "data.path", "data.samples", "data.stage", "data.stage_gb", "data.decoder", "data.threads", "data.prefetch", "data.max_bad",
    "train.stop_after", "train.zero_stage", "train.threads", "train.log_every",
    "speed.compile", "speed.recompute", "speed.keep_memory", "speed.linear",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every",
    "guard.max_bad_steps", "guard.collapse_std", "watchdog.timeout", "watchdog.slow_timeout",
    "track.mlflow", "track.experiment", "track.images_every", "track.images", "track.queue",
)  # fmt: skip
FREE_SECTIONS = ("probe.", "slurm.")


def keys(values: dict, prefix: str = "") -> list[str]:
    """The dotted keys of a recipe as plain values."""
    deeper = [
        keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
        for key, value in values.items()
    ]
    return [key for found in deeper for key in found]


def test_every_key_of_the_schema_but_those_named_here_makes_another_run(tmp_path):
    """Each in turn has another value in the checkpoint than in the recipe: one that no run ever has."""
    run = saved(tmp_path, recipe()) / state.RUN
    genuine = run.read_text()
    every = keys(json.loads(genuine)["recipe"])
    assert set(FREE) < set(every)
    assert all(any(key.startswith(section) for key in every) for section in FREE_SECTIONS)
    accepted = []
    for key in every:
        content = json.loads(genuine)
        section = content["recipe"]
        *path, last = key.split(".")
        for name in path:
            section = section[name]
        section[last] = "another"
        run.write_text(json.dumps(content))
        try:
            state.check_same_run(tmp_path, recipe(), "abc")
            accepted.append(key)
        except UserError as error:
            assert f"{key}=" in str(error)
            assert "(was another)" in str(error)
    assert set(accepted) == {key for key in every if key in FREE or key.startswith(FREE_SECTIONS)}


def test_a_checkpoint_of_another_format_is_refused_and_says_so(tmp_path):
    run = saved(tmp_path, recipe()) / state.RUN
    run.write_text(json.dumps(json.loads(run.read_text()) | {"format": 2}))
    for look in (lambda: state.check_same_run(tmp_path, recipe(), "abc"), lambda: state.saved_precision(tmp_path)):
        with pytest.raises(UserError, match=r"run\.json: format 2, this version reads 1; .*another name="):
            look()


def test_a_checkpoint_says_what_computed_it(tmp_path):
    progress, _ = state.read_progress(saved(tmp_path, recipe()))
    assert progress.versions == {
        "mcf": mcf.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"gpus_per_node": 2, "micro_batch": 2},
        {"train__zero_stage": 3, "train__stop_after": 3, "machine": "h200"},
        {"data__path": "elsewhere", "data__prefetch": 7, "data__stage": "/local", "data__stage_gb": 9},
        {"start__path": "moved.safetensors"},
        {"checkpoint__every": 1, "checkpoint__keep": 9, "guard__max_bad_steps": 1, "track__mlflow": "http://x"},
    ],
)
def test_where_and_how_fast_a_run_is_may_change(tmp_path, change):
    assert state.check_same_run(saved(tmp_path, recipe()), recipe(**change), "abc").step == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "seed=4 (was 3)"),
        ({"batch": 16}, "batch=16 (was 8)"),
        ({"model__decoder__depth": 2}, "model.decoder.depth=2 (was 1)"),
        ({"train__steps": 21}, "train.steps=21 (was 20)"),
        ({"data__window": 9, "mask__ratio": 0.5}, "data.window=9 (was 8), mask.ratio=0.5 (was 0.75)"),
    ],
)
def test_what_would_be_another_run_is_refused_and_named(tmp_path, change, said):
    with pytest.raises(UserError) as caught:
        state.check_same_run(saved(tmp_path, recipe()), recipe(**change), "abc")
    assert said in str(caught.value)
    assert "another name" in str(caught.value)


def test_a_key_that_came_later_had_its_default(tmp_path):
    """Who updates mcf goes on with the run that is there, so long as the new key does not change it."""
    run = saved(tmp_path, recipe()) / state.RUN
    content = json.loads(run.read_text())
    del content["recipe"]["teacher"]["products"], content["recipe"]["speed"]
    run.write_text(json.dumps(content))
    assert state.check_same_run(tmp_path, recipe(), "abc").step == 7
    with pytest.raises(UserError, match=r"teacher\.products=float8 \(was bfloat16\)"):
        state.check_same_run(tmp_path, recipe(teacher__products="float8"), "abc")


def test_other_data_and_another_teacher_are_refused(tmp_path):
    folder = saved(tmp_path, recipe())
    with pytest.raises(UserError, match=r"other data \(fingerprint abc, .* has xyz\)"):
        state.check_same_run(folder, recipe(), "xyz")
    progress = state.check_same_run(folder, recipe(), "abc")
    state.check_same_teacher(progress, "t", recipe())
    with pytest.raises(UserError, match=r"other weights than the run began with \(fingerprint u, was t\)"):
        state.check_same_teacher(progress, "u", recipe())


def test_a_fingerprint_sees_every_bit_and_name():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = state.fingerprint(module)
    assert before == state.fingerprint(module)
    assert len(before) == 16
    with torch.no_grad():
        module[0].bias[1] = torch.nextafter(module[0].bias[1], torch.tensor(9.0))
    changed = state.fingerprint(module)
    assert changed != before
    module[1].num_batches_tracked += 1
    assert state.fingerprint(module) not in (before, changed)
    assert state.fingerprint(None) == ""
