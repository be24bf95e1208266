"""The benchmark of packing runs on a small source and says what it compares."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import laion

from mcf.bench.__main__ import main


def test_both_ways_are_timed_and_scaling_is_said(tmp_path, capsys):
    laion.tree(tmp_path, laion.coloured(), parts=(0,), tars=2, per_tar=12, sizes=(120, 200))
    named = [f"source={tmp_path / 'images'}", f"detections={tmp_path / 'detections'}", "size=32"]
    assert main(["part=pack", *named, "tars=2", "rounds=1"]) == 0
    said = capsys.readouterr().out
    assert "22 images of 2 tars" in said
    assert re.search(r"ratio +\d+\.\d\d", said) and re.search(r"on 2 processes \d+: \d+\.\d\d times", said)


def test_a_source_without_tars_is_one_line(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    assert main(["part=pack", f"source={tmp_path}", f"detections={tmp_path}"]) == 2
    assert "no tars in it" in capsys.readouterr().err
