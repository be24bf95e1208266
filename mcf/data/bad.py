"""Samples that could not be read or decoded: what is told of each, and how many of them a run bears."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mcf.errors import UserError

_NAMED = 5  # bad samples that an error names


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or decoded, each time it came up; `substitute` is the key shown instead."""

    position: int
    shard: str
    row: int
    key: str
    reason: str
    substitute: str


class Tally:
    """The different bad samples found since the start, against the share of all samples of the folder that may be bad.

    The share is of the data, not of what has been read by now: in whatever order, by however many ranks and in however
    many starts a run meets its bad samples, it never stops if the data have no more of them than it may bear.
    """

    def __init__(self, max_bad: float, samples: int):
        self.max_bad, self.samples = max_bad, samples
        self._found: set[tuple[str, int]] = set()  # shard, row
        self._last: deque[str] = deque(maxlen=_NAMED)

    def add(self, found: Iterable[BadSample]) -> None:
        """Count samples; one that comes up in every epoch is one. Raises UserError if they are too many."""
        for bad in found:
            self._found.add((bad.shard, bad.row))
            self._last.append(f"{bad.key} in {bad.shard} ({bad.reason})")
        if len(self._found) > self.max_bad * max(self.samples, 100):
            raise UserError(
                f"{len(self._found)} of {self.samples} samples could not be read, more than data.max_bad="
                f"{self.max_bad:g} allows; the last: {', '.join(self._last)}; mend the folder, or raise data.max_bad"
            )
