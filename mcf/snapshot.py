"""The code of a run: a copy of what was launched, so that editing it changes no run that waits or is restarted.

RUN/code/mcf/             the package, with kernels/ and recipes/ inside: PYTHONPATH=RUN/code runs it
RUN/code/VERSION          commit it was copied from, with "+changes" if the working tree had any
"""

from __future__ import annotations

import compileall
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from mcf.errors import UserError

PACKAGE = "mcf"
# Packages of mcf that lie in folders of their own in the repository (setup.py).
MAPPED = ("kernels", "recipes")
VERSION = "VERSION"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.tmp", ".*")


def take(run_dir: Path) -> Path:
    """Copy the running code to RUN/code, in place of an earlier copy; returns the folder for PYTHONPATH."""
    code, staged, old = (run_dir / name for name in ("code", "code.new", "code.old"))
    for leftover in (staged, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        source = _folder(PACKAGE)
        shutil.copytree(source, staged / PACKAGE, ignore=_LEFT_OUT)
        for name in MAPPED:
            shutil.copytree(_folder(f"{PACKAGE}.{name}"), staged / PACKAGE / name, ignore=_LEFT_OUT, dirs_exist_ok=True)
        (staged / VERSION).write_text(version(source.parent) + "\n")
        # Compiled here, once: or every rank of the first start would write the same files at the same moment.
        compileall.compile_dir(staged, ddir=str(code), quiet=2)
        if code.exists():
            code.rename(old)
        staged.rename(code)
    except OSError as error:
        # copytree gathers what went wrong: (source, destination, why).
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise UserError(f"{run_dir}: the code cannot be copied there ({why}); free space, or set output=") from None
    shutil.rmtree(old, ignore_errors=True)
    return code


def version(root: Path) -> str:
    """Commit of the code below `root`, "+changes" appended if its tracked files differ; "" where nothing tells."""
    if (root / VERSION).is_file():
        return (root / VERSION).read_text().strip()
    if not (root / ".git").exists():
        return ""
    try:
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {package} is not installed; install the project with: pip install -e .")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        # `git status` must not take the index lock of a tree that somebody works in.
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()
