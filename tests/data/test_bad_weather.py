"""Storage that fails under a running job: real faults, in real reads (LD_PRELOAD), or in files while they are in use."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from data_shards import damage

from mcf.config import DataConfig
from mcf.data.loader import Loader
from mcf.exits import SAVED, UNAVAILABLE

HERE = Path(__file__).parent
COUNTS = (30, 17, 44, 25)
SAMPLES = 160


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> str:
    """faults.c as a library."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [
        os.environ.get("CC", "gcc"),
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(HERE / "faults.c"),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return str(library)


@pytest.fixture
def folder(shards):
    return shards(*COUNTS)


def start(folder, library: str = "", env: dict[str, str] | None = None, **told) -> subprocess.Popen:
    told = {"folder": str(folder), "samples": SAMPLES} | told
    env = os.environ | (env or {}) | ({"LD_PRELOAD": library} if library else {})
    command = [sys.executable, str(HERE / "read_all.py"), json.dumps(told)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[dict, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out), err


@pytest.fixture
def clean(folder) -> dict:
    """What a process reads without faults, as start() of it would print it."""
    loader = make(folder)
    found: list[tuple] = []
    for batch in loader:
        hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in batch.images]
        found += zip(batch.positions.tolist(), batch.keys, hashes)
        if len(found) >= SAMPLES:
            break
    loader.close()
    return {"found": [list(item) for item in found]}


def make(folder, rank: int = 0, world_size: int = 1) -> Loader:
    """The loader of read_all.py."""
    return Loader(
        DataConfig(path=str(folder), streams=8, window=6, threads=1, prefetch=2, max_bad=0.9), batch=16, micro_batch=4,
        seed=5, image_size=32, rank=rank, world_size=world_size, device="cpu", pauses=(0.01,),
    )  # fmt: skip


def test_reads_that_fail_at_first_change_nothing(folder, clean, faults):
    now, _ = ended(start(folder, faults, {"FAULT_PATH": "shard-", "FAULT_FIRST": "1"}))
    assert now["found"] == clean["found"] and now["bad"] == []


def test_a_stall_of_20_seconds_changes_nothing_and_is_said(folder, clean, faults):
    env = {"FAULT_PATH": ".tar", "FAULT_STALL": "20", "FAULT_STALL_AT": "12"}
    now, said = ended(start(folder, faults, env))
    assert now["found"] == clean["found"] and now["bad"] == []
    assert now["seconds"] > 19
    assert "still waiting for the storage to read from shard-0000" in said


def test_storage_that_is_away_for_8_seconds_makes_no_sample_bad(folder, clean, faults, tmp_path):
    away = tmp_path / "away"
    away.touch()
    process = start(folder, faults, {"FAULT_PATH": "shard-", "FAULT_WHILE": str(away)})
    time.sleep(8)
    away.unlink()
    now, said = ended(process)
    assert now["found"] == clean["found"] and now["bad"] == []
    assert "Input/output error, of other shards too; waiting for" in said


def test_storage_that_goes_in_between_makes_no_sample_bad(folder, clean, faults, tmp_path):
    """With a JPEG that is bad for good, whose stand-in is looked for meanwhile: it stays the nearest."""
    damage(folder, 2, 20, b"\0" * 200)
    away = tmp_path / "away"
    env = {"FAULT_PATH": "shard-", "FAULT_WHILE": str(away)}
    process = start(folder, faults, env, samples=16 * SAMPLES)
    for _ in range(20):
        time.sleep(0.15)
        away.touch()
        time.sleep(0.15)
        away.unlink()
    now, _ = ended(process)
    assert [item[:2] for item in now["found"][:SAMPLES]] == [item[:2] for item in clean["found"]]
    assert now["bad"] and {(item[2], item[4]) for item in now["bad"]} == {("s2r20", "s2r21")}


def test_storage_that_stays_away_ends_the_run_to_be_started_again(folder, faults, tmp_path):
    (tmp_path / "away").touch()
    env = {"FAULT_PATH": "shard-", "FAULT_WHILE": str(tmp_path / "away")}
    process = start(folder, faults, env, patience=1)
    _, said = process.communicate(timeout=240)
    assert process.returncode == UNAVAILABLE
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: {folder}: shard-0000") and "launch again when the storage answers" in last


def test_a_process_that_waits_for_its_storage_ends_when_it_is_told_to(folder, faults, tmp_path):
    (tmp_path / "away").touch()
    process = start(folder, faults, {"FAULT_PATH": "shard-", "FAULT_WHILE": str(tmp_path / "away")})
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - began < 5 and said.splitlines()[-1] == "KeyboardInterrupt", said


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bad_sector_costs_the_samples_on_it_and_nothing_else(folder, clean, faults, world_size):
    index = np.load(folder / "shard-00002.index.npy")
    low, high = int(index["offset"][20]) + 5, int(index["offset"][22]) + 5  # rows 20 to 22
    env = {"FAULT_PATH": "shard-00002.tar", "FAULT_BAD": f"{low}-{high}"}
    running = [
        start(folder, faults, env, rank=rank, world_size=world_size, samples=SAMPLES // world_size)
        for rank in range(world_size)
    ]
    parts = [ended(process)[0] for process in running]
    found = sorted(tuple(item) for part in parts for item in part["found"])
    assert [item[:2] for item in found] == [tuple(item[:2]) for item in clean["found"]]
    changed = {item[1] for item, before in zip(found, clean["found"]) if item[2] != before[2]}
    assert changed == {"s2r20", "s2r21", "s2r22"} & {item[1] for item in found}
    bad = [item for part in parts for item in part["bad"]]
    assert {item[2] for item in bad} == changed
    assert all(item[1] == "shard-00002.tar" and "Input/output error" in item[3] and item[4] == "s2r23" for item in bad)


def flip_bytes(tar: Path) -> None:
    """In the last third of the file, one byte in 40: some images break, some only look different, some headers go."""
    rng = np.random.default_rng(0)
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        for place in rng.integers(size * 2 // 3, size, size // 120):
            file.seek(int(place))
            file.write(bytes([rng.integers(256)]))


FAULTS = {
    "deleted": lambda tar: tar.unlink(),
    "truncated": lambda tar: os.truncate(tar, tar.stat().st_size // 2),
    "emptied": lambda tar: os.truncate(tar, 0),
    "flipped bytes": flip_bytes,
    "replaced by another file": lambda tar: tar.write_bytes(b"something else" * 1000),
    "index deleted": lambda tar: tar.with_name(tar.name.replace(".tar", ".index.npy")).unlink(),
    "index truncated": lambda tar: os.truncate(tar.with_name(tar.name.replace(".tar", ".index.npy")), 300),
    "unreadable JPEG": lambda tar: damage(tar.parent, 2, 40, b"\0" * 200),
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_shard_that_is_damaged_while_it_is_read(folder, clean, how):
    """Two ranks in step; the fault comes after the first batches. Order, keys and all other pictures stay."""
    loaders = [make(folder, rank, 2) for rank in range(2)]
    running = [iter(loader) for loader in loaders]
    found = []
    for number in range(SAMPLES // 8):
        if number == 2:
            FAULTS[how](folder / "shard-00002.tar")
        positions = []
        for batches in running:
            batch = next(batches)
            positions += batch.positions.tolist()
            found += zip(batch.positions.tolist(), batch.keys)
        assert sorted(positions) == list(range(8 * number, 8 * number + 8))  # in step
    bad = [b for loader in loaders for b in loader.take_bad()]
    for loader in loaders:
        loader.close()
    wanted = {position: key for position, key, _ in clean["found"]}
    for position, key in found:
        # Where the index itself is gone, the key is not known: shard and row stand for it.
        assert key == wanted[position] or (how.startswith("index") and key.startswith("shard-00002.tar:"))
    assert bad and {b.shard for b in bad} == {"shard-00002.tar"}
    assert all(b.reason and b.substitute for b in bad)


def test_too_many_failures_end_it_with_one_clear_line(folder, faults):
    env = {"FAULT_PATH": "shard-00002.tar", "FAULT_BAD": "0-1000000000"}
    process = start(folder, faults, env, max_bad=0.02)
    _, said = process.communicate(timeout=240)
    last = said.strip().splitlines()[-1]
    assert process.returncode != 0
    assert "samples could not be read, more than data.max_bad=0.02 allows" in last and "Input/output error" in last


def test_closing_while_the_storage_stalls_does_not_hang(folder, faults):
    env = {"FAULT_PATH": ".tar", "FAULT_STALL": "5", "FAULT_STALL_AT": "12"}
    began = time.monotonic()
    now, _ = ended(start(folder, faults, env, samples=8))
    assert len(now["found"]) == 8
    assert time.monotonic() - began < 60


def test_bad_samples_of_all_ranks_together_stop_the_run(tmp_path):
    """12 of 120, of which either rank sees a part that it alone could bear, as one rank that saw them all could not."""
    tiny.shards(tmp_path / "data", bad=dict.fromkeys(range(3, 120, 10), b"no JPEG"))
    values = tiny.recipe(tmp_path / "run", tmp_path / "data", ranks=2, data__max_bad=0.08, train__steps=40)
    run = tiny.write_recipe(tmp_path / "run", values)
    assert tiny.run(run, ranks=2) == 2, tiny.said(run)
    assert "10 of 120 samples could not be read, more than data.max_bad=0.08 allows" in tiny.said(run)
    assert "Traceback" not in tiny.said(run)


def test_two_ranks_train_on_while_a_shard_is_torn_from_under_them(tmp_path):
    """The whole job: it is named and counted in events.jsonl, and every step is made."""
    tiny.shards(tmp_path / "data")
    values = tiny.recipe(tmp_path / "run", tmp_path / "data", ranks=2, data__max_bad=0.9, train__steps=30)
    run = tiny.write_recipe(tmp_path / "run", values)
    processes = tiny.start(run, ranks=2)
    try:
        deadline = time.monotonic() + 500
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), tiny.said(run)
            time.sleep(0.02)
        os.truncate(tmp_path / "data/shard-00001.tar", 40_000)
        assert [p.wait(500) for p in processes] == [0, 0], tiny.said(run)
    finally:
        for process in processes:
            process.kill()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == list(range(1, 31))
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    bad = [event for event in events if event["kind"] == "bad_sample"]
    assert bad and {event["shard"] for event in bad} == {"shard-00001.tar"}
    assert all("file ends" in event["reason"] for event in bad)
    assert events[-1]["kind"] == "finished"


def bad_of(run: Path) -> tuple[list[int], int]:
    """Positions of the bad samples that a run told of, and its last count of them."""
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return [event["position"] for event in events if event["kind"] == "bad_sample"], last["bad/samples"]


def test_a_run_that_is_killed_between_its_reports_tells_of_each_bad_sample_once(tmp_path):
    tiny.shards(tmp_path / "data", bad=dict.fromkeys((5, 17, 33, 48, 70, 99, 111), b"no JPEG"))
    keys = {"data__max_bad": 0.5, "data__prefetch": 8, "train__log_every": 10, "train__steps": 25}
    runs = [tmp_path / "whole", tmp_path / "killed"]
    for run in runs:
        tiny.write_recipe(run, tiny.recipe(run, tmp_path / "data", **keys))
    assert tiny.run(runs[0]) == 0, tiny.said(runs[0])
    for step in (8, 16):
        (process,) = tiny.start(runs[1])
        while not (runs[1] / f"checkpoints/step-{step:08d}").exists():
            assert process.poll() is None, tiny.said(runs[1])
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert tiny.run(runs[1]) == 0, tiny.said(runs[1])
    (whole, count), again = bad_of(runs[0]), bad_of(runs[1])
    assert again == (whole, count)
    assert len(set(whole)) == len(whole) == count > 8 and max(whole) < 25 * 8


def test_a_run_that_has_begun_goes_on_without_a_shard(tmp_path):
    tiny.shards(tmp_path / "data")
    keys = {"data__max_bad": 0.5, "train__steps": 16}
    run = tiny.write_recipe(
        tmp_path / "run", tiny.recipe(tmp_path / "run", tmp_path / "data", train__stop_after=4, **keys)
    )
    assert tiny.run(run) in (0, SAVED), tiny.said(run)
    (tmp_path / "data/shard-00001.tar").unlink()
    tiny.write_recipe(run, tiny.recipe(run, tmp_path / "data", **keys))
    assert tiny.run(run) == 0, tiny.said(run)
    assert "shard-00001.tar: named by manifest.json but not there; its samples are bad" in tiny.said(run)
    assert bad_of(run)[1] > 0
