"""Attention: every implementation is the formula, and what cannot work says so in one line."""

import logging
import sys

import pytest
import torch

from mcf import attention
from mcf.errors import UserError


@pytest.fixture(autouse=True)
def fresh():
    for function in (attention._resolve, attention._say):
        function.cache_clear()
    yield
    for function in (attention._resolve, attention._say):
        function.cache_clear()


def formula(q, k, v):
    """One query at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for n in range(q.shape[1]):
                scores = k[b, :, h].double() @ q[b, n, h].double() / q.shape[-1] ** 0.5
                out[b, n, h] = torch.softmax(scores, 0) @ v[b, :, h].double()
    return out


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "math"])
def test_implementations_compute_the_formula(implementation):
    q, k, v = torch.randn(3, 2, 11, 3, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    # Weights sum to 1 and values are of magnitude 3: a few roundings of float32 (and the CPU's fast exponential).
    torch.testing.assert_close(
        attention.attention(q, k, v, implementation).double(), formula(q, k, v), rtol=0, atol=3e-6
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_on_a_gpu():
    q, k, v = torch.randn(3, 2, 50, 3, 64, device="cuda").bfloat16().unbind(0)
    # bfloat16 keeps 8 bits of values of magnitude 3.
    expected = formula(q.cpu(), k.cpu(), v.cpu())
    torch.testing.assert_close(attention.attention(q, k, v, "xformers").cpu().double(), expected, rtol=0, atol=3e-2)


def test_auto_on_a_cpu_is_sdpa_and_says_so_once(caplog):
    q = torch.randn(1, 4, 1, 8)
    with caplog.at_level(logging.INFO, "mcf.attention"):
        for _ in range(3):
            attention.attention(q, q, q)
    assert [r.getMessage() for r in caplog.records] == [
        "attention on cpu in float32: sdpa (the faster one; xformers needs a GPU)"
    ]


def test_xformers_needs_a_gpu():
    with pytest.raises(UserError, match=r"attention=xformers.*this is cpu.*attention=auto"):
        attention.resolve("xformers", "cpu", torch.float32)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="attention=flash: unknown; one of auto, xformers, sdpa, math"):
        attention.resolve("flash", "cpu", torch.float32)


def test_missing_xformers_is_one_line_or_a_fallback(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r"xformers is not installed.*pip install xformers"):
        attention.resolve("xformers", "cuda", torch.bfloat16)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    with caplog.at_level(logging.INFO, "mcf.attention"):
        assert attention.resolve("auto", "cuda", torch.bfloat16) == "sdpa"
    assert "xformers is not installed" in caplog.text and len(caplog.records) == 1
