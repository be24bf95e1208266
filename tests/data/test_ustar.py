"""Headers against tarfile's, made and read; what is not plain is left to it."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcf.data import ustar

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=25)
SIZES = st.integers(0, 8 * 2**30 - 1)


def info(name: str, size: int = 0, **others) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size = size
    for key, value in others.items():
        setattr(made, key, value)
    return made


@given(NAMES, SIZES)
def test_a_header_is_tarfiles_to_the_byte(name, size):
    header = ustar.header(name, size)
    assert header == info(name, size).tobuf(tarfile.USTAR_FORMAT, "utf-8")
    assert ustar.read_header(header) == (name, size, False)


@pytest.mark.parametrize(("name", "size"), [("k" * 101, 1), ("é" * 51, 1), ("k", 8 * 2**30), ("k", -1)])
def test_what_no_plain_header_can_tell_is_refused(name, size):
    with pytest.raises(ValueError, match="plain header"):
        ustar.header(name, size)


@given(NAMES, SIZES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]), st.integers(0, 2**31))
def test_headers_of_others_are_read_as_tarfile_reads_them(name, size, form, mtime):
    block = info(name, size, mtime=mtime, mode=0o444, uname="bigdata", uid=1000).tobuf(form, "utf-8")[-512:]
    theirs = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    assert ustar.read_header(block) == (theirs.name, theirs.size, False)


def test_what_is_not_plain_is_left_to_tarfile():
    kinds = (
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.GNUTYPE_LONGNAME,
    )
    for kind in kinds:
        assert ustar.read_header(info("a", type=kind).tobuf(tarfile.USTAR_FORMAT)) is None
    assert ustar.read_header(info("a").tobuf(tarfile.GNU_FORMAT)) is None  # where ustar's prefix stands, GNU has times
    assert ustar.read_header(info("folder/" * 20 + "a").tobuf(tarfile.USTAR_FORMAT)) is None  # in two fields
    assert ustar.read_header(info("folder/").tobuf(tarfile.USTAR_FORMAT)) is None
    for block in (b"", bytes(512), b"x" * 512, ustar.header("a", 1)[:511]):
        assert ustar.read_header(block) is None


def test_no_changed_byte_is_overlooked():
    header = ustar.header("00012.jpg", 4321)
    for place in range(ustar.BLOCK):
        for change in (0x01, 0x80):
            damaged = bytearray(header)
            damaged[place] ^= change
            assert ustar.read_header(bytes(damaged)) is None, place


def pax(**headers: str) -> bytes:
    """The records of the pax header that tarfile writes."""
    block = info("a", pax_headers=headers).tobuf(tarfile.PAX_FORMAT, "utf-8")
    extended = ustar.read_header(block[:512])
    assert extended is not None and extended[2]
    return block[512 : 512 + extended[1]]


def test_only_times_and_owners_of_a_pax_header_are_passed_over():
    assert ustar.only_times_and_owners(pax(mtime="1600000000.25")) and ustar.only_times_and_owners(
        pax(mtime="1.5", uname="é", gname="x" * 200)
    )
    for headers in ({"path": "é"}, {"size": "9"}, {"linkpath": "a"}, {"GNU.sparse.major": "1"}, {"comment": "mtime=1"}):
        assert not ustar.only_times_and_owners(pax(**headers)) and not ustar.only_times_and_owners(
            pax(mtime="1.5", **headers)
        )
    records = pax(mtime="1600000000.25")
    for damaged in (records[:-1], records + b"x", b"9" + records, records.replace(b"23 ", b"22 ")):
        assert not ustar.only_times_and_owners(damaged)


def test_a_tar_of_such_headers_is_read_by_tarfile():
    contents = {"a.jpg": b"x" * 511, "b.json": b"", "c.jpg": b"y" * 1024}
    body = b"".join(ustar.header(n, len(c)) + c + bytes(ustar.padding(len(c))) for n, c in contents.items())
    with tarfile.open(fileobj=io.BytesIO(body + bytes(1024))) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == contents
