"""The start of many ranks on one shared file system: who looks at what, and whether all see the same.

    read by rank 0 and sent to all    recipe, manifest, checkpoint, teacher     mcf/distributed.py, mcf/spread.py
    read by one rank a node           the code and the manifest, to compare     `check_same_everywhere`
    read by each rank                 the index of its own shards               mcf/data/reader.py
    kept on each node's own disk      what Triton and torch compile             mcf/caches.py

A node that has an old copy of the code, or of the data, trains something else than the others, and nothing would fail:
so such a cluster is refused at its start, naming the rank.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import mcf
from mcf import distributed
from mcf.data.shards import sight
from mcf.distributed import World
from mcf.errors import UserError

_PACKAGES = ("mcf", "mcf.kernels")


@dataclass(frozen=True)
class Sight:
    """What a rank sees: versions in its memory, code by its hash, data as `sight` says it; where both lie."""

    versions: str
    code: str
    data: str
    host: str = ""
    folder: str = ""


def check_same_everywhere(world: World, data: str) -> None:
    """Raise UserError, on all ranks, if ranks run other versions or code than most, or see another manifest in `data`.

    The files are looked at once on each node (and once more where ranks of a node see different folders). Collective.
    """
    folder = _folder("mcf")
    # Ranks of which this is equal see the same files: a host, where its code lies, and what data.path leads to.
    place = world.host, str(folder), _identity(folder), _identity(data)
    places = distributed.gather_objects(place)
    looks = places.index(place) == world.rank
    looked = distributed.gather_objects((_hash_of_code(), sight(data)) if looks else None)
    versions = distributed.gather_objects(_versions())
    found = [looked[places.index(at)] or ("", "") for at in places]
    sights = [Sight(v, code, there, at[0], at[1]) for v, (code, there), at in zip(versions, found, places)]
    if complaint := compare(sights):
        raise UserError(complaint)


def compare(sights: list[Sight]) -> str | None:
    """What is wrong with the sights of all ranks, in a sentence; None if they are all alike.

    Odd is who differs from most; of two equal halves, who differs from rank 0.
    """
    for field, what, remedy in (
        ("versions", "has other versions", "install the same on all nodes"),
        ("code", "runs other code", "start all ranks from one folder that every node sees, as mcf.launch does"),
        ("data", "sees other data", "give all nodes the same folder of shards"),
    ):
        values = [getattr(seen, field) for seen in sights]
        counts = Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        if odd := [rank for rank, value in enumerate(values) if value != usual]:
            more = f" (and ranks {', '.join(map(str, odd[1:9]))}{' …' if odd[9:] else ''})" if odd[1:] else ""
            one, other = (
                f"{values[rank]}{f' in {sights[rank].folder}' if field == 'code' else ''}"
                for rank in (odd[0], values.index(usual))
            )
            return (
                f"rank {odd[0]} on {sights[odd[0]].host}{more} {what} than rank {values.index(usual)} on "
                f"{sights[values.index(usual)].host}: {one}, not {other}; {remedy}"
            )
    return None


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _versions() -> str:
    return (
        f"mcf {mcf.__version__}, torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    )


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _hash_of_code() -> str:
    """Identity of the Python files of the project: path and content of each."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        folder = _folder(package)
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
