"""The copy of the code that a run runs from: whole, compiled, and it knows its version."""

import errno
import marshal
import os
import shutil
import subprocess
import sys

import pytest

from mcf import cli, snapshot
from mcf.errors import UserError
from mcf.track import origin


def test_the_copy_is_complete_and_knows_its_version(tmp_path):
    code = snapshot.take(tmp_path)
    # Compiled already, each file with the path it has now: 128 ranks that start from it have nothing to write.
    compiled = {file: file.stat().st_mtime_ns for file in code.rglob("*.pyc")}
    assert len(compiled) == len(list(code.rglob("*.py"))) > 50
    probe = (
        "import mcf, mcf.cli, mcf.kernels.reference, mcf.snapshot, pathlib;"
        "print(mcf.__file__, mcf.kernels.__file__, len(mcf.cli.recipe_names()), mcf.snapshot.take(pathlib.Path('again')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert {file: file.stat().st_mtime_ns for file in code.rglob("*.pyc")} == compiled
    (launcher,) = (file for file in compiled if file.name.startswith("launch."))
    assert marshal.loads(launcher.read_bytes()[16:]).co_filename == str(code / "mcf" / "launch.py")
    package, kernels, recipes, again = done.stdout.split()
    assert package == str(code / "mcf/__init__.py")
    assert kernels == str(code / "mcf/kernels/__init__.py")
    assert int(recipes) == len(cli.recipe_names())
    # A copy of the copy has the same version, though there is no git around it.
    assert (tmp_path / again / "VERSION").read_text() == (code / "VERSION").read_text()


def test_a_disk_too_full_for_the_copy_is_one_line(tmp_path, monkeypatch):
    def copy(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    # The default of copytree's copy_function, which it took when it was defined.
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, copy, False, False))
    with pytest.raises(UserError, match=r"No space left on device.*set output="):
        snapshot.take(tmp_path)


@pytest.mark.parametrize("version", [snapshot.version, lambda _: origin.code_version.__wrapped__()])
def test_version_tells_changes(tmp_path, monkeypatch, version):
    monkeypatch.setattr(origin, "ROOT", tmp_path)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert version(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert version(tmp_path) == commit
    (tmp_path / "new").touch()
    assert version(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert version(tmp_path) == commit + "+changes"
