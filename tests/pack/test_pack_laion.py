"""LAION-Face end to end: the join of tars and boxes against an independent one, tasks, kills, duplicates."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import laion
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from scenes import decode, distance, encode, interruptions, tree

from mcf.data.shards import load_manifest, verify
from mcf.errors import UserError
from mcf.pack import checking, detections, merge, parts
from mcf.pack.__main__ import main
from mcf.pack.options import PackConfig
from mcf.pack.writing import pack

SIZE = 48
SMALL = {"sizes": (120, 300)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two splits of three tars of 40 links, 37 or so images each; never changed."""
    return laion.tree(tmp_path_factory.mktemp("laion"), laion.coloured(), tars=3, per_tar=40, **SMALL)


def options(source: Path, out: Path, **keys) -> PackConfig:
    values = {"workers": 1, "size": SIZE, "min_face": 40} | keys
    return PackConfig(source=str(source / "images"), detections=str(source / "detections"), out=str(out), **values)


def truth(source: Path) -> dict[str, tuple[bytes, list]]:
    """Name of each image → its bytes and its faces, by the tars and pickles themselves."""
    boxes: dict[int, list] = {}
    for file in sorted((source / "detections").glob("*.pth")):
        boxes |= torch.load(file, weights_only=True)
    found = {}
    for tar in sorted((source / "images").rglob("*.tar")):
        with tarfile.open(tar) as content:
            members = {m.name: content.extractfile(m).read() for m in content}
        for name, body in members.items():
            if name.endswith(".jpg"):
                sample_id = json.loads(members[name[:-4] + ".json"])["SAMPLE_ID"]
                found[f"{tar.relative_to(source / 'images')}/{name}"] = (body, boxes[sample_id])
    return found


def packed(out: Path) -> dict[tuple[str, int], tuple[bytes, dict]]:
    """(name, number of the face) → JPEG and what its .json says, read from the tars by tarfile alone."""
    found = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as content:
            members = {m.name: content.extractfile(m).read() for m in content}
        for name, body in members.items():
            if name.endswith(".json"):
                facts = json.loads(body)
                assert (facts["path"], facts["face"]) not in found
                found[facts["path"], facts["face"]] = (members[name[:-5] + ".jpg"], facts)
    return found


def test_every_face_that_should_be_is_there_and_shows_what_its_box_holds(source, tmp_path):
    """An independent join and crop: dictionaries for tables, Pillow for the picture, loops for the limits."""
    manifest = pack(options(source, tmp_path / "out", faces="all", margin=0.4))
    found, refused, used = packed(tmp_path / "out"), Counter(), 0
    wanted = {}
    for name, (content, faces) in truth(source).items():
        with Image.open(io.BytesIO(content)) as image:
            picture = image.convert("RGB")
        kept = 0
        for number, (box, _, score) in enumerate(faces):
            left, top, right, bottom = np.float32(box).astype(float)
            if score < 0.9:
                refused["score too low"] += 1
            elif min(right - left, bottom - top) < 40:
                refused["face too small"] += 1
            else:
                side = min(round(max(right - left, bottom - top) * 1.4), *picture.size)
                x, y = (
                    min(max(round((low + high - side) / 2), 0), most - side)
                    for low, high, most in ((left, right, picture.width), (top, bottom, picture.height))
                )
                wanted[name, number] = picture.crop((x, y, x + side, y + side))
                kept += 1
        used += bool(kept)
    assert set(found) == set(wanted)
    assert manifest.samples == len(wanted) > 150
    for place, crop in wanted.items():
        small = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        # torch's bicubic differs from Pillow's by a level here and there (0.33 at most); a box a pixel off is 2 and more.
        encoded = Image.fromarray(decode(encode(small, subsampling="4:2:0")).astype(np.uint8))
        assert distance(decode(found[place][0]), encoded) < 0.6
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["faces_left_out"] == dict(refused)
    assert report["found"] == len(truth(source)) == report["images"] + sum(report["left_out"].values())
    assert (report["images"], report["kept"]) == (used, len(wanted))
    assert sum(report["face_side"].values()) == len(wanted)
    # The links that failed are in the parquets alone.
    assert report["downloads"] == {"success": report["found"], "failed_to_download": 12, "failed_to_resize": 6}
    listed = [json.loads(line) for file in (tmp_path / "out/left_out").iterdir() for line in file.open()]
    assert len(listed) == sum(report["left_out"].values())
    assert [len(shard) for shard in (manifest.shards,)] == [6]
    verify(manifest)


def test_keys_that_repeat_across_splits_stay_apart(source, tmp_path):
    manifest = pack(options(source, tmp_path / "out"))
    keys = [key for shard in range(len(manifest.shards)) for key in manifest.index(shard)["key"].tolist()]
    paths = [path for path, _ in packed(tmp_path / "out")]
    assert len(set(keys)) == len(keys) == len(set(paths))
    bare = Counter(path.rsplit("/", 1)[-1] for path in paths)
    assert max(bare.values()) == 2  # as img2dataset has it


@pytest.mark.parametrize("tasks", [2, 4, 9])
def test_tasks_in_any_order_and_twice_write_what_one_process_writes(source, tmp_path, tasks, capsys):
    pack(options(source, tmp_path / "one"))
    done = set()
    for task in [3, 3, 2, 1, 0] if tasks == 4 else range(tasks):
        made = pack(options(source, tmp_path / "many", task=task, tasks=tasks))
        done.add(task)
        complete = all(number % tasks in done for number in range(6))
        assert (made is not None) == (tmp_path / "many/manifest.json").exists() == complete
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    capsys.readouterr()
    pack(options(source, tmp_path / "many", task=1, tasks=tasks))
    assert "is packed already" in capsys.readouterr().out
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def command(source: Path, out: Path, *more: str) -> list[str]:
    named = [f"source={source / 'images'}", f"detections={source / 'detections'}", f"out={out}"]
    return [sys.executable, "-m", "mcf.pack", *named, f"size={SIZE}", "min_face=40", *more]


def test_slurm_tasks_at_once_share_the_work_and_one_of_them_merges(source, tmp_path):
    """Real processes that learn who they are from Slurm's variables, array numbers from 3 in steps of 2."""
    slurm = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}
    running = [
        subprocess.Popen(
            command(source, tmp_path / "many", "workers=1", f"converted={tmp_path / 'boxes'}"),
            env=os.environ | slurm | {"SLURM_ARRAY_TASK_ID": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, text=True,
        )
        for number in (3, 5, 7)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("packed " in text and " crops of " in text for text in said) == 1, said
    assert sum(text.count("converting") for text in said) == 2  # each of the two pickles once
    pack(options(source, tmp_path / "one"))
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_workers_change_nothing(source, tmp_path):
    pack(options(source, tmp_path / "one"))
    pack(options(source, tmp_path / "two", workers=2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_killed_with_9_it_goes_on_to_the_same_bytes_and_leaves_no_process(source, tmp_path):
    pack(options(source, tmp_path / "whole"))
    broken = tmp_path / "broken"
    process = subprocess.Popen(command(source, broken, "workers=2"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((broken / ".packing/parts").glob("0000*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert not (broken / "manifest.json").exists()
    done = {p.name: p.stat().st_ino for p in (broken / ".packing/parts").glob("0000*.json")}
    assert 1 <= len(done) < 6
    calls = []
    make = parts.Packer.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parts.Packer, "__call__", lambda self, unit, *a: calls.append(unit.number) or make(self, unit, *a)
        )
        pack(options(source, broken))
    assert sorted(calls) == [n for n in range(6) if f"{n:05d}.json" not in done]  # what was made is not made again
    assert tree(broken) == tree(tmp_path / "whole")


def test_interrupted_at_any_renaming_of_part_or_merge_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    source = laion.tree(tmp_path / "laion", laion.coloured(), parts=(0,), tars=2, per_tar=6, **SMALL)
    _copy_first_image(source)  # so that the merge writes one shard anew and renames the other
    detections.converted(source / "detections", None)
    # A part: index and tar written, list, rows, index, tar, its record (written, renamed): 8. The merge: index and tar
    # of one shard written anew, of the other renamed, a note each; two reports and the manifest.
    assert interruptions(lambda out: pack(options(source, out)), tmp_path, monkeypatch) == 2 * 8 + 2 + 2 + 2 + 3


def _copy_first_image(source: Path) -> str:
    """Give the last image of the second tar the bytes of the first of the first, and its detections; its name."""
    first, second = sorted((source / "images").rglob("*.tar"))[:2]
    with tarfile.open(first) as content:
        name = content.next().name
        body, facts = (content.extractfile(name[:-3] + form).read() for form in ("jpg", "json"))
    with tarfile.open(second) as content:
        members = [(m.name, content.extractfile(m).read()) for m in content]
    last = members[-3][0][:-4]
    boxes = torch.load(source / "detections/sample2detect_0.pth", weights_only=True)
    boxes[json.loads(members[-2][1])["SAMPLE_ID"]] = boxes[json.loads(facts)["SAMPLE_ID"]] = [
        ([20.0, 20.0, 90.0, 90.0], [[30.0, 30.0]] * 5, 0.99)
    ]
    torch.save(boxes, source / "detections/sample2detect_0.pth")
    with tarfile.open(second, "w") as content:
        for name, old in members:
            info = tarfile.TarInfo(name)
            new = body if name == f"{last}.jpg" else old
            info.size = len(new)
            content.addfile(info, io.BytesIO(new))
    return f"{second.relative_to(source / 'images')}/{last}.jpg"


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_same_crop_in_two_tars_is_kept_once_and_the_first_stays(tmp_path, tasks):
    source = laion.tree(tmp_path / "laion", laion.coloured(), parts=(0,), tars=2, per_tar=12, **SMALL)
    copy = _copy_first_image(source)
    for task in range(tasks):
        manifest = pack(options(source, tmp_path / "out", task=tasks - 1 - task, tasks=tasks))
    found = packed(tmp_path / "out")
    assert copy not in {path for path, _ in found}
    assert manifest.meta["counts"]["dropped"] == {"duplicate": 1}
    assert manifest.meta["counts"]["kept"] == manifest.samples == len(found)
    assert len({content for content, _ in found.values()}) == len(found)
    verify(manifest)


def test_near_duplicates_are_dropped_on_demand(tmp_path):
    """The same picture at two qualities has other bytes; its difference hash hardly moves."""
    source = laion.tree(tmp_path / "laion", laion.coloured(), parts=(0,), tars=1, per_tar=12, **SMALL)
    tar = next((source / "images").rglob("*.tar"))
    boxes = torch.load(source / "detections/sample2detect_0.pth", weights_only=True)
    with tarfile.open(tar) as content:
        members = [(m.name, content.extractfile(m).read()) for m in content]
    with Image.open(io.BytesIO(members[0][1])) as image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=70)
    first, other = (json.loads(members[place][1])["SAMPLE_ID"] for place in (1, 4))
    boxes[first] = boxes[other] = [([20.0, 20.0, 90.0, 90.0], [[30.0, 30.0]] * 5, 0.99)]
    torch.save(boxes, source / "detections/sample2detect_0.pth")
    members[3] = (members[3][0], stream.getvalue())
    with tarfile.open(tar, "w") as content:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            content.addfile(info, io.BytesIO(body))
    plain = pack(options(source, tmp_path / "plain"))
    near = pack(options(source, tmp_path / "near", near_duplicates=3))
    assert plain.meta["counts"]["dropped"] == {}
    assert near.meta["counts"]["dropped"] == {"near-duplicate": 1}
    assert {p for p, _ in packed(tmp_path / "plain")} - {p for p, _ in packed(tmp_path / "near")} == {
        f"{tar.relative_to(source / 'images')}/{members[3][0]}"
    }


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_near_hashes_are_those_of_all_pairs(bits):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 40, dtype=np.uint64)
    flips = [np.uint64(0), *(np.uint64(1) << rng.integers(0, 64, 5, dtype=np.uint64))]
    hashes = np.concatenate([hashes, hashes[rng.integers(0, 40, 300)]])
    for place in range(40, 340):
        for flip in rng.choice(flips, int(rng.integers(0, 5))):
            hashes[place] ^= flip
    wanted = [i for i in range(len(hashes)) if any(int(hashes[i] ^ hashes[j]).bit_count() <= bits for j in range(i))]
    rows = np.zeros(len(hashes), parts.ROW)
    rows["hash"] = hashes
    rows["digest"] = np.arange(len(hashes)).astype("<u8").repeat(2).view("V16")
    assert np.flatnonzero(merge.duplicates(rows, bits) == 2).tolist() == wanted
    assert merge.duplicates(rows, None).sum() == 0


def test_a_crop_that_dali_refuses_is_dropped_and_told(source, tmp_path, monkeypatch):
    """No JPEG we encode is refused by DALI, so the refusal is made up; what follows from it is real."""
    look, told = checking.Checker.look, []

    def refusing(self, tar, index):
        reasons, hashes = look(self, tar, index)
        assert reasons == {}
        told.append(index["key"][3].decode())
        return {3: "does not decode (made up)"}, hashes

    whole = pack(options(source, tmp_path / "whole"))
    monkeypatch.setattr(checking.Checker, "look", refusing)
    less = pack(options(source, tmp_path / "less"))
    assert less.samples == whole.samples - 6
    assert less.meta["counts"]["dropped"] == {"does not decode with DALI": 6}
    keys = {key.decode() for shard in range(6) for key in less.index(shard)["key"]}
    assert len(told) == 6 and not keys & set(told)
    verify(less)


def test_every_jpeg_of_a_shard_is_looked_at(source, tmp_path):
    """Damage in the middle of a written shard is found by its row, not only at its ends."""
    manifest = pack(options(source, tmp_path / "out"))
    tar, index = tmp_path / "out" / manifest.shards[1].name, manifest.index(1)
    broken = [2, 17, len(index) - 1]
    content = bytearray(tar.read_bytes())
    for row in broken:
        offset, size = int(index["offset"][row]), int(index["size"][row])
        content[offset + 2 : offset + size // 2] = bytes(size // 2 - 2)
    tar.write_bytes(content)
    reasons, hashes = checking.Checker().look(tar, index)
    assert sorted(reasons) == broken
    assert [hashes[row] for row in broken] == [0, 0, 0]


def test_whole_images_of_tars_are_packed_without_detections(source, tmp_path):
    manifest = pack(PackConfig(source=str(source / "images"), out=str(tmp_path / "out"), size=64, workers=1))
    assert manifest.samples == len(truth(source))


def test_an_image_that_kills_its_process_is_left_out_alone(source, tmp_path, monkeypatch):
    """The environment tells the workers, which are new processes, whom to kill: sitecustomize patches the cutter."""
    victim = sorted(truth(source))[40]
    content, _ = truth(source)[victim]
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if any('multiprocessing' in a for a in sys.orig_argv):\n"
        "    from mcf.pack import cut\n"
        "    plain = cut.Cutter.cut\n"
        "    def cutting(self, images):\n"
        f"        if any(len(c) == {len(content)} for c, _ in images): os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return plain(self, images)\n"
        "    cut.Cutter.cut = cutting\n"
    )
    assert sum(len(c) == len(content) for c, _ in truth(source).values()) == 1
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(source, tmp_path / "out", "workers=2"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for file in (tmp_path / "out/left_out").iterdir() for line in file.open()]
    assert [line for line in listed if "died" in line[2]] == [[victim, "damaged", "the process that decoded it died"]]
    pack(options(source, tmp_path / "whole"))
    lost = set(packed(tmp_path / "whole")) - set(packed(tmp_path / "out"))
    assert {path for path, _ in lost} <= {victim}


def test_other_settings_or_sources_over_parts_are_refused(source, tmp_path):
    pack(options(source, tmp_path / "out", task=0, tasks=6))
    with pytest.raises(UserError, match=r"begun with margin=0\.3, now it is 0\.5"):
        pack(options(source, tmp_path / "out", task=1, tasks=6, margin=0.5))
    pack(options(source, tmp_path / "out"))
    with pytest.raises(UserError, match=r"begun with margin=0\.3, now it is 0\.5"):
        pack(options(source, tmp_path / "out", margin=0.5))
    assert load_manifest(tmp_path / "out").samples > 100


def test_the_command_line_says_what_it_did(source, tmp_path, capsys):
    assert main([*command(source, tmp_path / "out", "workers=1")[3:], "task=0", "tasks=2"]) == 0
    assert "task 0 of 2 is done; 3 of 6 parts are other tasks' to make" in capsys.readouterr().out
    assert main([*command(source, tmp_path / "out", "workers=1")[3:], "task=1", "tasks=2"]) == 0
    assert "crops of 222 images into 6 shards" in capsys.readouterr().out
