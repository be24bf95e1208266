"""The table of levers: a row each, what it costs in numbers, and a lever that fails costs no other its row."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mcf.bench import levers
from mcf.bench.levers import Lever
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.models import float8

SMALL = [
    "model.image_size=64", "model.width=48", "model.depth=2", "model.heads=3", "model.decoder.width=32",
    "model.decoder.depth=1", "model.decoder.heads=2", "model.projection.hidden=32", "model.projection.dim=16",
    "teacher.width=48", "teacher.depth=3", "teacher.heads=3", "teacher.taps=[0,2]",
]  # fmt: skip


def test_each_lever_has_its_row_and_one_that_fails_says_why(tmp_path, monkeypatch, capsys):
    chosen = {
        "xformers": Lever({"attention": "xformers"}, together=False),
        "stream": Lever({"teacher.stream": "bfloat16"}),
        "recomputed": Lever({"speed.recompute": ("encoder",)}),
    }
    monkeypatch.setattr(levers, "LEVERS", chosen)
    file = tmp_path / "levers.json"
    written = []
    beside = levers.beside
    monkeypatch.setattr(levers, "beside", lambda *a, **n: (written.append(file.exists()), beside(*a, **n))[1])
    status = levers.main([*SMALL, "batch=4", "steps=2", "warmup=1", "precision=bf16", "threads=1", f"json_file={file}"])
    assert status == 1
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["xformers", "stream", "recomputed", "all"]
    assert written == [False, True, True, True], "what is known is written at once"
    assert "xformers computes on NVIDIA GPUs only" in rows["xformers"]["failed"]
    for name in ("stream", "recomputed", "all"):
        row = rows[name]
        assert len(row["ratios"]) == 2 and row["images_per_second"] > 0 and 1e8 < row["peak_memory"] < 2e9
    assert rows["recomputed"]["loss_difference"] == rows["recomputed"]["gradient_difference"] == 0
    # The stream in bfloat16 is another computation, and a close one (tests/test_step_speed.py).
    assert 0 < rows["stream"]["gradient_difference"] < 0.05 and 0 < rows["stream"]["loss_difference"] < 0.01
    assert rows["all"]["gradient_difference"] == rows["stream"]["gradient_difference"]
    assert rows["all"]["keys"] == {"teacher.stream": "bfloat16", "speed.recompute": "('encoder',)"}
    shown = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in shown[2:6]] == list(rows)


def test_levers_of_a_device_and_a_precision():
    cpu, gpu = levers.levers("cpu", "fp32"), levers.levers("cuda", "bf16")
    assert "memory kept" in cpu and "kernels" not in cpu and "teacher's stream bf16" not in cpu
    assert "kernels" in gpu and "teacher's stream bf16" in gpu and "memory kept" not in gpu
    assert gpu["all"] == {
        "attention": "auto", "kernels": "triton", "speed.compile": "blocks", "teacher.stream": "bfloat16"
    }  # fmt: skip
    assert list(levers.levers("cuda", "bf16", "recomputed")) == ["teacher recomputed", "all recomputed"]
    with pytest.raises(UserError, match="only=fp8: no lever has that in its name; there are memory kept, "):
        levers.levers("cpu", "fp32", "fp8")


def test_a_lever_that_is_not_there_is_one_line_before_anything_is_started(monkeypatch, capsys):
    monkeypatch.setattr(levers, "Apart", lambda *_: pytest.fail("a process was started"))
    assert levers.main([*SMALL, "precision=fp32", "only=nonsense"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: only=nonsense: no lever has that in its name; there are memory kept, ")


def test_float8_is_left_out_where_it_cannot_be_and_is_in_no_run_by_default(monkeypatch, tmp_path):
    assert (
        levers.NONE["teacher.products"] == "bfloat16" and "teacher.products" not in levers.levers("cuda", "bf16")["all"]
    )
    assert not [name for name in levers.levers("cuda", "fp32") if "float8" in name]
    monkeypatch.setattr(float8, "unavailable", lambda device: f"{device} is too old")
    monkeypatch.setattr(levers, "Apart", lambda *_: SimpleNamespace(close=lambda: None))
    file = tmp_path / "levers.json"
    assert levers.main([*SMALL, "precision=bf16", "only=float8", f"json_file={file}"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["teacher float8", "teacher float8 + compiled + stream"]
    assert {row["left out"] for row in rows.values()} == {"cpu is too old"}


def test_every_lever_is_of_keys_that_a_recipe_has():
    for lever in [Lever(levers.NONE), *levers.LEVERS.values()]:
        assert lever.keys.keys() <= levers.NONE.keys()
        recipe = levers.with_keys(Recipe(), lever.keys)
        values = Recipe.model_validate(recipe.model_dump())
        for key, value in lever.keys.items():
            found = values
            for name in key.split("."):
                found = getattr(found, name)
            assert found == value


def test_gradients_are_compared_by_norm():
    one, other = (
        SimpleNamespace(gradients=lambda a=a: np.array(a, dtype=np.float32).tobytes()) for a in ([3.0, 4.5], [3.0, 4.0])
    )
    assert levers._apart(one, other) == pytest.approx(0.1)


def test_time_that_is_over_is_said(monkeypatch, capsys):
    monkeypatch.setattr(levers, "Apart", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(levers.time, "monotonic", iter(range(0, 10_000, 100)).__next__)
    assert levers.main(["recipe=vit_b_20m", "precision=fp32", "seconds=50"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["left out"] for row in rows.values()} == {"50 s were over"} and "all" in rows
