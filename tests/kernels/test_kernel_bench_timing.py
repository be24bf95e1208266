"""The clocks of the benchmark: passes are timed apart, over inputs of their own."""

import time

import pytest
import torch
from kernel_cases import CPU, sure

from mcf.kernels.bench import timing


class Slow(torch.autograd.Function):
    """Two milliseconds forward, eight backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(2e-3)
        return x.clone()

    @staticmethod
    def backward(ctx, above):
        time.sleep(8e-3)
        return above


def test_passes_are_timed_apart_over_inputs_of_their_own():
    seen = []

    def function(x):
        seen.append(x.data_ptr())
        return Slow.apply(x)

    case = sure(make=lambda generator: (torch.ones(1 << 18),), truth=function, functions={"triton": function})
    # Sleeping lasts at least as long as asked, and on a busy machine now and then much longer: a pass that counted the
    # other one would do so every time.
    for _ in range(5):
        seen.clear()
        times = timing.measure(case, function, CPU, 0.1)
        if times["forward"].p20 < 8e3:
            break
    assert 2e3 <= times["forward"].p20 <= times["forward"].p50 <= times["forward"].p80
    assert times["backward"].p20 >= 8e3 and times["forward"].p20 < 8e3
    assert times["both"].p50 >= times["forward"].p20 + times["backward"].p20
    # Sets of 1 MiB and as much from above, until 96 MiB are held (or as many as are allowed).
    assert len(set(seen)) == timing.BUFFERS[1]


def test_percentiles():
    times = timing.percentiles([float(x) for x in range(101)])
    assert (times.p20, times.p50, times.p80, times.samples) == (20, 50, 80, 101)


def test_ceilings_are_those_of_a_machine():
    limits = timing.ceilings(CPU, torch.float32)
    assert 1e8 < limits.bandwidth < 1e13 and 1e8 < limits.throughput < 1e15
    assert 0 <= limits.overhead_us < 1e5


@pytest.mark.gpu
def test_the_clock_of_a_gpu_does_not_count_python():
    """A kernel that waits for a known time is measured so, and the host's sleep beside it is not seen."""
    watch = timing.CudaClock()
    cycles = int(1e-3 * watch.cycles_per_second)
    for _ in range(3):  # the first round says how long the device has to be held back
        watch.begin()
        start = watch.mark()
        torch.cuda._sleep(cycles)
        middle = watch.mark()
        time.sleep(5e-3)
        stop = watch.mark()
        watch.end()
    assert watch.between(start, middle) == pytest.approx(1e3, rel=0.2)
    assert watch.between(middle, stop) < 500
