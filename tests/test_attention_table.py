"""The table that `attention: auto` goes by: its file holds what was measured and nothing else, and is found wherever mcf is."""

import dataclasses

import pytest
import torch

from mcf import attention_table, processor
from mcf.attention_table import NOISE, Key, Row
from mcf.errors import UserError

KEY = Key("sm_90", "bfloat16", 197, 64, True)
ROW = Row(
    "cudnn", {"sdpa": 30.0, "cudnn": 20.0, "math": 90.5}, 256, 12, "NVIDIA H200", "2.13.0", "a command, and a comma"
)


def test_the_file_holds_what_it_should():
    table = attention_table.read(attention_table.FILE)
    assert list(attention_table.problems(table)) == []
    assert list(table) == sorted(table), "as `record=true` writes it"
    shapes = {(key.tokens, key.head_dim) for key in table}
    assert shapes >= {(50, 64), (197, 64), (197, 32)}, "ViT-B's encoder, teacher and decoder were measured"
    # A chip's rows for a shape: both passes of a type, or a run would go by half a measurement.
    assert {key._replace(gradient=not key.gradient) for key in table} == set(table)


@pytest.mark.parametrize(
    "key, row, problem",
    [
        (KEY, {"choice": "sdpa"}, "sdpa is not the fastest"),
        (KEY, {"us": {**ROW.us, "math": 19.5}}, "cudnn is not the fastest"),
        (KEY, {"choice": "flash"}, "flash was not measured"),
        (KEY, {"us": {**ROW.us, "sdpa": -1.0}}, "no such times"),
        (KEY, {"us": {**ROW.us, "sdpa": float("nan")}}, "no such times"),
        (KEY, {"us": {**ROW.us, "fast": 21.0}}, "no such times"),
        (KEY, {"command": ""}, "says not where it comes from"),
        (KEY, {"torch": ""}, "says not where it comes from"),
        (KEY._replace(dtype="bf16"), {}, "no such shape"),
        (KEY._replace(tokens=0), {}, "no such shape"),
        (KEY._replace(chip=""), {}, "no such shape"),
    ],
)
def test_what_is_edited_wrongly_is_found(key, row, problem):
    assert list(attention_table.problems({KEY: ROW})) == []
    (found,) = attention_table.problems({key: dataclasses.replace(ROW, **row)})
    assert found.endswith(problem)


def test_equals_are_told_from_the_fastest():
    """Within NOISE: the usual one, or else the first of the names."""
    us = {"sdpa": 100.0, "flash": 100.0 / (1 + 0.9 * NOISE), "math": 150.0}
    assert attention_table.choose(us, "sdpa") == attention_table.choose(us, "math") == "sdpa"
    assert attention_table.choose(us, "flash") == "flash"
    assert attention_table.choose({**us, "flash": 100.0 / (1 + 1.1 * NOISE)}, "sdpa") == "flash"
    assert attention_table.choose({**us, "math": 90.0}, "xformers") == "math"
    rows = {KEY: dataclasses.replace(ROW, us=us, choice="sdpa")}
    assert list(attention_table.problems(rows)) == []


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    table = {KEY: ROW, KEY._replace(chip="cpu amd avx2", gradient=False): dataclasses.replace(ROW, choice="math")}
    attention_table.write(file, table)
    assert attention_table.read(file) == table
    monkeypatch.setattr(attention_table, "FILE", file)
    assert attention_table.look_up(KEY) == ROW
    assert attention_table.look_up(KEY._replace(tokens=196)) is None


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("197", "many", "no row of the table (invalid literal"),
        (",yes,", ",true,", "gradient=true: must be yes or no"),
        ("90.5", "slow", "could not convert"),
        (",cudnn,", ",cudnn", "no row of the table"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_line(old, new, said, tmp_path):
    file = tmp_path / "table.csv"
    attention_table.write(file, {KEY: ROW})
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        attention_table.read(file)
    assert str(caught.value).startswith(f"{file}:2: ") and said in str(caught.value)


def test_a_key_is_there_once_and_a_table_is_there(tmp_path):
    file = tmp_path / "table.csv"
    with pytest.raises(UserError, match="cannot be read"):
        attention_table.read(file)
    attention_table.write(file, {KEY: ROW})
    file.write_text(file.read_text() + file.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"table.csv:3: sm_90, bfloat16, 197, 64, True is there twice"):
        attention_table.read(file)


def test_chips_have_names(monkeypatch):
    def chip(info, capability):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(processor, "here", lambda: processor.read(info))
        return attention_table.chip_of.__wrapped__("cpu")

    amd = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
    assert chip(amd, "AVX512") == "cpu amd avx512_bf16"
    assert chip(amd, "AVX2") == "cpu amd avx2", "torch was told to do without"
    intel = amd.replace("AuthenticAMD", "GenuineIntel").replace("avx512_bf16", "avx512_bf16 amx_bf16 amx_tile")
    assert chip(intel, "AVX512") == "cpu intel amx_bf16"
    assert chip(intel.replace("_bf16", ""), "AVX512") == "cpu intel avx512"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert chip("Features\t: fp asimd sve bf16\n", "SVE256") == "cpu aarch64 sve256"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert attention_table.chip_of.__wrapped__("cuda") == "sm_90"
