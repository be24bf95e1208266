"""The compile gate: every kernel in use, compiled for sm_80 and sm_90 by Triton's own compiler, on any machine.

Kernels of this process are interpreted (tests/conftest.py), so that what compiles runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcf.kernels import aot
from mcf.kernels.arguments import ArgumentError

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


def compiling(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in which kernels are compiled and not interpreted."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=clean, timeout=900)


def compiled(**changes) -> aot.Compiled:
    good = {
        "variant": "k", "chip": "sm_90", "warps": 4, "stages": 2, "registers": 200, "stack": 0, "spills": 0,
        "shared": 1024, "mma": 0, "wgmma": 4, "load": 16, "store": 16, "wants_tensor_cores": True,
    }  # fmt: skip
    return aot.Compiled(**(good | changes))


def test_every_kernel_in_use_is_fit_for_both_chips(capsys):
    done = compiling("-m", "mcf.kernels.aot")
    with capsys.disabled():  # the table is what one wants to read in the log
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    for chip in ("sm_80", "sm_90"):
        kernels = {row[0].split("/")[0].split()[0] for row in rows if row[1].strip() == chip}
        assert kernels == set(aot.OPERATIONS)
    for row in rows:
        assert 16 <= int(row[4]) <= 255 and int(row[5]) == int(row[6]) == 0

    # The table that is published says the same: of the same kernels, and of the same Triton to the last register.
    document = (Path(aot.__file__).resolve().parents[1] / "docs/benchmarks.md").read_text()
    published = [
        line.split("|")[1:-1]
        for line in document[document.index("## Compiled") :].splitlines()
        if line.startswith("| ")
    ]
    same = f"Triton {triton.__version__}," in document
    assert [row if same else row[:4] for row in published[2:]] == [row if same else row[:4] for row in rows], (
        "docs/benchmarks.md is not what is compiled now: python -m mcf.kernels.aot"
    )


def test_every_kernel_file_is_compiled():
    kernels = {path.stem for path in Path(aot.__file__).parent.glob("*.py") if "@triton.jit" in path.read_text()}
    assert kernels == set(aot.OPERATIONS)


BAD_KERNELS = """
import json, sys
from dataclasses import asdict
from mcf.kernels.aot import compile_variant
from mcf.kernels.triton_or_none import tl, triton
from mcf.kernels.tuning import Variant

@triton.jit
def product(p_a, p_b, p_c, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CORES: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for i in range(steps):
        a = tl.load(p_a + o_m[:, None] * K + o_k[None, :] + i * M * K)
        b = tl.load(p_b + o_k[:, None] * N + o_n[None, :] + i * N * K)
        if CORES:
            total = tl.dot(a, b, total)
        else:
            total += tl.sum(a.to(tl.float32), 1)[:, None] * tl.sum(b.to(tl.float32), 0)[None, :]
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], total)

def variant(name, m, n, k, warps, stages, cores=True):
    signature = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32", "steps": "i32"}
    constexprs = {"M": m, "N": n, "K": k, "CORES": cores}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return Variant(name, product, signature, constexprs, warps, stages, wants_tensor_cores=True)

found = []
for chip in ("sm_80", "sm_90"):
    for one in (
        variant("good", 64, 64, 64, 4, 2),
        variant("spilling", 256, 256, 64, 4, 2),
        variant("large", 128, 128, 128, 8, 5),
        variant("scalar", 32, 32, 16, 4, 2, cores=False),
    ):
        compiled = compile_variant(one, chip)
        found.append({**asdict(compiled), "problems": compiled.problems()})
print(json.dumps(found))
"""


def test_what_is_not_fit_is_found(tmp_path):
    """Each fault made for real: a tile that spills, stages that do not fit, a product outside the tensor cores."""
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    done = compiling(str(tmp_path / "bad_kernels.py"))
    assert done.returncode == 0, done.stderr
    found = {(one["variant"], one["chip"]): one for one in json.loads(done.stdout)}
    for chip in ("sm_80", "sm_90"):
        good, spilling, large, scalar = (found[name, chip] for name in ("good", "spilling", "large", "scalar"))
        assert good["problems"] == [] and good["registers"] < 255
        # Rows of 64 values lie side by side, and move in pieces of 16 bytes.
        assert good["load"] == 16 and good["store"] == 16
        assert (good["wgmma"] > 0) == (chip == "sm_90") and (good["mma"] > 0) == (chip == "sm_80")
        assert spilling["stack"] > 0 and spilling["spills"] > 0
        assert f"{spilling['spills']} instructions spill" in spilling["problems"][0]
        # Four or five stages of 2·128·128 values in two bytes each are beyond either chip.
        assert large["shared"] >= 4 * 2 * 128 * 128 * 2 and "bytes of shared memory" in large["problems"][0]
        assert scalar["mma"] == scalar["wgmma"] == 0 and "tensor cores" in scalar["problems"][0]


def test_the_gate_names_kernel_and_chip():
    assert compiled().problems() == []
    assert compiled(stack=8, spills=2).problems() == ["k on sm_90: 2 instructions spill, 8 bytes of stack a thread"]
    assert compiled(shared=227 * 1024).problems() == []
    assert "232449 bytes" in compiled(shared=227 * 1024 + 1).problems()[0]
    assert "166913 bytes" in compiled(chip="sm_80", mma=1, shared=163 * 1024 + 1).problems()[0]
    # An mma of a single warp does not make an sm_90's products fast.
    assert "tensor cores" in compiled(wgmma=0, mma=9).problems()[0]
    assert compiled(wgmma=0, wants_tensor_cores=False).problems() == []


def test_variants_are_what_launchers_launch():
    """Launches of all shapes of the benchmark, caught before they reach a GPU, are all among the variants compiled."""
    done = compiling(str(HERE / "catch_launches.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["launches"] > 20
    assert result["unknown"] == []


def test_bad_input_is_one_line(capsys):
    for words, complaint in (
        (["chip=sm_75"], "chip=sm_75: must be one of sm_80, sm_90, all"),
        (["op=mas"], "did you mean mask?"),
        (["processes=0"], "processes=0: must be a number ≥ 1"),
        (["mask"], "'mask' is not key=value"),
        (["chip=sm_80", "chip=sm_90"], "chip is given twice"),
        (["chips=sm_80"], "did you mean chip?"),
        (["foo=1"], "unknown key 'foo'; keys: op, chip, processes (`--help`"),
    ):
        assert aot.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_interpreted_kernels_are_not_compiled(capsys):
    if not aot.INTERPRETED:
        pytest.skip("kernels are compiled here: there is a GPU")
    assert aot.main(["op=mask"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_a_number_is_a_number():
    for text in ("nan", "inf", "x", "-1", ""):
        with pytest.raises(ArgumentError, match=f"seconds={text}"):
            aot.number("seconds", text, 0)
