"""Attention: every implementation is the formula, forward and backward, `auto` goes by the table, and what cannot work says
so in one line."""

import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from mcf import attention, attention_table
from mcf.attention_table import Key, Row
from mcf.config import Recipe
from mcf.downstream.config import FinetuneConfig
from mcf.errors import UserError

# Tokens, heads, width of a head: ViT-B's encoder, teacher and decoder with fewer heads, and two odd ones.
SHAPES = [(50, 2, 64), (197, 2, 64), (197, 2, 32), (11, 3, 8), (63, 1, 24)]
HERE = [name for name in attention.IMPLEMENTATIONS if name not in attention.GPU_ONLY]
# ‖error‖ / ‖value‖. Sums of up to 197 products round like a random walk, √197 · 2⁻²⁴ = 8e-7. bfloat16 rounds by up to 2⁻⁹ =
# 2e-3, and the formula does it to scores of magnitude 4, to probabilities and to results.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def fresh():
    def clear() -> None:
        for function in (attention._resolve, attention._say, attention_table._table, attention_table.chip_of):
            function.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of the test's own: empty, and written by `table({key: choice})`."""
    monkeypatch.setattr(attention_table, "FILE", tmp_path / "table.csv")

    def write(choices: dict[Key, str]) -> None:
        us = dict.fromkeys(attention_table.NAMES, 1.0)
        rows = {key: Row(choice, us, 8, 12, "a machine", "2.13", "by hand") for key, choice in choices.items()}
        attention_table.write(attention_table.FILE, rows)
        attention_table._table.cache_clear()
        attention._resolve.cache_clear()

    write({})
    return write


def formula(q, k, v, above):
    """Output and gradients of q, k and v, by hand in NumPy's float64: P = softmax(S), dS = P ∘ (dP − Σ_m P ∘ dP)."""
    q, k, v, above = (x.detach().cpu().double().numpy().swapaxes(1, 2) for x in (q, k, v, above))
    scale = q.shape[-1] ** -0.5
    weights = np.exp(scores := q @ k.swapaxes(2, 3) * scale)
    assert np.abs(scores).max() < 30, "the exponential of nothing large"
    weights /= weights.sum(-1, keepdims=True)
    by_weight = above @ v.swapaxes(2, 3)
    by_score = scale * weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True))
    results = weights @ v, by_score @ k, by_score.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ above
    return [torch.from_numpy(x.swapaxes(1, 2).copy()) for x in results]


def apart(function, shape, dtype, device="cpu"):
    """The largest relative error of output and gradients of q, k and v, and the output."""
    tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3, heads, width, generator=generator).to(device, dtype).requires_grad_()
    above = torch.randn(2, tokens, heads, width, generator=generator).to(device, dtype)
    out = function(*qkv.unbind(2))
    (gradient,) = torch.autograd.grad(out, qkv, above)
    pairs = zip([out.detach(), *gradient.unbind(2)], formula(*qkv.unbind(2), above))
    return max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs), out


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", HERE)
def test_implementations_compute_the_formula_and_its_gradient(implementation, shape, dtype):
    error, out = apart(lambda *qkv: attention.attention(*qkv, implementation), shape, dtype)
    assert error < LIMITS[dtype] and out.dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_implementations_on_a_gpu(implementation, shape):
    error, _ = apart(lambda *qkv: attention.attention(*qkv, implementation), shape, torch.bfloat16, "cuda")
    assert error < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("names", [["math"], ["sdpa", "flash"]])
def test_a_name_is_what_computes(names):
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    fused = "ScaledDotProductFlashAttentionForCpuBackward0"
    for name in names:
        found, todo = set(), [attention.attention(q, q, q, name).grad_fn]
        while todo:
            node = todo.pop()
            found.add(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions if parent is not None]
        assert (fused in found) == (name != "math")


@pytest.mark.parametrize("implementation", HERE)
def test_compiled_it_is_one_graph_a_shape(implementation, table):
    """And `auto` in it goes by the table: by tokens, and by whether there is a gradient."""
    chip = attention_table.chip_of("cpu")
    table({Key(chip, "float32", 7, 8, True): "math", Key(chip, "float32", 9, 8, False): "flash"})
    graphs = []

    def backend(module, inputs):
        graphs.append({node.target for node in module.graph.nodes if node.op == "call_function"})
        return module

    torch._dynamo.reset()
    compiled = torch.compile(attention.attention, backend=backend, fullgraph=True, dynamic=False)
    fused = torch.nn.functional.scaled_dot_product_attention
    try:
        for tokens, gradient in [(7, True), (7, False), (9, True), (9, False)]:
            q = torch.randn(1, tokens, 2, 8, requires_grad=gradient)
            for _ in range(2):
                out = compiled(q, q, q, implementation)
            assert (out.detach() - formula(q, q, q, q)[0]).norm() < LIMITS[torch.float32] * out.norm()
            expected = "math" if implementation == "auto" and (tokens, gradient) == (7, True) else implementation
            assert (fused in graphs[-1]) == (expected != "math")
            assert any("sdpa_kernel" in str(target) for target in graphs[-1]) == (
                expected == "flash" or (expected == "auto" and (tokens, gradient) == (9, False))
            )
        assert len(graphs) == 4, "compiled again for nothing"
        # All the way, with the backward pass in a graph too.
        whole = torch.compile(attention.attention, backend="aot_eager", fullgraph=True, dynamic=False)
        error, _ = apart(lambda *qkv: whole(*qkv, implementation), (7, 2, 8), torch.float32)
        assert error < LIMITS[torch.float32]
    finally:
        torch._dynamo.reset()


def test_auto_takes_the_row_of_exactly_its_key(table):
    key = Key(attention_table.chip_of("cpu"), "float32", 197, 64, True)
    table({key: "math"})
    assert attention.resolve("auto", "cpu", torch.float32, 197, 64, True) == "math"
    for other in [(196, 64, True), (197, 32, True), (197, 64, False)]:
        assert attention.resolve("auto", "cpu", torch.float32, *other) == "sdpa"
    assert attention.resolve("sdpa", "cpu", torch.float32, 197, 64, True) == "sdpa", "a name is a name"
    table({key._replace(chip="cpu other"): "math"})
    assert attention.resolve("auto", "cpu", torch.float32, 197, 64, True) == "sdpa"
    table({key._replace(dtype="bfloat16"): "flash"})
    assert attention.resolve("auto", "cpu", torch.float32, 197, 64, True) == "sdpa"
    assert attention.resolve("auto", "cpu", torch.bfloat16, 197, 64, True) == "flash"


def test_a_gradient_is_wanted_where_there_will_be_one(table, monkeypatch):
    """Frozen weights and an input that wants a gradient, or none; and a pass that keeps nothing."""
    asked = []
    monkeypatch.setattr(attention, "resolve", lambda *key: asked.append(key) or "math")
    for wanted in (False, True):
        q = torch.randn(1, 4, 1, 8, requires_grad=wanted)
        attention.attention(q.detach(), q.detach(), q)
        with torch.no_grad():
            attention.attention(q, q, q)
    assert [key[-1] for key in asked] == [False, False, True, False]
    assert asked[0] == ("auto", "cpu", torch.float32, 4, 8, False)


def test_a_row_that_does_not_work_here_is_passed_over(table, monkeypatch):
    key = Key(attention_table.chip_of("cpu"), "bfloat16", 50, 64, True)
    table({key: "cudnn"})
    assert attention.resolve("auto", "cpu", torch.bfloat16, 50, 64, True) == "math"
    # On a GPU: what works is asked of the GPU.
    monkeypatch.setattr(attention_table, "chip_of", lambda device: "sm_90")
    table({key._replace(chip="sm_90"): "cudnn"})
    broken: list[str] = []
    monkeypatch.setattr(attention, "refusal", lambda name, *_: "no" if name in broken else "")
    answers = []
    for name in (None, "cudnn", "xformers"):
        broken += [name] if name else []
        attention._resolve.cache_clear()
        answers.append(attention.resolve("auto", "cuda", torch.bfloat16, 50, 64, True))
    assert answers == ["cudnn", "xformers", "sdpa"]


def test_what_auto_takes_is_said_once_for_each_shape(table, caplog):
    chip = attention_table.chip_of("cpu")
    table({Key(chip, "float32", 5, 8, False): "math"})
    with caplog.at_level(logging.INFO, "mcf.attention"):
        for tokens in (4, 5, 4, 5):
            q = torch.randn(1, tokens, 1, 8)
            attention.attention(q, q, q)
            attention.attention(q, q, q, "flash")
    assert [r.getMessage() for r in caplog.records] == [
        "attention on cpu in float32, 4 tokens, heads of 8, without a gradient: sdpa (the usual one on a CPU)",
        "attention on cpu in float32: flash (as the recipe says)",
        "attention on cpu in float32, 5 tokens, heads of 8, without a gradient: math (the fastest one as recorded for "
        f"{chip})",
    ]


@pytest.mark.parametrize("name", attention.GPU_ONLY)
def test_what_needs_a_gpu_is_refused_without_one(name):
    with pytest.raises(UserError, match=rf"^attention={name}: .*NVIDIA GPUs only, this is cpu; use attention=auto$"):
        attention.resolve(name, "cpu", torch.float32)


def test_what_a_backend_does_not_do_is_one_line():
    """PyTorch's kernel for CPUs has no integers."""
    with pytest.raises(UserError, match=r"^attention=flash: does not work here in int32 with heads of 8: .*=auto$"):
        attention.resolve("flash", "cpu", torch.int32, 4, 8)


@pytest.mark.parametrize("schema", [Recipe, FinetuneConfig])
def test_recipes_have_all_names(schema):
    assert set(get_args(schema.model_fields["attention"].annotation)) == set(attention.IMPLEMENTATIONS)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="attention=fast: unknown; one of auto, xformers, sdpa, flash, cudnn, eff"):
        attention.resolve("fast", "cpu", torch.float32)


def test_missing_xformers_is_one_line_or_a_fallback(table, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(UserError, match=r"xformers is not installed.*pip install xformers"):
        attention.resolve("xformers", "cuda", torch.bfloat16)
    with caplog.at_level(logging.INFO, "mcf.attention"):
        assert attention.resolve("auto", "cuda", torch.bfloat16) == "sdpa"
    assert "xformers is not installed" in caplog.text and len(caplog.records) == 1


def test_cuda_12_is_loaded_for_xformers():
    """Its wheel needs that library by this name, and torch's wheels with CUDA 13 do not bring it."""
    code = "from mcf import attention; attention._load_cuda_12(); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "/libcudart.so.12" in done.stdout
    wanted = Path(str(metadata.distribution("xformers").locate_file("xformers/_C.so"))).read_bytes()
    assert b"libcudart.so.12\0" in wanted, "xformers is linked with another CUDA now: load that one"


def test_xformers_that_does_not_work_is_a_fallback(table, monkeypatch, caplog):
    def refuse(*_):
        raise NotImplementedError(
            "No operator found for\n  this and that\n`a` is not supported because:\n    of that\nand b"
        )

    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=refuse))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    with caplog.at_level(logging.INFO, "mcf.attention"):
        assert attention.resolve("auto", "cuda", torch.bfloat16) == "sdpa"
    (record,) = caplog.records
    assert "bfloat16 with heads of 64: of that; use attention=auto" in record.getMessage()
