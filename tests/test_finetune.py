"""mcf.finetune and mcf.predict through the real parts, on small trees: results, restarts, ranks, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mcf import checkpoint, finetune, predict
from mcf.downstream import saved
from mcf.downstream.config import FinetuneConfig
from mcf.downstream.pictures import TILE
from mcf.exits import RANK_LOST, SAVED
from mcf.models.vit import VisionTransformer
from mcf.track.jsonl import read
from mcf.weights import files

sys.path.append(str(Path(__file__).parent / "downstream"))
import trees

SMALL = [
    "batch=4", "micro_batch=4", "warp_size=48", "input_size=32", "head.channels=8", "head.pools=[1,2]", "heatmap.size=16",
    "heatmap.radius=3", "ema=0.5", "track.mlflow=off", "train.epochs=3", "train.log_every=1", "train.threads=1",
    "train.readers=1", "pictures=2", "evaluate_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Data of both tasks and a small encoder, in one folder."""
    root = tmp_path_factory.mktemp("finetune")
    trees.table(root / "points", train=8, test=4)
    trees.masks(root / "masks", train=8, test=3, classes=5)
    (root / "masks/classes.txt").write_text("background\nskin\nnose\nhair\nhat\n")
    torch.manual_seed(123)
    vit = VisionTransformer(image_size=32, patch_size=8, width=16, depth=4, heads=2)
    files.write(root / "encoder.safetensors", vit.state_dict(), {"heads": "2"})
    return root


@pytest.fixture
def run(places, tmp_path, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs mcf.finetune in this process: (status, stdout, stderr)."""
    # What else a run tells its process, this one is not to keep.
    monkeypatch.setattr("mcf.linear._onednn", False)
    monkeypatch.setattr("mcf.memory.keep_freed_memory", lambda: True)

    def start(task: str, *keys: str, name: str = "run") -> tuple[int, str, str]:
        data = {"alignment": ("csv", "points"), "parsing": ("masks", "masks")}[task]
        given = {key.partition("=")[0] for key in keys}
        base = [
            f"task={task}", f"dataset={data[0]}", f"data={places / data[1]}", f"weights={places / 'encoder.safetensors'}",
            f"output={tmp_path}", f"name={name}", *SMALL,
        ]  # fmt: skip
        status = finetune.main([*(key for key in base if key.partition("=")[0] not in given), *keys])
        return status, *capsys.readouterr()

    return start


def numbers(run_dir: Path) -> list[dict]:
    """Metrics without clocks."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("time", "rate/"))}
        for record in read(run_dir / "metrics.jsonl")
    ]


def test_alignment_ends_with_a_table_metrics_pictures_and_a_model(run, places, tmp_path):
    status, out, err = run("alignment")
    assert status == 0, err
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (results["headline"], results["selected"]["epoch"], results["selected"]["by"]) == (
        "nme_inter_ocular", 3, "last epoch",
    )  # fmt: skip
    tests = [entry["test"]["nme_inter_ocular"] for entry in results["history"]]
    assert len(tests) == 3
    assert results["best_on_test"]["nme_inter_ocular"] == min(tests)
    assert results["best_on_test"]["epoch"] == 1 + tests.index(min(tests))
    assert "selected" in out and "best_on_test" in out and f"{tests[-1]:.3f}" in out
    pictures = {path.name.split("-", 2)[2] for path in (tmp_path / "run/images").iterdir()}
    assert pictures == {"ced.png", "test-best.png", "test-spread.png", "test-worst.png"}
    # The model's file alone, on the test images alone, gives what was reported.
    network, description = saved.load(str(tmp_path / "run"), "alignment")
    assert (description.epoch, description.outputs, description.heads) == (3, 68, 2)
    from mcf.downstream.datasets import open_faces
    from mcf.downstream.inference import Predictor

    errors = []
    for face in open_faces("alignment", "csv", places / "points").test:
        _, points = Predictor(network, description)(face.image, face.box)
        apart = np.linalg.norm(face.points[36] - face.points[45])
        errors.append(np.linalg.norm(points - face.points, axis=1).mean() / apart)
    assert 100 * np.mean(errors) == pytest.approx(tests[-1], rel=1e-4)


def test_parsing_ends_with_a_table_metrics_and_pictures(run, tmp_path, monkeypatch):
    # A busy machine may take long to make MLflow's database.
    monkeypatch.setattr("mcf.track.mlflow.sink.PATIENCE", 200.0)
    status, out, err = run("parsing", "evaluate_every=2", "track.mlflow=local")
    assert status == 0, err
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [entry["epoch"] for entry in results["history"]] == [2, 3]  # every second epoch, and the last
    assert results["better"] == "higher"
    classes = [results["selected"][f"f1/{c}"] for c in ("skin", "nose", "hair", "hat")]
    assert results["selected"]["f1_mean"] == pytest.approx(np.mean(classes))
    assert "f1/hat" in out
    assert len(list((tmp_path / "run/images").glob("*-classes.png"))) == 1
    records = numbers(tmp_path / "run")
    assert [r["epoch"] for r in records if "epoch" in r] == [2, 3]
    losses = [r["loss/total"] for r in records if "loss/total" in r]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (followed,) = client.search_runs([client.get_experiment_by_name("mcf-downstream").experiment_id])
    assert followed.info.status == "FINISHED"
    assert followed.data.params["head.channels"] == "8"
    assert "Face parsing on masks" in followed.data.tags["mlflow.note.content"]
    told = [metric.value for metric in client.get_metric_history(followed.info.run_id, "test/f1_mean")]
    assert told == pytest.approx([entry["test"]["f1_mean"] for entry in results["history"]])
    assert len(client.list_artifacts(followed.info.run_id, "images")) == 4


def test_a_run_in_pieces_is_the_unbroken_run(run, tmp_path):
    """Bitwise, dropout included, wherever it stops: in the middle of an epoch here."""
    keys = ("labels=8", "validation=0.0", "evaluate_every=1")
    assert run("alignment", *keys, name="whole")[0] == 0
    for _ in range(3):
        assert run("alignment", *keys, "train.stop_after=3", name="pieces")[0] == 0
    kinds = [event["kind"] for event in read(tmp_path / "pieces/events.jsonl")]
    assert (kinds.count("resumed"), kinds[-1]) == (2, "finished")
    assert numbers(tmp_path / "pieces") == numbers(tmp_path / "whole")
    assert json.loads((tmp_path / "pieces/metrics.json").read_text()) == json.loads(
        (tmp_path / "whole/metrics.json").read_text()
    )
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("pieces", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_epoch_is_chosen_on_held_out_people(run, tmp_path):
    assert run("alignment", "validation=0.4", "batch=2", "micro_batch=2", "optimizer.lr=0.05")[0] == 0
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    held = [entry["validation"] for entry in results["history"]]
    assert results["selected"]["by"] == "held-out training faces"
    assert results["selected"]["epoch"] == 1 + held.index(min(held))
    assert saved.load(str(tmp_path / "run"))[1].epoch == results["selected"]["epoch"]


def test_a_frozen_backbone_stays_and_a_trained_one_moves_at_its_own_rate(run, places, tmp_path):
    before = load_file(places / "encoder.safetensors")
    one_step = ("train.epochs=1", "batch=8", "micro_batch=8", "ema=0", "optimizer.weight_decay=0")
    assert run("alignment", *one_step, "freeze=true", name="frozen")[0] == 0
    assert run("alignment", *one_step, name="tuned")[0] == 0
    frozen, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("frozen", "tuned"))
    moved = 0
    for name, value in before.items():
        key = f"backbone.vit.{name}"
        if key in frozen:
            assert torch.equal(frozen[key], value)
            # AdamW's first step is its rate in the direction of the sign, where the gradient is not next to nothing.
            assert (tuned[key] - value).abs().max() <= 1.01e-4
            moved += int((tuned[key] - value).abs().max() > 0.9e-4)
    assert moved > 20
    key = "decoder.head.out.weight"
    # The first gradient of the head is the same whether or not the backbone is trained as well.
    torch.testing.assert_close(frozen[key], tuned[key])
    config = json.loads((checkpoint.latest(tmp_path / "tuned") / "run.json").read_text())["finetune"]
    from mcf.downstream.network import build_decoder

    start = build_decoder(0, 16, 68, FinetuneConfig(**config).head).head.out.weight.detach()
    assert (tuned[key] - start).abs().max() == pytest.approx(1e-2, rel=0.01)


def test_the_baseline_of_random_weights_has_the_shape_and_nothing_else(run, places, tmp_path):
    assert run("alignment", "random=true", "freeze=true", "train.epochs=1")[0] == 0
    ours, theirs = load_file(tmp_path / "run/model.safetensors"), load_file(places / "encoder.safetensors")
    key = "blocks.0.attn.qkv.weight"
    assert ours[f"backbone.vit.{key}"].shape == theirs[key].shape
    assert not torch.equal(ours[f"backbone.vit.{key}"], theirs[key])


def test_sides_follow_the_encoder_s_own_images(run, tmp_path):
    """Twice its 32 pixels, and the protocol's 512 for 448 around them; a run goes on without naming them, and not with others."""
    keys = ("input_size=null", "warp_size=null")
    assert run("alignment", *keys, "train.stop_after=3")[0] == 0
    status, _, err = run("alignment", *keys[1:], "input_size=32")
    assert status == 2
    assert "checkpoint of another run: warp_size=37 (was 73), input_size=32 (was 64)" in err
    assert run("alignment", *keys)[0] == 0
    _, description = saved.load(str(tmp_path / "run"))
    assert (description.input_size, description.warp_size) == (64, 73)
    config = FinetuneConfig(task="alignment", dataset="csv", data="d", weights="w")
    assert config.sized(448).sides == (512, 448)
    assert config.model_copy(update={"warp_size": 96}).sized(64).sides == (96, 64)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["data=/nowhere"], "data=/nowhere: no such folder; dataset=csv expects"),
        (["dataset=lapa"], "it is a set of task=parsing"),
        (["weights=/nowhere.pth"], "weights=/nowhere.pth: no such file"),
        (["batch=12", "micro_batch=12"], "batch=12, but there are 8 faces to train on"),
        (["micro_batch=3"], "batch=4 cannot be cut into 1 ranks × micro-batches of 3"),
        (["micro_batch=1", "batch=1"], "BatchNorm"),
        (["input_size=36"], "input_size=36: patches of 8 pixels do not divide it"),
        (["taps=[0,1,2,4]"], "has blocks 0 to 3"),
        (["taps=[0,1]"], "expected four blocks"),
        (["heads=5"], "was trained with 2 heads"),
        (["task=alignmnet"], "did you mean alignment"),
        (["output=/dev/null"], "output=/dev/null: /dev/null/run cannot be made (Not a directory); set output="),
    ],
)
def test_mistakes_are_one_line(run, keys, said):
    status, _, err = run("alignment", *keys)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in err


def test_weights_that_do_not_fit(run, places, tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pth")
    assert "of no known kind" in run("alignment", f"weights={tmp_path / 'resnet.pth'}")[2]
    state = load_file(places / "encoder.safetensors")
    files.write(tmp_path / "unstated.safetensors", state, {})
    assert (
        "does not state its attention heads; set heads="
        in run("alignment", f"weights={tmp_path / 'unstated.safetensors'}")[2]
    )
    files.write(tmp_path / "other.safetensors", {**state, "blocks.0.ls1.gamma": torch.ones(16)}, {"heads": "2"})
    assert "another architecture" in run("alignment", f"weights={tmp_path / 'other.safetensors'}")[2]


def test_a_model_of_the_wrong_task_and_runs_that_do_not_go_on(run, places, tmp_path, capsys):
    assert run("alignment", "train.epochs=1", name="points")[0] == 0
    assert "is a fine-tuned model, not an encoder" in run("parsing", f"weights={tmp_path / 'points'}")[2]
    with pytest.raises(saved.UserError, match="a model of task=alignment, not of task=parsing"):
        saved.load(str(tmp_path / "points"), "parsing")
    said = run("alignment", "train.epochs=1", "optimizer.lr=0.5", name="points")[2]
    assert "checkpoint of another run: optimizer.lr=0.5 (was null)" in said
    assert "task=parsing (was alignment)" in run("parsing", "train.epochs=1", name="points")[2]
    other = load_file(places / "encoder.safetensors")
    files.write(tmp_path / "other.safetensors", {k: v + 1 for k, v in other.items()}, {"heads": "2"})
    said = run("alignment", "train.epochs=1", f"weights={tmp_path / 'other.safetensors'}", name="points")[2]
    assert "other weights than the run began with" in said
    assert predict.main([f"weights={places / 'encoder.safetensors'}", f"images={places / 'points/images'}"]) == 2
    assert "weights, but of no fine-tuned model" in capsys.readouterr().err


def test_its_process_is_told_to_be_fast(run, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("mcf.memory.keep_freed_memory", lambda: told.append("memory"))
    monkeypatch.setattr("mcf.linear.use", told.append)
    assert run("alignment", "train.epochs=1")[0] == 0
    # On a GPU there is no such memory.
    assert told == (["auto"] if torch.cuda.is_available() else ["auto", "memory"])


@pytest.mark.parametrize(
    ("keys", "remedy"), [((), "freeze=true"), (("freeze=true", "head.channels=8"), "head.channels below 8")]
)
def test_a_gpu_that_is_too_small_is_one_line(run, monkeypatch, keys, remedy):
    def step(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr("mcf.finetuning.Finetuning.step", step)
    status, _, err = run("alignment", *keys)
    assert status == 2 and "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert "micro_batch=4: " in line and line.endswith(f"use a smaller one, or {remedy}")


def test_a_mask_that_breaks_in_training_is_one_line(run, tmp_path):
    trees.masks(tmp_path / "data", train=4, test=2)
    trees.mask(tmp_path / "data/train/masks/2.png", np.full((48, 64), 77))
    status, _, err = run("parsing", f"data={tmp_path / 'data'}")
    assert status == 2
    assert "2.png: class 77, but classes are 0 to 18" in err
    assert "Traceback" not in err


# --- predict --------------------------------------------------------------------------------------------------------


def test_predict_draws_points_and_classes(run, places, tmp_path, capsys):
    assert run("alignment", "train.epochs=1", name="points")[0] == 0
    assert run("parsing", "train.epochs=1", name="classes")[0] == 0
    for name, pictures in (("points", places / "points/images"), ("classes", places / "masks/dev/images/1.jpg")):
        out = tmp_path / f"drawn-{name}"
        assert predict.main([f"weights={tmp_path / name}", f"images={pictures}", f"out={out}", "threads=1"]) == 0
        drawn = sorted(out.glob("*.jpg.png"))
        assert len(drawn) == (12 if name == "points" else 1)
        with Image.open(drawn[0]) as opened:
            assert opened.size == (64, 48)
        # Each picture and what was found in it, two of them in a row.
        with Image.open(out / "sheet.jpg") as opened:
            cells, rows_down = opened.width // (2 * TILE), opened.height // TILE
            assert (cells, rows_down) == ((2, 6) if name == "points" else (1, 1))
    rows = (tmp_path / "drawn-points/points.csv").read_text().splitlines()
    assert len(rows) == 13 and len(rows[1].split(",")) == 137
    with Image.open(tmp_path / "drawn-classes/1.jpg.classes.png") as opened:
        assert np.asarray(opened).max() < 5
    assert (tmp_path / "drawn-classes/classes.txt").read_text().split() == ["background", "skin", "nose", "hair", "hat"]

    boxes = tmp_path / "boxes.csv"
    boxes.write_text("file,left,top,right,bottom\n1.jpg,10,5,40,nan\n")
    for text, said in [
        ("1.jpg,10,5,40,nan", "'nan', not a number"), ("1.jpg,10,5,10,9", "without an area"), ("2.jpg,1,1,9,9", "no box for 1"),
        ("1.jpg,1,1,9", "4 values"),
    ]:  # fmt: skip
        boxes.write_text(f"file,left,top,right,bottom\n{text}\n")
        arguments = [f"weights={tmp_path / 'classes'}", f"images={places / 'masks/dev/images/1.jpg'}", f"boxes={boxes}"]
        assert predict.main(arguments) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "file").write_text("not a folder")
    assert predict.main([*arguments[:2], f"out={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}: File exists; mend that")
    for keys, said in [
        (["images=/nowhere"], "no such file or folder"), ([f"images={tmp_path}"], "no pictures in it"),
        ([f"images={places / 'points/images'}", f"out={places / 'points/images'}"], "choose another folder"),
    ]:  # fmt: skip
        assert predict.main([f"weights={tmp_path / 'classes'}", *keys]) == 2
        assert said in capsys.readouterr().err


def test_predict_leaves_out_what_is_no_picture_and_says_so(run, places, tmp_path, capsys):
    assert run("alignment", "train.epochs=1", name="points")[0] == 0
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    whole = sorted((places / "points/images").glob("*.jpg"))[0].read_bytes()
    (mixed / "b.jpg").write_bytes(whole)
    (mixed / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (mixed / "c.png").write_text("no picture")
    arguments = [f"weights={tmp_path / 'points'}", "threads=1"]
    capsys.readouterr()
    assert predict.main([*arguments, f"images={mixed}", f"out={tmp_path / 'drawn'}"]) == 0
    out, err = capsys.readouterr()
    assert "1 picture with 68 points of a model of csv, 2 left out" in out
    for name, line in zip(("a.jpg", "c.png"), err.splitlines(), strict=True):
        assert line.startswith(f"left out: {mixed / name}: cannot be read as an image (")
    assert [row.split(",")[0] for row in (tmp_path / "drawn/points.csv").read_text().splitlines()[1:]] == ["b.jpg"]
    (mixed / "b.jpg").write_bytes(whole[:100])
    assert predict.main([*arguments, f"images={mixed}", f"out={tmp_path / 'drawn'}"]) == 2
    assert f"images={mixed}: none of its 3 pictures can be read" in capsys.readouterr().err
    assert predict.main([*arguments, f"images={mixed / 'a.jpg'}", f"out={tmp_path / 'drawn'}"]) == 2
    assert f"error: {mixed / 'a.jpg'}: cannot be read as an image" in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------------------------


def start_ranks(places: Path, output: Path, ranks: int, *keys: str) -> list[subprocess.Popen]:
    """mcf.finetune as torchrun would start it; output of rank r in OUTPUT/rank-r.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "task=alignment", "dataset=csv", f"data={places / 'points'}", f"weights={places / 'encoder.safetensors'}",
        f"output={output}", *SMALL, *keys,
    ]  # fmt: skip
    last = {argument.partition("=")[0]: argument for argument in arguments}
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with (output / f"rank-{rank}.log").open("a") as log:
            command = [sys.executable, "-m", "mcf.finetune", *last.values()]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return processes


def test_told_to_stop_it_saves_and_goes_on_later(places, tmp_path):
    (process,) = start_ranks(places, tmp_path, 1, "name=told", "train.epochs=400", "evaluate_every=400")
    metrics, deadline = tmp_path / "told/metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or len(read(metrics)) < 3:
        assert process.poll() is None, (tmp_path / "rank-0.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == SAVED, (tmp_path / "rank-0.log").read_text()
    event = read(tmp_path / "told/events.jsonl")[-1]
    assert event["kind"] == "stopped"
    assert 3 <= event["step"] < 800
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "told")) == event["step"]


def test_a_stopped_rank_is_named_and_ends_the_run(places, tmp_path):
    keys = ("name=lost", "train.epochs=4000", "evaluate_every=4000", "watchdog.timeout=5", "watchdog.slow_timeout=200")
    processes = start_ranks(places, tmp_path, 2, *keys)
    try:
        metrics, deadline = tmp_path / "lost/metrics.jsonl", time.monotonic() + 240
        while not metrics.exists() or len(read(metrics)) < 3:
            assert [p.poll() for p in processes] == [None, None], (tmp_path / "rank-0.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(120) == RANK_LOST, (tmp_path / "rank-0.log").read_text()
    finally:
        for process in processes:
            process.kill()
    event = read(tmp_path / "lost/events.jsonl")[-1]
    assert (event["kind"], event["ranks"]) == ("rank_lost", [1])
    (line,) = [line for line in (tmp_path / "rank-0.log").read_text().splitlines() if line.startswith("error: ")]
    assert "rank 1 (" in line and "is stopped (SIGSTOP)" in line


def test_an_evaluation_makes_as_many_marks_on_every_rank(monkeypatch):
    """Five faces over two ranks at two a time: two batches here, one and a mark there."""
    from mcf.finetuning import Finetuning

    counted = {}
    for rank in (0, 1):
        judge = Finetuning.__new__(Finetuning)
        judge.world = SimpleNamespace(rank=rank, size=2)
        judge.local_batch, marks = 2, []
        judge.mark = lambda phase, step=None, marks=marks: marks.append(phase)
        judge.loader = SimpleNamespace(
            plain=lambda faces, size: iter(
                [SimpleNamespace(images=None, faces=faces[i : i + size]) for i in range(0, len(faces), size)]
            )
        )
        judge.task = SimpleNamespace(
            predict=lambda _, faces: faces, judge=lambda prediction, _: prediction, score=lambda _, results: results
        )
        monkeypatch.setattr("mcf.distributed.gather_objects", lambda value: [value])
        assert judge.evaluate(lambda _: None, [0, 1, 2, 3, 4]) == ([0, 2, 4] if rank == 0 else [1, 3])
        counted[rank] = marks
    assert counted[0] == counted[1] == ["evaluating"] * 2


def test_through_the_launcher(run, places, tmp_path, capsys):
    """A copy of the code, a lock, ranks as processes; the same results as in this process."""
    keys = ("train.epochs=1", "pictures=0")
    status, out, err = run("alignment", *keys, "mode=local", name="launched")
    assert status == 0, out + err
    assert "best_on_test" in out
    assert (tmp_path / "launched/code/mcf/finetune.py").is_file()
    assert run("alignment", *keys, name="direct")[0] == 0
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("launched", "direct")]
    assert results[0] == results[1]
    status, out, err = run("alignment", *keys, "mode=print", "slurm.partition=faces", "gpus_per_node=2")
    assert status == 0, err
    assert "--partition=faces" in out and "--ntasks-per-node=2" in out and "mcf.finetune" not in err
    assert "mode=local, which is this machine alone" in run("alignment", "mode=local", "nodes=2")[2]


@pytest.mark.slow
def test_two_ranks_are_one(places, tmp_path):
    """The same samples, statistics of BatchNorm over both ranks: the same losses up to the order of float32 sums."""
    keys = ("head.dropout=0", "train.epochs=2", "train.zero_stage=1")
    for ranks in (1, 2):
        processes = start_ranks(places, tmp_path, ranks, f"name=ranks-{ranks}", *keys)
        try:
            assert max(p.wait(400) for p in processes) == 0, (tmp_path / "rank-0.log").read_text()
        finally:
            for process in processes:
                process.kill()
    one, two = (numbers(tmp_path / f"ranks-{ranks}") for ranks in (1, 2))
    assert len(one) == len(two)
    for ours, theirs in zip(two, one):
        for name, value in theirs.items():
            # Adam divides by small second moments at first, which makes rounding of 1e-7 up to 1e-4.
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
