"""The benchmark's command line, and what it writes: it can be read, and drawn elsewhere."""

import time
from dataclasses import replace

import pytest
import torch
from kernel_cases import CPU, cpu_only

from mcf.kernels.bench import __main__ as bench
from mcf.kernels.bench import plots, registry, table, timing


def test_on_a_cpu_it_says_that_these_are_no_gpu_numbers(tmp_path, capsys):
    cpu_only()
    assert bench.main([f"out={tmp_path}", "op=mask,feature_tap"]) == 0
    output = capsys.readouterr().out
    assert "NOT GPU numbers" in output and "interpreted, not timed" in output
    assert (tmp_path / "bench.md").read_text().startswith("**These are not GPU numbers.**")
    rows, machine = table.read_csv(tmp_path / "bench.csv")
    assert machine.torch == torch.__version__ and machine.device.startswith("CPU (") and len(machine.source) == 12
    assert {row.op for row in rows} == {"mask", "feature_tap"}
    assert {row.implementation for row in rows if row.p50_us} == {"eager", "library"}
    assert all(row.p20_us <= row.p50_us <= row.p80_us and row.floor_us > 0 for row in rows if row.p50_us)
    assert all(row.error is not None and row.error < 2e-6 for row in rows if row.implementation != "library")
    # What is asked is asked of an H200, and not of a multiple of what this processor could do.
    assert not any(row.accept_us for row in rows)


def test_without_time_nothing_is_measured_and_that_is_said(capsys):
    assert bench.main(["op=mask", "sizes=small", "seconds=0"]) == 0
    output = capsys.readouterr().out
    assert "rows were not reached in time" in output and "eager forward" not in output


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["ops=mask"], "unknown key 'ops'; did you mean op?"),
        (["op=masks"], "op=masks: must be one of"),
        (["sizes=big"], "sizes=big: must be one of auto, full, small"),
        (["seconds=soon"], "seconds=soon: must be a number"),
        (["out=/dev/null/x"], "out=/dev/null/x: cannot be made"),
        (["plots=nowhere.csv"], "plots=nowhere.csv: there is no such file"),
        (["mask"], "'mask' is not key=value"),
    ],
)
def test_bad_input_is_one_line(words, complaint, capsys):
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert all(f"{key}=" in output for key in bench.KEYS)
    assert all(op in output for op in registry.OPERATIONS)


def results() -> list[table.Row]:
    made = []
    for size, floor in ((1000, 2.0), (10_000, 20.0)):
        for which in ("forward", "backward"):
            for name, factor in (("triton", 1.5), ("eager", 8.0)):
                time_us = floor * factor
                made.append(
                    table.Row(
                        "mask", f"uint8 B={size}", "int64", name, which, 0.0, "", 0.9 * time_us, time_us, 1.1 * time_us,
                        60, 12.5, size, 0, floor, 2.0 * floor,
                    )
                )  # fmt: skip
    made.append(table.Row("mask", "uint8 B=9", "int64", "triton", "forward", None, "wrong: no, really", bytes=9))
    return made


def test_a_csv_file_is_read_as_it_was_written(tmp_path):
    rows, machine = results(), table.here(CPU)
    table.write_csv(tmp_path / "bench.csv", rows, machine)
    assert table.read_csv(tmp_path / "bench.csv") == (rows, machine)
    header = (tmp_path / "bench.csv").read_text().splitlines()[0].split(",")
    assert {"device", "torch", "triton", "commit", "share", "p20_us", "p50_us", "p80_us", "peak_mib"} <= set(header)


def test_tables_and_verdicts():
    rows = results()
    text = table.markdown(rows)
    assert "| uint8 B=1000 int64 | forward | 3 (2.7–3.3) | 16 (14.4–17.6) | 2 | 67% | 4 | 12.5 / 12.5 |" in text
    assert "wrong: no, really" in text
    h200 = replace(table.here(CPU), device="NVIDIA H200", capability="9.0")
    verdicts = bench._summary(rows, h200)
    assert "mask uint8 B=10000 forward: 30 of 40 µs, accepted" in verdicts and "NOT" not in verdicts
    slow = [
        replace(row, p50_us=41.0) if (row.shape, row.implementation) == ("uint8 B=10000", "triton") else row
        for row in rows
    ]
    assert "41 of 40 µs, NOT accepted" in bench._summary(slow, h200)
    fast = [replace(row, p50_us=1.0) if row.implementation == "eager" and row.p50_us else row for row in rows]
    assert "mask uint8 B=1000 forward: eager is faster, 1 µs" in bench._summary(fast, h200)
    assert "no verdict" in bench._summary(rows, table.here(CPU))


def test_a_table_has_no_column_that_is_empty():
    """Nor a share, or a peak, of which one must guess whose it is."""
    head, *_ = (line for line in table.markdown(results()).splitlines() if line.startswith("|"))
    assert head.endswith("| floor µs | triton's share | accept µs | peak MiB (triton / eager) |")
    bare = [replace(row, peak_mib=None, accept_us=None) for row in results() if row.implementation == "eager"]
    lines = table.markdown(bare).splitlines()
    assert lines[2] == "| shape | pass | eager µs | floor µs | eager's share |"
    assert all(line.count("|") == 6 for line in lines[2:])


def test_plots_are_drawn_from_the_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    table.write_csv(tmp_path / "bench.csv", results(), table.here(CPU))
    assert bench.main([f"plots={tmp_path / 'bench.csv'}", f"out={tmp_path / 'drawn'}"]) == 0
    for name in ("time_mask.png", "roofline.png"):
        data = (tmp_path / "drawn" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    (tmp_path / "bench.csv").write_text("a,b\n1,2\n")
    assert bench.main([f"plots={tmp_path / 'bench.csv'}"]) == 2
    assert "not a bench.csv" in capsys.readouterr().err


def test_without_matplotlib_it_says_where_plots_can_be_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "possible", lambda: False)
    # The machine itself is not measured for nothing: under compute-sanitizer that would take minutes.
    monkeypatch.setattr(timing, "ceilings", None)
    assert bench.main([f"out={tmp_path}", "op=mask", "sizes=small", "timing=no"]) == 0
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert bench.main([f"plots={tmp_path / 'bench.csv'}"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_kernels_come_first_and_what_is_lost_by_one_is_said(monkeypatch, tmp_path, capsys):
    """After an illegal access a process can do nothing on its GPU: the others are measured by another start."""
    cases = registry.cases("small", torch.float32)[:3] + registry.cases("small", torch.float32)[-2:]
    assert cases[0].op != cases[-1].op
    asked: list[tuple[str, str]] = []

    def rows(case, name, function, device, limits, note):
        asked.append((name, note))
        if (name, case.op, note) == ("eager", cases[-1].op, ""):
            raise bench.DeviceLost("failed: an illegal access")
        return [table.Row(case.op, case.shape, "float32", name, "forward", None, note or "right")]

    def functions(case, device, timed):
        return dict.fromkeys(("compile", "eager", "triton"))

    monkeypatch.setattr(bench, "_rows", rows)
    monkeypatch.setattr(bench, "_functions", functions)
    assert bench.run(cases, CPU, False, time.monotonic() + 60, tmp_path) == bench.LOST
    plain = ["triton"] * 5 + ["eager"] * 5
    lost = [("eager", "failed: an illegal access"), *[("compile", "the GPU was lost before")] * 5]
    assert asked == [(name, "") for name in plain] + lost
    others = ",".join(dict.fromkeys(case.op for case in cases if case.op != cases[-1].op))
    error = capsys.readouterr().err
    assert f"the GPU was lost by {cases[-1].op}, and with it all that came after; go on with op={others}" in error
    found, _ = table.read_csv(tmp_path / "bench.csv")
    assert [(row.shape, row.implementation) for row in found] == [
        (case.shape, name) for case in cases for name in ("compile", "eager", "triton")
    ]
