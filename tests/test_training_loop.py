"""The training loop on one rank, in this process: what it tells of each step, and how it ends."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from power import Disk

from mcf import checkpoint, state
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.step import Step
from mcf.track import Tracker
from mcf.track.images import reconstruction_grid
from mcf.track.jsonl import read
from mcf.train import Training, train

ON = SimpleNamespace(received=False, for_good=False)  # nobody wants the run to stop


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    tiny.shards(folder)
    return folder


@pytest.fixture
def made(world, data, tmp_path):
    """`made(steps, **overrides)`: a run of so many steps (15 an epoch), as far as it is, ready to go on."""

    def make(steps: int, **overrides) -> Training:
        overrides = {"optimizer__warmup_epochs": 0.0, "checkpoint__every": 100} | overrides
        values = tiny.recipe(tmp_path / "run", data, train__steps=steps, **overrides)
        training = Training(Recipe.model_validate(values), tmp_path / "run", world)
        loaders.append(training.loader)
        return training

    loaders: list = []
    yield make
    for loader in loaders:
        loader.close()


def test_records_tell_the_rate_and_momentum_that_their_step_was_taken_with(made, caplog):
    training = made(5, optimizer__warmup_epochs=0.2, momentum__schedule="cosine", train__log_every=2)
    rates, momenta = [], []
    step, update = training.step.engine.step, training.step.momentum.update
    training.step.engine.step = lambda lr, **rest: rates.append(lr) or step(lr, **rest)
    training.step.momentum.update = lambda parameters, m: momenta.append(m) or update(parameters, m)
    assert training.run(ON)

    # 3 steps of warm-up, then the half of a cosine over 2; the momentum moves before each of two micro-batches.
    peak = 0.02 * 8 / 256
    lr = [0, peak / 3, peak * 2 / 3, peak, peak / 2]
    m = [1 - 0.01 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
    assert rates == pytest.approx(lr, rel=1e-12)
    assert momenta == pytest.approx([each for each in m for _ in range(2)], rel=1e-12)
    records = list(read(training.run_dir / "metrics.jsonl"))
    # Every second step, and the last one, which no interval reaches.
    assert [record["step"] for record in records] == [2, 4, 5]
    assert [record["lr"] for record in records] == pytest.approx([lr[1], lr[3], lr[4]], rel=1e-12)
    assert [record["momentum"] for record in records] == pytest.approx([m[1], m[3], m[4]], rel=1e-12)


@pytest.mark.parametrize(("share", "warned"), [(0.99, True), (0.01, False)])
def test_queries_that_are_nearer_than_the_guard_allows_are_told(made, capsys, share, warned):
    """Four queries of random weights lie closer than an even spread, and much wider than a hundredth of it."""
    training = made(1, guard__collapse_std=share)
    assert training.run(ON)
    told = [event["step"] for event in read(training.run_dir / "events.jsonl") if event["kind"] == "warning"]
    assert told == ([1] if warned else [])
    assert ("the queries are collapsing" in capsys.readouterr().out) == warned


def test_the_last_step_leaves_a_picture_of_as_many_faces_as_asked(made, monkeypatch):
    training = made(4, track__images_every=3, track__images=2)
    outcomes = []
    genuine = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *given: outcomes.append(genuine(*given)) or outcomes[-1])
    assert training.run(ON)
    pictures = sorted((training.run_dir / "images").iterdir())
    assert [picture.name for picture in pictures] == [f"step-00000{step}-reconstruction.png" for step in (3, 4)]
    for picture, step in zip(pictures, (3, 4)):
        faces = [part[:2].numpy() for part in outcomes[step - 1].picture]
        assert (reconstruction_grid(*faces, patch_size=8) == Image.open(picture)).all()


def test_a_checkpoint_and_the_lines_up_to_it_outlive_a_power_loss(made, tmp_path, monkeypatch):
    disk = Disk(monkeypatch, *(tmp_path / "run" / name for name in ("metrics.jsonl", "events.jsonl")))
    assert made(3, checkpoint__every=2).run(ON)
    assert [new for _, new in disk.renamed] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("steps", "for_good", "done", "again"), [(1, False, True, False), (2, False, False, True), (2, True, False, False)]
)
def test_only_a_run_that_is_not_done_and_not_ended_for_good_wants_to_go_on(made, steps, for_good, done, again):
    """Told to stop in its first step, which may be the last one."""
    training = made(steps)
    assert training.run(SimpleNamespace(received=True, for_good=for_good)) == done
    assert (training.progress.step, training.interrupted) == (1, again)


def test_the_tracker_hears_where_the_run_stands_and_how_it_ended(made, monkeypatch):
    """Of a run that is told to stop after its first step, and goes on under the MLflow run that it was given."""
    told = []

    class Told(Tracker):
        run_id = "0badcafe"

        def __init__(self, *given, **named):
            told.append([named["run_id"], named["start"]])
            super().__init__(*given, **named)

        def close(self, status="finished"):
            told[-1].append(status)
            super().close(status)

    monkeypatch.setattr("mcf.train.Tracker", Told)
    stopped = made(2)
    assert not stopped.run(SimpleNamespace(received=True, for_good=False))
    progress, _ = state.read_progress(checkpoint.latest(stopped.run_dir))
    assert (progress.step, progress.mlflow_run) == (1, "0badcafe")
    assert made(2).run(ON)
    # Leaving the tracker closes it once more, which does nothing.
    assert [each[:3] for each in told] == [[None, 0, "stopped"], ["0badcafe", 1, "finished"]]


@pytest.mark.parametrize(("step", "error"), [(1, UserError), (2, torch.OutOfMemoryError)])
def test_a_full_memory_is_the_users_to_mend_in_the_first_step_alone(made, monkeypatch, step, error):
    training, genuine = made(3), Step.__call__

    def fills(self, number, *rest):
        if number == step - 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return genuine(self, number, *rest)

    monkeypatch.setattr(Step, "__call__", fills)
    with pytest.raises(error):
        training.run(ON)


def test_the_ranks_of_a_machine_share_what_staging_may_take(data, tmp_path, world):
    values = tiny.recipe(tmp_path / "run", data, data__stage=str(tmp_path / "stage"), data__stage_gb=1.0)
    loader = Training(Recipe.model_validate(values), tmp_path / "run", dataclasses.replace(world, local_size=4)).loader
    stage = loader.stage()
    stage.close()
    loader.close()
    assert stage.budget == 250_000_000


def test_torch_computes_on_the_threads_that_the_recipe_says(world, data, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def looks(*_):
        raise Seen(torch.get_num_threads())

    monkeypatch.setattr("mcf.train.Training", looks)
    # As many as no rank would take by itself.
    threads = world.cores + 3
    values = tiny.recipe(
        tmp_path / "run", data, train__threads=threads, speed__keep_memory=False, speed__linear="torch"
    )
    try:
        with pytest.raises(Seen, match=rf"^{threads}$"):
            train(
                Recipe.model_validate(values), tmp_path / "run", world, ON, SimpleNamespace(mark=None), launched=False
            )
    finally:
        torch.set_num_threads(1)
