"""The reader against the order and the shards, and against files that vanish, shrink and fail."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_shards import make_jpeg

from mcf.data.order import Order, Segment
from mcf.data.reader import Reader, ShardFiles
from mcf.data.shards import load_manifest
from mcf.data.storage import Local


def make(folder, *, rank=0, world_size=1, start=0, batch=8, streams=4, window=6, ahead=8, **more):
    manifest = load_manifest(folder)
    order = Order(manifest.counts, batch=batch, streams=streams, window=window, seed=3)
    return Reader(manifest, order, rank=rank, world_size=world_size, start=start, ahead=ahead, pauses=(0.01,), **more)


def take(reader, count):
    try:
        return reader.take(count)
    finally:
        reader.close()


def test_gives_the_bytes_that_the_order_names(shards):
    folder = shards(13, 5, 21, 9)
    reader = make(folder)
    for sample in take(reader, 100):  # through two epochs and a bit
        _, shard, row = reader.order.locate(sample.position)
        assert sample.stored.key == f"s{shard}r{row}"
        assert sample.stored.jpeg.tobytes() == make_jpeg(shard * 1000 + row)


def test_no_thread_parses_python(shards, monkeypatch):
    """CPython 3.11's parser fails now and then in several threads at once; NumPy reads headers with it."""
    reader = make(shards(13, 5))
    monkeypatch.setattr("ast.parse", lambda *_, **__: pytest.fail("a header was parsed as Python"))
    assert all(sample.stored.jpeg is not None for sample in take(reader, 18))


def test_the_header_of_an_index_is_read_as_numpy_reads_it(shards):
    files = ShardFiles(load_manifest(shards(13, 5)))
    for shard in range(2):
        rows = files.manifest.index(shard)
        dtype, data, count = files._read_header(shard, files.storage)
        assert (dtype, count) == (rows.dtype, len(rows)) and data == rows.offset


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("start", [0, 24, 64])
def test_ranks_share_the_positions_and_restarts_change_nothing(shards, world_size, start):
    folder = shards(13, 5, 21, 9)
    alone = {s.position: s.stored.key for s in take(make(folder), 160)}
    together = {}
    for rank in range(world_size):
        samples = take(make(folder, rank=rank, world_size=world_size, start=start), 64 // world_size)
        assert [s.position for s in samples] == list(range(start + rank, start + 64, world_size))
        together |= {s.position: s.stored.key for s in samples}
    assert together == {p: alone[p] for p in range(start, start + 64)}


def test_one_read_a_window_and_shard_and_bounded_memory(shards, monkeypatch):
    folder = shards(64, 64, 64, 64, meta=False)
    reader = make(folder, batch=16, streams=4, window=16, ahead=8)
    reads = []
    plain = Local.read
    monkeypatch.setattr(Local, "read", lambda self, name, *a: reads.append(Path(name).suffix) or plain(self, name, *a))
    most = 0
    for _ in range(60):
        reader.take(4)
        most = max(most, len(reader._open))
    reader.close()
    # 240 + 8 samples of 4 streams are 62 a stream: 4 or 5 windows each, of which the 3 ends of shards cut some in two.
    assert 16 <= reads.count(".tar") <= 20 + 3
    # A window in use a stream; with 2 samples a stream in sight at most one stream more has begun its next.
    assert most <= 5


def test_a_read_that_fails_once_is_tried_again(shards, monkeypatch):
    folder = shards(20)
    reader = make(folder)
    plain, failed = os.pread, []

    def flaky(descriptor, size, offset):
        if not failed:
            failed.append(offset)
            raise OSError(116, "Stale file handle")
        return plain(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert all(sample.stored.jpeg is not None for sample in take(reader, 16))
    assert failed


def test_a_shard_that_is_gone_makes_bad_samples_with_their_names(shards):
    folder = shards(20, 20)
    reader = make(folder)
    (folder / "shard-00001.tar").unlink()
    samples = take(reader, 40)
    bad = [s.stored for s in samples if s.stored.jpeg is None]
    assert sorted(s.key for s in bad) == sorted(f"s1r{row}" for row in range(20))
    assert all("shard-00001.tar" in s.error and "No such file" in s.error for s in bad)
    assert all(s.stored.key.startswith("s0") for s in samples if s.stored.jpeg is not None)


def test_a_shard_that_shrinks_loses_only_what_lay_beyond(shards):
    folder = shards(20)
    tar = folder / "shard-00000.tar"
    index = np.load(folder / "shard-00000.index.npy")
    reader = make(folder, window=20, streams=1)
    os.truncate(tar, int(index["offset"][12]) + 5)
    samples = [s.stored for s in take(reader, 16)]
    assert {s.row for s in samples if s.jpeg is None} == {s.row for s in samples if s.row >= 12}
    assert all("file ends" in s.error for s in samples if s.jpeg is None)


@pytest.mark.parametrize("how", ["deleted", "short", "shuffled", "text"])
def test_a_damaged_index_is_no_crash(shards, how):
    folder = shards(20, 20)
    path = folder / "shard-00001.index.npy"
    reader = make(folder)
    if how == "deleted":
        path.unlink()
    elif how == "short":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "text":
        path.write_text("not an index")
    else:
        index = np.load(path)
        index["offset"][7] = 1 << 60
        np.save(path, index)
    samples = [s.stored for s in take(reader, 40)]
    bad = [s for s in samples if s.jpeg is None]
    assert bad and {s.shard for s in bad} == {1}
    assert all("index of shard-00001.tar" in s.error for s in bad)


def test_neighbours_depend_on_the_place_alone_and_skip_what_cannot_be_read(shards):
    folder = shards(4, 3, 5)
    reader = make(folder, batch=4)
    assert [s.key for s in reader.neighbours(0, 2)] == ["s0r3", "s0r0", "s0r1", "s1r0", "s2r0"]
    (folder / "shard-00000.tar").unlink()
    assert [s.key for s in reader.neighbours(0, 2)] == ["s1r0", "s2r0"]
    assert [s.key for s in reader.neighbours(2, 4, limit=2)] == ["s2r0"]
    reader.close()


def test_close_does_not_wait_for_storage_that_fails(shards):
    folder = shards(20, 20)
    manifest = load_manifest(folder)
    (folder / "shard-00000.tar").unlink()
    order = Order(manifest.counts, batch=8, streams=4, window=6, seed=3)
    reader = Reader(manifest, order, rank=0, world_size=1, pauses=(60.0, 60.0))
    reader._plan(40)
    began = time.perf_counter()
    reader.close()
    assert time.perf_counter() - began < 5
    assert not [t for t in threading.enumerate() if t.name.startswith("mcf-read")]


def test_a_segment_is_read_in_the_order_of_its_rows(shards):
    files = ShardFiles(load_manifest(shards(9)))
    assert [s.key for s in files.read(Segment(0, 3, 4))] == ["s0r3", "s0r4", "s0r5", "s0r6"]
