"""What freed tensors cost: nothing where the process keeps their memory, and the process does not grow by it.

In processes of their own, since malloc is told for good.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mcf import memory

# Tensors of 40 to 44 MB, the same in each round, as in each step; glibc by itself maps and unmaps them.
PROGRAM = """
import json, resource, sys
import torch
from mcf.memory import keep_freed_memory
torch.set_num_threads(1)
told = keep_freed_memory() if sys.argv[1] == "keep" else None
faults, resident = [], []
for round in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(10_000_000 + 500_000 * i) for i in range(3)]
    held += [tensor + 1 for tensor in held]
    del held
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    resident.append(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
print(json.dumps([told, faults, resident]))
"""


def rounds(how: str) -> tuple[bool | None, list[int], list[int]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_that_is_freed_is_used_again():
    told, faults, resident = rounds("keep")
    _, without, _ = rounds("as it is")
    assert told
    # Each round touches six tensors of 10,000 pages, and without the allocator's help gets them anew each time.
    assert min(without) > 30_000
    # With it most touch none; now and then the heap's holes do not fit, and it grows by a tensor.
    assert sorted(faults[5:])[len(faults[5:]) // 2] < 1_000, faults
    assert sum(faults[5:]) < 0.1 * sum(without[5:]), faults
    # And what is kept does not grow beyond that: 25 rounds have 150 tensors of 40 MB.
    assert resident[-1] - resident[5] < 200e6, resident


def test_where_there_is_no_glibc_nothing_is_told(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())  # musl has neither function
    assert not memory.keep_freed_memory()
