"""Schedules against closed forms at their ends, knees and middles."""

import math
from types import SimpleNamespace

import pytest

from mcf.config import MomentumConfig, OptimizerConfig
from mcf.schedule import learning_rate, momentum

LENGTH = SimpleNamespace(lr=2.4e-3, warmup_steps=100, steps=1600)
CONFIG = OptimizerConfig(min_lr=0.0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 2.4e-5),
        (50, 1.2e-3),
        (100, 2.4e-3),
        (850, 1.2e-3),  # the middle of the cosine
        (100 + 500, 2.4e-3 * 0.75),  # a third: cos(60°) = 1/2
        (1600, 0.0),
        (5000, 0.0),
    ],
)
def test_learning_rate_of_the_reference(step, expected):
    assert learning_rate(step, LENGTH, CONFIG) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_learning_rate_is_continuous_where_the_warm_up_ends_between_two_steps():
    length = SimpleNamespace(lr=1.0, warmup_steps=9.5, steps=100)
    before, after = learning_rate(9, length, CONFIG), learning_rate(10, length, CONFIG)
    assert before == pytest.approx(9 / 9.5)
    assert after == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5 / 90.5)))
    assert after > before


def test_learning_rate_ends_at_min_lr_and_never_goes_below():
    config = OptimizerConfig(min_lr=1e-5)
    rates = [learning_rate(step, LENGTH, config) for step in range(100, 1700)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 1e-5
    assert learning_rate(1599, LENGTH, config) > 1e-5


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, SimpleNamespace(lr=0.5, warmup_steps=0, steps=10), CONFIG) == 0.5


def test_constant_momentum_is_the_value_at_every_step():
    config = MomentumConfig(value=0.99)
    assert {momentum(step, 1000, config) for step in (0, 1, 500, 1000, 2000)} == {0.99}


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.99), (250, 1 - 0.01 * (2 + 2**0.5) / 4), (500, 0.995), (1000, 1.0)]
)
def test_cosine_momentum_rises_to_one(step, expected):
    assert momentum(step, 1000, MomentumConfig(value=0.99, schedule="cosine")) == pytest.approx(expected, abs=1e-15)
