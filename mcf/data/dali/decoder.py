"""JPEG bytes to images of one size with DALI, on a GPU or without one.

    on a GPU      external_source ── decoders.image (mixed) ── resize and mirror ── uint8 [b, H, W, 3]
    without one   external_source ── decoders.image (cpu) ── resize and mirror by torch ── uint8 [b, H, W, 3]

One micro-batch is in DALI at a time, so that a batch that fails is known. `begin` gives it one, on which its own threads
work; `wait` takes it back; what torch has to do with it, `finish` does, best when DALI has begun the next. The pictures
are resized to a square with bilinear interpolation and antialiasing (the triangle filter, as torchvision's Resize does
on a PIL image), and not normalised: that is done where the pixels are used. DALI's resize for the CPU takes two to four
times as long as its decoder, and its flip a fifth of it; torch has the same filter in integers and needs a fifth of
that, and little for the flip. jpeg_fancy_upsampling makes the GPU upsample chroma as libjpeg does.

One JPEG that does not decode makes DALI fail the batch and declare the pipeline dead. `Decoder.decode` then finds an
image that fails on its own, raises `Undecodable`, and goes on with a new pipeline. Of a batch that failed on a GPU the
CPU's decoder is asked; where it finds nothing wrong, it decodes the batch, so that no file ends a run. Where that is so for
batch after batch, the GPU is not asked again.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mcf.data.dali.library import import_dali
from mcf.data.jpeg import unfit
from mcf.errors import UserError

log = logging.getLogger(__name__)

# Batches in a row that the GPU may leave to the CPU before it is given up: one may have met with a lack of memory.
PATIENCE = 3


class Undecodable(Exception):
    """Some images of a batch do not decode: `reasons` maps their places in the batch to why."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__(f"{len(reasons)} images do not decode: {reasons}")
        self.reasons = reasons


class Decoded(NamedTuple):
    """A decoded micro-batch: DALI's list of images, which are to be flipped, and whether DALI has resized and flipped them."""

    images: Any
    mirror: np.ndarray
    ready: bool


class Decoder:
    """Decodes micro-batches of up to `batch` JPEGs to uint8 [b, image_size, image_size, 3] on `device`.

    decoder: "mixed" decodes on the GPU, "cpu" on `threads` cores; "auto" is mixed on a GPU. Not for several threads at
    once. only_check: for `check` alone, which then takes two thirds of the time.
    """

    def __init__(
        self, image_size: int, batch: int, *, device: torch.device, decoder: str = "auto", threads: int = 2,
        only_check: bool = False,
    ):  # fmt: skip
        if decoder == "mixed" and device.type != "cuda":
            raise UserError(f"data.decoder=mixed needs a GPU, and this rank has none ({device}); use auto or cpu")
        self.image_size, self.batch, self.device, self.threads = image_size, batch, device, threads
        self._mixed = device.type == "cuda" and decoder != "cpu"
        self._left_to_cpu = 0  # batches, in a row
        self._only_check = only_check
        self._dali = import_dali()
        self._pipelines: dict[bool, Any] = {}  # by whether they decode on the GPU
        self._judge: Decoder | None = None
        self._stream: torch.cuda.Stream | None = None
        self._begun: tuple[Sequence[np.ndarray], np.ndarray, dict[int, str]] = [], np.zeros(0, dtype=bool), {}

    def decode(self, jpegs: Sequence[np.ndarray], mirror: np.ndarray) -> Tensor:
        """Images of the JPEGs (uint8 [bytes] each), those with `mirror` (bool [b]) flipped left to right.

        Raises Undecodable when some of them are no images, naming one or more of those; the next call works again.
        """
        self.begin(jpegs, mirror)
        return self.finish(self.wait())

    def check(self, jpegs: Sequence[np.ndarray]) -> None:
        """Decode and throw away. Raises Undecodable as `decode` does."""
        self.begin(jpegs, np.zeros(len(jpegs), dtype=bool))
        self.wait()

    def begin(self, jpegs: Sequence[np.ndarray], mirror: np.ndarray) -> None:
        """Have DALI decode a micro-batch on its own threads, once the one before has been waited for."""
        refused = {i: why for i, jpeg in enumerate(jpegs) if (why := unfit(jpeg))}
        self._begun = jpegs, mirror, refused
        if not refused:
            self._start(jpegs, mirror)

    def wait(self) -> Decoded:
        """What was begun, when it is decoded. Raises Undecodable as `decode` does; then the batch is to be begun again."""
        jpegs, mirror, refused = self._begun
        if refused:
            raise Undecodable(refused)
        try:
            images = self._outputs()
        except RuntimeError as error:
            self._pipelines.pop(self._mixed, None)
            reasons = self._broken(jpegs, str(error))
            if reasons:
                raise Undecodable(reasons) from None
            if self._mixed:
                return self._decoded_by_cpu(jpegs, mirror, _reason(error))
            # If there still is no image to blame, it fails in its own words.
            images = self._run(jpegs, mirror)
        self._left_to_cpu = 0
        return Decoded(images, mirror, self._mixed)

    def finish(self, decoded: Decoded) -> Tensor:
        """The images of what was waited for; the next micro-batch may have begun."""
        if decoded.ready:
            return self._copied(decoded.images)
        return self.handed_over(self._resized(decoded.images, decoded.mirror))

    def handed_over(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device, whole when this returns, and without waiting for what training has queued there."""
        with self._beside_training():
            return self._given(tensor.to(self.device))

    def close(self) -> None:
        """Let the pipeline and its buffers go; the next batch builds another."""
        self._pipelines.clear()

    def _decoded_by_cpu(self, jpegs: Sequence[np.ndarray], mirror: np.ndarray, reason: str) -> Decoded:
        """A batch in which the CPU finds nothing wrong, and the GPU did."""
        self._left_to_cpu += 1
        given_up = self._left_to_cpu == PATIENCE
        then = "from here on the CPU decodes" if given_up else "the CPU decodes this batch"
        log.warning("the GPU does not decode what the CPU does (%s); %s", reason, then)
        self._mixed = False
        try:
            return Decoded(self._run(jpegs, mirror), mirror, False)
        finally:
            self._mixed = not given_up

    def _broken(self, jpegs: Sequence[np.ndarray], message: str) -> dict[int, str]:
        """Which images fail on their own, and DALI's reason; each failure costs a new pipeline (4 ms).

        DALI's message numbers what failed first. Where that is true the others are not tried: should there be more,
        the next attempt names them. Else all are tried one by one.
        """
        named = sorted({int(number) for number in re.findall(r"#(\d+)", message)} & set(range(len(jpegs))))
        for places in (named, range(len(jpegs))):
            failures = ((i, self._failure(jpegs[i])) for i in places)
            if reasons := {i: reason for i, reason in failures if reason}:
                return reasons
        return {}

    def _failure(self, jpeg: np.ndarray) -> str | None:
        if self._mixed:
            # Alone, an image takes another way through the GPU than in a batch. The CPU's decoder has one way, and is strict.
            self._judge = self._judge or Decoder(
                self.image_size, 1, device=torch.device("cpu"), threads=1, only_check=True
            )
            try:
                self._judge.check([jpeg])
            except Undecodable as error:
                return error.reasons[0]
            return None
        try:
            self._run([jpeg], np.zeros(1, dtype=bool))
        except RuntimeError as error:
            self._pipelines.pop(False, None)
            return _reason(error)
        return None

    def _run(self, jpegs: Sequence[np.ndarray], mirror: np.ndarray):
        self._start(jpegs, mirror)
        return self._outputs()

    def _start(self, jpegs: Sequence[np.ndarray], mirror: np.ndarray) -> None:
        if self._mixed not in self._pipelines:
            self._pipelines[self._mixed] = self._build()
        pipeline = self._pipelines[self._mixed]
        pipeline.feed_input("jpegs", list(jpegs))
        if self._mixed:
            pipeline.feed_input("mirror", mirror.astype(np.int32))
        pipeline.schedule_run()

    def _outputs(self):
        """DALI's list of images. Their buffer is not used again while somebody holds the list (exec_dynamic)."""
        (images,) = self._pipelines[self._mixed].outputs()
        return images

    def _build(self):
        fn, types, pipeline, _ = self._dali
        on_gpu, side = self.device.type == "cuda", self.image_size
        pipe = pipeline(
            batch_size=self.batch,
            num_threads=self.threads,
            device_id=_index(self.device) if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
            seed=0,
        )
        with pipe:
            jpegs = fn.external_source(name="jpegs", device="cpu", dtype=types.UINT8, ndim=1, batch=True)
            images = fn.decoders.image(
                jpegs,
                device="mixed" if self._mixed else "cpu",
                # Grey: all of the file is still read and every code in it, but colours are not made into pixels.
                output_type=types.GRAY if self._only_check else types.RGB,
                jpeg_fancy_upsampling=True,
                # NVML's cores may be none of the job's, and are the same for all ranks of a socket: the system knows better.
                affine=False,
            )
            if self._mixed:
                mirror = fn.external_source(name="mirror", device="cpu", dtype=types.INT32, ndim=0, batch=True)
                size = {"resize_x": side, "resize_y": side, "crop": (side, side)}
                images = fn.resize_crop_mirror(
                    images, **size, mirror=mirror, interp_type=types.INTERP_LINEAR, antialias=True
                )
            pipe.set_outputs(images)
        pipe.build()
        return pipe

    def _copied(self, images) -> Tensor:
        """Pictures of the right size, copied out of DALI's buffer on the GPU."""
        dense = images.as_tensor()
        with self._beside_training() as stream:
            result = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
            self._dali[3](dense, result, cuda_stream=stream)
            stream.synchronize()
            return self._given(result)

    @contextlib.contextmanager
    def _beside_training(self) -> Iterator[Any]:
        """On a GPU, have torch use a stream of the decoder's own: training's would first do all that was queued there."""
        if self.device.type != "cuda":
            yield None
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            yield self._stream

    def _given(self, tensor: Tensor) -> Tensor:
        """A tensor made beside training: once training lets go of it, its memory waits for what training does with it."""
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return tensor

    def _resized(self, images, mirror: np.ndarray) -> Tensor:
        """Pictures of the right size, from pictures of any sizes; those of one size are resized in one go."""
        if images.is_dense_tensor():  # all of one size, which is usual: where it is the right one, nothing is copied
            result = self._to_side(torch.from_dlpack(images.as_tensor()))
        else:
            result = torch.empty(len(images), self.image_size, self.image_size, 3, dtype=torch.uint8)
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for i, shape in enumerate(images.shape()):
                by_shape.setdefault(tuple(shape), []).append(i)
            for places in by_shape.values():
                pictures = torch.stack([torch.from_numpy(np.asarray(images[i])) for i in places])
                for i, picture in zip(places, self._to_side(pictures)):  # result[places] = … takes many times as long
                    result[i].copy_(picture)
        for i in np.flatnonzero(mirror).tolist():
            result[i].copy_(_mirrored(result[i]))
        return result

    def _to_side(self, pictures: Tensor) -> Tensor:
        """Pictures of one size, uint8 [n, H, W, 3], at the right size: themselves where they have it."""
        side = self.image_size
        if pictures.shape[1:3] == (side, side):
            return pictures
        last = pictures.permute(0, 3, 1, 2)  # in memory still channels last, the fast way
        return F.interpolate(last, (side, side), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _mirrored(picture: Tensor) -> Tensor:
    """A picture, uint8 [H, W, 3], flipped left to right. Torch is fast at this where it sees [b, C, H, W], channels last."""
    return picture.permute(2, 0, 1)[None].flip(-1)[0].permute(1, 2, 0)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def _reason(error: RuntimeError) -> str:
    """What DALI's message says after the operator and the Python lines that made it."""
    said = re.search(r"encountered:\s*(.+)", str(error))
    return "does not decode" + (f" ({said[1].strip()})" if said else "")
