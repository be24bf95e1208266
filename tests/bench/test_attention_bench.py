"""Times of attention: what is wrong is not timed, and what is printed and recorded is a row of the table."""

import csv
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

from mcf import attention, attention_table
from mcf.bench import attention as bench
from mcf.kernels.bench import gpu_check

CPU = torch.device("cpu")
NAMES = ["sdpa", "flash", "math"]


@pytest.fixture(autouse=True)
def unbound(monkeypatch):
    """This process, whose memory other tests look at, stays as it is."""
    monkeypatch.setattr(bench.memory, "keep_freed_memory", lambda: True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    attention_table.write(file, {})
    monkeypatch.setattr(attention_table, "FILE", file)
    return file


SMALL = ("shapes=7x2x8", "precision=fp32", "batch=2", "rounds=3", "threads=1")


def run(*more: str, words: tuple[str, ...] = SMALL) -> int:
    threads = torch.get_num_threads()
    try:
        return bench.main([*words, *more])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="rows are a GPU's where there is one")
def test_rows_are_printed_and_recorded_and_numbers_kept(table, tmp_path, capsys):
    other = attention_table.Key("sm_90", "bfloat16", 7, 8, True)
    row = attention_table.Row("sdpa", {"sdpa": 1.0}, 1, 1, "another", "2.13", "before")
    attention_table.write(table, {other: row})
    file = tmp_path / "numbers.csv"
    assert run("record=true", f"csv_file={file}") == 0
    recorded = attention_table.read(table)
    assert recorded.pop(other) == row, "what others measured stays"
    chip = attention_table.chip_of("cpu")
    assert list(recorded) == [attention_table.Key(chip, "float32", 7, 8, gradient) for gradient in (False, True)]
    assert list(attention_table.problems(recorded)) == []
    shown = capsys.readouterr().out.splitlines()
    numbers = list(csv.DictReader(file.open()))
    assert [row["implementation"] for row in numbers] == NAMES * 2
    for (key, row), start in zip(recorded.items(), (0, 3)):
        assert ",".join(map(str, attention_table.cells(key, row)[:6])) in "\n".join(shown)
        assert row.batch == 2 and row.heads == 2 and row.torch == torch.__version__ and "threads: 1" in row.device
        assert row.command.startswith("python -m mcf.bench part=attention shapes=7x2x8 precision=fp32 batch=2")
        assert "record" not in row.command and "csv_file" not in row.command
        for number in numbers[start : start + 3]:
            # The table keeps four digits.
            assert float(number["us"]) == pytest.approx(row.us[number["implementation"]], rel=1e-3)
            assert float(number["error"]) < 2e-6 and number["gradient"] == str(key.gradient)
            assert (number["device"], number["torch"]) == (row.device, row.torch)
        (starred,) = [line for line in shown[2:8] if "*" in line and ("both" in line) == key.gradient]
        assert f" {row.choice}* " in starred


def test_without_record_the_table_stays(table):
    before = table.read_text()
    assert run() == 0
    assert table.read_text() == before


def test_what_is_wrong_or_breaks_is_neither_timed_nor_taken(table, monkeypatch, capsys):
    compute = attention.compute

    def spoilt(name, q, k, v):
        if name == "sdpa":
            return compute(name, q, k, v) * 1.001
        if name == "flash":
            raise RuntimeError("no such kernel\nat all")
        return compute(name, q, k, v)

    monkeypatch.setattr(attention, "compute", spoilt)
    assert run("record=true") == 1
    for row in attention_table.read(table).values():
        assert row.choice == "math" and list(row.us) == ["math"]
    shown = capsys.readouterr().out
    assert shown.count("wrong: 1.0e-03 from float64") == 2 and "no such kernel" in shown and "at all" not in shown


@pytest.mark.parametrize("batch", ["1e12", "1e30"])
def test_inputs_that_memory_does_not_hold_are_the_shapes_failure(batch, table, tmp_path, capsys):
    file = tmp_path / "numbers.csv"
    before = table.read_text()
    assert run(f"csv_file={file}", "record=true", f"batch={batch}", words=("shapes=7x2x8", "precision=fp32")) == 1
    rows = list(csv.DictReader(file.open()))
    assert [row["implementation"] for row in rows] == NAMES * 2
    for row in rows:
        assert row["failed"].startswith(f"batch={int(float(batch))}: inputs cannot be made: ") and not row["us"]
        assert (
            row["failed"].endswith("; give a smaller batch") and "\n" not in row["failed"] and row["broken"] == "True"
        )
    assert table.read_text() == before
    shown = capsys.readouterr()
    assert shown.out.count("inputs cannot be made") == 6 and not shown.err


def test_a_shape_that_memory_does_not_hold_costs_no_other(table, tmp_path):
    file = tmp_path / "numbers.csv"
    assert run(f"csv_file={file}", words=(f"shapes={10**13}x1x8,7x2x8", "precision=fp32", "batch=2", "rounds=1")) == 1
    rows = list(csv.DictReader(file.open()))
    assert [bool(row["us"]) for row in rows] == [False] * 6 + [True] * 6


def test_a_wrong_gradient_is_found(monkeypatch):
    compute = attention.compute
    monkeypatch.setattr(attention, "compute", lambda name, q, k, v: compute(name, q, k.detach(), v))
    forward, both = (
        bench.error("math", bench.case((7, 2, 8), torch.float32, 2, CPU, gradient)) for gradient in (False, True)
    )
    assert forward < 2e-6 and both > 0.1


def test_what_this_device_refuses_is_no_fault(monkeypatch):
    refusal = attention.refusal
    monkeypatch.setattr(attention, "refusal", lambda n, *a: "not here" if n == "flash" else refusal(n, *a))
    rows = bench.measure((7, 2, 8), torch.bfloat16, True, CPU, batch=1, rounds=1)
    assert [(row.implementation, row.failed, row.broken, row.us is None) for row in rows] == [
        ("sdpa", "", False, False), ("flash", "not here", False, True), ("math", "", False, False)
    ]  # fmt: skip
    assert [row.times for row in rows if row.implementation == "math"] == [1.0], "auto's own, without a table"


def test_inputs_lie_as_in_a_block():
    qkv, above = bench.case((7, 2, 8), torch.bfloat16, 3, CPU, True)
    assert [x.stride() for x in qkv.unbind(2)] == [(336, 48, 8, 1)] * 3 and above.shape == (3, 7, 16)
    out, gradient = bench.call("flash", qkv, above)
    assert out.shape == above.shape and gradient.shape == qkv.shape
    assert len(bench.call("flash", *bench.case((7, 2, 8), torch.bfloat16, 3, CPU, False))) == 1


@pytest.mark.parametrize("threads, waits", [(1, False), (2, True)])
def test_one_thread_is_timed_by_what_it_does_and_not_by_what_it_waits(threads, waits, monkeypatch):
    called: list[str] = []

    def call(name, *_):
        called.append(name)
        time.sleep(0.05 if name == "slow" else 0)

    monkeypatch.setattr(bench, "call", call)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = bench.take_turns(["quick", "slow"], bench.case((7, 2, 8), torch.float32, 1, CPU, False), CPU, 3)
    finally:
        torch.set_num_threads(before)
    assert all(len(samples) == 3 for samples in taken.values())
    # A sleep of 50 ms, of which this process computes hardly anything.
    assert all((us > 49_000) == waits for us in taken["slow"])
    turns = [name for name, _ in itertools.groupby(called)]
    assert sorted(called) == ["quick"] * 15 + ["slow"] * 15 and len(turns) >= 6, "they take turns"


def test_it_stops_beginning_when_time_is_over(table, capsys):
    assert run("seconds=0") == 0
    assert "left out from here on: 0 s were over" in capsys.readouterr().out


@pytest.mark.parametrize(
    "word, said",
    [
        ("shapes=student", "shapes=student: must be one of encoder, teacher, decoder, all, or TOKENSxHEADSxWIDTH"),
        ("shapes=7x2", "shapes=7x2: must be"),
        ("shapes=7x0x8", "shapes=7x0x8: must be"),
        ("shapes=7x2xax8", "shapes=7x2xax8: must be"),
        ("precision=fp8", "precision=fp8: must be one of fp32, bf16, all"),
        ("batch=0", "batch=0: must be a number ≥ 1"),
        ("rounds=1.5", "rounds=1.5: must be a whole number"),
        ("threads=100000", f"threads=100000: must be at most {4 * os.cpu_count()}, four for each processor"),
        (f"threads={4 * os.cpu_count() + 1}", f"threads={4 * os.cpu_count() + 1}: must be at most"),
        ("record=yes", "record=yes: must be one of true, false"),
        ("csv_file=/no/such/folder/a.csv", "csv_file=/no/such/folder/a.csv: its folder does not exist"),
        ("batches=3", "unknown key 'batches'; did you mean batch?"),
    ],
)
def test_what_is_mistyped_is_one_line(word, said, capsys):
    assert bench.main([word]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1 and not shown.out


def test_it_is_a_part_of_the_benchmark():
    done = subprocess.run(
        [sys.executable, "-m", "mcf.bench", "part=attention", "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: python -m mcf.bench part=attention key=value" in done.stdout
    assert all(f"  {key}=" in done.stdout for key in bench.KEYS)


def test_a_bare_machine_is_lent_what_it_needs(tmp_path):
    """Packages that it lacks are refused; and the table is there."""
    package = tmp_path / "path" / "mcf"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kernels").symlink_to(gpu_check.KERNELS, target_is_directory=True)
    gpu_check.lend(package)
    code = (
        "import sys\nfor name in ('pydantic', 'yaml', 'psutil', 'deepspeed', 'xformers'): sys.modules[name] = None\n"
        "from mcf import attention_table\nfrom mcf.bench.attention import main\n"
        "assert attention_table.read(attention_table.FILE)\n"
        "sys.exit(main(['shapes=7x2x8', 'batch=1', 'rounds=1']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=package.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n7x2x8 ") >= 4 * len(NAMES)
