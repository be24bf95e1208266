"""Meters: loss terms are those of the last step, rates and waits those since the last line."""

from __future__ import annotations

import pytest
import torch

from mcf import meters
from mcf.distributed import World
from mcf.step import Outcome


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told."""
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def rank(monkeypatch, clock):
    """One rank's meters; its peer has seen loss terms that are larger by 1."""
    monkeypatch.setattr(meters.distributed, "mean", lambda tensor: tensor + 0.5)
    return meters.Meters(World(0, 2, 0, 2, torch.device("cpu"), "here", 1))


def outcome(*totals: float) -> Outcome:
    terms = [{"total": torch.tensor(t), "query_std": torch.tensor(2 * t)} for t in totals]
    return Outcome(applied=True, grad_norm=0.25, terms=terms)


def test_losses_of_the_last_step_and_rates_since_the_last_line(rank, clock):
    def source():
        for seconds in (0.5, 1.5, 4.0):
            clock[0] += seconds
            yield seconds

    batches = rank.timed(source())
    assert [next(batches), next(batches)] == [0.5, 1.5]
    clock[0] += 6.0  # the steps themselves
    rank.add(outcome(50.0), samples=8)
    rank.add(outcome(1.0, 3.0), samples=8)
    numbers = rank.read()
    assert numbers["loss/total"] == 2.5 and numbers["contrast/query_std"] == 4.5
    assert numbers["grad_norm"] == 0.25
    assert numbers["rate/images_per_s"] == pytest.approx(16 / 8.0)
    assert numbers["rate/data_wait"] == pytest.approx(2.0 / 8.0)
    assert numbers["memory/gib"] > 0

    next(batches)
    clock[0] += 1.0
    rank.add(outcome(7.0), samples=8)
    numbers = rank.read()
    assert numbers["rate/images_per_s"] == pytest.approx(8 / 5.0)
    assert numbers["rate/data_wait"] == pytest.approx(4.0 / 5.0)
