"""Faces for a network: decoded and cut out by threads, warped on the device in whole batches.

    order      a permutation of each epoch by the seed; sample number n of the run is face order[n]
    thread     decode, the warp with its draw, the region that it needs
    device     warp, colours, resize to the network's input

What a step sees depends on (seed, samples seen) alone: rank r of W takes every W-th sample of a step's batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mcf.downstream import augment
from mcf.downstream.augment import Draw
from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import Face, FaceSet
from mcf.downstream.datasets.faceset import read_image, read_labels
from mcf.downstream.warps import Warp, about_centre, box_matrix, needed_region, similarity_matrix

AHEAD = 2  # micro-batches that are prepared beforehand


@dataclass(frozen=True, eq=False)
class Prepared:
    """A decoded face. image uint8 [h, w, 3]: the part of the original that its square reads; part: the square's warp from
    there, warp: from the original. labels uint8 [H, W]: of the whole original; cut: of the part."""

    face: Face
    image: NDArray[np.uint8]
    part: Warp
    warp: Warp
    shape: tuple[int, int]
    labels: NDArray[np.uint8] | None
    cut: NDArray[np.uint8] | None
    draw: Draw | None


@dataclass(frozen=True)
class Batch:
    """What the network and the loss take.

    images: float [B, 3, input, input] in [0, 1]. points: float [B, P, 2] in [0, 1], (pixel + ½) / side of the square.
    labels: int64 [B, S, S], classes of the square's pixels.
    """

    faces: list[Prepared]
    images: Tensor
    points: Tensor | None
    labels: Tensor | None


class Loader:
    """Makes batches of one data set; use it as a context, its threads end with it."""

    def __init__(self, faces: FaceSet, config: FinetuneConfig, device: torch.device, threads: int):
        self.set, self.config, self.device = faces, config, device
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def training(self, faces: Sequence[Face], start: int, rank: int, ranks: int, micro_batch: int) -> Iterator[Batch]:
        """Micro-batches for ever, from sample number `start` of the run on."""
        order = Order(len(faces), self.config.batch, self.config.seed)

        def work() -> Iterator[list[Future[Prepared]]]:
            step = start
            while True:
                samples = range(step + rank, step + self.config.batch, ranks)
                for first in range(0, len(samples), micro_batch):
                    chosen = samples[first : first + micro_batch]
                    yield [self._pool.submit(self._draw, faces[order[n]], n) for n in chosen]
                step += self.config.batch

        yield from self._ahead(work())

    def plain(self, faces: Sequence[Face], size: int) -> Iterator[Batch]:
        """All faces in order, without augmentation, `size` at a time."""
        chunks = (faces[first : first + size] for first in range(0, len(faces), size))
        yield from self._ahead([self._pool.submit(self.prepare, face, None) for face in chunk] for chunk in chunks)

    def prepare(self, face: Face, draw: Draw | None) -> Prepared:
        """Decode a face. Raises UserError for an image or mask that cannot be used."""
        config = self.config
        image = read_image(face)
        height, width = image.shape[:2]
        warp = face_warp(face, self.set, config.sides[0], (height, width), draw)
        labels = None
        if self.set.task == "parsing" and (face.labels is not None or face.parts):
            labels = read_labels(face, len(self.set.classes), image.shape)
        left, top, right, bottom = needed_region(warp, height, width)
        shift = torch.eye(3, dtype=torch.float64)
        shift[0, 2], shift[1, 2] = left, top
        return Prepared(
            face=face,
            image=image[top:bottom, left:right],
            part=Warp(warp.matrix @ shift, warp.size, warp.factor),
            warp=warp,
            shape=(height, width),
            labels=labels,
            cut=None if labels is None else labels[top:bottom, left:right],
            draw=draw,
        )

    def collate(self, prepared: list[Prepared]) -> Batch:
        """Warp decoded faces into a batch, on the device."""
        size, device = self.config.sides[0], self.device
        warp = Warp(torch.stack([p.part.matrix for p in prepared]), size, self.set.warp).to(device)
        images = _padded([torch.from_numpy(p.image).permute(2, 0, 1) for p in prepared]).to(device)
        squares = warp.images(images) / 255
        draws = [p.draw for p in prepared if p.draw is not None]
        if draws:
            squares = augment.colours(squares, draws)
        points, labels = None, None
        if self.set.task == "alignment" and all(p.face.points is not None for p in prepared):
            moved = [p.warp.points(torch.from_numpy(np.asarray(p.face.points))) for p in prepared]
            points = ((torch.stack(moved) + 0.5) / size).float().to(device)
        cuts = [torch.from_numpy(p.cut)[None] for p in prepared if p.cut is not None]
        if cuts:
            labels = warp.images(_padded(cuts).to(device), "nearest")[:, 0].long()
        return Batch(prepared, self.resize(squares), points, labels)

    def resize(self, squares: Tensor) -> Tensor:
        """Squares [B, 3, S, S] at the network's input size, bilinear."""
        side = self.config.sides[1]
        if squares.shape[-1] == side:
            return squares
        return F.interpolate(squares, (side, side), mode="bilinear", align_corners=False)

    def _draw(self, face: Face, sample: int) -> Prepared:
        return self.prepare(face, augment.draw(self.set.task, self.config.seed, sample, self.set.scale))

    def _ahead(self, work: Iterator[list[Future[Prepared]]]) -> Iterator[Batch]:
        waiting: deque[list[Future[Prepared]]] = deque()
        work = iter(work)
        while True:
            while len(waiting) <= AHEAD and (more := next(work, None)) is not None:
                waiting.append(more)
            if not waiting:
                return
            yield self.collate([future.result() for future in waiting.popleft()])


class Order:
    """Which face is sample number n of a run: every epoch a new permutation, its last incomplete batch left out."""

    def __init__(self, faces: int, batch: int, seed: int):
        self.faces, self.seed = faces, seed
        self.epoch = faces // batch * batch
        self._known: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, sample: int) -> int:
        epoch, place = divmod(sample, self.epoch)
        if epoch not in self._known:
            # The next epoch is asked for before the last of this one.
            self._known = {e: p for e, p in self._known.items() if e >= epoch - 1}
            # Three numbers, so that no sample's draw has the same seed.
            self._known[epoch] = np.random.default_rng((self.seed, epoch, 1)).permutation(self.faces)
        return int(self._known[epoch][place])


def face_warp(face: Face, faces: FaceSet, size: int, shape: tuple[int, int], draw: Draw | None) -> Warp:
    """How a face (of an image of `shape`, height and width) comes into the square: the set's crop, then the draw."""
    if faces.crop == "box":
        assert face.box is not None
        crop = box_matrix(torch.from_numpy(face.box), size)
    elif faces.crop == "similarity":
        assert face.align is not None
        crop = similarity_matrix(torch.from_numpy(face.align), size)
    else:
        crop = box_matrix(whole_box(shape), size)
    if draw is None:
        moved = about_centre(size, faces.scale)
    else:
        moved = about_centre(size, draw.scale, draw.angle, (draw.shift[0] * size, draw.shift[1] * size))
    return Warp(moved @ crop, size, faces.warp)


def whole_box(shape: tuple[int, int]) -> Tensor:
    """The square about an image (height, width) that holds all of it; a square image fills it exactly."""
    height, width = shape
    x, y, half = (width - 1) / 2, (height - 1) / 2, max(height, width) / 2
    return torch.tensor([x - half, y - half, x + half, y + half], dtype=torch.float64)


def _padded(images: list[Tensor]) -> Tensor:
    """Images [C, h, w] of several sizes as one batch [B, C, H, W], 0 to the right and below."""
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for place, image in zip(batch, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch
