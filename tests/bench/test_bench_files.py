"""A file that cannot be written is refused before minutes are spent on its numbers."""

from __future__ import annotations

import json

import pytest

from mcf.bench.__main__ import main
from mcf.bench.files import save


@pytest.mark.parametrize("part", ["loader", "step", "levers", "fed", "traffic"])
@pytest.mark.parametrize("file", ["missing/numbers.json", "."])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, part, file, capsys):
    arguments = ["data=x"] if part == "loader" else []
    assert main([f"part={part}", *arguments, f"json_file={tmp_path / file}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith(f"json_file: {tmp_path / file} cannot be written; give a file in a folder that exists")


def test_what_is_written(tmp_path):
    save(None, {"a": 1})
    save(str(tmp_path / "numbers.json"), {"a": [1, 2.5]})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"a": [1, 2.5]}
