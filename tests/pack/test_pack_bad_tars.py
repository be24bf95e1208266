"""Whatever may come in a tar: named with its reason; no name is a path, no size is believed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from bad import read, sample, write_tar
from scenes import jpeg, tree

from mcf.pack import convert, tars
from mcf.pack.options import PackConfig
from mcf.pack.source import LeftOut


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_members_that_do_not_belong_are_named_and_nothing_is_written_anywhere(tmp_path):
    (tmp_path / "inside").mkdir()
    path = write_tar(
        tmp_path / "inside/t.tar",
        [
            *sample("000000000", 1),
            ("/etc/evil.jpg", jpeg(2)),
            ("../evil.jpg", jpeg(3)),
            ("a/../../evil.json", b"{}"),
            ("notes.exe", b"MZ"),
            ("folder/0.jpg", jpeg(4)),
            (special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (special("hard.jpg", tarfile.LNKTYPE, "000000000.jpg"), b""),
            (special("fifo.jpg", tarfile.FIFOTYPE), b""),
            (special("device.jpg", tarfile.CHRTYPE), b""),
            (special("folder", tarfile.DIRTYPE), b""),
            *sample("000000001", 5),
        ],
    )
    before = tree(tmp_path)
    good, out = read(path)
    assert good == ["000000000", "000000001"]
    assert out == {
        "t.tar//etc/evil.jpg": tars.UNSAFE,
        "t.tar/../evil.jpg": tars.UNSAFE,
        "t.tar/a/../../evil.json": tars.UNSAFE,
        "t.tar/notes.exe": tars.UNEXPECTED,
        "t.tar/folder/0.jpg": tars.UNEXPECTED,
        "t.tar/link.jpg": tars.UNEXPECTED,
        "t.tar/hard.jpg": tars.UNEXPECTED,
        "t.tar/fifo.jpg": tars.UNEXPECTED,
        "t.tar/device.jpg": tars.UNEXPECTED,
    }
    assert tree(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["inside"]


def test_a_sparse_member_that_claims_terabytes_is_not_read(tmp_path):
    """GNU tar makes it: one written byte at the end of 1 TB of nothing."""
    with (tmp_path / "0.jpg").open("wb") as file:
        file.seek(1 << 40)
        file.write(b"x")
    subprocess.run(["tar", "--sparse", "--format=gnu", "-cf", "t.tar", "0.jpg"], cwd=tmp_path, check=True)
    (tmp_path / "0.jpg").unlink()
    assert (tmp_path / "t.tar").stat().st_size < 100_000
    assert read(tmp_path / "t.tar") == ([], {"t.tar/0.jpg": tars.UNEXPECTED})


def test_members_over_the_limits_are_not_read(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("0.jpg", bytes(5000)), ("0.json", b" " * (2 << 20)), *sample("1", 1)])
    good, out = read(path, max_bytes=4000)
    assert good == ["1"]
    assert out == {"t.tar/0.jpg": convert.TOO_LARGE, "t.tar/0.json": convert.TOO_LARGE}


def test_a_name_that_comes_twice_is_kept_once(tmp_path):
    path = write_tar(tmp_path / "t.tar", [*sample("0", 1), *sample("1", 2), *sample("0", 3), ("1.png", jpeg(4))])
    items = list(tars.entries(path, "t.tar", PackConfig()))
    assert [(item.key, item.content) for item in items if not isinstance(item, LeftOut)] == [
        ("0", jpeg(1)), ("1", jpeg(2)), ("1", jpeg(4))
    ]  # fmt: skip
    assert [item.reason for item in items if isinstance(item, LeftOut)] == [tars.SEEN]


def test_samples_without_image_or_json(tmp_path):
    path = write_tar(
        tmp_path / "t.tar",
        [
            ("0.json", b'{"error_message": "HTTP 404"}'),
            ("0.txt", b"x"),
            ("1.jpg", jpeg(1)),
            ("2.jpg", jpeg(2)),
            ("2.json", b"{no"),
        ],
    )
    items = list(tars.entries(path, "t.tar", PackConfig()))
    assert [(item.name, item.reason, item.detail) for item in items if isinstance(item, LeftOut)] == [
        ("t.tar/0", tars.NO_IMAGE, "HTTP 404")
    ]
    assert [(item.key, item.facts, item.sample_id) for item in items[1:]] == [("1", {}, None), ("2", {}, None)]


@pytest.mark.parametrize("value", [None, "x", True, [], {}, float("inf"), 1.5, "12"])
def test_sample_ids_of_any_kind(value):
    expected = {1.5: 1, "12": 12}.get(value) if not isinstance(value, (list, dict, bool)) else None
    assert tars.Entry("t.tar/0.jpg", b"", {"SAMPLE_ID": value}).sample_id == expected


@pytest.mark.parametrize("keep", [0, 100, 700, 2000, 6000])
def test_a_truncated_tar_gives_what_lies_before(tmp_path, keep):
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(6) for m in sample(f"{i}", i)])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:keep])
    good, out = read(cut)
    assert good == [f"{i}" for i in range(len(good))] and len(good) < 6
    assert out == {"t.tar": tars.DAMAGED_TAR}


def test_a_tar_that_is_none_and_a_flipped_header(tmp_path):
    text = tmp_path / "text.tar"
    text.write_bytes(b"not a tar" * 200)
    assert read(text) == ([], {"t.tar": tars.DAMAGED_TAR})
    packed = tmp_path / "t.tar.gz"
    subprocess.run(["tar", "-czf", packed.name, "text.tar"], cwd=tmp_path, check=True)
    assert read(packed) == ([], {"t.tar": tars.DAMAGED_TAR})
    path = write_tar(tmp_path / "t.tar", [m for i in range(4) for m in sample(f"{i}", i)])
    content = bytearray(path.read_bytes())
    place = content.index(b"2.jpg")
    content[place + 150] ^= 0xFF  # in the header's checksum
    path.write_bytes(content)
    good, out = read(path)
    assert good == ["0", "1"]
    assert out == {"t.tar": tars.DAMAGED_TAR}


def test_random_damage_never_raises(tmp_path):
    whole = write_tar(tmp_path / "t.tar", [m for i in range(3) for m in sample(f"{i}", i)]).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.tar"
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 40):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        read(path)


def test_a_million_members_are_read_in_little_memory(tmp_path):
    """A bomb of empty members: 30,000 of them (15 MB) may not cost what tarfile's own list of them does."""
    program = (
        "import sys, resource; from pathlib import Path; from mcf.pack import tars; from mcf.pack.options import PackConfig\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in tars.entries(Path(sys.argv[1]), 't.tar', PackConfig()))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(30_000):
            tar.fileobj.write(tarfile.TarInfo(f"{i}.exe").tobuf())
            tar.offset += 512
    said = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout
    count, grown = map(int, said.split())
    assert count == 30_000
    assert grown < 10_000  # kB; with all TarInfo objects kept it is 30 MB


def by_webdataset(path, members):
    """As img2dataset writes: a time with a fraction gives every member a pax header."""
    with pytest.importorskip("webdataset").TarWriter(str(path)) as writer:
        for i in range(0, len(members), 3):
            (name, image), (_, facts), (_, text) = members[i : i + 3]
            writer.write({"__key__": name.removesuffix(".jpg"), "jpg": image, "json": facts, "txt": text})


def by_tarfile(path, members, form=tarfile.PAX_FORMAT, mtime=1.5):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))


def by_tarfile_gnu(path, members):
    by_tarfile(path, members, tarfile.GNU_FORMAT, 1)


def by_tarfile_ustar(path, members):
    by_tarfile(path, members, tarfile.USTAR_FORMAT, 1)


@pytest.mark.parametrize("write", [by_webdataset, by_tarfile, by_tarfile_gnu, by_tarfile_ustar])
def test_every_kind_of_tar_gives_what_tarfile_gives(tmp_path, write):
    # Names that need more than a plain header amid plain ones; ustar has no room for any.
    odd = [] if write is by_tarfile_ustar else ["k" * 99, "é" * 60]
    keys = ["000000000", "000000001", *odd, "000000002", "000000003"]
    write(tmp_path / "t.tar", [member for i, key in enumerate(keys) for member in sample(key, i)])
    with tarfile.open(tmp_path / "t.tar") as tar:
        theirs = {m.name: tar.extractfile(m).read() for m in tar}
    ours = list(tars.entries(tmp_path / "t.tar", "t.tar", PackConfig(source="x")))
    assert [entry.key for entry in ours] == keys
    for entry in ours:
        assert entry.content == theirs[f"{entry.key}.jpg"] and entry.facts == json.loads(theirs[f"{entry.key}.json"])


@pytest.mark.parametrize("write", [by_webdataset, by_tarfile, by_tarfile_ustar])
def test_a_plain_tar_needs_no_tarfile(tmp_path, monkeypatch, write):
    write(tmp_path / "t.tar", [member for i in range(5) for member in sample(f"{i}", i)])
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("tarfile was asked"))
    assert [entry.key for entry in tars.entries(tmp_path / "t.tar", "t.tar", PackConfig(source="x"))] == list("01234")
