"""The loader's benchmark: it measures what it says, and refuses to time a loader that is wrong."""

import itertools
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mcf.bench.__main__ import main
from mcf.bench.loader import LoaderBench, _loaders
from mcf.bench.meter import rate
from mcf.data.dali import Decoder
from mcf.data.shards import ShardWriter, write_manifest


@pytest.fixture
def folder(tmp_path):
    file = tmp_path / "face.jpg"
    with ShardWriter(tmp_path / "shard-00000.tar") as writer:
        for i in range(64):
            rng = np.random.default_rng(i)
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((48, 48), Image.Resampling.BICUBIC).save(file)
            writer.add(f"face{i}", file.read_bytes())
        write_manifest(tmp_path, [writer.close()], {})
    return tmp_path


def arguments(folder, *more):
    small = ["batch=16", "micro_batch=8", "streams=8", "window=8", "image_size=32", "threads=1"]
    return ["part=loader", f"data={folder}", *small, "rounds=2", "seconds=0.2", *more]


def test_rates_and_waits_are_those_of_the_loop(folder, monkeypatch, capsys):
    plain = Decoder.finish

    def slow(self, decoded):
        if len(decoded.images) == 8:
            time.sleep(0.02)  # 8 images in 20 ms: 400 images/s at the most
        return plain(self, decoded)

    monkeypatch.setattr(Decoder, "finish", slow)
    assert main(arguments(folder, f"json_file={folder / 'numbers.json'}", "train_rate=50")) == 0
    report = json.loads((folder / "numbers.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    # The upper bound holds but for batches made ready before the clock ran: the queue's 3, of at least 5 a round.
    assert 20 < rows["loader"]["images_per_s"][1] < 400 * 8 / 5
    assert 20 < rows["DALI"]["images_per_s"][1] <= 400
    assert 20 < rows["beside a step"]["images_per_s"][1] <= 51  # the step is what bounds it,
    assert rows["beside a step"]["wait_share"] < 0.5 < rows["loader"]["wait_share"]  # and the loader is ahead of it
    assert report["bad_image_s"] > 0 and report["error_against_pillow"] <= 2
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        (["batch=10"], "streams=5 micro_batch=5"),
        (["batch=16", "micro_batch=6"], "micro_batch=4"),
        (["batch=256", "streams=128", "micro_batch=64"], "batch=64 streams=64"),
    ],
)
def test_numbers_that_do_not_fit_are_told_by_the_names_of_its_own_keys(folder, more, remedy, capsys):
    given = {word.partition("=")[0]: word for word in [*arguments(folder, *more), *more]}
    assert main(list(given.values())) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(f"; use {remedy}\n")
    config = LoaderBench.model_validate(dict(word.split("=", 1) for key, word in given.items() if key != "part"))
    mended = config.model_copy(update={key: int(n) for key, n in (word.split("=") for word in remedy.split())})
    for loader in _loaders(mended, torch.device("cpu")):
        loader.close()


def test_wrong_pictures_are_not_timed(folder, monkeypatch, capsys):
    plain = Decoder.finish
    monkeypatch.setattr(Decoder, "finish", lambda *a: plain(*a).flip(1))
    assert main(arguments(folder)) == 2
    assert "not timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"), [([], "part=loader"), (["part=nothing"], "part=nothing"), (["part=loader"], "data")]
)
def test_what_to_measure_must_be_said(argv, words, capsys):
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_the_rivals_do_the_same_work(folder, monkeypatch, capsys):
    """Each of them gives pictures of the side and number it is asked for; the table has a row for each."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    names = ["DALI webdataset", "webdataset, Pillow", "loose files, Pillow"]
    out = folder / "numbers.json"
    assert main(arguments(folder, "rivals=true", f"json_file={out}")) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(names) < set(rows)
    assert all(rows[name]["images_per_s"][1] > 0 for name in names)
    # Workers' CPU time is counted, also of those that end: no way of decoding these takes under 2 µs of it an image, and
    # more cores than there are cannot be busy (a fifth more: a worker's time is known in hundredths).
    assert all(0 < rows[name]["images_per_cpu_s"][1] < 500_000 for name in names)
    assert all(0 < row["cores"] < 1.2 * os.cpu_count() for row in rows.values())
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_a_machine_that_is_away_for_the_whole_time_still_gives_a_rate():
    images, per_cpu = rate(itertools.repeat(4), seconds=0.0, ahead=2)
    assert images > 0 and per_cpu > 0


def test_each_pair_of_threads_and_prefetch_is_a_row(folder, capsys):
    out = folder / "numbers.json"
    argv = [
        word for word in arguments(folder, "threads=[1,2]", "prefetch=[3,1]", f"json_file={out}") if word != "threads=1"
    ]
    assert main(argv) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["name"].startswith("loader")]
    assert [row["name"] for row in rows] == [f"loader, {t} threads, {p} ahead" for t in (1, 2) for p in (1, 3)]
    assert rows[-1]["loader_is"] == 1 and all(row["memory_gb"] >= 0 for row in rows)
    assert "loader is" in capsys.readouterr().out


def test_a_rivals_picture_is_the_face_or_its_mirror(folder):
    from mcf.bench.rivals import opened

    jpeg = next(folder.glob("*.jpg")).read_bytes()
    with Image.open(folder / "face.jpg") as image:
        plain = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    seen = {
        min((0, 1), key=lambda way: np.abs(opened(jpeg, 32) - (plain, plain[:, ::-1])[way]).max()) for _ in range(40)
    }
    assert seen == {0, 1}
