"""metrics.jsonl survives what happens to it: kills, torn lines, restarts, full disks, strange numbers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from power import Disk

from mcf.track.jsonl import Writer, read


def steps(path):
    return [record["step"] for record in read(path)]


def test_every_written_line_outlives_kill_9(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from mcf.track.jsonl import Writer\n"
        f"w = Writer({str(path)!r})\n"
        "for step in range(10**9):\n"
        "    w.append({'step': step, 'loss/total': step / 7}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = -1
    while last < 500:
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.wait()
    reported = int(rest[-1]) if rest and rest[-1] else last
    got = steps(path)
    # A line may be written whose number was not printed any more; none that was printed may be missing.
    assert got == list(range(len(got)))
    assert len(got) >= reported


def test_a_torn_last_line_is_dropped_and_what_follows_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a"')
    assert read(path) == [{"step": 1, "a": 1.5}]
    writer = Writer(path)
    writer.append({"step": 2, "a": 2.5})
    writer.close()
    assert read(path) == [{"step": 1, "a": 1.5}, {"step": 2, "a": 2.5}]


def test_a_file_that_cannot_be_opened_is_tried_again_with_the_next_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    writer = Writer(path)
    for record in (lambda: writer.append({"step": 1}), lambda: writer.cut(1)):
        with pytest.raises(IsADirectoryError):
            record()
    writer.sync()
    path.rmdir()
    writer.append({"step": 2})
    writer.close()
    assert read(path) == [{"step": 2}]


def test_a_damaged_block_costs_only_its_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 100 + b"\xff\xfe\n" + b"[3]\n" + b'{"step": 4}\n')
    assert steps(path) == [1, 4]


def test_cut_keeps_what_is_before_the_step_byte_by_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = Writer(path)
    for step in range(10, 140, 10):
        writer.append({"step": step, "life": 1})
    before = path.read_bytes()
    writer.cut(110)
    assert before.startswith(path.read_bytes())
    for step in range(110, 160, 10):
        writer.append({"step": step, "life": 2})
    writer.close()
    assert [(r["step"], r["life"]) for r in read(path)] == [(s, 1 if s <= 100 else 2) for s in range(10, 160, 10)]


def test_cut_after_the_end_changes_nothing_and_cut_removes_a_torn_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "x')
    writer = Writer(path)
    writer.cut(5)
    assert steps(path) == [1, 2]
    writer.cut(2)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("-inf")])
def test_non_finite_numbers_come_back_and_the_file_is_strict_json(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    writer = Writer(path)
    writer.append({"step": 1, "loss": value, "deep": {"list": [value, 1.0]}})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    back = read(path)[0]["loss"]
    assert isinstance(back, float)
    assert np.array_equal(back, float(value), equal_nan=True)


def test_numbers_keep_every_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(200) * 10.0 ** np.arange(-100, 100)
    writer = Writer(tmp_path / "metrics.jsonl")
    writer.append({"step": 1, "values": values, "one": np.float32(0.1), "count": np.int64(7)})
    record = read(tmp_path / "metrics.jsonl")[0]
    assert record["values"] == values.tolist()
    assert record["one"] == float(np.float32(0.1))
    assert record["count"] == 7


def test_a_full_disk_costs_only_the_lines_of_that_time(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = Writer(path)
    writer.append({"step": 1})
    write = os.write

    def half(file, line):
        return write(file, line[: len(line) // 2])

    def full(file, line):
        raise OSError(28, "No space left on device")

    for broken in (half, full):
        monkeypatch.setattr(os, "write", broken)
        with pytest.raises(OSError):
            writer.append({"step": 2})
        monkeypatch.setattr(os, "write", write)
    writer.append({"step": 3})
    assert steps(path) == [1, 3]


def test_synced_lines_outlive_a_power_loss(tmp_path, monkeypatch):
    path, disk = tmp_path / "metrics.jsonl", Disk(monkeypatch)
    writer = Writer(path)
    for step in (1, 2):
        writer.append({"step": step})
        assert not disk.has(path)
        writer.sync()
        assert disk.has(path)


def test_no_file_reads_as_no_records(tmp_path):
    assert read(tmp_path / "none.jsonl") == []
