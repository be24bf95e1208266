"""mcf.results: the whole table at toy size through the real verbs, that nothing is done twice, and what its numbers are."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mcf import finetune, train
from mcf.data.faces.writing import Settings, write_faces
from mcf.downstream.datasets import Face, FaceSet, open_faces
from mcf.errors import UserError
from mcf.pack.__main__ import main as pack_main
from mcf.results import __main__ as verb
from mcf.results import crops, runs
from mcf.results.options import ResultsConfig
from mcf.results.runs import Job
from mcf.results.table import INITIALISATIONS, Result, table

VERBS = {"pack": pack_main, "train": train.main, "finetune": finetune.main}
SMALL = [
    "alignment_set=faces", "parsing_set=faces", "seeds=[0,1]", "steps=6", "size=32", "alignment_labels=8",
    "parsing_labels=8",
    "train=batch=16 micro_batch=16 model.image_size=32 model.width=32 model.heads=2 model.decoder.width=32 "
    "model.decoder.depth=1 model.decoder.heads=2 model.projection.hidden=32 model.projection.dim=16 teacher.heads=2 data.streams=4 "
    "data.window=4 optimizer.warmup_epochs=0.3 train.log_every=1",
    "finetune=batch=4 micro_batch=4 train.epochs=2 warp_size=32 input_size=32 head.channels=8 head.pools=[1,2] "
    "heatmap.size=16 pictures=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """40 faces of 10 people, 2 of whom are tested on."""
    folder = tmp_path_factory.mktemp("results") / "drawn"
    list(write_faces(folder, 40, Settings(seed=0, size=64, quality=92, images_per_person=4), workers=1))
    return folder


def in_this_process(monkeypatch) -> list[Job]:
    """Let the verbs run here, one after another: what processes cost to start is minutes. The jobs that were run."""
    called: list[Job] = []

    def call(out: Path, job: Job) -> None:
        called.append(job)
        assert VERBS[job.verb](list(job.arguments)) == 0, job

    def run_all(out: Path, jobs: list[Job], at_once: int) -> None:
        for job in jobs:
            runs.follow(out, job, [])

    monkeypatch.setattr(runs, "call", call)
    monkeypatch.setattr(verb, "run_all", run_all)
    return called


def test_the_table_from_pictures_to_numbers_and_a_second_call_that_does_nothing(drawn, tmp_path, monkeypatch, capsys):
    called = in_this_process(monkeypatch)
    out = tmp_path / "out"
    keys = [f"alignment={drawn}", f"parsing={drawn}", f"out={out}", *SMALL]
    assert verb.main(keys) == 0, capsys.readouterr().err
    assert [job.verb for job in called] == ["pack"] + 6 * ["train"] + 12 * ["finetune"]

    # What was pre-trained on: two squares of each training picture, and none of the people that are tested on.
    faces = open_faces("alignment", "faces", drawn)
    crops = {path.name.rsplit("-", 2)[0] for path in (out / "crops").iterdir()}
    assert crops == {face.image.stem for face in faces.train}
    assert not crops & {face.image.stem for face in faces.test}
    assert json.loads((out / "shards/manifest.json").read_text())["samples"] == 2 * len(faces.train)

    # Who was taught by whom, for how long, on what the heads stand.
    arguments = {job.name: dict(a.split("=", 1) for a in job.arguments) for job in called}
    assert [arguments[f"{kind}-1"]["train.steps"] for kind in ("teacher", "mcf", "mae")] == ["3", "3", "6"]
    assert arguments["mcf-1"]["teacher.path"] == str(out / "runs/teacher-1")
    backbones = {}
    for kind in INITIALISATIONS:
        model = load_file(out / f"runs/parsing-{kind}-1/model.safetensors")
        backbones[kind] = model["backbone.vit.blocks.0.attn.qkv.weight"].numpy()
    for kind in ("mae", "mcf"):
        (state,) = (out / f"runs/{kind}-1/checkpoints").glob("*/weights.safetensors")
        (trained,) = [v.numpy() for k, v in load_file(state).items() if k.endswith("encoder.blocks.0.attn.qkv.weight")]
        np.testing.assert_array_equal(backbones[kind], trained)
    assert len({value.tobytes() for value in backbones.values()}) == 3

    # The table against numpy, from the metrics of the runs themselves.
    rows = list(csv.DictReader((out / "results.csv").open()))
    told = (out / "results.md").read_text().splitlines()
    for line, (kind, name) in zip(told[2:], INITIALISATIONS.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name
        for cell, task, metric in ((cells[1], "alignment", "nme_inter_ocular"), (cells[-1], "parsing", "f1_mean")):
            runs = [json.loads((out / f"runs/{task}-{kind}-{seed}/metrics.json").read_text()) for seed in (0, 1)]
            values = [run["selected"][metric] for run in runs]
            # Two decimals are printed.
            expected = [np.mean(values), np.std(values, ddof=1), min(values), max(values)]
            assert [float(n) for n in re.findall(r"[\d.]+", cell)] == pytest.approx(expected, abs=0.00501)
            stored = [float(r["value"]) for r in rows if (r["initialisation"], r["metric"]) == (kind, metric)]
            assert stored == pytest.approx(values, abs=0.0000501)

    called.clear()
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert verb.main(keys) == 0
    assert called == []
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert (out / "results.md").read_text().splitlines() == told

    capsys.readouterr()
    assert verb.main([*keys[:-1], keys[-1], "jobs=1"]) == 0  # how many at a time changes no number
    keys[keys.index("steps=6")] = "steps=8"
    assert verb.main(keys) == 2
    assert "holds results of other keys (steps=6, now 8)" in capsys.readouterr().err
    assert called == []


def test_mean_spread_and_range_of_a_cell():
    """By hand: 1, 2, 6 have mean 3, squares of deviations 4 + 1 + 9 = 14, and √(14 / 2) = 2.6458."""
    made = [Result(kind, "parsing", s, "f1_mean", v) for kind in INITIALISATIONS for s, v in enumerate((1.0, 6.0, 2.0))]
    lines = table(made).splitlines()
    assert lines[0] == "| Frozen encoder | parsing: mean F1, % ↑ |"
    assert lines[2] == "| random | 3.00 ± 2.65 (1.00–6.00) |"
    assert len(lines) == 5
    # One seed has no spread, and none is told.
    assert table([r for r in made if r.seed == 0]).splitlines()[2] == "| random | 1.00 |"


def test_one_pretraining_serves_the_heads_of_all_seeds(tmp_path):
    config = ResultsConfig(alignment="a", parsing="p", seeds=(4, 5), one_pretraining=True, steps=9)
    jobs = {job.name: job for job in runs.jobs_of(tmp_path, config)}
    assert list(jobs)[:3] == ["teacher-4", "mcf-4", "mae-4"] and len(jobs) == 3 + 12
    assert ("train.steps=4" in jobs["teacher-4"].arguments, "train.steps=5" in jobs["mcf-4"].arguments) == (True, True)
    for seed in (4, 5):
        head = jobs[f"alignment-mcf-{seed}"]
        assert f"weights={tmp_path}/runs/mcf-4" in head.arguments and head.after == ("mcf-4",)
        assert f"seed={seed}" in head.arguments  # of the head, and of a random encoder


def test_jobs_wait_for_those_before_them_and_run_beside_the_others(tmp_path, monkeypatch):
    started, ended, most, now = {}, {}, 0, 0
    lock = threading.Lock()

    def call(out: Path, job: Job) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        started[job.name] = time.monotonic()
        time.sleep(0.05)
        ended[job.name] = time.monotonic()
        with lock:
            now -= 1

    monkeypatch.setattr(runs, "call", call)
    jobs = [Job("a", "v", ()), Job("b", "v", ()), Job("c", "v", (), ("a",)), Job("d", "v", (), ("c", "b"))]
    runs.run_all(tmp_path, jobs, 2)
    assert most == 2
    for job in jobs:
        assert all(started[job.name] >= ended[other] for other in job.after)


def test_a_run_that_fails_is_one_line_and_nothing_is_built_on_it(tmp_path, capsys):
    """Through real processes: a shape that cannot be, and what would have gone on from it."""
    (tmp_path / "logs").mkdir()
    bad = Job("teacher-0", "train", ("recipe=faces_small_mae", "model.width=130", f"output={tmp_path}"))
    after = Job("mcf-0", "train", ("recipe=faces_small",), ("teacher-0",))
    with pytest.raises(
        UserError, match=r"teacher-0 ended with status 2 \(error: .*model\.width=130.*it goes on"
    ) as failure:
        runs.run_all(tmp_path, [bad, after], 2)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "logs/mcf-0.log").exists()


def test_people_on_both_sides_are_refused(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(picture)
    one, other = Face("a", picture, person="Ada"), Face("b", tmp_path / "b.png", person="Ada")
    with pytest.raises(UserError, match="Ada is in the training and in a test split; split by person"):
        crops.training_pictures([FaceSet("csv", "alignment", [one], [other], crop="box")])
    # A picture of one set's training that the other set tests on.
    sets = [FaceSet("csv", "alignment", [Face("a", picture)], [], crop="box")]
    sets.append(FaceSet("masks", "parsing", [], [Face("a", picture)], crop="whole"))
    with pytest.raises(UserError, match="the picture is in the training and in a test split"):
        crops.training_pictures(sets)


def test_squares_are_the_middle_of_a_picture_in_two_sizes(tmp_path):
    """A wide picture with a white square of 56 pixels in its middle: 70 % of its height of 80."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[12:68, 32:88] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "crops").mkdir()
    crops.squares(tmp_path / "wide.png", tmp_path / "crops", 80)
    whole, close = (np.asarray(Image.open(path)) for path in sorted((tmp_path / "crops").iterdir()))
    np.testing.assert_array_equal(whole, pixels[:, 20:100])
    assert close.shape == (80, 80, 3) and close.min() == 255


@pytest.fixture
def kept(drawn, tmp_path, monkeypatch) -> list[str]:
    """Keys of a call that ends where packing would begin."""
    monkeypatch.setattr(verb, "pack", lambda *_: (_ for _ in ()).throw(UserError("packed")))
    return [f"alignment={drawn}", f"parsing={drawn}", f"out={tmp_path / 'out'}", *SMALL[:2]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("alignment=nowhere/drawm", r"error: alignment=nowhere/drawm: no such folder; alignment_set=faces expects images/"),
        ("parsing=nowhere/data=2", r"error: parsing=nowhere/data=2: no such folder; parsing_set=faces expects images/"),
        ("alignment_set=lapa", r"error: alignment_set=lapa: no set of alignment \(it is a set of parsing\); there are: "),
        ("train=bogus=1", r"error: train='bogus=1': mcf\.train: bogus=1: unknown key"),
        ("train=batch=16 model.width=130", r"error: train='batch=16 model\.width=130': .*model\.width=130"),
        ("finetune=head.chanels=8", r"error: finetune='head\.chanels=8': mcf\.finetune: head\.chanels=8: unknown key.*head\.channels"),
        ("finetune=batch=no", r"error: finetune='batch=no': .*batch=no"),
    ],
)  # fmt: skip
def test_a_typo_is_one_line_in_the_keys_of_this_verb_and_can_be_mended(kept, tmp_path, capsys, wrong, said):
    name = wrong.partition("=")[0]
    assert verb.main([*(key for key in kept if not key.startswith(f"{name}=")), wrong]) == 2
    error = capsys.readouterr().err
    assert re.match(said, error) and error.count("\n") == 1, error
    assert verb.main(kept) == 2
    assert capsys.readouterr().err == "error: packed\n"


def test_keys_are_anothers_only_where_something_was_made_with_them(kept, tmp_path, capsys):
    out = tmp_path / "out"
    assert verb.main([*kept, "steps=4"]) == verb.main([*kept, "steps=6"]) == 2
    assert capsys.readouterr().err == 2 * "error: packed\n"
    (out / "crops").mkdir()
    assert verb.main([*kept, "steps=4"]) == 2
    assert "holds results of other keys (steps=6, now 4)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"steps": 6, "si', "[1]", "7"])
def test_keys_that_were_written_in_half_are_one_line(kept, tmp_path, capsys, content):
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/keys.json").write_text(content)
    assert verb.main(kept) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: \S+out/keys\.json: cannot be read, .*; give another out=, or remove this file .*\n", error
    )
