"""The decoder against Pillow, and on files that are no images."""

import io
import sys

import numpy as np
import pytest
import torch
from data_shards import make_jpeg
from PIL import Image

from mcf.data.dali import Decoder, Undecodable
from mcf.data.jpeg import jpeg_size
from mcf.errors import UserError

CPU = torch.device("cpu")


def raw(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def encode(image: Image.Image, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return raw(buffer.getvalue())


def pillow(jpeg: np.ndarray, side: int) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def spoilt(number: int) -> np.ndarray:
    """A whole JPEG whose first Huffman table is none."""
    content = bytearray(make_jpeg(number))
    counts = content.index(b"\xff\xc4") + 5
    content[counts : counts + 16] = bytes([255] * 16)
    return raw(bytes(content))


@pytest.mark.parametrize("size", [(40, 40), (64, 48), (31, 57), (16, 16)])
def test_decodes_and_resizes_as_pillow_does(size):
    jpegs = [raw(make_jpeg(i, size)) for i in range(5)]
    images = Decoder(32, 8, device=CPU).decode(jpegs, np.zeros(5, bool))
    assert images.shape == (5, 32, 32, 3) and images.dtype == torch.uint8
    expected = np.stack([pillow(jpeg, 32) for jpeg in jpegs]).astype(int)
    # Both decode with libjpeg and filter with a triangle in 8-bit fixed point; weights may be rounded by one step.
    # Without antialiasing, or with the chroma upsampled otherwise, single pixels are off by 10 and more.
    assert np.abs(images.numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (40, 40)])
def test_mirrors_the_asked_images_and_no_others(size):
    jpegs = [raw(make_jpeg(i, size)) for i in range(6)]
    mirror = np.array([True, False, False, True, True, False])
    decoder = Decoder(32, 6, device=CPU)
    plain, mirrored = decoder.decode(jpegs, np.zeros(6, bool)), decoder.decode(jpegs, mirror)
    assert torch.equal(mirrored, torch.where(torch.from_numpy(mirror)[:, None, None, None], plain.flip(2), plain))
    assert (plain.int() - plain.flip(2).int()).abs().max() > 20


def test_what_was_waited_for_stays_while_the_next_is_decoded():
    """The loader finishes a micro-batch after it has begun the next: DALI must not write over the first."""
    batches = [[raw(make_jpeg(8 * n + i, (32, 32))) for i in range(8)] for n in range(6)]
    decoder, upright = Decoder(32, 8, device=CPU), np.zeros(8, bool)
    expected = [decoder.decode(jpegs, upright) for jpegs in batches]
    kept = []
    for jpegs in batches:
        decoder.begin(jpegs, upright)
        kept.append(decoder.wait())
    assert all(torch.equal(decoder.finish(decoded), images) for decoded, images in zip(kept, expected))


@pytest.mark.parametrize("size", [(32, 32), (40, 40)])
def test_the_company_of_an_image_does_not_change_it(size):
    """Images of one size are resized together, and those of the right size not at all."""
    same = [raw(make_jpeg(i, size)) for i in range(4)]
    mirror = np.array([True, False, True, False, False, True])
    decoder = Decoder(32, 8, device=CPU)
    together = decoder.decode([*same, raw(make_jpeg(9, (50, 40))), raw(make_jpeg(10, (32, 33)))], mirror)
    for i, jpeg in enumerate(same):
        assert torch.equal(decoder.decode([jpeg], mirror[i : i + 1])[0], together[i])


def test_grey_progressive_and_rotated_jpegs():
    image = Image.open(io.BytesIO(make_jpeg(1, (40, 40))))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    jpegs = [encode(image.convert("L")), encode(image, progressive=True), encode(image, exif=exif, quality=95)]
    images = Decoder(40, 4, device=CPU).decode(jpegs, np.zeros(3, bool)).numpy().astype(int)
    assert np.abs(images[0] - pillow(jpegs[0], 40)).max() <= 2
    assert np.abs(images[1] - pillow(jpegs[1], 40)).max() <= 2
    turned = np.rot90(pillow(jpegs[2], 40), -1).astype(int)
    assert np.abs(images[2] - turned).max() <= 2


@pytest.mark.parametrize("message", ["true", "silent", "wrong"])
def test_names_the_broken_images_and_goes_on(message, monkeypatch):
    """Also where DALI's message does not say, or says wrongly, which it was."""
    decoder = Decoder(32, 8, device=CPU)
    good = [raw(make_jpeg(i)) for i in range(8)]
    before = decoder.decode(good, np.zeros(8, bool))
    if message != "true":
        plain = decoder._broken
        text = {"silent": "something failed", "wrong": "sample #3, #77"}[message]
        monkeypatch.setattr(decoder, "_broken", lambda jpegs, _: plain(jpegs, text))
    broken, found = [*good], {}
    broken[2], broken[6] = spoilt(2), spoilt(6)
    while True:
        try:
            images = decoder.decode(broken, np.zeros(8, bool))
            break
        except Undecodable as error:
            assert error.reasons and not error.reasons.keys() & found.keys()
            found |= error.reasons
            for i in error.reasons:
                broken[i] = good[i]
    assert sorted(found) == [2, 6]
    assert all(reason.startswith("does not decode") and "fn." not in reason for reason in found.values())
    assert torch.equal(images, before)


def test_a_failure_that_no_image_is_to_blame_for_is_raised(monkeypatch):
    """Out of memory, say: one more attempt, and then its own words."""
    decoder, calls = Decoder(32, 8, device=CPU), []
    start, outputs = decoder._start, decoder._outputs

    def counted(jpegs, mirror):
        calls.append(len(jpegs))
        start(jpegs, mirror)

    def failing():
        if calls[-1] > 1:
            raise RuntimeError("out of memory")
        return outputs()

    monkeypatch.setattr(decoder, "_start", counted)
    monkeypatch.setattr(decoder, "_outputs", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.decode([raw(make_jpeg(i)) for i in range(3)], np.zeros(3, bool))
    assert calls == [3, 1, 1, 1, 3]


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 500, b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"\xff\xd8" * 40]
)
def test_what_has_no_jpeg_header_is_refused_before_dali_sees_it(content, monkeypatch):
    decoder = Decoder(32, 2, device=CPU)
    monkeypatch.setattr(decoder, "_start", None)
    with pytest.raises(Undecodable) as error:
        decoder.decode([raw(make_jpeg(0)), raw(content)], np.zeros(2, bool))
    assert error.value.reasons == {1: "no JPEG header"}


def test_what_breaks_off_is_refused_before_dali_sees_it_and_what_follows_an_image_is_not(monkeypatch):
    """A GPU's decoder may say of the former that it was decoded (nvImageCodec's hardware path reads headers alone)."""
    image = Image.open(io.BytesIO(make_jpeg(1, (37, 53))))
    thumbnail = make_jpeg(2, (8, 8))  # with an end of its own
    kinds = {
        "plain": encode(image), "progressive": encode(image, progressive=True), "thumbnail": encode(image, comment=thumbnail),
        "restarts": encode(image, restart_marker_rows=1),
    }  # fmt: skip
    assert kinds["thumbnail"].tobytes().count(b"\xff\xd9") == 2
    decoder = Decoder(32, 2, device=CPU)
    for jpeg in kinds.values():
        followed = np.concatenate([jpeg, raw(b"\xff\xd8\xff and what a telephone adds")])
        assert decoder.decode([jpeg, followed], np.zeros(2, bool)).shape == (2, 32, 32, 3)
    monkeypatch.setattr(decoder, "_start", None)
    for jpeg in kinds.values():
        start = jpeg.tobytes().rindex(b"\xff\xda")
        for end in (start + 10, (start + len(jpeg)) // 2, len(jpeg) - 2, len(jpeg) - 1):
            with pytest.raises(Undecodable) as error:
                decoder.decode([jpeg, jpeg[:end]], np.zeros(2, bool))
            assert error.value.reasons == {1: "breaks off"}


def test_a_header_that_claims_gigabytes_is_refused():
    content = bytearray(make_jpeg(0))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(Undecodable) as error:
        Decoder(32, 1, device=CPU).decode([raw(bytes(content))], np.zeros(1, bool))
    assert "65535x65535" in error.value.reasons[0]


def test_the_size_is_read_from_any_header():
    image = Image.open(io.BytesIO(make_jpeg(1, (37, 53))))
    exif = Image.Exif()
    exif[0x010E] = "a description " * 100
    for options in ({}, {"progressive": True}, {"exif": exif}, {"comment": b"x" * 5000}, {"restart_marker_rows": 1}):
        jpeg = encode(image, **options)
        assert jpeg_size(jpeg) == (53, 37)
        assert all(jpeg_size(jpeg[:cut]) in (None, (53, 37)) for cut in range(0, len(jpeg), 7))


def test_real_faces(shared_data):
    files = sorted((shared_data / "youtube_faces" / "images").rglob("*.jpg"))[::90]
    jpegs = [np.fromfile(file, np.uint8) for file in files]
    images = Decoder(224, len(jpegs), device=CPU).decode(jpegs, np.zeros(len(jpegs), bool)).numpy().astype(int)
    differences = np.abs(images - np.stack([pillow(jpeg, 224) for jpeg in jpegs]))
    assert len(files) > 20 and differences.max() <= 3 and differences.mean() < 0.3


def test_mixed_without_a_gpu_and_a_missing_dali_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"data\.decoder=mixed needs a GPU"):
        Decoder(32, 2, device=CPU, decoder="mixed")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        Decoder(32, 2, device=CPU)


@pytest.mark.gpu
def test_the_gpu_decodes_the_same_pictures():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    jpegs = [raw(make_jpeg(i, (48, 48))) for i in range(8)]
    mirror = np.arange(8) % 2 == 0
    on_gpu = Decoder(32, 8, device=torch.device("cuda")).decode(jpegs, mirror)
    on_cpu = Decoder(32, 8, device=CPU).decode(jpegs, mirror)
    assert on_gpu.is_cuda
    # nvJPEG's inverse DCT may round otherwise, and DALI promises a step on average and nothing of single pixels. Chroma
    # upsampled otherwise, or a picture not mirrored, is off by 20 and more.
    error = (on_gpu.cpu().int() - on_cpu.int()).abs().float()
    assert error.mean() < 1 and error.max() <= 16


@pytest.mark.gpu
def test_the_gpu_finds_broken_images_or_leaves_them_to_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    decoder = Decoder(32, 8, device=torch.device("cuda"))
    jpegs = [raw(make_jpeg(i, (48, 48))) for i in range(8)]
    jpegs[3] = spoilt(3)
    for _ in range(3):
        with pytest.raises(Undecodable) as caught:
            decoder.decode(jpegs, np.zeros(8, bool))
        assert list(caught.value.reasons) == [3]


class _LikeAGPU(Decoder):
    """A decoder that takes itself for one on a GPU. Its batches fail, as DALI says it, but for those numbered `good`."""

    def __init__(self, *arguments, good=(), **named):
        super().__init__(*arguments, **named)
        self._mixed, self.good, self.tried = True, good, 0

    def _build(self):
        if not self._mixed:
            return super()._build()
        self.tried += 1
        self._mixed = False
        pipeline = super()._build() if self.tried in self.good else None
        self._mixed = True
        return _AsOnAGPU(pipeline)


class _AsOnAGPU:
    def __init__(self, pipeline):
        self.pipeline = pipeline

    def feed_input(self, name, values):
        self.count = len(values)
        if self.pipeline and name == "jpegs":
            self.pipeline.feed_input(name, values)

    def schedule_run(self):
        if self.pipeline:
            self.pipeline.schedule_run()

    def outputs(self):
        if self.pipeline:
            return self.pipeline.outputs()
        raise RuntimeError(f"Error in mixed operator, encountered: hardware decoder, {self.count} images, sample #1")


def test_what_a_gpu_alone_refuses_the_cpu_decodes_and_from_the_third_on_all(caplog):
    good = [raw(make_jpeg(i)) for i in range(4)]
    mirror = np.array([True, False, False, True])
    expected = Decoder(32, 4, device=CPU).decode(good, mirror)
    decoder = _LikeAGPU(32, 4, device=CPU)
    with pytest.raises(Undecodable) as caught:  # one that the CPU refuses too is named, and the GPU goes on
        decoder.decode([*good[:2], spoilt(2), good[3]], mirror)
    assert list(caught.value.reasons) == [2] and not caplog.records
    for _ in range(5):
        assert torch.equal(decoder.decode(good, mirror), expected)
    assert decoder.tried == 1 + 3
    said = [record.getMessage() for record in caplog.records]
    assert all("hardware decoder" in line for line in said)
    assert [line.rpartition("; ")[2] for line in said] == 2 * ["the CPU decodes this batch"] + [
        "from here on the CPU decodes"
    ]


def test_a_gpu_that_fails_now_and_then_is_asked_again(caplog, monkeypatch):
    good, mirror = [raw(make_jpeg(i)) for i in range(4)], np.zeros(4, bool)
    decoder = _LikeAGPU(32, 4, device=CPU, good=(3, 6))
    monkeypatch.setattr(decoder, "finish", lambda decoded: decoded.ready)
    by_gpu = []
    for _ in range(6):
        by_gpu.append(decoder.decode(good, mirror))
        decoder._pipelines.pop(True, None)  # the next batch is another one
    assert by_gpu == [False, False, True, False, False, True] and len(caplog.records) == 4


def decodes(decoder: Decoder, jpeg: np.ndarray) -> bool:
    try:
        decoder.check([jpeg])
    except Undecodable:
        return False
    return True


def test_a_decoder_that_only_checks_finds_what_decoding_finds():
    rng = np.random.default_rng(0)
    full, check = (Decoder(32, 1, device=CPU, decoder="cpu", only_check=only) for only in (False, True))
    verdicts = []
    for trial in range(150):
        damaged = bytearray(make_jpeg(trial, (48, 40)))
        for place in rng.integers(2, len(damaged), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        if trial % 3 == 0:
            del damaged[rng.integers(len(damaged) // 2, len(damaged)) :]
        jpeg = raw(bytes(damaged))
        verdicts.append(decodes(full, jpeg))
        assert decodes(check, jpeg) == verdicts[-1], trial
    assert 20 < sum(verdicts) < 130  # both kinds were among them
