"""Tuning walks downhill, and writes rows as the table has them."""

import math
import time

import pytest
import torch
from kernel_cases import CPU, SMALL, cpu_only

from mcf.kernels import tuning
from mcf.kernels.bench import tune
from mcf.kernels.tuning import Config


def test_tuning_walks_downhill_and_around_what_cannot_be_used():
    asked = []

    def cost(config):
        asked.append(config)
        size, warps = config.blocks["A"], config.num_warps
        if warps == 16:
            return math.inf
        return 1 + abs(math.log2(size / 64)) + abs(math.log2(warps / 8)) + abs(config.num_stages - 3)

    best, after, before = tune.descend(Config({"A": 16}, 2, 1), cost, time.monotonic() + 60)
    assert (best, after, before) == (Config({"A": 64}, 8, 3), 1, 1 + 2 + 2 + 2)
    assert len(asked) == len({str(config) for config in asked}), "asked twice"


def test_tuning_stays_where_nothing_is_clearly_faster_and_stops_in_time():
    start = Config({"A": 16}, 4, 2)
    best, *_ = tune.descend(start, lambda config: 1.0 if config == start else 0.99, time.monotonic() + 60)
    assert best == start
    calls = []
    assert tune.descend(start, lambda config: calls.append(1) or 1 / len(calls), time.monotonic() - 1)[0] == start


def test_rows_are_written_as_the_table_has_them():
    key, config = ("info_nce/forward", "any", "sm_90"), Config({"N": 128, "M": 64}, num_warps=8, num_stages=3)
    line = tune.row(key, config, "171 µs, was 190")
    assert line.startswith("    (") and line.endswith("  # 171 µs, was 190")
    assert eval("{" + line + "\n}", {"Config": Config}) == {key: config}


def test_tuning_finds_the_rows_that_shapes_ask_for(monkeypatch):
    cpu_only()
    served_table = tune.Asked(tuning.TABLE)
    monkeypatch.setattr(tuning, "TABLE", served_table)
    cases = [case for case in SMALL.values() if case.op in ("mask", "feature_tap")]
    served = tune._served(cases, served_table, CPU)
    assert all(tuning.config(*key) for key in served)
    kernels_asked = {key[0] for key in served}
    assert {"mask", "feature_loss/forward", "feature_loss/backward"} == kernels_asked
    assert {key[2] for key in served} == {"interpreter"}


def test_tuning_without_a_gpu_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
