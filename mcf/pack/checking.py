"""Every JPEG of a shard is decoded once, from its place in the tar, by the decoder of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mcf.data.dali import Decoder, Undecodable

_BATCH = 64
_SIDE = 72  # what pictures are shrunk to: 8 rows of 9 pixels, 9 columns of 8


class Checker:
    """Reads shards that were just written; one for many shards, not for several threads.

    hashes: also give the difference hash of each picture, which takes three times as long.
    """

    def __init__(self, threads: int = 1, hashes: bool = False):
        self._hashes = hashes
        self._decoder = Decoder(
            _SIDE, _BATCH, device=torch.device("cpu"), decoder="cpu", threads=threads, only_check=not hashes
        )

    def look(self, tar: Path, index: np.ndarray) -> tuple[dict[int, str], np.ndarray]:
        """Rows of the index that do not decode, with the reason, and the hash of each row (or 0), uint64 [n]."""
        reasons: dict[int, str] = {}
        hashes = np.zeros(len(index), dtype=np.uint64)
        for first, jpegs in _batches(tar, index):
            good = list(range(len(jpegs)))
            while good:
                try:
                    values = self._decoded([jpegs[i] for i in good])
                except Undecodable as error:
                    reasons |= {first + good[i]: reason for i, reason in error.reasons.items()}
                    good = [place for i, place in enumerate(good) if i not in error.reasons]
                    continue
                hashes[[first + i for i in good]] = values
                break
        return reasons, hashes

    def _decoded(self, jpegs: list[np.ndarray]) -> np.ndarray | int:
        if self._hashes:
            return difference_hash(self._decoder.decode(jpegs, np.zeros(len(jpegs), dtype=bool)))
        self._decoder.check(jpegs)
        return 0


def _batches(tar: Path, index: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    with tar.open("rb") as file:
        for first in range(0, len(index), _BATCH):
            rows = index[first : first + _BATCH]
            start = int(rows["offset"][0])
            file.seek(start)
            content = file.read(int(rows["offset"][-1] + rows["size"][-1]) - start)
            places = zip((rows["offset"] - start).tolist(), rows["size"].tolist())
            yield first, [np.frombuffer(content, np.uint8, size, offset) for offset, size in places]


def difference_hash(pictures: torch.Tensor) -> np.ndarray:
    """64 bits of each picture (uint8 [n, 72, 72, 3]): whether a cell of 8 rows of 9 is brighter than the next."""
    grey = pictures.float() @ torch.tensor([0.299, 0.587, 0.114])
    cells = F.avg_pool2d(grey[:, None], (_SIDE // 8, _SIDE // 9))[:, 0]
    bits = (cells[:, :, :-1] > cells[:, :, 1:]).flatten(1).numpy()
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0]
