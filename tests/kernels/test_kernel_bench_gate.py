"""The gate of the benchmark lets nothing wrong through, and what passed it is kept."""

import time

import pytest
import torch
from kernel_cases import CPU, SMALL, sure

from mcf import kernels
from mcf.kernels.bench import __main__ as bench
from mcf.kernels.bench import gate, table, timing


def spoilt(outputs, i):
    return tuple(x * 1.001 if place == i else x for place, x in enumerate(outputs))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x, x.sum()

    @staticmethod
    def backward(ctx, above, above_sum):
        (x,) = ctx.saved_tensors
        return 2.001 * x * above + above_sum


def one_value_off(x):
    y = x * x
    return torch.where(torch.arange(len(y)) == 3, y + 1e-4, y), x.sum()


WRONG = {
    "an output": (lambda x: spoilt((x * x, x.sum()), 0), "output 0"),
    "a scalar": (lambda x: spoilt((x * x, x.sum()), 1), "output 1"),
    "one value": (one_value_off, "output 0"),
    "a gradient": (WrongGradient.apply, "gradient of argument 0"),
    "NaN": (lambda x: (x * x * torch.where(torch.arange(10) == 9, float("nan"), 1.0), x.sum()), "output 0"),
    "a shape": (lambda x: ((x * x)[:9], x.sum()), "shape [9] instead of [10]"),
    "a missing output": (lambda x: x * x, "1 outputs instead of 2"),
    "a broken graph": (lambda x: (x.detach() * x.detach(), x.sum()), "output 0 passes no gradient on"),
    "a type": (lambda x: (x.bfloat16() ** 2, x.sum()), "output 0"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_named_and_not_timed(kind, tmp_path, capsys, monkeypatch):
    function, complaint = WRONG[kind]
    case = sure()
    assert gate.check(case, case.functions["triton"], CPU).why == ""
    assert complaint in gate.check(case, function, CPU).why

    monkeypatch.setattr(timing, "ceilings", lambda *_: timing.Ceilings(1e10, 1e11, 0.1))
    # `eager` is what a CPU computes with; there it stands for the kernel too.
    timed = []
    measure = timing.measure
    monkeypatch.setattr(
        timing, "measure", lambda case, function, *rest: timed.append(function) or measure(case, function, *rest)
    )
    case = sure(functions={"eager": function, "library": case.functions["triton"]})
    assert bench.run([case], CPU, True, time.monotonic() + 60, tmp_path) == 1
    assert timed == [case.functions["library"]]
    output = capsys.readouterr()
    assert output.err.startswith("error: square n=10 eager: wrong: ") and complaint in output.err
    rows, _ = table.read_csv(tmp_path / "bench.csv")
    assert {(row.implementation, row.p50_us is None, row.note[:6]) for row in rows} == {
        ("eager", True, "wrong:"), ("library", False, ""),
    }  # fmt: skip


def test_a_kernel_that_raises_fails_the_benchmark_and_a_baseline_does_not(capsys):
    def broken(x):
        raise RuntimeError("no such operator\nand a long story")

    good = sure().functions["eager"]
    assert bench.run([sure(functions={"eager": good, "library": broken})], CPU, True, time.monotonic() + 60, None) == 0
    assert "square n=10 float32 library: failed: RuntimeError: no such operator" in capsys.readouterr().out
    assert bench.run([sure(functions={"eager": broken})], CPU, True, time.monotonic() + 60, None) == 1


def test_what_was_measured_is_kept_whatever_comes_after(tmp_path, capsys):
    """Each implementation is in the files when the next begins, so that a kill loses one; ctrl-C still gives tables."""
    seen = []

    def interrupted(x):
        seen.append([(tmp_path / name).read_text() for name in ("bench.csv", "bench.md")])
        raise KeyboardInterrupt

    case = sure()
    case = sure(functions={"eager": case.truth, "library": case.truth, "last": interrupted})
    assert bench.run([case, sure(shape="n=11")], CPU, True, time.monotonic() + 60, tmp_path) == 130
    assert all("square" in text and "eager" in text and "library" in text for text in seen[0])
    rows, _ = table.read_csv(tmp_path / "bench.csv")
    assert {(row.shape, row.implementation, row.p50_us is None) for row in rows} == {
        ("n=10", "eager", False), ("n=10", "library", False), ("n=11", "triton", True),
    }, "all kernels come first"  # fmt: skip
    output = capsys.readouterr()
    assert "| n=10 float32 | backward |" in output.out and output.err.startswith("error: interrupted;")


def test_ids_must_agree_to_the_last(capsys):
    case = SMALL["mask B=5 L=63 K=15 int64"]

    def other(*arguments):
        keep, restore = case.truth(*arguments)
        keep[3, 3] += 1
        return keep, restore

    assert gate.check(case, case.truth, CPU).why == ""
    verdict = gate.check(case, other, CPU)
    assert "output 0" in verdict.why and verdict.error == pytest.approx(1 / (5 * 15))


def test_the_gate_sees_the_loss_in_the_gradient_of_a_tap():
    """A tap that passes the stream's gradient on and forgets the loss's is wrong."""

    def forgetful(x, target, axis):
        return x.view_as(x), kernels.feature_loss(x.detach(), target, axis) + 0 * x.sum()

    for name in ("feature_tap B=3 L+1=63 C=80 tokens float32", "feature_tap B=3 L+1=63 C=80 channels float32"):
        verdict = gate.check(SMALL[name], forgetful, CPU)
        assert "gradient" in verdict.why and verdict.error > 0.1
