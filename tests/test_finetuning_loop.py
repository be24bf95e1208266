"""The fine-tuning loop of one rank: rates, averages, steps that are refused, saves that fail, and what may go on from what."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from power import Disk

from mcf import checkpoint, cli, distributed, finetune
from mcf.downstream import saved, state
from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import Face
from mcf.downstream.datasets.splits import chosen_faces
from mcf.downstream.scores import choose
from mcf.engine import Engine
from mcf.errors import UserError
from mcf.exits import INTERRUPTED, SAVED
from mcf.finetuning import METRICS, Finetuning
from mcf.models.vit import VisionTransformer
from mcf.track.jsonl import read
from mcf.weights import files

sys.path.append(str(Path(__file__).parent / "downstream"))
import trees

GOES_ON = SimpleNamespace(received=False, for_good=False)
OUT = "decoder.head.out.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Eight faces to train on and four to test, and a small encoder."""
    root = tmp_path_factory.mktemp("loop")
    trees.table(root / "points", train=8, test=4)
    torch.manual_seed(123)
    vit = VisionTransformer(image_size=32, patch_size=8, width=16, depth=4, heads=2)
    files.write(root / "encoder.safetensors", vit.state_dict(), {"heads": "2"})
    return root


def config(places: Path, output: Path, **changes) -> FinetuneConfig:
    """Two steps an epoch, three epochs."""
    values = {
        "task": "alignment", "dataset": "csv", "data": str(places / "points"), "output": str(output), "name": "run",
        "weights": str(places / "encoder.safetensors"), "batch": 4, "micro_batch": 4, "warp_size": 48, "input_size": 32,
        "head": {"channels": 8, "pools": (1, 2)}, "heatmap": {"size": 16, "radius": 3.0}, "ema": 0.5, "pictures": 0,
        "evaluate_every": 100, "train": {"epochs": 3, "log_every": 1, "threads": 1, "readers": 1}, "track": {"mlflow": "off"},
    }  # fmt: skip
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return FinetuneConfig.model_validate(values)


@pytest.fixture
def start(places, tmp_path, world) -> Callable[..., Finetuning]:
    """Makes a run of RUN = tmp_path/run, brought to where it stands."""
    return lambda **changes: Finetuning(config(places, tmp_path, **changes), tmp_path / "run", world)


def events(run_dir: Path, kind: str) -> list[dict]:
    return [event for event in read(run_dir / "events.jsonl") if event["kind"] == kind]


def spoil(monkeypatch, run: Finetuning, *steps: int) -> list[list[str]]:
    """Make the loss of some steps infinite, its gradient as finite as before; returns the faces of every step."""
    terms, faces = run.task.terms, []

    def spoilt(logits, batch):
        faces.append([prepared.face.name for prepared in batch.faces])
        found = terms(logits, batch)
        return {**found, "total": found["total"] + math.inf} if len(faces) in steps else found

    monkeypatch.setattr(run.task, "terms", spoilt)
    return faces


def test_all_rates_drop_at_their_epoch(start, tmp_path, monkeypatch):
    applied, step = [], Engine.step

    def noted(self, *arguments, **named):
        result = step(self, *arguments, **named)
        applied.append([group["lr"] for group in self._deepspeed.optimizer.param_groups])
        return result

    monkeypatch.setattr(Engine, "step", noted)
    start(optimizer={"lr": 0.02, "backbone_lr": 1e-3, "drop_epoch": 2, "drop": 0.25}).run(GOES_ON)
    assert [lr for rates in applied for lr in rates] == pytest.approx([0.02, 1e-3] * 4 + [0.005, 2.5e-4] * 2)
    told = [record["lr"] for record in read(tmp_path / "run/metrics.jsonl") if "lr" in record]
    assert told == pytest.approx([0.02] * 4 + [0.005] * 2)


def test_weight_decay_is_decoupled_and_of_all_parameters(start, tmp_path):
    """One AdamW step with decay λ and one without it differ by lr·λ·w, backbone and biases included."""
    ended = []
    for decay in (0.0, 5.0):
        run = start(name=f"decay-{decay}", optimizer={"lr": 0.02, "backbone_lr": 1e-3, "weight_decay": decay})
        begun = {name: value.detach().clone() for name, value in run.engine.module.named_parameters()}
        next(iter(steps_of(run)))
        ended.append({name: value.detach().clone() for name, value in run.engine.module.named_parameters()})
    for name, value in begun.items():
        lr = 1e-3 if name.startswith("backbone.") else 0.02
        torch.testing.assert_close(ended[0][name] - ended[1][name], lr * 5.0 * value, rtol=1e-3, atol=1e-6)


def test_a_refused_step_moves_nothing_and_is_written_down(start, tmp_path, monkeypatch):
    run = start(train={"stop_after": 2})
    faces = spoil(monkeypatch, run, 2)
    begun = run.average.module.state_dict()[OUT].clone()
    run.run(GOES_ON)
    # One step was applied, so the average has moved half of the way once.
    weights = run.engine.module.state_dict()[OUT]
    assert not torch.equal(weights, begun)
    torch.testing.assert_close(run.average.module.state_dict()[OUT], (begun + weights) / 2)
    assert [r["bad/steps"] for r in read(tmp_path / "run/metrics.jsonl")] == [0, 1]
    assert [event["step"] for event in events(tmp_path / "run", "bad_step")] == [2]
    (written,) = (tmp_path / "run/bad_steps").iterdir()
    assert json.loads(written.read_text())["keys"] == faces[1]
    # It is known to whoever goes on.
    assert start().progress.bad_steps == 1


def test_too_many_refused_steps_in_a_row_end_the_run(start, monkeypatch):
    run = start(guard={"max_bad_steps": 2})
    spoil(monkeypatch, run, 1, 3, 4)
    with pytest.raises(UserError, match="step 4: 2 non-finite steps in a row"):
        run.run(GOES_ON)


def test_a_save_that_fails_ends_the_run_only_at_its_end(start, tmp_path):
    run = start(checkpoint={"every": 2})
    checkpoint.folder_of(tmp_path / "run").write_text("a file where the folder has to be")
    with pytest.raises(UserError, match=r"checkpoint not saved in .*, then start again"):
        run.run(GOES_ON)
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint_failed")] == [2, 4, 6]


def test_a_checkpoint_and_the_lines_up_to_it_outlive_a_power_loss(start, tmp_path, monkeypatch):
    lines = [tmp_path / "run" / name for name in ("metrics.jsonl", "events.jsonl")]
    disk = Disk(monkeypatch, *lines)
    start(checkpoint={"every": 3}).run(GOES_ON)
    assert [new for _, new in disk.renamed] == ["step-00000003", saved.FILE, "step-00000006", METRICS]


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_weights_that_cannot_be_written_at_an_evaluation_are_told_and_the_run_goes_on(start, tmp_path, validation):
    keys = {"evaluate_every": 1, "validation": validation, "batch": 2, "micro_batch": 2}
    per_epoch = 4 if not validation else 2
    model = tmp_path / "run" / saved.FILE
    model.mkdir(parents=True)
    assert not start(**keys, train={"stop_after": per_epoch}).run(GOES_ON)
    (event,) = events(tmp_path / "run", "model_failed")
    assert event["step"] == per_epoch and f"{model}: is a directory" in event["message"]
    model.rmdir()
    assert start(**keys).run(GOES_ON)
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [entry["epoch"] for entry in results["history"]] == [1, 2, 3]
    # What is told is what is there: not the first epoch, however good it was.
    assert [entry["validation"] is None for entry in results["history"]] == [True, *[not validation] * 2]
    assert results["selected"]["epoch"] == saved.load(str(tmp_path / "run"))[1].epoch > 1


def test_weights_that_cannot_be_written_at_the_last_evaluation_are_the_outcome(start, tmp_path, world, monkeypatch):
    (tmp_path / "run" / saved.FILE).mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a directory; .*, then start again"):
        start(evaluate_every=2).run(GOES_ON)
    assert [event["step"] for event in events(tmp_path / "run", "model_failed")] == [4, 6]
    # Another rank, which writes nothing, hears of it.
    run = start()
    run.world, run.progress.step = replace(world, rank=1), run.steps
    monkeypatch.setattr(distributed, "broadcast", lambda _: "rank 0's disk is full")
    with pytest.raises(UserError, match="rank 0's disk is full, then start again"):
        run.keep(None, run.network(), 3)


def test_metrics_that_cannot_be_written_are_the_outcome_and_trained_for_no_more(start, tmp_path, monkeypatch):
    (tmp_path / "run" / METRICS).mkdir(parents=True)
    with pytest.raises(
        UserError, match=rf"{METRICS}: cannot be written \(Is a directory\); .* nothing is trained anew"
    ):
        start().run(GOES_ON)
    assert sorted(path.name for path in (tmp_path / "run").glob("metrics*")) == [METRICS, "metrics.jsonl"]
    (tmp_path / "run" / METRICS).rmdir()
    run = start()
    monkeypatch.setattr(run, "step", lambda *_: pytest.fail("there is nothing to train"))
    assert run.run(GOES_ON)
    assert json.loads((tmp_path / "run" / METRICS).read_text())["selected"]["epoch"] == 3


def test_an_epoch_without_a_number_of_held_out_faces_is_not_selected():
    history = [
        {"epoch": epoch, "test": {"nme": test}, "validation": held}
        for epoch, test, held in ((1, 1.0, None), (2, 5.0, 7.0), (3, 4.0, 6.0), (4, 2.0, None), (5, 3.0, 6.5))
    ]
    chosen = choose(history, "nme", "lower", True)
    assert (chosen["selected"]["epoch"], chosen["best_on_test"]["epoch"]) == (3, 1)


def test_fewer_labels_are_spread_over_the_split(places, tmp_path):
    faces = [Face(f"{i}.jpg", None) for i in range(10)]
    train, held = chosen_faces(faces, config(places, tmp_path, labels=3))
    assert ([face.name for face in train], held) == (["0.jpg", "4.jpg", "9.jpg"], [])
    assert chosen_faces(faces, config(places, tmp_path, labels=11))[0] == faces


def test_what_dropout_draws_is_of_the_seed_the_step_and_the_rank():
    drawn = set()
    with torch.random.fork_rng(devices=[]):
        for seed, step, rank in np.ndindex(2, 2, 2):
            run = Finetuning.__new__(Finetuning)
            run.config, run.progress = SimpleNamespace(seed=seed), SimpleNamespace(step=step)
            run.world, run.accumulation = SimpleNamespace(rank=rank), 0
            run.engine = SimpleNamespace(module=torch.nn.Dropout())
            for _ in range(2):
                run.step(iter(()))
                drawn.add(tuple(torch.rand(4).tolist()))
    assert len(drawn) == 8


@pytest.mark.parametrize(
    ("number", "launched", "status"),
    [
        (signal.SIGINT, False, INTERRUPTED),
        (signal.SIGINT, True, 0),
        (signal.SIGTERM, False, SAVED),
        (signal.SIGTERM, True, SAVED),
        (signal.SIGUSR2, True, SAVED),
    ],
)
def test_only_a_system_that_wants_its_machine_back_has_the_run_started_again(
    places, tmp_path, world, monkeypatch, number, launched, status
):
    """After ctrl-C it is saved, too, and stays ended."""
    keys = config(places, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / finetune.CONFIG).write_text(cli.dump(keys))
    # What else a run does to its process, this one is not to keep.
    monkeypatch.setattr("mcf.linear._onednn", False)
    monkeypatch.setattr("mcf.memory.keep_freed_memory", lambda: True)
    monkeypatch.setattr(distributed, "leave", lambda: None)
    advance = Finetuning.advance

    def signalled(self, *arguments, **named):
        signal.raise_signal(number)
        return advance(self, *arguments, **named)

    monkeypatch.setattr(Finetuning, "advance", signalled)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        assert finetune.work(keys, tmp_path / "run", launched=launched) == status
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9}, {"validation": 0.2}, {"labels": 5}, {"seed": 1}, {"batch": 8}, {"freeze": True}, {"random": True},
        {"dataset": "300w"}, {"evaluate_every": 2}, {"head": {"channels": 16}}, {"optimizer": {"drop": 0.5}},
        {"train": {"epochs": 7}}, {"train": {"precision": "bf16"}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_changes_the_numbers_is_another_run(places, tmp_path, changes):
    write_state(tmp_path, config(places, tmp_path))
    with pytest.raises(UserError, match=rf"checkpoint of another run: {next(iter(changes))}[.\w]*=.*\(was "):
        state.check_same_run(tmp_path, config(places, tmp_path, **changes), "faces")


def test_how_it_is_run_may_change(places, tmp_path):
    write_state(tmp_path, config(places, tmp_path))
    changes = {"micro_batch": 2, "pictures": 3, "data": "moved", "train": {"log_every": 5}, "checkpoint": {"every": 7}}
    assert state.check_same_run(tmp_path, config(places, tmp_path, **changes), "faces").step == 12


def test_other_faces_or_labels_are_another_run(places, tmp_path):
    write_state(tmp_path, config(places, tmp_path))
    with pytest.raises(UserError, match="checkpoint of a run on other faces or labels; give the old data="):
        state.check_same_run(tmp_path, config(places, tmp_path), "other faces")


def write_state(folder: Path, keys: FinetuneConfig) -> None:
    """A checkpoint's files, without its tensors."""
    state.write(folder, keys, state.Progress(step=12, data="faces"), {}, {})


def steps_of(run: Finetuning):
    """The steps of a run without what is told of them."""
    from mcf.downstream.loader import Loader

    with Loader(run.set, run.config, run.world.device, 1) as loader:
        batches = loader.training(run.train, 0, 0, 1, run.local_batch)
        while True:
            yield run.advance(batches, SimpleNamespace(event=lambda *_, **__: None), GOES_ON, first=False)
