"""What was measured of attention, chip by chip and shape by shape: what `attention: auto` goes by.

The rows are in attention_table.csv beside this file. `python -m mcf.bench part=attention record=true` measures the machine
at hand and writes them. What nobody has measured is not among them, and nothing is measured while training runs: ranks
would come to different choices, and no run could be repeated. Processors are measured with one thread: each of several
does the same work on images and heads of its own.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mcf import processor
from mcf.errors import UserError

FILE = Path(__file__).with_name("attention_table.csv")
NAMES = ("xformers", "sdpa", "flash", "cudnn", "efficient", "math")
"""All implementations that can be timed; among equally fast ones the first is taken."""
DTYPES = ("float32", "bfloat16")
NOISE = 0.02
"""Times that differ by less count as equal."""


class Key(NamedTuple):
    """What a choice depends on.

    chip: see `chip_of`.
    dtype: of q, k and v, torch's name ("bfloat16").
    tokens: N of self-attention.
    head_dim: width of a head.
    gradient: whether there is a backward pass, which is then part of the time.
    """

    chip: str
    dtype: str
    tokens: int
    head_dim: int
    gradient: bool


@dataclass(frozen=True)
class Row:
    """The times of a key, and where they come from.

    choice: the implementation to take.
    us: implementation → median microseconds of a call, with its backward pass where there is one.
    batch, heads: of the call.
    device, torch: the machine and the version that were measured.
    command: what measured them, with the commit.
    """

    choice: str
    us: Mapping[str, float]
    batch: int
    heads: int
    device: str
    torch: str
    command: str


Table = dict[Key, Row]
_FACTS = ("batch", "heads", "device", "torch", "command")
COLUMNS = (*Key._fields, "choice", *(f"{name}_us" for name in NAMES), *_FACTS)


def look_up(key: Key) -> Row | None:
    """The row of exactly this key, or None."""
    return _table(FILE).get(key)


@cache
def _table(file: Path) -> Table:
    return read(file)


def read(file: Path) -> Table:
    """The rows of a table.

    Raises:
        UserError: the file cannot be read, or a row is not one: its line is named.
    """
    table: Table = {}
    try:
        with file.open(newline="") as stream:
            reader = csv.DictReader(stream)
            for line in reader:
                try:
                    key, row = _parse(line)
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f"{file}:{reader.line_num}: no row of the table ({error}); measure it anew: "
                        "python -m mcf.bench part=attention record=true"
                    ) from None
                if key in table:
                    raise UserError(f"{file}:{reader.line_num}: {', '.join(map(str, key))} is there twice; delete one")
                table[key] = row
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); install the project again") from None
    return table


def _parse(line: Mapping[str, str]) -> tuple[Key, Row]:
    if line["gradient"] not in ("yes", "no"):
        raise ValueError(f"gradient={line['gradient']}: must be yes or no")
    key = Key(
        line["chip"], line["dtype"], int(line["tokens"]), int(line["head_dim"]), gradient=line["gradient"] == "yes"
    )
    us = {name: float(line[f"{name}_us"]) for name in NAMES if line[f"{name}_us"]}
    return key, Row(
        line["choice"], us, int(line["batch"]), int(line["heads"]), line["device"], line["torch"], line["command"]
    )


def write(file: Path, table: Table) -> None:
    """Write a table, chips and shapes in order."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(cells(key, row) for key, row in sorted(table.items(), key=lambda item: item[0]))


def cells(key: Key, row: Row) -> list[str]:
    """A row as it stands in the file, by COLUMNS."""
    times = [f"{row.us[name]:.4g}" if name in row.us else "" for name in NAMES]
    facts = [str(getattr(row, name)) for name in _FACTS]
    return [*map(str, key[:-1]), "yes" if key.gradient else "no", row.choice, *times, *facts]


def choose(us: Mapping[str, float], usual: str) -> str:
    """The fastest implementation. Of those that are as fast but for NOISE, `usual`, or else the first of NAMES."""
    equal = [name for name in NAMES if name in us and us[name] <= (1 + NOISE) * min(us.values())]
    return usual if usual in equal else equal[0]


def problems(table: Table) -> Iterable[str]:
    """What is wrong with the rows of a table, a line each."""
    for key, row in table.items():
        where = ", ".join(map(str, key))
        if key.dtype not in DTYPES or min(key.tokens, key.head_dim, row.batch, row.heads) < 1 or not key.chip:
            yield f"{where}: no such shape"
        if not row.us.keys() <= set(NAMES) or not all(0 < time < float("inf") for time in row.us.values()):
            yield f"{where}: no such times"
        elif row.choice not in row.us:
            yield f"{where}: {row.choice} was not measured"
        # A thousandth more than NOISE, since the file keeps four digits.
        elif row.us[row.choice] > (1 + NOISE) * 1.001 * min(row.us.values()):
            yield f"{where}: {row.choice} is not the fastest"
        if not (row.device and row.torch and row.command):
            yield f"{where}: says not where it comes from"


@cache
def chip_of(device: str) -> str:
    """What rows of a kind of device ("cuda", "cpu") are told apart by.

    A GPU's compute capability ("sm_90" for H100 and H200, which have one multiprocessor). Of a processor its maker, since
    libraries take other ways on each, and the widest instructions for products that torch uses on it
    ("cpu amd avx512_bf16"): those decide whether the products or the softmax between them is the slow part.
    """
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    if device != "cpu":
        return device
    here = processor.here()
    return f"cpu {here.maker} {here.products}"
