"""Whatever may come as LAION-Face's detections, and what does not fit them: counted, or one line."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile

import laion
import numpy as np
import pytest
import torch
from bad import BOX, MARKS, options, refusal, report, sample, write_boxes, write_tar
from scenes import encode, jpeg, scene

from mcf.pack import detections
from mcf.pack.faces import Face
from mcf.pack.writing import pack


@pytest.mark.parametrize(
    "value",
    [
        [(BOX, MARKS, 0.99)],
        [[tuple(BOX), [v for mark in MARKS for v in mark], 0.99]],
        [(np.array(BOX, np.float32), np.array(MARKS), np.float32(0.99))],
        [(torch.tensor(BOX), torch.tensor(MARKS), torch.tensor(0.99))],
        ([BOX, MARKS, [0.99]],),
    ],
    ids=["lists", "flat", "numpy", "torch", "score in a list"],
)
def test_pickles_of_lists_arrays_and_tensors_are_read(small, value):
    write_boxes(small / "boxes", dict.fromkeys(range(3), value))
    tables = detections.Tables(detections.converted(small / "boxes", None))
    (faces, none) = tables.look_up([1, 77])
    assert none is None and len(tables) == 3
    assert faces == [Face(tuple(BOX), pytest.approx(0.99), tuple(v for mark in MARKS for v in mark))]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_something_is_refused(small, monkeypatch, legacy):
    monkeypatch.chdir(small)
    file = small / "boxes/sample2detect_0.pth"
    torch.save({1: [_Evil()]}, file, _use_new_zipfile_serialization=not legacy)
    assert "cannot be read as plain numbers" in refusal(options(small))
    file.write_bytes(pickle.dumps(_Evil()))
    assert "cannot be read as plain numbers" in refusal(options(small))
    assert not (small / "PWNED").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list"),
        ({"a": []}, "its keys are no SAMPLE_IDs"),
        ({1: [(BOX, 0.9)]}, "sample 1: face 0 is no"),
        ({1: [(BOX[:3], MARKS, 0.9)]}, "sample 1: face 0 is no"),
    ],
)
def test_pickles_of_something_else_are_one_line(small, content, words):
    torch.save(content, small / "boxes/sample2detect_0.pth")
    assert words in refusal(options(small))


def test_a_pickle_is_converted_once_and_again_when_it_changes(small, capsys):
    pack(options(small))
    assert capsys.readouterr().out.count("converting") == 1
    shutil.rmtree(small / "out")
    pack(options(small))
    assert "converting" not in capsys.readouterr().out
    write_boxes(small / "boxes", {i: [([0.0, 0.0, 63.0, 63.0], MARKS, 0.99)] for i in range(3)})
    shutil.rmtree(small / "out")
    pack(options(small))
    assert capsys.readouterr().out.count("converting") == 1


def test_boxes_of_other_images_stop_it_at_the_first_tar_that_shows_it(tmp_path):
    write_tar(tmp_path / "source/split_00005/00000.tar", [m for i in range(120) for m in sample(f"{i:09d}", i)])
    write_boxes(tmp_path / "boxes", {i: [(BOX, MARKS, 0.99)] for i in range(1000, 1120)})
    told = refusal(options(tmp_path))
    assert "split_00005/00000.tar: none of its 120 images is in detections" in told and "add the file" in told
    assert not list((tmp_path / "out").glob("*.tar"))
    write_boxes(tmp_path / "boxes", {i: [(BOX, MARKS, 0.99)] for i in range(120)}, "sample2detect_5.pth")
    shutil.rmtree(tmp_path / "out")
    assert pack(options(tmp_path)).samples == 120


def test_a_few_images_without_boxes_are_only_counted(small):
    write_boxes(small / "boxes", {0: [(BOX, MARKS, 0.99)], 1: []})
    assert pack(options(small)).samples == 1
    assert report(small)["left_out"] == {"no face": 1, "not in the detections": 1}


def test_a_missing_parquet_is_said_and_costs_nothing(small):
    pack(options(small))
    page = (small / "out/report.md").read_text()
    assert "no parquet beside 1 of 1 tars (split_00000/00000.tar)" in page
    assert report(small)["downloads"] == {}


def test_sample_ids_may_stand_in_the_parquet_alone(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [laion.scene(rng, laion.coloured(), sizes=(120, 200)) for _ in range(4)]
    tar = tmp_path / "source/split_00000/00000.tar"
    laion.write_tar(tar, 0, list(enumerate(scenes, 50)))
    with tarfile.open(tar) as content:
        members = [(m.name, content.extractfile(m).read()) for m in content if not m.name.endswith("json")]
    write_tar(tar, members)
    write_boxes(tmp_path / "boxes", {50 + i: scene.faces for i, scene in enumerate(scenes)})
    assert pack(options(tmp_path)).samples >= 3
    tar.with_suffix(".parquet").write_bytes(b"PAR1 damaged")
    shutil.rmtree(tmp_path / "out")
    assert "4 no SAMPLE_ID" in refusal(options(tmp_path))
    assert "unreadable parquet" in (tmp_path / "out/report.md").read_text()


def test_boxes_are_scaled_to_images_that_img2dataset_resized(tmp_path):
    large = scene(192, 128)
    small = encode(large.resize((96, 64)))
    facts = {"original_width": 192, "original_height": 128}
    write_tar(
        tmp_path / "source/0.tar",
        [*sample("0", 0, small, **facts), *sample("1", 1, small, **(facts | {"original_width": 300}))],
    )
    write_boxes(tmp_path / "boxes", {i: [([40.0, 20.0, 160.0, 120.0], MARKS, 0.99)] for i in range(2)})
    assert pack(options(tmp_path)).samples == 1
    with tarfile.open(tmp_path / "out/shard-00000.tar") as tar:
        facts = json.loads(tar.extractfile(tar.getmembers()[1]).read())
    assert facts["box"] == [20.0, 10.0, 80.0, 60.0]
    assert report(tmp_path)["left_out"] == {"unsupported": 1}


def test_bad_boxes_are_counted_by_their_fault(small):
    write_boxes(
        small / "boxes",
        {
            0: [([float("nan")] * 4, MARKS, 0.99), (BOX, MARKS, 0.99)],
            1: [([80.0, 60.0, 20.0, 10.0], MARKS, 0.99)],
            2: [([900.0, 10.0, 990.0, 90.0], MARKS, 0.99)],
        },
    )
    assert pack(options(small)).samples == 1
    assert report(small)["faces_left_out"] == {
        "box is empty or reversed": 1, "box is not a number": 1, "box outside the image": 1
    }  # fmt: skip
    assert report(small)["left_out"] == {"box is empty or reversed": 1, "box outside the image": 1}


def test_an_image_of_900_megapixels_is_in_the_report(small):
    at = (header := jpeg(9)).index(b"\xff\xc0")
    bomb = header[: at + 5] + (30_000).to_bytes(2, "big") * 2 + header[at + 9 :]
    write_tar(small / "source/split_00000/00001.tar", sample("000010000", 2, bomb))
    assert pack(options(small)).samples == 3
    (line,) = [json.loads(line) for line in (small / "out/left_out/00001.jsonl").open()]
    assert line[1] == "too large" and "30000x30000" in line[2]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"detections": "nowhere"}, "nowhere: the source is a folder of tars"),
        ({"detections": "empty"}, "no sample2detect_*.pth"),
        ({"detections": None, "crop": "face"}, "crop=face needs boxes"),
        ({"crop": "square"}, "take detections= away"),
        ({"detector": "a:b"}, "both given"),
        ({"task": 1}, "task and tasks belong together"),
        ({"task": 2, "tasks": 2}, "give 0 to 1"),
        ({"shard_samples": 10}, "every tar of the source becomes one shard"),
        ({"converted": "file/below"}, "cannot be converted into it"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(small, monkeypatch, keys, words):
    monkeypatch.chdir(small)
    (small / "empty").mkdir()
    (small / "file").write_text("x")
    assert words in refusal(options(small, **keys))


def test_files_beside_the_tars_are_named(small):
    (small / "source/cat.jpg").write_bytes(jpeg(1))
    (small / "source/split_00000/00000_stats.json").write_text("{}")
    (small / "source/split_00000/00007.parquet").write_bytes(b"x")
    assert pack(options(small)).samples == 3
    assert {file["name"]: file["reason"] for file in report(small)["files_left_out"]} == {
        "cat.jpg": "not a tar", "split_00000/00007.parquet": "not a tar"
    }  # fmt: skip


def test_a_write_that_really_fails_is_one_line_and_goes_on(small):
    """The kernel lets no file grow over 10 kB: the error comes from the writing of a shard itself."""
    members = [m for i in range(3, 60) for m in sample(f"{i:09d}", i)]
    write_tar(small / "source/split_00000/00001.tar", members)
    write_boxes(small / "boxes", {i: [(BOX, MARKS, 0.99)] for i in range(60)})
    detections.converted(small / "boxes", None)
    command = [
        sys.executable,
        "-m",
        "mcf.pack",
        *(f"{k}={v}" for k, v in options(small).model_dump(exclude_unset=True).items()),
    ]
    limits = (30_000, resource.RLIM_INFINITY)
    failed = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    )
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert "the disk is full" in failed.stderr
    parts = {p.name for p in (small / "out/.packing/parts").iterdir() if not p.name.startswith(".scratch")}
    assert parts == {
        "00000.jsonl", "00000.json", "shard-00000.tar", "shard-00000.index.npy", "shard-00000.rows.npy"
    }  # fmt: skip
    assert subprocess.run(command).returncode == 0
    assert pack(options(small)).samples == 60
