"""Packing whole folders: nothing lost, nothing depends on workers or interruptions, every mistake is one line."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import encode, interruptions, jpeg, scene, tree

from mcf.data.faces.writing import Settings, write_faces
from mcf.data.shards import ShardWriter, load_manifest, verify
from mcf.errors import UserError
from mcf.pack import convert, writing
from mcf.pack.__main__ import main
from mcf.pack.options import PackConfig
from mcf.pack.writing import pack

# kind of a file → (its bytes for a number, the reason it is left out for, or None)
KINDS = {
    "plain": (jpeg, None),
    "png": (lambda i: encode(scene(seed=i), "PNG"), None),
    "grey": (lambda i: encode(scene(seed=i).convert("L"), comment=b"%d" % i), None),
    "cut": (lambda i: jpeg(i)[: 900 + i], "truncated"),
    "text": (lambda i: b"notes %d" % i, "not an image"),
    "nothing": (lambda i: b"", "empty"),
    "tiny": (lambda i: jpeg(i, 31, 80), "too small"),
}


def samples(out: Path) -> dict[str, bytes]:
    """Original path → stored JPEG, read from the tars by tarfile alone."""
    found = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as content:
            members = {m.name: content.extractfile(m).read() for m in content}
        for name, body in members.items():
            if name.endswith(".json"):
                found[json.loads(body)["path"]] = members[name.removesuffix(".json") + ".jpg"]
    return found


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def source(tmp_path) -> Path:
    """24 images in three forms and four files that are out."""
    files = {f"d{i % 3}/{i}.jpg": KINDS[("plain", "png", "grey")[i % 3]][0](i) for i in range(24)}
    files |= {
        "cut.jpg": KINDS["cut"][0](1),
        "notes.txt": b"notes",
        "tiny.jpg": jpeg(1, 9, 9),
        "copy.jpg": files["d0/0.jpg"],
    }
    return fill(tmp_path / "source", files)


def options(source: Path, out: Path, **keys) -> PackConfig:
    return PackConfig(source=str(source), out=str(out), **({"workers": 1, "shard_samples": 5} | keys))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([*KINDS, "copy"]), st.sampled_from(["", "a/", "a/b/", "ü ñ/"])), max_size=30),
    st.integers(1, 7),
)
def test_kept_and_left_out_make_up_what_was_found(tmp_path, plan, shard_samples):
    root = tmp_path / "source"
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    files: dict[str, bytes] = {}
    for number, (kind, folder) in enumerate([("plain", ""), *plan]):
        content = KINDS[kind][0](number) if kind != "copy" else list(files.values())[number // 2]
        files[f"{folder}{number:02d} {kind}.jpg"] = content
    fill(root, files)
    first: dict[bytes, str] = {}
    for name in sorted(files):
        first.setdefault(files[name], name)
    kind_of = {content: kind for kind, number, content in (
        (name[:-4].split(" ")[-1], 0, files[name]) for name in files if "copy" not in name
    )}  # fmt: skip
    wanted = {
        name: "duplicate" if content and first[content] != name else KINDS[kind_of[content]][1]
        for name, content in files.items()
    }

    pack(options(root, tmp_path / "out", shard_samples=shard_samples))

    report = json.loads((tmp_path / "out/report.json").read_text())
    kept = samples(tmp_path / "out")
    assert set(kept) == {name for name, reason in wanted.items() if reason is None}
    assert {f["name"]: f["reason"] for f in report["files_left_out"]} == {n: r for n, r in wanted.items() if r}
    assert report["found"] == len(files) == report["kept"] + sum(report["left_out"].values())
    assert sum(report["shorter_side"].values()) == report["kept"] == len(kept)
    for name, content in kept.items():
        if "plain" in name:
            assert content == files[name]


def test_shards_are_full_in_the_seeds_order_and_indexed(source, tmp_path):
    manifest = pack(options(source, tmp_path / "out"))
    assert [s.samples for s in manifest.shards] == [5, 5, 5, 5, 4]
    for number, shard in enumerate(manifest.shards):
        whole = (tmp_path / "out" / shard.name).read_bytes()
        for offset, size, key in manifest.index(number):
            with Image.open(io.BytesIO(whole[offset : offset + size])) as image:
                image.load()
            assert whole[offset - 512 : offset].startswith(key + b".jpg")
    other = pack(options(source, tmp_path / "other", seed=1))
    assert sorted(samples(tmp_path / "out").items()) == sorted(samples(tmp_path / "other").items())
    assert manifest.index(0)["key"].tolist() != other.index(0)["key"].tolist()
    verify(manifest)


def test_workers_change_nothing(source, tmp_path):
    pack(options(source, tmp_path / "one"))
    pack(options(source, tmp_path / "two", workers=2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_interrupted_at_any_renaming_it_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    # Settings, then index, tar and record of five shards, two reports, the manifest.
    assert interruptions(lambda out: pack(options(source, out)), tmp_path, monkeypatch) == 1 + 5 * 3 + 2 + 1


def test_killed_with_9_it_goes_on_to_the_same_bytes(tmp_path):
    """A real process in mid-work: finished shards stay as they are, no worker is left behind."""
    large = encode(scene(900, 700))
    source = fill(tmp_path / "source", {f"{i}.jpg": large + b"%d" % i for i in range(120)})
    arguments = [f"source={source}", "shard_samples=10", "size=64", "workers=2"]
    command = [sys.executable, "-m", "mcf.pack", *arguments]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = subprocess.Popen([*command, f"out={broken}"], stdout=subprocess.DEVNULL)
    while not (broken / ".packing/shard-00002.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "manifest.json").exists()
    finished = {p.name: p.stat().st_ino for p in broken.glob("shard-0000[0-2].tar")}
    assert psutil.wait_procs(workers, timeout=20)[1] == []

    said = subprocess.run([*command, f"out={broken}"], capture_output=True, text=True, check=True).stdout
    assert "going on after" in said
    assert {name: (broken / name).stat().st_ino for name in finished} == finished
    assert main([*arguments[:-1], "workers=1", f"out={whole}"]) == 0
    assert tree(broken) == tree(whole)


def test_a_finished_folder_is_left_alone(source, tmp_path, capsys):
    pack(options(source, tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    pack(options(source, tmp_path / "out", workers=2))
    assert "packed already: 24 images in 5 shards" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def refusal(**keys) -> str:
    with pytest.raises(UserError) as caught:
        pack(PackConfig(**keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_one_line(source, tmp_path):
    out, empty, file = tmp_path / "out", tmp_path / "empty", source / "notes.txt"
    empty.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("x")
    (tmp_path / "loop").symlink_to(source)
    drawn = tmp_path / "drawn"
    list(write_faces(drawn, 1, Settings(seed=0, size=64, quality=92, images_per_person=1), workers=1))
    assert refusal(source=str(drawn), out=str(out)).endswith(f"packed as images; say source={drawn}/images")
    assert "source is missing" in refusal(out=str(out))
    assert "out is missing" in refusal(source=str(source))
    assert "no such folder" in refusal(source=str(tmp_path / "nowhere"), out=str(out))
    assert "is empty" in refusal(source=str(empty), out=str(out))
    assert "is a file" in refusal(source=str(file), out=str(out))
    assert "is a file" in refusal(source=str(source), out=str(tmp_path / "mine/letter.txt"))
    assert "lies in source" in refusal(source=str(source), out=str(source / "shards"))
    assert "lies in source" in refusal(source=str(tmp_path / "loop"), out=str(source))
    assert "lies in out" in refusal(source=str(source), out=str(tmp_path))
    assert "not written by mcf.pack" in refusal(source=str(source), out=str(tmp_path / "mine"))
    assert not out.exists()


def test_other_settings_over_existing_output_are_refused(source, tmp_path):
    out = tmp_path / "out"
    pack(options(source, out))
    for keys, told in [
        ({"quality": 80}, "quality=95, now it is 80"),
        ({"crop": "square"}, "crop=none, now it is square"),
    ]:
        with pytest.raises(UserError, match=told):
            pack(options(source, out, **keys))
    (source / "new.jpg").write_bytes(jpeg(99))
    with pytest.raises(UserError, match="has changed since"):
        pack(options(source, out))


def test_two_at_once_are_refused(source, tmp_path):
    code = "import sys, fcntl, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    (tmp_path / "out/.packing").mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out/.packing/lock")], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert "another mcf.pack" in refusal(source=str(source), out=str(tmp_path / "out"))
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_folder_of_nothing_usable_says_why_and_can_be_tried_again(tmp_path):
    source = fill(tmp_path / "source", {"a.jpg": b"text", "b.jpg": jpeg(1, 20, 20)})
    told = refusal(source=str(source), out=str(tmp_path / "out"), workers=1)
    assert "none of the 2 files" in told
    assert "1 too small" in told
    assert pack(options(source, tmp_path / "out", min_side=16)).samples == 1


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source, tmp_path, monkeypatch):
    add, added = ShardWriter.add, []

    def full(self, key, *rest):
        added.append(key)
        if len(added) == 13:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, key, *rest)

    monkeypatch.setattr(ShardWriter, "add", full)
    assert "the disk is full" in refusal(**options(source, tmp_path / "out").model_dump())
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar*")) == ["shard-00000.tar", "shard-00001.tar"]
    monkeypatch.undo()
    pack(options(source, tmp_path / "out"))
    pack(options(source, tmp_path / "whole"))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_write_that_really_fails_is_one_line(source, tmp_path):
    """The kernel refuses to let files grow over 20 kB: the error comes from the write itself, buffers and all."""
    command = [sys.executable, "-m", "mcf.pack", f"source={source}", f"out={tmp_path / 'out'}", "workers=1"]
    limits = (20_000, resource.RLIM_INFINITY)
    failed = subprocess.run(
        [*command, "shard_samples=24"],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )  # fmt: skip
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "the disk is full" in failed.stderr
    assert not list((tmp_path / "out").glob("shard*"))
    assert main([*command[3:], "shard_samples=24"]) == 0


def test_a_file_that_may_not_be_read_is_named(source, tmp_path, monkeypatch):
    def read(candidate, genuine=writing.read):
        if candidate.name == "d1/1.jpg":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return genuine(candidate)

    monkeypatch.setattr(writing, "read", read)
    assert pack(options(source, tmp_path / "out")).samples == 23
    listed = json.loads((tmp_path / "out/report.json").read_text())["files_left_out"]
    assert {"name": "d1/1.jpg", "reason": "unreadable", "detail": "Permission denied"} in listed


def test_an_error_nobody_thought_of_costs_one_image(source, tmp_path, monkeypatch):
    def prepare(content, options, genuine=convert.prepare):
        if content == jpeg(3):
            raise ZeroDivisionError("of a codec")
        return genuine(content, options)

    monkeypatch.setattr(convert, "prepare", prepare)
    assert pack(options(source, tmp_path / "out")).samples == 23
    listed = json.loads((tmp_path / "out/report.json").read_text())["files_left_out"]
    assert {"name": "d0/3.jpg", "reason": "damaged", "detail": "ZeroDivisionError: of a codec"} in listed


def test_names_of_any_bytes_are_packed_and_reported(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (b"\xff\xfe.jpg", "größe | 日本\n.jpg".encode(), b"-.jpg"):
        (source / os.fsdecode(name)).write_bytes(encode(scene(), comment=name))
        (source / os.fsdecode(b"no " + name)).write_bytes(b"no image " + name)
    assert pack(options(source, tmp_path / "out", workers=2)).samples == 3
    assert {os.fsencode(name) for name in samples(tmp_path / "out")} == {
        b"\xff\xfe.jpg", "größe | 日本\n.jpg".encode(), b"-.jpg"
    }  # fmt: skip
    page = (tmp_path / "out/report.md").read_text()
    assert page.count("| not an image |") == 4  # three files and their count


def test_the_check_at_every_start_sees_a_truncated_tar_and_verify_sees_a_changed_byte(source, tmp_path, capsys):
    out = tmp_path / "out"
    manifest = pack(options(source, out))
    tar = out / manifest.shards[2].name
    genuine = tar.read_bytes()
    changed = bytearray(genuine)
    changed[3000] ^= 1
    tar.write_bytes(changed)
    load_manifest(out)
    assert main([f"out={out}", "verify=true"]) == 2
    assert "shard-00002.tar: its checksum" in capsys.readouterr().err
    tar.write_bytes(genuine[:-512])
    with pytest.raises(UserError, match="truncated or changed"):
        load_manifest(out)
    tar.write_bytes(genuine)
    assert main([f"out={out}", "verify=true"]) == 0


def test_the_remedy_for_damage_gives_the_same_data_again(source, tmp_path, capsys):
    out = tmp_path / "out"
    before = pack(options(source, out)).fingerprint
    (out / "shard-00001.index.npy").unlink()
    assert main([f"source={source}", f"out={out}"]) == 2
    assert f"delete {out} and pack it again" in capsys.readouterr().err
    shutil.rmtree(out)
    assert pack(options(source, out)).fingerprint == before


def test_the_command_line_packs_and_refuses(source, tmp_path, capsys):
    assert main([f"source={source}", f"out={tmp_path / 'out'}", "crop=square", "size=48", "workers=1"]) == 0
    said = capsys.readouterr().out
    assert "packed 24 of 28 files" in said
    assert "1 truncated" in said
    for content in samples(tmp_path / "out").values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (48, 48)
    assert main([f"source={source}", f"out={tmp_path / 'b'}", "qualty=3"]) == 2
    assert "quality" in capsys.readouterr().err


def test_dali_decodes_every_kept_sample(tmp_path):
    """The reader of training takes all that was kept, also what came in odd forms, and sees the same pixels."""
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    from nvidia.dali import fn, pipeline_def

    exif = Image.Exif()
    exif[0x0112] = 8
    files = {f"{kind}.jpg": make(1) for kind, (make, _) in KINDS.items()}
    files |= {
        "turned.jpg": encode(scene(), exif=exif),
        "upright.jpg": encode(scene(), exif=Image.Exif(), comment=b"u"),
        "progressive.jpg": encode(scene(), progressive=True),
        "cmyk.jpg": encode(Image.new("CMYK", (50, 50), (9, 99, 199, 9))),
        "clear.png": encode(scene().convert("RGBA"), "PNG"),
        "restart.jpg": encode(scene(), restart_marker_rows=1),
        "after.jpg": jpeg(5) + b"bytes after the end",
        "444.jpg": encode(scene(), subsampling="4:4:4", comment=b"4"),
    }
    pack(options(fill(tmp_path / "source", files), tmp_path / "out"))
    kept = list(samples(tmp_path / "out").values())
    assert len(kept) == 11

    @pipeline_def(batch_size=len(kept), num_threads=1, device_id=None)
    def pipeline():
        jpegs = fn.external_source(source=lambda: [np.frombuffer(k, np.uint8) for k in kept], batch=True)
        return fn.decoders.image(jpegs, device="cpu")

    reader = pipeline()
    reader.build()
    (decoded,) = reader.run()
    for content, image in zip(kept, decoded):
        with Image.open(io.BytesIO(content)) as wanted:
            # Both are libjpeg-turbo; chroma upsampling may differ by a few levels at edges.
            assert np.abs(np.asarray(wanted).astype(int) - np.asarray(image)).mean() < 2
