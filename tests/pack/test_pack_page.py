"""report.html: what it says is what is in the folder, pictures included, and hostile names stay text."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from scenes import jpeg

from mcf.data.shards import load_manifest
from mcf.pack.__main__ import main
from mcf.pack.page import PICTURES, SHARDS, some_jpegs


class Parsed(html.parser.HTMLParser):
    """Tags, texts and pictures; a tag that is not closed is noted."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.pictures = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def pack(tmp_path, count: int, **files: bytes):
    (tmp_path / "source").mkdir()
    for i in range(count):
        (tmp_path / f"source/{i}.jpg").write_bytes(jpeg(i))
    for name, content in files.items():
        (tmp_path / "source" / name).write_bytes(content)
    assert main([f"source={tmp_path / 'source'}", f"out={tmp_path / 'out'}", "workers=1", "shard_samples=5"]) == 0
    return tmp_path / "out"


def test_the_page_says_and_shows_what_is_in_the_folder(tmp_path, capsys):
    out = pack(tmp_path, 12, **{"<script>alert(1)</script>.jpg".replace("/", "∕"): b"text", "tiny.jpg": jpeg(1, 9, 9)})
    assert main([f"report={out}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    text = (out / "report.html").read_text()
    page = Parsed(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    words = " ".join(page.texts)
    assert "14 found = 12 kept + 2 left out." in words
    assert load_manifest(out).fingerprint in words and "not an image" in words and "too small" in words
    assert not re.search(r"https?://", text)
    assert len(page.pictures) == 3
    for number, source in enumerate(page.pictures):
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as image:
            sheet = np.asarray(image.convert("RGB")).astype(int)
        count = min(PICTURES, load_manifest(out).shards[number].samples)
        assert sheet.shape == (88, count * 92 - 4, 3)
        for i, content in enumerate(some_jpegs(load_manifest(out), number, PICTURES)):
            with Image.open(io.BytesIO(content)) as image:
                middle = np.asarray(image).astype(int)[32, 48]
            assert np.abs(sheet[44, i * 92 + 44] - middle).max() < 12  # shrunk, and two JPEG generations


def test_of_many_shards_some_are_shown_and_that_is_said(tmp_path):
    out = pack(tmp_path, 5 * SHARDS + 40)
    assert main([f"report={out}"]) == 0
    page = Parsed((out / "report.html").read_text())
    assert len(page.pictures) == SHARDS
    assert f"{SHARDS} of {SHARDS + 8} shards" in " ".join(page.texts)


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"found": 1})])
def test_a_folder_without_a_report_is_one_line(tmp_path, content, capsys):
    out = pack(tmp_path, 3)
    (out / "report.json").unlink() if content is None else (out / "report.json").write_text(content)
    assert main([f"report={out}"]) == 2
    error = capsys.readouterr().err
    assert "report.json: cannot be read" in error and error.count("\n") == 1
    assert main([f"report={tmp_path / 'nowhere'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: report={tmp_path / 'nowhere'}: no such folder; ")
    # It packs nothing, and does not let somebody wait for shards.
    assert main([f"report={out}", "source=somewhere"]) == 2
    assert "report=DIR packs nothing: leave out source= and out=" in capsys.readouterr().err
