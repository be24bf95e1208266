"""What this machine's processor is: its maker, its model, and the widest instructions that torch multiplies with on it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

FILE = Path("/proc/cpuinfo")
MAKERS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


@dataclass(frozen=True)
class Processor:
    """A machine's processors, as the kernel names them.

    maker: "amd" or "intel"; else the architecture ("aarch64").
    family: the maker's number of the generation, 0 where the kernel says none (AMD: 25 is Zen 3 and 4, 26 Zen 5).
    model: its name in full, or the architecture's.
    cores: how many the kernel lists, 0 where it says nothing.
    flags: names of its instruction sets ("avx512f").
    """

    maker: str
    family: int
    model: str
    cores: int
    flags: frozenset[str]

    @property
    def products(self) -> str:
        """The widest instructions for products that torch uses on it: "amx_bf16", "avx512_bf16", "avx512", "avx2" …"""
        capability = torch.backends.cpu.get_cpu_capability()
        # ATEN_CPU_CAPABILITY may keep torch from what the processor has.
        matrix = (flag for flag in ("amx_bf16", "avx512_bf16") if flag in self.flags and capability == "AVX512")
        return next(matrix, capability.lower())


@cache
def here() -> Processor:
    """This machine's."""
    return read(FILE.read_text() if FILE.exists() else "")


def read(info: str) -> Processor:
    """The processor that the text of /proc/cpuinfo tells of; what the text leaves open is asked of the system."""
    lines = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in info.splitlines())]
    facts, models = dict(lines), [value for name, value in lines if name == "model name"]
    return Processor(
        maker=MAKERS.get(facts.get("vendor_id", ""), platform.machine()),
        family=int(facts.get("cpu family", 0)),
        model=models[0] if models else platform.processor() or platform.machine(),
        cores=len(models),
        flags=frozenset(facts.get("flags", "").split()),
    )
