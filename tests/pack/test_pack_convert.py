"""What becomes of one image: every form it can come in, by its pixels; everything that must be refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from scenes import decode, distance, encode, scene

from mcf.pack import convert, jpeg
from mcf.pack.convert import Refused, prepare
from mcf.pack.options import PackConfig

KEEP = PackConfig(size=None)
# One JPEG generation at quality 95 with 4:2:0 moves these smooth scenes by under one level on average (0.3 to 0.9);
# a wrong turn, channel order or range moves them by 20 and more.
CLOSE = 1.5


def refused(content: bytes, options: PackConfig = KEEP) -> str:
    with pytest.raises(Refused) as caught:
        prepare(content, options)
    return caught.value.reason


@pytest.mark.parametrize("extra", [{}, {"restart_marker_rows": 1}, {"optimize": True}, {"subsampling": "4:4:4"}])
def test_a_good_jpeg_keeps_its_bytes(extra):
    content = encode(scene(), **extra)
    result = prepare(content, KEEP)
    assert result.jpeg is content
    assert result.changes == ()
    assert result.size == (96, 64)


def test_upright_exif_and_an_rgb_profile_do_not_cost_a_generation():
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010F] = "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encode(scene(), exif=exif, icc_profile=profile)
    assert prepare(content, KEEP).jpeg is content


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_turns_are_applied_and_dropped(orientation):
    # The stored raster is what a camera holding the scene in that orientation writes: the inverse of EXIF's turn.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = prepare(encode(scene().transpose(inverse), exif=exif), KEEP)
    assert distance(decode(result.jpeg), scene()) < CLOSE
    assert result.original == (96, 64)
    assert "turned upright" in result.changes
    with Image.open(io.BytesIO(result.jpeg)) as image:
        assert not image.getexif()


def test_broken_exif_says_nothing_about_the_pixels():
    content = encode(scene(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert prepare(content, KEEP).jpeg is content


def plain_png() -> bytes:
    return encode(scene(), "PNG")


def palette() -> bytes:
    return encode(scene().quantize(256), "PNG")


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        pytest.param(plain_png, CLOSE, id="png"),
        pytest.param(palette, 6.0, id="palette: 256 colours for a gradient are a few levels off"),
        pytest.param(lambda: encode(scene(), "WEBP", lossless=True), CLOSE, id="webp"),
        pytest.param(lambda: encode(scene(), "BMP"), CLOSE, id="bmp"),
        pytest.param(
            lambda: encode(scene(), "MPO", quality=95, save_all=True, append_images=[scene(seed=9)]), CLOSE, id="mpo"
        ),
        pytest.param(lambda: encode(scene(), "TIFF"), CLOSE, id="tiff"),
        pytest.param(lambda: encode(scene(), progressive=True), CLOSE, id="progressive"),
        pytest.param(lambda: encode(scene(), keep_rgb=True), CLOSE, id="jpeg that stores RGB"),
        pytest.param(lambda: encode(scene(), "PNG", save_all=True, append_images=[scene(seed=9)]), CLOSE, id="apng"),
    ],
)
def test_other_forms_become_plain_jpeg_of_the_same_pixels(content, tolerance):
    result = prepare(content(), KEEP)
    assert distance(decode(result.jpeg), scene()) < tolerance
    assert jpeg.structure(result.jpeg).plain
    assert result.changes


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_kept(form):
    first, second = Image.new("RGB", (64, 64), (200, 40, 90)), Image.new("RGB", (64, 64), (10, 220, 30))
    result = prepare(encode(first, form, save_all=True, append_images=[second]), KEEP)
    assert distance(decode(result.jpeg), first) < 4  # lossy WebP before JPEG
    assert "first frame of several" in result.changes


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_grey(form):
    result = prepare(encode(scene().convert("L"), form), KEEP)
    assert distance(decode(result.jpeg), scene().convert("L")) < CLOSE


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65_535, 96)[None].repeat(64, 0)
    content = encode(Image.fromarray(ramp.astype(np.uint16)), "PNG")
    found = decode(prepare(content, KEEP).jpeg)
    assert np.abs(found[..., 0] - ramp / 257).mean() < CLOSE


def test_transparent_pixels_show_a_neutral_ground():
    image = scene().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(96) < 48, 0, 255)[None].repeat(64, 0).astype(np.uint8)))
    found = decode(prepare(encode(image, "PNG"), KEEP).jpeg)
    assert np.abs(found[:, :40] - 128).mean() < CLOSE
    assert np.abs(found[:, 56:] - np.asarray(scene()).astype(int)[:, 56:]).mean() < CLOSE


def test_a_colour_key_is_transparency_too():
    image = Image.new("RGB", (64, 64), (255, 0, 255))
    found = decode(prepare(encode(image, "PNG", transparency=(255, 0, 255)), KEEP).jpeg)
    assert np.abs(found - 128).mean() < CLOSE


def test_cmyk_without_a_profile_follows_the_plain_formula():
    c, m, y, k = 0.2, 0.6, 0.1, 0.3
    image = Image.new("CMYK", (64, 64), tuple(round(255 * v) for v in (c, m, y, k)))
    found = decode(prepare(encode(image), KEEP).jpeg).reshape(-1, 3).mean(0)
    wanted = [255 * (1 - v) * (1 - k) for v in (c, m, y)]
    # Pillow rounds min(255, v + k) or the product, by version: the brief formula within a few levels, not inverted.
    assert np.abs(found - wanted).max() < 14


@pytest.mark.parametrize("kind", ["broken", "of another colour space"])
def test_a_wrong_cmyk_profile_does_not_lose_the_image(kind):
    image = Image.new("CMYK", (64, 64), (10, 200, 30, 0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_profile = prepare(encode(image, icc_profile=b"no profile at all" * 20 if kind == "broken" else srgb), KEEP)
    assert np.array_equal(decode(with_profile.jpeg), decode(prepare(encode(image), KEEP).jpeg))


def test_square_crop_takes_the_centre_and_reaches_the_size():
    result = prepare(encode(scene(300, 200), "PNG"), PackConfig(crop="square", size=100))
    wanted = scene(300, 200).crop((50, 0, 250, 200)).resize((100, 100), Image.Resampling.BOX)
    assert distance(decode(result.jpeg), wanted) < CLOSE


def test_square_crop_enlarges_and_keeps_a_square_of_the_size():
    assert prepare(encode(scene(50, 40)), PackConfig(crop="square", size=64)).size == (64, 64)
    content = encode(scene(64, 64))
    assert prepare(content, PackConfig(crop="square", size=64)).jpeg is content


def test_without_crop_the_shorter_side_shrinks_to_the_size_and_never_grows():
    assert prepare(encode(scene(300, 200)), PackConfig(size=100)).size == (150, 100)
    content = encode(scene(90, 60))
    assert prepare(content, PackConfig(size=100)).jpeg is content


@pytest.mark.parametrize("turned", [False, True])
def test_decoding_at_a_fraction_gives_the_picture_of_decoding_whole(turned):
    large = scene(1600, 1200)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    stored = large.transpose(Image.Transpose.ROTATE_90) if turned else large
    result = prepare(encode(stored, exif=exif), PackConfig(crop="square", size=100))
    wanted = large.crop((200, 0, 1400, 1200)).resize((100, 100), Image.Resampling.BOX)
    assert distance(decode(result.jpeg), wanted) < CLOSE


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("extra", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"], ids=["cut", "cut, but with an end marker"])
def test_a_truncated_jpeg_is_refused_whole_never_half_grey(share, extra, end):
    rng = np.random.default_rng(0)
    rough = Image.fromarray((np.asarray(scene()) // 2 + rng.integers(0, 128, (64, 96, 3))).astype(np.uint8))
    content = encode(rough, **extra)
    assert prepare(content, KEEP).size == (96, 64)
    assert refused(content[: int(len(content) * share)] + end) in (convert.TRUNCATED, convert.DAMAGED)
    assert refused(content[: int(len(content) * share)] + end, PackConfig(size=40)) in (
        convert.TRUNCATED,
        convert.DAMAGED,
    )


def test_an_image_that_is_grey_at_its_end_is_no_truncated_one():
    pixels = np.asarray(scene()).copy()
    pixels[32:] = 128
    content = encode(Image.fromarray(pixels))
    assert prepare(content, KEEP).jpeg is content


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_other_forms_cut_short_are_refused(form, share):
    rng = np.random.default_rng(0)
    content = encode(Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)), form)
    assert refused(content[: int(len(content) * share)]) in (convert.TRUNCATED, convert.DAMAGED)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", convert.EMPTY),
        (b"a text, perhaps notes", convert.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", convert.NOT_AN_IMAGE),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", convert.UNSUPPORTED),
        (b"\xff\xd8\xff\xe0", convert.DAMAGED),
        (b"\x89PNG\r\n\x1a\n", convert.DAMAGED),
        (bytes(range(256)) * 40, convert.NOT_AN_IMAGE),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(content, reason):
    assert refused(content) == reason


def test_limits_name_themselves_and_are_kept_before_decoding():
    assert refused(encode(scene(200, 31)), KEEP) == convert.TOO_SMALL
    assert prepare(encode(scene(200, 32)), KEEP).size == (200, 32)
    assert refused(encode(scene(200, 100)), PackConfig(max_pixels=19_999)) == convert.TOO_LARGE


def test_a_bomb_is_refused_without_being_decoded(monkeypatch):
    """100,000 x 100,000 black pixels as a PNG of a few bytes: 30 GB when decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert refused(bomb) == convert.TOO_LARGE


def test_garbled_files_never_raise_anything_but_refused():
    """Random damage anywhere: the answer is an image or a reason, and an image decodes to the size it claims."""
    rng = np.random.default_rng(3)
    for form, extra in [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {})]:
        original = encode(scene(), form, **extra)
        for _ in range(60):
            content = bytearray(original)
            for place in rng.integers(0, len(content), 6):
                content[place] = rng.integers(256)
            try:
                result = prepare(bytes(content), KEEP)
            except Refused:
                continue
            assert decode(result.jpeg).shape[1::-1] == result.size
