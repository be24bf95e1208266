"""The format of shards: what a writer puts down, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import tarfile

import numpy as np
import pytest
from power import Disk

from mcf.data.shards import MANIFEST, UNFINISHED, Shard, ShardWriter, index_path, load_manifest, verify, write_manifest
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE

SAMPLES = [("first-1", b"\xff\xd8one"), ("second_2", b"\xff\xd8" + bytes(700)), ("third", b"\xff\xd8three")]


def write(folder, name="shard-00000.tar", samples=SAMPLES) -> Shard:
    with ShardWriter(folder / name) as writer:
        for number, (key, jpeg) in enumerate(samples):
            writer.add(key, jpeg, {"path": f"{number}.jpg"})
        return writer.close()


@pytest.fixture
def folder(tmp_path):
    write_manifest(tmp_path, [write(tmp_path), write(tmp_path, "shard-00001.tar", SAMPLES[:2])], {"by": "a test"})
    return tmp_path


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_manifest(folder).index(0)
    return str(caught.value)


def test_a_shard_is_a_plain_tar_and_its_index_points_into_it(folder):
    manifest = load_manifest(folder)
    assert (manifest.samples, manifest.counts.tolist(), manifest.meta) == (5, [3, 2], {"by": "a test"})
    with tarfile.open(folder / "shard-00000.tar") as tar:
        assert tar.getnames() == [f"{key}.{end}" for key, _ in SAMPLES for end in ("jpg", "json")]
        assert json.load(tar.extractfile("second_2.json")) == {"path": "1.jpg"}
    raw = (folder / "shard-00000.tar").read_bytes()
    rows = manifest.index(0)
    assert isinstance(rows, np.memmap)
    assert [(key.decode(), raw[offset : offset + size]) for offset, size, key in rows] == SAMPLES
    verify(manifest)


def test_equal_samples_give_equal_bytes_and_the_same_fingerprint(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_manifest(other, [write(other), write(other, "shard-00001.tar", SAMPLES[:2])], {"by": "somebody else"})
    assert (folder / "shard-00000.tar").read_bytes() == (other / "shard-00000.tar").read_bytes()
    assert load_manifest(folder).fingerprint == load_manifest(other).fingerprint
    write_manifest(other, [write(other, samples=SAMPLES[::-1])], {})
    assert load_manifest(folder).fingerprint != load_manifest(other).fingerprint


def test_one_byte_of_one_image_makes_other_data(folder, tmp_path_factory):
    """Of equal length, under the same names: a run must not go on with it."""
    other = tmp_path_factory.mktemp("other")
    changed = [SAMPLES[0], ("second_2", b"\xff\xd8" + bytes(699) + b"\1"), SAMPLES[2]]
    write_manifest(other, [write(other, samples=changed), write(other, "shard-00001.tar", SAMPLES[:2])], {})
    ours, theirs = load_manifest(folder), load_manifest(other)
    assert [(s.name, s.samples, s.bytes) for s in ours.shards] == [(s.name, s.samples, s.bytes) for s in theirs.shards]
    assert ours.fingerprint != theirs.fingerprint


def test_a_tar_whose_index_cannot_be_written_is_not_put_in_place(tmp_path):
    tar = tmp_path / "shard-00000.tar"
    index_path(tar).mkdir()
    with pytest.raises(OSError):
        write(tmp_path)
    assert not tar.exists()


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "shard-00000.tar") as writer:
        writer.add(*SAMPLES[0])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_no_file_has_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """So a power loss leaves whole files or none, and never a tar without its index."""
    disk = Disk(monkeypatch)
    write_manifest(tmp_path, [write(tmp_path)], {})
    names = "shard-00000.index.npy", "shard-00000.tar", MANIFEST
    assert [new for _, new in disk.renamed] == list(names)
    assert all(old.startswith(new) and old.endswith(".tmp") for old, new in disk.renamed)
    assert all(disk.has(tmp_path / name) for name in names)


def test_folders_that_are_not_packed(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "the folder is empty" in refused(tmp_path)
    (tmp_path / "x").write_text("x")
    # The remedy can be typed: mcf.pack writes into no folder that holds something else.
    assert f"no {MANIFEST}" in refused(tmp_path)
    assert "out=NEW_FOLDER" in refused(tmp_path)
    assert "is a file" in refused(tmp_path / "x")
    (tmp_path / UNFINISHED).mkdir()
    assert "packing has not ended" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1, "shards": [{"name": "a"}]}', '{"shards": []}'])
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    assert "damaged manifest" in refused(tmp_path)


def test_manifests_that_cannot_be_used(folder):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"format": 99}))
    assert "format 99" in refused(folder)
    (folder / MANIFEST).write_text(json.dumps(content | {"shards": []}))
    assert "no samples" in refused(folder)


def test_files_that_do_not_fit_the_manifest(folder):
    tar, index = folder / "shard-00000.tar", index_path(folder / "shard-00000.tar")
    genuine, rows = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(genuine[:-1])
    assert "truncated or changed" in refused(folder)
    tar.unlink()
    assert "not there" in refused(folder)
    tar.write_bytes(genuine)
    index.write_bytes(rows[:40])
    assert "unreadable index" in refused(folder)
    np.save(index, np.load(index_path(folder / "shard-00001.tar")))
    assert "2 samples" in refused(folder)
    index.unlink()
    assert "not there" in refused(folder)


def test_verify_finds_one_changed_byte_and_an_index_of_another_tar(folder):
    tar, index = folder / "shard-00001.tar", index_path(folder / "shard-00001.tar")
    genuine, rows = bytearray(tar.read_bytes()), np.load(index)
    genuine[600] ^= 1
    tar.write_bytes(genuine)
    with pytest.raises(UserError, match=r"shard-00001\.tar: its checksum"):
        verify(load_manifest(folder))
    genuine[600] ^= 1
    tar.write_bytes(genuine)
    rows["offset"][1] += 512
    np.save(index, rows)
    with pytest.raises(UserError, match=r"index\.npy: does not fit"):
        verify(load_manifest(folder))


@pytest.mark.parametrize("how", ["gone", "truncated", "index gone"])
def test_a_run_that_has_begun_bears_shards_that_went_up_to_a_share(shards, how, caplog):
    """17 of 116 samples are 14.7 %."""
    folder = shards(30, 17, 44, 25)
    tar = folder / "shard-00001.tar"
    whole = load_manifest(folder).fingerprint
    if how == "truncated":
        os.truncate(tar, 2000)
    else:
        (tar if how == "gone" else index_path(tar)).unlink()
    for lost in (0.0, 0.14):
        with pytest.raises(UserError, match=r"shard-00001\.(tar|index\.npy): (named by|2000 bytes)"):
            load_manifest(folder, lost=lost)
    assert not caplog.records
    assert load_manifest(folder, lost=0.15).fingerprint == whole
    assert "shard-00001." in caplog.text and "its samples are bad" in caplog.text


def test_storage_that_does_not_answer_at_the_start_is_to_be_tried_again(shards):
    """The first page of a process's memory cannot be read: EIO, for real."""
    folder = shards(4)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("/proc/self/mem")
    with pytest.raises(
        UserError, match=r"manifest\.json: cannot be read \(Input/output error\); launch again"
    ) as caught:
        load_manifest(folder)
    assert caught.value.status == UNAVAILABLE
