"""Walking a folder: everything is found once, whatever links and names it holds."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

from mcf.pack.source import (
    DUPLICATE,
    LINK_LOOP,
    NOT_A_FILE,
    UNREADABLE,
    Candidate,
    Folder,
    LeftOut,
    mixed,
    without_duplicates,
)


def walk(root):
    found = list(Folder(root).walk())
    return [f.name for f in found if isinstance(f, Candidate)], {
        f.name: f.reason for f in found if isinstance(f, LeftOut)
    }


def test_links_are_followed_once_and_loops_end(tmp_path):
    root, aside = tmp_path / "root", tmp_path / "aside"
    (root / "b" / "c").mkdir(parents=True)
    aside.mkdir()
    for file in (root / "x.jpg", root / "b" / "y.jpg", root / "b" / "c" / "z.jpg", aside / "w.jpg"):
        file.write_bytes(file.name.encode())
    (root / "a-loop").symlink_to(root)
    (root / "b" / "again").symlink_to(root / "b" / "c")
    (root / "aside").symlink_to(aside)
    (aside / "back").symlink_to(root / "b")
    (root / "file.jpg").symlink_to(aside / "w.jpg")
    (root / "nowhere.jpg").symlink_to(root / "gone")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    os.mkfifo(root / "pipe.jpg")
    names, left_out = walk(root)
    assert sorted(names) == ["aside/w.jpg", "b/c/z.jpg", "b/y.jpg", "file.jpg", "x.jpg"]
    assert left_out == {
        "a-loop/": LINK_LOOP,
        "b/again/": LINK_LOOP,
        "aside/back/": LINK_LOOP,
        "nowhere.jpg": UNREADABLE,
        "itself.jpg": UNREADABLE,
        "pipe.jpg": NOT_A_FILE,
    }


def test_a_folder_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "x.jpg").write_bytes(b"x")
    opened = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert walk(tmp_path) == (["x.jpg"], {"locked/": UNREADABLE})


def test_of_equal_files_the_first_name_stays(tmp_path):
    for name, content in {"b": b"same", "a": b"same", "c": b"same", "d": b"else", "e": b"longer"}.items():
        (tmp_path / name).write_bytes(content)
    found = [f for f in Folder(tmp_path).walk() if isinstance(f, Candidate)]
    for order in (found, found[::-1]):
        kept, doubles = without_duplicates(order, threads=2)
        assert sorted(c.name for c in kept) == ["a", "d", "e"]
        assert sorted((d.name, d.reason, d.detail) for d in doubles) == [
            ("b", DUPLICATE, "same bytes as a"),
            ("c", DUPLICATE, "same bytes as a"),
        ]


def test_files_of_a_length_of_their_own_are_not_read():
    files = [Candidate(f"{i}", "", i) for i in range(9)] + [Candidate("8 too", "", 8)]
    read = []
    without_duplicates(files, threads=1, digest=lambda c: read.append(c.name))
    assert sorted(read) == ["8", "8 too"]


def test_keys_are_plain_unlike_and_stay():
    names = [
        "a/b.jpg",
        "b.jpg",
        "a/b.png",
        "a.b/c..d.jpg",
        "ä ö/œuvre 1.JPG",
        "日本.jpg",
        "日本語.jpg",
        ".hidden",
        "x" * 250,
    ]
    keys = [Candidate(n, "", 1).key for n in names]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key) for key in keys)
    assert Candidate("a/b.jpg", "/elsewhere/a/b.jpg", 7).key == keys[0] == "b-4a51636246e7c418"


def test_names_that_are_no_text_have_keys():
    assert Candidate(os.fsdecode(b"\xff\xfe.jpg"), "", 1).key.startswith("image-")


def test_order_depends_on_seed_and_names_alone():
    files = [Candidate(f"{i}.jpg", "", 1) for i in range(200)]
    order = [c.name for c in mixed(files, 0)]
    assert order == [c.name for c in mixed(files[::-1], 0)]
    assert order != [c.name for c in mixed(files, 1)]
    # A random order has about n/2 ascents; a sorted one 199.
    assert 70 < sum(a < b for a, b in itertools.pairwise(order)) < 130


def test_the_walk_needs_no_heavy_package():
    heavy = "{'torch', 'deepspeed', 'nvidia.dali', 'mlflow', 'submitit', 'triton'}"
    code = f"import sys, mcf.pack.writing; print(sorted(sys.modules.keys() & {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
