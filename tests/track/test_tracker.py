"""The tracker: every sink gets what it should, and no failure of one reaches the training loop or another sink."""

from __future__ import annotations

import io
import os
import time

import numpy as np
import pytest

from mcf.config import Recipe
from mcf.track import Tracker, jsonl
from mcf.track.jsonl import read


@pytest.fixture
def recipe(tmp_path):
    return Recipe.model_validate({"name": "run", "output": str(tmp_path), "batch": 8, "track": {"mlflow": "off"}})


def test_every_sink_gets_the_record(tmp_path, recipe):
    stream = io.StringIO()
    with Tracker(recipe, tmp_path / "run", plan={"steps": 10}, stream=stream) as tracker:
        before = time.time()
        tracker.metrics(5, {"loss/total": np.float32(0.5), "lr": 0.25})
        tracker.event("bad_sample", key="abc", reason="truncated")
        path = tracker.image(5, "reconstruction", np.full((4, 6, 3), 9, np.uint8))
    (record,) = read(tmp_path / "run/metrics.jsonl")
    assert before <= record.pop("time") <= time.time()
    assert record == {"step": 5, "samples": 40, "loss/total": 0.5, "lr": 0.25}
    (event,) = read(tmp_path / "run/events.jsonl")
    assert (event["kind"], event["key"], event["reason"]) == ("bad_sample", "abc", "truncated")
    assert path == tmp_path / "run/images/step-000005-reconstruction.png"
    from PIL import Image

    assert np.asarray(Image.open(path)).shape == (4, 6, 3)
    assert "step 5/10 50.0%  loss 0.5000  lr 2.5e-1" in stream.getvalue()
    assert "bad sample: key=abc reason=truncated" in stream.getvalue()
    assert tracker.how_to_open is None


def test_other_ranks_do_nothing_at_all(tmp_path, recipe):
    stream = io.StringIO()
    tracker = Tracker(recipe, tmp_path / "run", rank=1, run_id="abc", stream=stream)
    tracker.metrics(1, {"loss/total": 1.0})
    tracker.event("warning", message="x")
    assert tracker.image(1, "reconstruction", np.zeros((4, 4, 3), np.uint8)) is None
    tracker.sync()
    tracker.close()
    assert tracker.run_id == "abc"
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""


def test_a_run_that_goes_on_from_100_has_each_step_once(tmp_path, recipe):
    for life, steps in enumerate((range(10, 140, 10), range(110, 160, 10))):
        tracker = Tracker(recipe, tmp_path / "run", stream=io.StringIO())
        for step in steps:
            tracker.metrics(step, {"life": life})
            tracker.metrics(step, {"second/record": 1.0})  # of the same step: nothing that may be cut
        tracker.event("stop", step=steps[-1])
        tracker.close()
    first = [record for record in read(tmp_path / "run/metrics.jsonl") if "life" in record]
    assert [(r["step"], r["life"]) for r in first] == [(s, s > 100) for s in range(10, 160, 10)]
    assert len(read(tmp_path / "run/metrics.jsonl")) == 2 * len(first)
    assert len(read(tmp_path / "run/events.jsonl")) == 2  # a history: never cut


def test_a_broken_terminal_leaves_the_file(tmp_path, recipe, capsys):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("gone")

    tracker = Tracker(recipe, tmp_path / "run", stream=Broken())
    for step in (1, 2, 3):
        tracker.metrics(step, {"loss/total": 1.0})
    tracker.close()
    assert [record["step"] for record in read(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().err.count("console failed (gone)") == 1


def test_a_disk_that_fills_and_empties_is_said_once(tmp_path, recipe, monkeypatch, capsys):
    tracker = Tracker(recipe, tmp_path / "run", stream=io.StringIO())
    tracker.metrics(1, {"loss/total": 1.0})
    write = os.write

    def full(file, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.os, "write", full)
    tracker.metrics(2, {"loss/total": 1.0})
    tracker.metrics(3, {"loss/total": 1.0})
    monkeypatch.setattr(jsonl.os, "write", write)
    tracker.metrics(4, {"loss/total": 1.0})
    tracker.close()
    assert [record["step"] for record in read(tmp_path / "run/metrics.jsonl")] == [1, 4]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_run_directory_that_cannot_be_made_stops_nothing(tmp_path, recipe, capsys):
    (tmp_path / "run").write_text("a file is in the way")
    stream = io.StringIO()
    tracker = Tracker(recipe, tmp_path / "run", stream=stream)
    tracker.metrics(1, {"loss/total": 1.0})
    tracker.event("warning", message="still here")
    assert tracker.image(1, "reconstruction", np.zeros((4, 4, 3), np.uint8)) is None
    tracker.sync()
    tracker.close()
    assert "step 1" in stream.getvalue()
    assert "still here" in stream.getvalue()
    assert capsys.readouterr().err.count("\n") == 1


def test_strange_values_do_not_raise(tmp_path, recipe, capsys):
    tracker = Tracker(recipe, tmp_path / "run", stream=io.StringIO())
    tracker.image(1, "reconstruction", np.zeros((4, 4, 7), np.float32))
    tracker.event("odd", thing=object(), where=tmp_path, keys={"a", "b"})
    tracker.metrics(2, {"loss/total": "no number"})
    tracker.metrics(3, {"loss/total": 1.0})
    tracker.close()
    tracker.close()
    tracker.metrics(4, {"loss/total": 1.0})
    assert read(tmp_path / "run/metrics.jsonl")[-1]["step"] == 3
    assert sorted(read(tmp_path / "run/events.jsonl")[0]["keys"]) == ["a", "b"]
    assert not list((tmp_path / "run/images").glob("*.png"))
