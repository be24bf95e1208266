"""Files that are whole or not there: after errors, full disks, kills and power losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from power import Disk

from mcf import atomic


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    for content in ("Größe\n", b"\x00\xff"):
        atomic.write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path):
    atomic.write(tmp_path / "file", "former")
    with pytest.raises(ZeroDivisionError), atomic.replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "former" and names(tmp_path) == ["file"]


def test_a_folder_of_that_name_is_an_error_and_stays(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        atomic.write(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").is_dir()


def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path):
    """A limit on the size of files stands for it: writing fails part of the way, as there."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from mcf import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic.write(Path(sys.argv[1]), bytes(2000))\n"
    )
    atomic.write(tmp_path / "file", "former")
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert (tmp_path / "file").read_text() == "former" and names(tmp_path) == ["file"]


def test_a_kill_leaves_the_former_file(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from mcf import atomic\n"
        "with atomic.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    atomic.write(tmp_path / "file", "former")
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "file"]).returncode == -9
    assert (tmp_path / "file").read_text() == "former"


def test_a_power_loss_leaves_all_of_the_new_file(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)  # fails where a file gets its name before its content is on the disk
    atomic.write(tmp_path / "file", "text")
    assert [new for _, new in disk.renamed] == ["file"] and disk.has(tmp_path / "file")
    with pytest.raises(AssertionError, match="is not on the disk"):
        atomic.write(tmp_path / "other", "text", sync=False)
