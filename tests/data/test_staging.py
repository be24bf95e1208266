"""Staged copies: what is needed next is there in time, never more than the budget, and nothing depends on it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import shutil
import time

import numpy as np
import pytest
from data_shards import damage

from mcf.config import DataConfig
from mcf.data import reader, staging
from mcf.data.loader import Loader
from mcf.data.order import Order
from mcf.data.shards import index_path, load_manifest
from mcf.data.staging import Stage, needs
from mcf.data.storage import Local

COUNTS = (30, 17, 44, 25, 38, 21, 40, 26)  # 241 samples
SETTINGS = {"batch": 16, "micro_batch": 4, "seed": 5, "image_size": 32, "device": "cpu", "pauses": (0.01,)}


@pytest.fixture
def folder(shards):
    return shards(*COUNTS)


def make(folder, rank=0, world_size=1, start=0, **data) -> Loader:
    data = {"streams": 4, "window": 6, "threads": 1, "prefetch": 1, "max_bad": 0.5} | data
    config = DataConfig(path=str(folder), **data)
    return Loader(config, rank=rank, world_size=world_size, start=start, **SETTINGS)


def read(loader, samples) -> list[tuple[int, str, str]]:
    found: list = []
    for batch in loader:
        hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
        found += zip(batch.positions.tolist(), batch.keys, hashes)
        if len(found) >= samples:
            break
    loader.close()
    return found


def size_of(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 80, 480])
def test_needs_are_those_that_the_order_names_in_the_order_of_their_use(world_size, start):
    """Against locate(), position by position, through two epochs."""
    order = Order(np.array(COUNTS), batch=16, streams=4, window=6, seed=3)
    for rank in range(world_size):
        stretches = list(
            itertools.takewhile(
                lambda need: need.begin < 2 * order.span + start // 4, needs(order, rank, world_size, start)
            )
        )
        assert [need.begin for need in stretches] == sorted(need.begin for need in stretches)
        spans: dict[int, list] = {}
        for need in stretches:
            spans.setdefault(need.shard, []).append((need.begin, need.end))
        for position in range(start + rank, start + 2 * order.samples_per_epoch, world_size):
            shard = order.locate(position).shard
            # Windows give their samples in another order than they lie: a tick may lie a window off.
            tick = position // 4
            assert any(begin - 6 <= tick < end + 6 for begin, end in spans[shard]), (position, shard)


def test_a_staged_run_reads_the_same_and_from_the_copies(folder, tmp_path, monkeypatch):
    plain = read(make(folder), 480)
    reads: dict[str, int] = {}
    genuine = Local.read
    monkeypatch.setattr(
        Local,
        "read",
        lambda self, name, *a: (
            reads.update({str(self.folder): reads.get(str(self.folder), 0) + 1}) or genuine(self, name, *a)
        ),
    )
    loader = make(folder, stage=str(tmp_path / "stage"), stage_gb=1.0)
    batches = iter(loader)
    first = next(batches)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "stage").rglob("*.tar"))) < len(COUNTS):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reads.clear()
    found = list(zip(first.positions.tolist(), first.keys))
    for batch in itertools.islice(batches, 119):
        found += zip(batch.positions.tolist(), batch.keys)
    loader.close()
    assert found == [item[:2] for item in plain]
    assert (
        reads.get(str(folder), 0) == 0 and sum(reads.values()) > 50
    )  # all shards are there: no read goes to the source


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_the_budget_is_kept_and_what_was_read_makes_room(folder, tmp_path, share, monkeypatch):
    monkeypatch.setattr(staging, "_WAIT", 0.001)
    plain = read(make(folder), 720)
    budget = share * size_of(folder) + 100 * max(COUNTS) + 256  # the room an index is given before it is there
    stage, most = tmp_path / "stage", 0
    loader = make(folder, stage=str(stage), stage_gb=budget / 1e9)
    made: list[Stage] = []
    genuine = Loader.stage
    monkeypatch.setattr(Loader, "stage", lambda self: made.append(genuine(self)) or made[-1])
    found = []
    for batch in loader:
        hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
        found += zip(batch.positions.tolist(), batch.keys, hashes)
        time.sleep(0.01)
        for _ in range(3):  # files vanish under rglob
            try:
                most = max(most, size_of(stage))
                break
            except FileNotFoundError:
                continue
        if len(found) >= 720:
            break
    loader.close()
    assert found == plain
    assert 0 < most <= budget
    assert made[0].copied > len(COUNTS) / 2  # over three epochs far more than fits at once


@pytest.mark.parametrize("world_size", [2])
def test_ranks_stage_for_themselves_and_see_the_same(folder, tmp_path, world_size):
    plain = read(make(folder), 320)
    found = []
    for rank in range(world_size):
        found += read(make(folder, rank, world_size, stage=str(tmp_path / "stage")), 320 // world_size)
    assert sorted(found) == plain
    fingerprint = load_manifest(folder).fingerprint
    assert sorted(p.name for p in (tmp_path / "stage" / fingerprint).iterdir()) == ["rank-0", "rank-1"]


@pytest.mark.parametrize("how", ["deleted", "truncated", "index gone"])
def test_a_copy_that_is_damaged_costs_nothing_but_time(folder, tmp_path, how, caplog):
    plain = read(make(folder), 480)
    loader = make(folder, stage=str(tmp_path / "stage"))
    found = []
    with caplog.at_level(logging.WARNING):
        for number, batch in enumerate(loader):
            if number == 30:
                for tar in (tmp_path / "stage").rglob("*.tar"):
                    if how == "deleted":
                        tar.unlink()
                    elif how == "truncated":
                        with tar.open("r+b") as file:
                            file.truncate(600)
                    else:
                        index_path(tar).unlink()
            found += zip(batch.positions.tolist(), batch.keys)
            if len(found) >= 480:
                break
    loader.close()
    assert found == [item[:2] for item in plain]
    assert loader.take_bad() == []
    if how != "index gone":  # an index whose header is known is read by windows, and those may be done
        assert "cannot be read; reading the source" in caplog.text


@pytest.mark.parametrize("what", ["*.tar", "*.index.npy"])
def test_a_copy_that_is_zeroed_while_it_is_read_costs_nothing_but_time(folder, tmp_path, what, caplog):
    plain = read(make(folder), 480)
    loader = make(folder, stage=str(tmp_path / "stage"))
    found: list = []
    with caplog.at_level(logging.WARNING):
        for number, batch in enumerate(loader):
            if number == 30:
                for file in (tmp_path / "stage").rglob(what):
                    file.write_bytes(bytes(file.stat().st_size))
            hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
            found += zip(batch.positions.tolist(), batch.keys, hashes)
            if len(found) >= 480:
                break
    loader.close()
    assert found == plain
    assert loader.take_bad() == []
    assert "cannot be read; reading the source" in caplog.text


def test_copies_that_are_damaged_between_two_runs_are_made_anew(folder, tmp_path):
    """Bytes that flip: many of these pictures can be decoded, and are others."""
    plain = read(make(folder), 480)
    read(make(folder, stage=str(tmp_path / "stage")), 480)
    rng = np.random.default_rng(0)
    files = [*(tmp_path / "stage").rglob("*.tar"), *(tmp_path / "stage").rglob("*.index.npy")]
    for file in files:
        content = bytearray(file.read_bytes())
        for place in rng.integers(128, len(content), len(content) // 200):
            content[place] ^= 0x10
        file.write_bytes(content)
    assert len(files) > len(COUNTS)
    loader = make(folder, stage=str(tmp_path / "stage"))
    assert read(loader, 480) == plain
    assert loader.take_bad() == []


def test_a_source_that_is_damaged_is_not_staged(folder, tmp_path, caplog):
    damage(folder, 2, 5, lambda old: bytes(len(old)))
    loader = make(folder, stage=str(tmp_path / "stage"))
    with caplog.at_level(logging.WARNING):
        read(loader, 480)
    assert "shard-00002.tar is not what the manifest says; it is not staged" in caplog.text
    assert not list((tmp_path / "stage").rglob("shard-00002*"))
    assert {bad.key for bad in loader.take_bad()} == {"s2r5"}


def test_a_stage_that_cannot_be_written_is_said_and_training_goes_on(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    plain = read(make(folder), 160)
    with caplog.at_level(logging.WARNING):
        assert read(make(folder, stage=str(tmp_path / "file/stage")), 160) == plain
    assert "shards are read from their source" in caplog.text


def test_copies_of_an_earlier_run_are_used_and_leftovers_go(folder, tmp_path, monkeypatch):
    read(make(folder, stage=str(tmp_path / "stage")), 480)
    (inside,) = (tmp_path / "stage").glob("*/rank-0")
    (inside / "shard-00001.tar.tmp").write_bytes(b"half")
    (inside / "shard-00003.tar").write_bytes(b"of another size")
    fetched = []
    genuine = Local.fetch
    monkeypatch.setattr(Local, "fetch", lambda self, name, target: fetched.append(name) or genuine(self, name, target))
    plain = read(make(folder), 480)
    loader = make(folder, stage=str(tmp_path / "stage"))
    assert read(loader, 480) == plain
    assert {name for name in fetched if name.endswith(".tar")} <= {"shard-00003.tar"}
    assert not list(inside.glob("*.tmp"))


@pytest.mark.parametrize(("share", "local_ranks"), [(0.5, 1), (1.0, 2)])
def test_copies_of_an_earlier_run_that_had_more_room_go_at_the_start(folder, tmp_path, share, local_ranks):
    """All shards are there; then the budget is smaller, or as large and shared by the ranks of the machine."""
    whole = make(folder, stage=str(tmp_path / "stage")).stage()
    deadline = time.monotonic() + 60
    while whole.copied < len(COUNTS):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    whole.close()
    size = size_of(tmp_path / "stage")
    data = DataConfig(path=str(folder), streams=4, window=6, stage=str(tmp_path / "stage"), stage_gb=share * size / 1e9)
    less = Loader(data, rank=0, world_size=1, local_ranks=local_ranks, **SETTINGS).stage()

    def fits() -> bool:
        with contextlib.suppress(FileNotFoundError):  # files vanish under rglob
            return size_of(tmp_path / "stage") <= size / 2
        return False

    # Not at once: what is there is read in full first.
    while not fits():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    less.close()
    assert 0 < size_of(tmp_path / "stage") <= size / 2


def test_it_is_off_by_default(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "Stage", None)
    monkeypatch.setattr(staging.Stage, "__init__", lambda *a, **k: pytest.fail("staged"))
    read(make(folder), 32)
    assert DataConfig().stage is None
    shutil.rmtree(tmp_path / "shards")
