"""Compiles every kernel ahead of time, on any machine: `python -m mcf.kernels.aot`.

Triton's compiler needs no GPU: for each specialisation that a launcher can choose (`variants(chip)` of each operation's
module) it makes the machine code of an sm_80 and an sm_90, which says what would otherwise be found out on the GPU:
registers that spill, shared memory that does not fit, matrix products that missed the tensor cores.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

from mcf.kernels.arguments import ArgumentError, chosen, number, parse, said
from mcf.kernels.triton_or_none import HAS_TRITON, INTERPRETED, triton
from mcf.kernels.tuning import CHIPS, Variant

OPERATIONS = ("mask", "patch_gather", "token_restore", "feature_loss", "info_nce")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities 8.0 and 9.0)."""

_KEYS = {
    "op": ("all", f"operations, by commas: {', '.join(OPERATIONS)}"),
    "chip": ("all", f"{', '.join(CHIPS)}"),
    "processes": ("2", "compilers at a time"),
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant for a chip.

    Args:
        variant, chip: which.
        warps, stages: how it is launched.
        registers: of a thread.
        stack: bytes of local memory of a thread; whatever spills lies there.
        spills: instructions that store to it or load from it.
        shared: bytes of shared memory of a block.
        mma, wgmma: matrix instructions of a warp, and of a warp group (sm_90).
        load, store: bytes of the widest access of a thread to memory; 16 is the most there is.
        wants_tensor_cores: what the variant says.
    """

    variant: str
    chip: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    mma: int
    wgmma: int
    load: int
    store: int
    wants_tensor_cores: bool

    def problems(self) -> list[str]:
        """What keeps this kernel from being used, one line each."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.spills} instructions spill, {self.stack} bytes of stack a thread")
        if self.shared > SHARED_LIMIT[self.chip]:
            found.append(f"{self.shared} bytes of shared memory, the chip has {SHARED_LIMIT[self.chip]}")
        if self.wants_tensor_cores and not (self.wgmma if self.chip == "sm_90" else self.mma):
            found.append("no matrix instruction: its products miss the tensor cores")
        return [f"{self.variant} on {self.chip}: {problem}" for problem in found]


def compile_variant(variant: Variant, chip: str) -> Compiled:
    """Compile one variant for one chip; Triton's cache keeps what it has compiled."""
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(variant.signature.items())
        if kind.startswith("*") or name in variant.divisible
    }
    source = triton.compiler.ASTSource(variant.kernel, dict(variant.signature), dict(variant.constexprs), attributes)
    target = triton.backends.compiler.GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(source, target=target, options=options)

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        registers, stack = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", _cuobjdump("-sass", file.name))) if stack else 0
    ptx = kernel.asm["ptx"]
    return Compiled(
        variant=variant.name,
        chip=chip,
        warps=variant.num_warps,
        stages=variant.num_stages,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=kernel.metadata.shared,
        mma=len(re.findall(r"\bmma\.sync\b", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        load=_widest("ld", ptx),
        store=_widest("st", ptx),
        wants_tensor_cores=variant.wants_tensor_cores,
    )


def _widest(access: str, ptx: str) -> int:
    """Bytes of the widest load (`ld`, or a copy past the registers) or store (`st`) of global memory."""
    found = re.findall(rf"\b{access}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in found]
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?, 0x([0-9a-f]+)", ptx) if access == "ld" else []
    return max([*sizes, *(int(size, 16) for size in copies)], default=0)


def _cuobjdump(option: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def variants(op: str, chip: str) -> list[Variant]:
    """All variants of an operation on a chip."""
    return importlib.import_module(f"mcf.kernels.{op}").variants(chip)


def compile_all(ops: list[str], chips: list[str], processes: int = 2) -> list[Compiled]:
    """Compile all variants of some operations, several at a time; in the order of operations and chips."""
    work = [(op, chip, i) for op, chip in product(ops, chips) for i in range(len(variants(op, chip)))]
    # Kernels cannot be sent to another process, so that each finds its own by name. Spawned and not forked: torch has
    # threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(_compile, work, chunksize=4))


def _compile(which: tuple[str, str, int]) -> Compiled:
    op, chip, index = which
    return compile_variant(variants(op, chip)[index], chip)


def table(compiled: list[Compiled]) -> str:
    """A Markdown table of what was compiled, one row a variant and chip."""
    lines = [
        "| kernel | chip | warps | stages | registers | stack | spills | shared | mma | wgmma | load | store |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in compiled:
        access = f"{one.mma or '–'} | {one.wgmma or '–'} | {one.load} B | {one.store} B"
        lines.append(
            f"| {one.variant} | {one.chip} | {one.warps} | {one.stages} | {one.registers} | {one.stack} "
            f"| {one.spills} | {one.shared / 1024:.1f} KiB | {access} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the table; 1 if a kernel is not fit for its chip."""
    try:
        values = parse(
            "mcf.kernels.aot",
            "compile every kernel for sm_80 and sm_90, on any machine, and see whether it is fit for them",
            _KEYS,
            argv,
        )
        ops, chips = chosen("op", values["op"], list(OPERATIONS)), chosen("chip", values["chip"], list(CHIPS))
        processes = int(number("processes", values["processes"], 1))
        if not HAS_TRITON:
            raise ArgumentError("Triton is not installed, and it is what compiles: pip install triton")
        if INTERPRETED:
            raise ArgumentError("TRITON_INTERPRET is set, and interpreted kernels are not compiled: unset it")
    except ArgumentError as error:
        return said(error)
    compiled = compile_all(ops, chips, processes)
    print(f"Triton {triton.__version__}, {len(compiled)} kernels\n\n{table(compiled)}")
    problems = [problem for one in compiled for problem in one.problems()]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
