"""What a packing that goes on believes of the shards that it finds."""

from __future__ import annotations

import pytest

from mcf.data.shards import ShardWriter, index_path
from mcf.pack.journal import Journal, Record
from mcf.pack.report import Tally


@pytest.fixture
def journal(tmp_path) -> Journal:
    """Of a packing that was cut off after three shards."""
    journal = Journal(tmp_path / "out", {"size": 8})
    for number in range(3):
        with ShardWriter(journal.shard_path(number)) as writer:
            writer.add(f"{number}", b"a JPEG")
            journal.commit(Record(writer.close(), number + 1, Tally()))
    journal.close()
    return journal


def done(journal: Journal) -> list[int]:
    again = Journal(journal.out, {"size": 8})
    again.close()
    return [record.done for record in again.records]


def test_whole_shards_are_not_written_again(journal):
    assert done(journal) == [1, 2, 3]


@pytest.mark.parametrize(
    "harm",
    [
        lambda tar: tar.write_bytes(tar.read_bytes()[:-512]),
        lambda tar: tar.write_bytes(tar.read_bytes() + bytes(512)),
        lambda tar: tar.unlink(),
        lambda tar: index_path(tar).unlink(),
    ],
    ids=["shorter", "longer", "gone", "without its index"],
)
def test_from_the_first_shard_that_is_not_whole_they_are_written_again(journal, harm):
    harm(journal.shard_path(1))
    assert done(journal) == [1]
