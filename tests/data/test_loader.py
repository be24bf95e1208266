"""The promises of the data order on the real loader: ranks, micro-batches, restarts, damage. DALI decodes real JPEGs."""

import gc
import io
import itertools
import shutil
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from data_shards import damage, make_jpeg
from PIL import Image

from mcf.config import DataConfig
from mcf.data.dali import Decoder
from mcf.data.loader import Loader, _with_index
from mcf.errors import UserError

BATCH, STREAMS, WINDOW, SIZE = 16, 8, 6, 32
COUNTS = (30, 17, 44, 25)  # 116 samples, 7 steps an epoch, 4 samples left out


def make(folder, *, batch=BATCH, micro_batch=4, seed=5, rank=0, world_size=1, start=0, streams=STREAMS, **data):
    data = {"window": WINDOW, "threads": 2, "prefetch": 2} | data
    return Loader(
        DataConfig(path=str(folder), streams=streams, **data),
        batch=batch,
        micro_batch=micro_batch,
        seed=seed,
        image_size=SIZE,
        rank=rank,
        world_size=world_size,
        device="cpu",
        start=start,
        pauses=(0.01,),
    )


def read(loader, samples) -> dict[int, tuple[str, torch.Tensor]]:
    """position → (key, image) of the next samples of a loader, in the order they come."""
    result = {}
    for batch in loader:
        for position, key, image in zip(batch.positions.tolist(), batch.keys, batch.images):
            assert position not in result
            result[position] = (key, image.clone())
        if len(result) >= samples:
            break
    loader.close()
    return result


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[p][0] == other[p][0] and torch.equal(one[p][1], other[p][1]) for p in one
    )


@pytest.fixture
def folder(shards):
    return shards(*COUNTS)


@pytest.fixture
def alone(folder):
    """The first 20 steps as one rank reads them in one go: the third epoch has begun."""
    return read(make(folder), 20 * BATCH)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_ranks_sees_the_same_samples_flips_and_pixels(folder, alone, world_size):
    together = {}
    for rank in range(world_size):
        mine = read(make(folder, rank=rank, world_size=world_size, micro_batch=2), 20 * BATCH // world_size)
        assert list(mine) == list(range(rank, 20 * BATCH, world_size))
        together |= mine
    assert same(together, alone)


def test_micro_batches_of_all_ranks_are_runs_of_positions(folder):
    """Contrast within a micro-batch meets the same neighbours on any number of ranks, if the global size is the same."""
    loaders = [make(folder, rank=rank, world_size=2, micro_batch=4) for rank in range(2)]
    for index, batches in enumerate(itertools.islice(zip(*loaders), 9)):
        assert sorted(torch.cat([b.positions for b in batches]).tolist()) == list(range(8 * index, 8 * index + 8))
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("settings", [{"micro_batch": 1}, {"micro_batch": 16}, {"prefetch": 7}, {"threads": 1}])
def test_micro_batch_threads_and_prefetch_change_nothing(folder, alone, settings):
    assert same(read(make(folder, **settings), 20 * BATCH), alone)


@pytest.mark.parametrize("step", [1, 2, 6, 7, 13, 18])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_restart_at_any_step_goes_on_where_it_was(folder, alone, step, world_size):
    start = step * BATCH
    rest = {}
    for rank in range(world_size):
        loader = make(folder, rank=rank, world_size=world_size, start=start)
        rest |= read(loader, (20 * BATCH - start) // world_size)
    rest = {p: v for p, v in rest.items() if p < 20 * BATCH}
    assert same(rest, {p: v for p, v in alone.items() if p >= start})


def test_pictures_are_those_of_their_keys_and_half_are_mirrored(folder, alone):
    """Against files decoded here, without the loader's own order, reader or decoder."""
    mirrored = 0
    for key, image in alone.values():
        shard, row = map(int, key[1:].split("r"))
        jpeg = Image.open(io.BytesIO(make_jpeg(shard * 1000 + row)))
        expected = torch.from_numpy(np.array(jpeg.resize((SIZE, SIZE), Image.Resampling.BILINEAR))).int()
        plain, flipped = ((image.int() - picture).abs().max() for picture in (expected, expected.flip(1)))
        assert min(plain, flipped) <= 3 < max(plain, flipped)  # DALI and Pillow round differently, by 2 at most
        mirrored += bool(flipped < plain)
    # 320 fair coins: 160 ± 9; six standard deviations.
    assert abs(mirrored - len(alone) / 2) < 54


def test_flips_are_drawn_anew_each_epoch_and_can_be_turned_off(folder):
    plain = read(make(folder, flip=0.0), 112 * 2)
    flipped = read(make(folder, flip=1.0), 112 * 2)
    assert [key for key, _ in plain.values()] == [key for key, _ in flipped.values()]
    for (_, one), (_, other) in zip(plain.values(), flipped.values()):
        assert (one.int() - other.flip(1).int()).abs().max() <= 1
    half = read(make(folder, flip=0.5), 112 * 2)
    by_key: dict[str, list[bool]] = {}
    for position, (key, image) in half.items():
        by_key.setdefault(key, []).append(torch.equal(image, flipped[position][1]))
    twice = [flips for flips in by_key.values() if len(flips) == 2]
    assert len(twice) > 90
    assert 0.3 < np.mean([one != other for one, other in twice]) < 0.7


def test_an_epoch_gives_each_sample_at_most_once_and_epochs_and_seeds_differ(folder, alone):
    keys = [key for key, _ in alone.values()]
    first, second = keys[:112], keys[112:224]
    assert len(set(first)) == len(set(second)) == 112
    # Should the four shards come in the same order twice, each of the 27 windows still agrees in one place on average.
    assert sum(a == b for a, b in zip(first, second)) < 56
    other = [key for key, _ in read(make(folder, seed=6), 112).values()]
    assert sum(a == b for a, b in zip(first, other)) < 56


# ------------------------------------------------------------------------------------------------------------ damage


def truncate(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2] + b"\xff\xd9".ljust(len(jpeg) - len(jpeg) // 2, b"\0")


def zero_header(jpeg: bytes) -> bytes:
    return b"\0" * (len(jpeg) // 2)


def garble(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return bytes(byte ^ 0xFF if i > at else byte for i, byte in enumerate(jpeg))


@pytest.mark.parametrize("how", [truncate, zero_header, garble])
def test_a_broken_image_is_named_counted_and_replaced_and_nothing_else_changes(folder, alone, how):
    damage(folder, 2, 20, how)
    loader = make(folder, max_bad=0.05)
    now = read(loader, 20 * BATCH)
    hit = [p for p, (key, _) in alone.items() if key == "s2r20"]
    assert 2 <= len(hit) <= 3  # it comes up once an epoch
    assert [key for key, _ in now.values()] == [key for key, _ in alone.values()]
    assert same({p: v for p, v in now.items() if p not in hit}, {p: v for p, v in alone.items() if p not in hit})

    bad = [b for b in loader.take_bad() if b.position < 20 * BATCH]
    assert [b.position for b in bad] == hit
    assert {(b.shard, b.row, b.key, b.substitute) for b in bad} == {("shard-00002.tar", 20, "s2r20", "s2r21")}
    assert loader.take_bad() == []
    stand_in = next(image for key, image in alone.values() if key == "s2r21")
    for position in hit:
        image = now[position][1].int()
        assert min((image - stand_in.int()).abs().max(), (image - stand_in.flip(1).int()).abs().max()) <= 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_picture_shown_instead_is_the_same_on_any_number_of_ranks_and_after_a_restart(folder, world_size):
    for row in (20, 21, 22):
        damage(folder, 2, row, truncate)
    damage(folder, 0, 29, zero_header)
    alone = read(make(folder, max_bad=0.2), 8 * BATCH)
    together = {}
    for rank in range(world_size):
        loader = make(folder, rank=rank, world_size=world_size, micro_batch=2, max_bad=0.2)
        together |= read(loader, 8 * BATCH // world_size)
    assert same(together, alone)
    assert same(read(make(folder, start=BATCH, max_bad=0.2), 7 * BATCH), {p: alone[p] for p in alone if p >= BATCH})


def test_too_many_bad_images_stop_the_run_and_are_named(folder):
    for row in range(8):
        damage(folder, 2, row, truncate)
    with pytest.raises(UserError) as error:
        read(make(folder, max_bad=0.05), 112)
    message = str(error.value)
    assert "6 of " in message and "data.max_bad=0.05" in message
    assert message.count(" in shard-00002.tar (") == 5


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("start", [0, 32, 96])
def test_a_damaged_shard_that_may_be_stops_no_run_whoever_reads_it_and_since_when(shards, world_size, start):
    """25 of 1,000 samples, one after another, which are in the streams of a rank or two: data.max_bad is 3 %."""
    folder = shards(200, 200, 200, 200, 200, meta=False)
    for row in range(40, 65):
        damage(folder, 2, row, zero_header)
    found = set()
    for rank in range(world_size):
        loader = make(folder, rank=rank, world_size=world_size, micro_batch=2, start=start, max_bad=0.03)
        read(loader, 1000 // world_size)
        found |= {bad.key for bad in loader.take_bad()}
    assert len(found) > 10


def test_bad_samples_are_told_up_to_a_position_and_later_ones_kept_back(folder):
    for row in range(10, 30):
        damage(folder, 2, row, zero_header)
    every = make(folder, max_bad=0.5)
    read(every, 10 * BATCH)
    wanted = [bad.position for bad in every.take_bad(before=10 * BATCH)]
    assert wanted == sorted(wanted) and len(wanted) > 20

    loader = make(folder, max_bad=0.5, micro_batch=BATCH, prefetch=20)
    batches, taken = iter(loader), []
    for step in range(1, 11):
        next(batches)
        part = [bad.position for bad in loader.take_bad(before=step * BATCH)]
        assert all((step - 1) * BATCH <= position < step * BATCH for position in part)
        taken += part
    loader.close()
    assert taken == wanted


def test_one_bad_image_stops_no_run_however_often_it_comes_up(folder, alone):
    """116 samples, the default data.max_bad of 1 %: twice by position 120, three times by 336."""
    key = alone[7 * BATCH + 8][0]
    damage(folder, int(key[1]), int(key[3:]), truncate)
    loader = make(folder)
    assert same({p: v for p, v in read(loader, 21 * BATCH).items() if v[0] != key},
                {p: v for p, v in read(make(folder, max_bad=1), 21 * BATCH).items() if v[0] != key})  # fmt: skip
    assert [bad.key for bad in loader.take_bad() if bad.position < 21 * BATCH] == [key] * 3


def test_a_shard_deleted_while_running(folder):
    loader = make(folder, max_bad=0.01)
    batches = iter(loader)
    next(batches)
    (folder / "shard-00002.tar").unlink()
    with pytest.raises(UserError, match=r"s2r\d+ in shard-00002\.tar \(shard-00002\.tar: No such file"):
        for _ in range(200):
            next(batches)
    assert own_threads() == []


def test_a_shard_deleted_while_running_is_left_out_where_that_is_allowed(folder, alone):
    loader = make(folder, max_bad=0.9)
    batches = iter(loader)
    next(batches)
    (folder / "shard-00002.tar").unlink()
    keys = [key for _ in range(50) for key in next(batches).keys]
    loader.close()
    assert keys == [key for key, _ in alone.values()][4:204]
    assert {b.substitute[:2] for b in loader.take_bad()} == {"s3"}  # the first of the next shard


def test_a_truncated_tar_is_refused_at_the_start(folder):
    tar = folder / "shard-00001.tar"
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size - 1000)
    with pytest.raises(UserError, match=r"shard-00001\.tar.*truncated"):
        make(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 128}, ("116 samples", "batch=128")),
        ({"streams": 5}, ("data.streams=5", "set it to 4")),
        ({"world_size": 3}, ("3 ranks", "data.streams=8")),
        ({"micro_batch": 3}, ("micro_batch=3", "divisor of 16")),
        ({"start": 8}, ("start=8", "batch=16")),
    ],
)
def test_numbers_that_do_not_fit_are_refused(folder, settings, words):
    with pytest.raises(UserError) as error:
        make(folder, **settings)
    assert all(word in str(error.value) for word in words)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path is not set"):
        Loader(
            DataConfig(), batch=4, micro_batch=2, seed=0, image_size=32, rank=0, world_size=1, device="cpu"
        )  # fmt: skip
    with pytest.raises(UserError, match="no such folder"):
        make(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------- threads


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mcf-")]


def test_closing_ends_every_thread_and_a_loader_can_be_used_again(folder, alone):
    loader = make(folder)
    for _ in range(3):
        assert own_threads() == []
        part = read(loader, 5 * BATCH)  # closes
        assert same(part, {p: alone[p] for p in part})
    loader.close()
    assert own_threads() == []


def test_an_iteration_that_is_dropped_ends_its_threads(folder):
    batches = iter(make(folder))
    next(batches)
    assert own_threads()
    del batches
    gc.collect()
    assert own_threads() == []


def test_images_do_not_change_after_they_are_given(folder):
    loader = make(folder)
    batches = iter(loader)
    first = next(batches)
    copy = first.images.clone()
    for _ in range(10):
        next(batches)
    loader.close()
    assert torch.equal(first.images, copy)


def test_memory_of_given_batches_is_free(folder):
    loader = make(folder)
    batches = iter(loader)
    given = weakref.ref(next(batches).images)
    next(batches)
    gc.collect()
    assert given() is None
    loader.close()


def test_an_error_in_the_thread_is_raised_where_batches_are_taken(folder, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("from the thread")

    monkeypatch.setattr("mcf.data.loader.uniform", broken)
    with pytest.raises(ZeroDivisionError, match="from the thread"):
        next(iter(make(folder)))
    assert own_threads() == []


def test_wait_is_the_time_that_next_took(folder, monkeypatch):
    plain = Decoder.wait
    monkeypatch.setattr(Decoder, "wait", lambda self: time.sleep(0.05) or plain(self))
    loader = make(folder, prefetch=1)
    batches = iter(loader)
    next(batches), next(batches)
    began = time.perf_counter()
    next(batches)
    took = time.perf_counter() - began
    assert 0.02 < loader.wait <= took
    time.sleep(0.5)  # the queue is full again
    next(batches)
    assert loader.wait < 0.02
    loader.close()


def test_loaders_of_two_folders_run_side_by_side(folder, alone, tmp_path):
    other = tmp_path / "copy"
    shutil.copytree(folder, other)
    pairs = zip(make(folder), make(other, seed=9))
    for one, two in itertools.islice(pairs, 5):
        assert one.keys != two.keys
        assert one.keys == [alone[p][0] for p in one.positions.tolist()]


def test_a_process_may_end_while_the_loader_runs(folder):
    """The thread is inside DALI then: an interpreter that goes from under it aborts, or DALI complains at its exit."""
    program = f"""
import sys
from mcf.config import DataConfig
from mcf.data.loader import Loader
loader = Loader(DataConfig(path={str(folder)!r}, streams=8, prefetch=1000), batch=16, micro_batch=16, seed=0,
                image_size=32, rank=0, world_size=1, device="cpu")
batches = iter(loader)
next(batches)
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (3, "")


# ------------------------------------------------------------------------------------------------------------- scale


def test_the_first_batch_of_twenty_million_samples_comes_as_soon_after_a_restart(twenty_millions):
    """Issue 2: time to the first batch does not grow with the position. One rank of 8 of the faithful run."""
    batch = 4096

    def seconds(start: int) -> float:
        began = time.perf_counter()
        settings = {"batch": batch, "micro_batch": 64, "streams": 512, "window": 256, "threads": 1}
        loader = make(twenty_millions, rank=3, world_size=8, start=start, **settings)
        given = next(iter(loader))
        took = time.perf_counter() - began
        loader.close()
        assert given.positions.tolist() == list(range(start + 3, start + 3 + 8 * 64, 8))
        return took

    starts = {"start": 0, "far": 4639 * batch, "later epoch": 3 * 4882 * batch + 4639 * batch}
    seconds(0)  # files into the cache, DALI's own start
    # The quickest of three: what else the machine does only ever adds.
    took = {name: min(seconds(start) for _ in range(3)) for name, start in starts.items()}
    # A first batch costs the manifest's 4,000 looks at files and 64 windows of 256 samples, wherever it is. Skipping
    # to 19 million sample by sample would take many seconds. Twice and 0.3 s leave room for a busy machine.
    assert max(took["far"], took["later epoch"]) < 2 * took["start"] + 0.3, took
    assert max(took.values()) < 5, took  # 0.14 s on two idle cores


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """The loader's thread has no current device of its own."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _with_index(torch.device("cuda")) == torch.device("cuda", 3)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert _with_index(device) is device
