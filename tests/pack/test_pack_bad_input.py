"""Whatever may come in a tar, a pickle, a CSV or from a detector: named with its reason, or one line; nothing is believed."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import laion
import numpy as np
import pytest
import torch
from scenes import encode, jpeg, scene, tree

from mcf.errors import UserError
from mcf.pack import convert, detections, detectors, tars
from mcf.pack.faces import Face
from mcf.pack.options import PackConfig
from mcf.pack.source import LeftOut
from mcf.pack.writing import pack

BOX = [20.0, 10.0, 80.0, 60.0]
MARKS = [[35.0, 25.0], [60.0, 25.0], [48.0, 35.0], [38.0, 48.0], [58.0, 48.0]]


def write_tar(path: Path, members) -> Path:
    """(name or TarInfo, content) one after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, number: int, content: bytes | None = None, **facts):
    facts = {"SAMPLE_ID": number, "width": 96, "height": 64, "original_width": 96, "original_height": 64} | facts
    return [(f"{key}.jpg", content or jpeg(number)), (f"{key}.json", json.dumps(facts).encode()), (f"{key}.txt", b"x")]


def write_boxes(folder: Path, found: dict, name: str = "sample2detect_0.pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, folder / name)
    return folder


def options(tmp_path: Path, **keys) -> PackConfig:
    values = {"workers": 1, "size": 32, "min_face": 20, "detections": str(tmp_path / "boxes")} | keys
    return PackConfig(source=str(tmp_path / "source"), out=str(tmp_path / "out"), **values)


def read(path: Path, **keys):
    items = list(tars.entries(path, "t.tar", PackConfig(**keys)))
    good = [item.key for item in items if not isinstance(item, LeftOut)]
    return good, {item.name: item.reason for item in items if isinstance(item, LeftOut)}


def refusal(configured: PackConfig) -> str:
    with pytest.raises(UserError) as caught:
        pack(configured)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/report.json").read_text())


# --- tars -----------------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_members_that_do_not_belong_are_named_and_nothing_is_written_anywhere(tmp_path):
    (tmp_path / "inside").mkdir()
    path = write_tar(
        tmp_path / "inside/t.tar",
        [
            *sample("000000000", 1),
            ("/etc/evil.jpg", jpeg(2)),
            ("../evil.jpg", jpeg(3)),
            ("a/../../evil.json", b"{}"),
            ("notes.exe", b"MZ"),
            ("folder/0.jpg", jpeg(4)),
            (special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (special("hard.jpg", tarfile.LNKTYPE, "000000000.jpg"), b""),
            (special("fifo.jpg", tarfile.FIFOTYPE), b""),
            (special("device.jpg", tarfile.CHRTYPE), b""),
            (special("folder", tarfile.DIRTYPE), b""),
            *sample("000000001", 5),
        ],
    )
    before = tree(tmp_path)
    good, out = read(path)
    assert good == ["000000000", "000000001"]
    assert out == {
        "t.tar//etc/evil.jpg": tars.UNSAFE,
        "t.tar/../evil.jpg": tars.UNSAFE,
        "t.tar/a/../../evil.json": tars.UNSAFE,
        "t.tar/notes.exe": tars.UNEXPECTED,
        "t.tar/folder/0.jpg": tars.UNEXPECTED,
        "t.tar/link.jpg": tars.UNEXPECTED,
        "t.tar/hard.jpg": tars.UNEXPECTED,
        "t.tar/fifo.jpg": tars.UNEXPECTED,
        "t.tar/device.jpg": tars.UNEXPECTED,
    }
    assert tree(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["inside"]


def test_a_sparse_member_that_claims_terabytes_is_not_read(tmp_path):
    """GNU tar makes it: one written byte at the end of 1 TB of nothing."""
    with (tmp_path / "0.jpg").open("wb") as file:
        file.seek(1 << 40)
        file.write(b"x")
    subprocess.run(["tar", "--sparse", "--format=gnu", "-cf", "t.tar", "0.jpg"], cwd=tmp_path, check=True)
    (tmp_path / "0.jpg").unlink()
    assert (tmp_path / "t.tar").stat().st_size < 100_000
    assert read(tmp_path / "t.tar") == ([], {"t.tar/0.jpg": tars.UNEXPECTED})


def test_members_over_the_limits_are_not_read(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("0.jpg", bytes(5000)), ("0.json", b" " * (2 << 20)), *sample("1", 1)])
    good, out = read(path, max_bytes=4000)
    assert good == ["1"]
    assert out == {"t.tar/0.jpg": convert.TOO_LARGE, "t.tar/0.json": convert.TOO_LARGE}


def test_a_name_that_comes_twice_is_kept_once(tmp_path):
    path = write_tar(tmp_path / "t.tar", [*sample("0", 1), *sample("1", 2), *sample("0", 3), ("1.png", jpeg(4))])
    items = list(tars.entries(path, "t.tar", PackConfig()))
    assert [(item.key, item.content) for item in items if not isinstance(item, LeftOut)] == [
        ("0", jpeg(1)), ("1", jpeg(2)), ("1", jpeg(4))
    ]  # fmt: skip
    assert [item.reason for item in items if isinstance(item, LeftOut)] == [tars.SEEN]


def test_samples_without_image_or_json(tmp_path):
    path = write_tar(
        tmp_path / "t.tar",
        [
            ("0.json", b'{"error_message": "HTTP 404"}'),
            ("0.txt", b"x"),
            ("1.jpg", jpeg(1)),
            ("2.jpg", jpeg(2)),
            ("2.json", b"{no"),
        ],
    )
    items = list(tars.entries(path, "t.tar", PackConfig()))
    assert [(item.name, item.reason, item.detail) for item in items if isinstance(item, LeftOut)] == [
        ("t.tar/0", tars.NO_IMAGE, "HTTP 404")
    ]
    assert [(item.key, item.facts, item.sample_id) for item in items[1:]] == [("1", {}, None), ("2", {}, None)]


@pytest.mark.parametrize("value", [None, "x", True, [], {}, float("inf"), 1.5, "12"])
def test_sample_ids_of_any_kind(value):
    expected = {1.5: 1, "12": 12}.get(value) if not isinstance(value, (list, dict, bool)) else None
    assert tars.Entry("t.tar/0.jpg", b"", {"SAMPLE_ID": value}).sample_id == expected


@pytest.mark.parametrize("keep", [0, 100, 700, 2000, 6000])
def test_a_truncated_tar_gives_what_lies_before(tmp_path, keep):
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(6) for m in sample(f"{i}", i)])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:keep])
    good, out = read(cut)
    assert good == [f"{i}" for i in range(len(good))] and len(good) < 6
    assert out == {"t.tar": tars.DAMAGED_TAR}


def test_a_tar_that_is_none_and_a_flipped_header(tmp_path):
    text = tmp_path / "text.tar"
    text.write_bytes(b"not a tar" * 200)
    assert read(text) == ([], {"t.tar": tars.DAMAGED_TAR})
    packed = tmp_path / "t.tar.gz"
    subprocess.run(["tar", "-czf", packed.name, "text.tar"], cwd=tmp_path, check=True)
    assert read(packed) == ([], {"t.tar": tars.DAMAGED_TAR})
    path = write_tar(tmp_path / "t.tar", [m for i in range(4) for m in sample(f"{i}", i)])
    content = bytearray(path.read_bytes())
    place = content.index(b"2.jpg")
    content[place + 150] ^= 0xFF  # in the header's checksum
    path.write_bytes(content)
    good, out = read(path)
    assert good == ["0", "1"]
    assert out == {"t.tar": tars.DAMAGED_TAR}


def test_random_damage_never_raises(tmp_path):
    whole = write_tar(tmp_path / "t.tar", [m for i in range(3) for m in sample(f"{i}", i)]).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.tar"
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 40):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        read(path)


def test_a_million_members_are_read_in_little_memory(tmp_path):
    """A bomb of empty members: 30,000 of them (15 MB) may not cost what tarfile's own list of them does."""
    program = (
        "import sys, resource; from pathlib import Path; from mcf.pack import tars; from mcf.pack.options import PackConfig\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in tars.entries(Path(sys.argv[1]), 't.tar', PackConfig()))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(30_000):
            tar.fileobj.write(tarfile.TarInfo(f"{i}.exe").tobuf())
            tar.offset += 512
    said = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout
    count, grown = map(int, said.split())
    assert count == 30_000
    assert grown < 10_000  # kB; with all TarInfo objects kept it is 30 MB


# --- detections -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Path:
    """One tar of three images, boxes for them."""
    write_tar(tmp_path / "source/split_00000/00000.tar", [m for i in range(3) for m in sample(f"00000000{i}", i)])
    write_boxes(tmp_path / "boxes", {i: [(BOX, MARKS, 0.99)] for i in range(3)})
    return tmp_path


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


# --- folders of images with boxes, and detectors --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(5):
        (tmp_path / f"source/d{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"source/d{i % 2}/{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


def boxes_file(folder: Path, text: str, name: str = "boxes.csv") -> dict:
    (folder / name).write_text(text)
    return {"detections": str(folder / name)}


def test_a_csv_and_a_json_of_the_same_boxes_give_the_same_shards(folder):
    marks = ",".join(f"{axis}{i}" for i in range(5) for axis in "xy")
    points = ",".join(f"{v}" for mark in MARKS for v in mark)
    lines = [f"file,left,top,right,bottom,score,{marks}"]
    lines += [f"d{i % 2}/{i}.jpg,20,10,80,60,0.95,{points}" for i in range(4)]
    content = {f"d{i % 2}/{i}.jpg": [{"box": BOX, "score": 0.95, "landmarks": MARKS}] for i in range(4)}
    for crop in ("face", "aligned"):
        pack(options(folder, crop=crop, **boxes_file(folder, "\n".join(lines))))
        (folder / "out").rename(folder / f"csv-{crop}")
        pack(options(folder, crop=crop, **boxes_file(folder, json.dumps(content), "boxes.json")))
        (folder / "out").rename(folder / f"json-{crop}")
        shards = [
            {n: c for n, c in tree(folder / f"{form}-{crop}").items() if "shard" in n} for form in ("csv", "json")
        ]
        assert shards[0] == shards[1] and len(shards[0]) == 2
        counts = json.loads((folder / f"csv-{crop}/report.json").read_text())
        assert (counts["kept"], counts["left_out"]) == (4, {"not in the detections": 1})


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("file,left,top\n", "b.csv", ":1: no column right"),
        ("file,left,top,right,bottom\nx,1,2,3,four\n", "b.csv", ":2: not a box"),
        ("file,left,top,right,bottom\nx,1,2\n", "b.csv", ":2: not a box"),
        ("{", "b.json", "not valid JSON"),
        ("[1]", "b.json", "a list"),
        ('{"a": [{"score": 1}]}', "b.json", "a: not a list of boxes"),
        ("x", "b.txt", "unknown form"),
        ("file,left,top,right,bottom\nelsewhere.jpg,1,2,30,40\n", "b.csv", "none of the files it names is in"),
    ],
)
def test_files_of_boxes_that_are_none_are_one_line(folder, text, name, words):
    assert words in refusal(options(folder, **boxes_file(folder, text, name)))
    assert words in refusal(options(folder, **boxes_file(folder, text, name), task=0, tasks=2))


def test_a_folder_of_pickles_is_not_for_images_and_a_csv_not_for_tars(folder, small):
    (small / "b.csv").write_text("file,left,top,right,bottom\n")
    assert "give the folder of LAION-Face's" in refusal(options(small, detections=str(small / "b.csv")))
    shutil.rmtree(folder / "source/split_00000")
    assert "give a .csv or .json" in refusal(options(folder))


PLUGIN = """
import numpy as np
def find(image):
    assert image.dtype == np.uint8 and image.shape == (64, 96, 3)
    return [[20, 10, 80, 60]], [0.97], None
def wrong(image):
    return [[1, 2, 3]], [1], None
def broken(image):
    raise ZeroDivisionError("of a detector")
something = 3
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_detector_of_the_users_own(folder, monkeypatch, workers):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(PLUGIN)
    sys.modules.pop("own", None)
    manifest = pack(options(folder, detections=None, detector="own:find", workers=workers, shard_samples=3))
    assert [shard.samples for shard in manifest.shards] == [3, 2]


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        ("own", "give MODULE:FUNCTION"),
        ("own:nothing", "cannot be imported"),
        ("nowhere:find", "cannot be imported"),
        ("own:something", "not a function"),
        ("own:wrong", "gives no (boxes"),
        ("nowhere.onnx", "no such file"),
    ],
)
def test_detectors_that_are_none_are_one_line(folder, monkeypatch, detector, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(PLUGIN)
    sys.modules.pop("own", None)
    assert words in refusal(options(folder, detections=None, detector=detector))


def test_a_detector_that_fails_on_an_image_costs_that_image(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(PLUGIN)
    sys.modules.pop("own", None)
    assert "5 the detector failed" in refusal(options(folder, detections=None, detector="own:broken"))
    assert "ZeroDivisionError: of a detector" in (folder / "out/report.md").read_text()


def test_a_file_that_is_no_yunet_is_one_line(tmp_path):
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot read it as YuNet"):
        detectors.finder(str(tmp_path / "x.onnx"))
