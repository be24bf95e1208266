"""The line a person reads."""

from __future__ import annotations

import io
import math
import re

import pytest

from mcf.track.console import (
    Console,
    Screen,
    duration,
    fit,
    format_event,
    format_line,
    number,
    read_line,
    scientific,
    thousands,
)  # fmt: skip

RECORD = {
    "step": 12340,
    "samples": 12340 * 4096,
    "time": 0.0,
    "loss/total": 7.3124,
    "loss/feature": 4.3121e-6,
    "loss/contrast": 2.998,
    "lr": 2.4e-3,
    "grad_norm": 0.81,
    "rate/images_per_s": 23333.0,
    "rate/data_wait": 0.031,
    "memory/gib": 31.23,
}


def test_whole_line():
    # (78125 − 12340) · 4096 / 23333 = 11548.3 s = 3 h 12 min 28 s
    assert format_line(RECORD, 78125, 4096) == (
        "step 12,340/78,125 15.8%  loss 7.312  feature 4.31e-6  contrast 2.998  lr 2.4e-3  grad 0.8100  "
        "23.3k img/s  wait 3%  mem 31.2 GiB  ETA 3h12m"
    )


def test_missing_numbers_leave_no_gap_and_strange_ones_do_not_break_it():
    assert format_line({"step": 3}, None, 8) == "step 3"
    line = format_line({"step": 3, "loss/total": math.nan, "grad_norm": math.inf, "rate/images_per_s": 0.0}, 10, 8)
    assert line == "step 3/10 30.0%  loss nan  grad inf  0 img/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (725, "12m05s"), (11548, "3h12m"), (86399, "23h59m"), (371000, "4d07h"), (-3, "0s")],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.93, "0.93"), (42.13, "42.1"), (99.96, "100"), (870.4, "870"), (999.9, "1.0k"), (1234, "1.2k"), (1.4e6, "1.4M")],
)
def test_thousands(rate, text):
    assert thousands(rate) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2.4e-3, "2.4e-3"), (1.5e-4, "1.5e-4"), (0.0, "0"), (1.0, "1e0"), (1.234e-5, "1.23e-5")]
)
def test_scientific(value, text):
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(7.3124, "7.312"), (2.0, "2.000"), (0.00041, "0.0004100"), (1234.0, "1234"), (3e-7, "3e-7"), (2e6, "2e6")]
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_event():
    event = {"kind": "bad_sample", "time": 5.0, "key": "000012", "message": "not a JPEG", "seconds": 1.23456}
    assert format_event(event) == "bad sample: not a JPEG key=000012 seconds=1.235"


def test_a_file_gets_plain_lines():
    stream = io.StringIO()
    console = Console(100, 8, stream)
    console.metrics({"step": 1, "loss/total": 3.0})
    console.event({"kind": "restart", "step": 1})
    console.metrics({"step": 2, "loss/total": 2.0})
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 1/100 1.0%  loss 3.000",
        "restart: step=1",
        "step 2/100 2.0%  loss 2.000",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def visible(stream: io.StringIO) -> str:
    """What was written, without the movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_a_terminal_gets_one_live_line_with_events_above(terminal):
    stream = terminal
    console = Console(100, 8, stream)
    for step in (1, 2, 50):
        console.metrics({"step": step, "loss/total": 3.0})
    console.event({"kind": "checkpoint", "step": 50})
    console.close()
    assert "\x1b[" in stream.getvalue()  # it moves the cursor instead of adding lines
    plain = visible(stream)
    assert plain.rindex("checkpoint: step=50") < plain.rindex("step 50/100 50.0%")
    assert "━" in plain


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(100, 8, terminal)
    console.metrics({"step": 1, "loss/total": 3.0})
    console.event({"kind": "restart", "step": 1})
    console.close()
    assert terminal.getvalue() == "step 1/100 1.0%  loss 3.000\nrestart: step=1\n"


@pytest.mark.parametrize("steps", [None, 78125, 12340])
def test_a_step_line_is_known_again(steps):
    assert read_line(format_line(RECORD, steps, 4096)) == (12340, steps)
    assert read_line(format_line({"step": 0}, steps, 8)) == (0, steps)


@pytest.mark.parametrize(
    "line", ["", "step", "stepping 3", "checkpoint: step=50", "12:00:01 step 3/10 30.0%", "step 3 of 10"]
)
def test_other_lines_are_no_step_lines(line):
    assert read_line(line) is None


def test_what_a_narrow_line_keeps():
    line = format_line(RECORD, 78125, 4096)
    assert fit(line, len(line)) == line
    assert fit(line, len(line) - 1) == line.replace("  mem 31.2 GiB", "")
    # 80 columns, 10 of them the bar and one its gap.
    assert fit(line, 69) == "step 12,340/78,125 15.8%  loss 7.312  23.3k img/s  ETA 3h12m"
    assert fit(line, 50) == "step 12,340/78,125 15.8%  loss 7.312  ETA 3h12m"
    assert fit(line, 5) == "step 12,340/78,125 15.8%"  # rich shortens what is left


@pytest.mark.parametrize("columns", [20, 40, 80, 81, 200])
def test_the_live_line_never_wraps(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen(terminal)
    screen.show(format_line(RECORD, 78125, 4096))
    screen.close()
    rows = re.split(r"[\r\n]+", visible(terminal))
    assert any("step 1" in row for row in rows)
    assert max(map(len, rows)) <= columns
    if columns == 80:
        # 15.8 % of 10 columns in halves: one whole and a half.
        assert rows[-2] == "━╸━━━━━━━━ step 12,340/78,125 15.8%  loss 7.312  23.3k img/s  ETA 3h12m"


def test_other_lines_reach_the_terminal_whole(terminal):
    screen = Screen(terminal)
    path = "saved: " + "/long/path" * 20 + " [not a style] 12"
    screen.show("step 1/10 10.0%")
    screen.show(path)
    screen.close()
    assert path in terminal.getvalue()
