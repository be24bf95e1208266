"""Where what Triton and torch compile is kept: on each node's own disk, and not below the $HOME that a cluster shares."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Variable → folder below the node's own one. By default all but the second lie below $HOME.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
}


def keep_local() -> Path | None:
    """Have whatever compiles keep its results on this node's own disk, for this user; variables that are set stay.

    Returns the folder, below TMPDIR or /tmp; None where code may not be run from there: all stays as it is then. Call
    it before anything compiles.
    """
    there = Path(tempfile.gettempdir())
    if os.statvfs(there).f_flag & os.ST_NOEXEC:
        return None
    folder = there / f"mcf-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # What lies there is run as code: a folder that somebody else has put there under this name is not used.
        mine = found.st_uid == os.getuid() and not found.st_mode & 0o022 and not folder.is_symlink()
    except OSError:
        mine = False
    if not mine:
        folder = Path(tempfile.mkdtemp(prefix="mcf-"))
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))
    return folder
