"""What is measured: every operation, what it must cost at least, and what of that the documents say."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from kernel_cases import FULL, SMALL

from mcf import kernels
from mcf.kernels.bench import baselines, gate, registry
from mcf.kernels.triton_or_none import HAS_TRITON, INTERPRETED

ROOT = Path(registry.__file__).resolve().parents[2]


def test_every_operation_is_measured():
    ops = {
        name for name in kernels.__all__
        if callable(getattr(kernels, name)) and "implementation" in inspect.signature(getattr(kernels, name)).parameters
    }  # fmt: skip
    assert ops == set(registry.OPERATIONS) == {case.op for case in FULL.values()}
    assert len(FULL) == len(registry.cases("full", torch.bfloat16)), "two cases have one name"


@pytest.mark.parametrize("name", SMALL)
def test_kernels_and_baselines_compute_what_the_reference_does(name):
    case = SMALL[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for which, function in case.functions.items():
        if which in case.ungated or (which == "triton" and not (HAS_TRITON and (INTERPRETED or device.type == "cuda"))):
            continue
        if which == "library" and case.op == "info_nce" and device.type == "cuda" and case.dtype == torch.float32:
            continue  # flash attention multiplies in half precision alone there
        if which == "compile":
            # The same graph as on a GPU, run by torch's own operations: a break in it would be an error here too.
            function = baselines.compiled(case.functions["eager"], backend="aot_eager")
            torch._dynamo.reset()
        verdict = gate.check(case, function, device)
        assert verdict.why == "", which
        # Something was compared: float32 arithmetic is not exact to the last bit of float64 (ids and copies are).
        assert verdict.error > 0 or case.op in ("mask", "patch_gather"), which


def test_masks_by_sorting_are_masks():
    ids_keep, ids_restore = baselines.mask_by_sorting(0, torch.arange(5), 0, 20, 6)
    assert ids_keep.shape == (5, 6) and torch.equal(ids_restore.sort(1)[0], torch.arange(20).expand(5, 20))
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(6).expand(5, 6))


def test_floors_are_those_of_the_derivations():
    """At 4.3 TB/s and 790 TFLOP/s, what the derivation of each kernel counts: floors and accepted times of issue 3."""

    def floor(name, which="forward"):
        return FULL[name].passes()[which].floor_us(4.3e12, 790e12)

    assert floor("info_nce N=1024 M=65536 D=256 bfloat16") == pytest.approx(87, abs=0.5)
    assert floor("info_nce N=1024 M=4096 D=256 bfloat16") == pytest.approx(5.4, abs=0.1)
    assert floor("patch_gather uint8 B=1024 S=224 P=16 K=49 bfloat16") == pytest.approx(54 / 2, abs=0.5)
    tap = "feature_tap B=1024 L+1=197 C=768 tokens bfloat16"
    assert floor(tap) == pytest.approx(144, abs=0.5) and floor(tap, "backward") == pytest.approx(288, abs=0.5)
    assert {case.name: case.forward.accept_us for case in FULL.values() if case.forward.accept_us} == {
        "info_nce N=1024 M=65536 D=256 bfloat16": 180,
        "info_nce N=1024 M=4096 D=256 bfloat16": 25,
        "patch_gather uint8 B=1024 S=224 P=16 K=49 bfloat16": 45,
        "token_restore B=1024 L=196 K=49 D=512 bfloat16": 90,
        "mask B=1024 L=196 K=49 int64": 15,
    }


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if not case.op.startswith("info_nce")])
def test_bytes_are_those_of_the_tensors(name):
    """Counted from the formulas, and from the tensors themselves: inputs, outputs, gradients from above and down."""
    case = SMALL[name]
    arguments = gate.leaves(case, case.make(torch.Generator().manual_seed(0)))
    outputs = gate.tensors(case.functions["eager"](*arguments))
    inputs = [x for x in arguments if isinstance(x, torch.Tensor)]
    read = sum(x.nbytes for x in inputs)
    # A tap's features go through it, and are written by nobody.
    written = sum(x.nbytes for x in outputs if x.data_ptr() != inputs[0].data_ptr())
    if case.op == "patch_gather" and arguments[1] is not None:
        # Only the patches that are kept are read.
        image, ids = arguments[:2]
        read = image.nbytes * ids.shape[1] // (image.shape[2] // 14) ** 2 + ids.nbytes
    # Within the few bytes that do not grow with the batch: losses, the mask token, the table of positions.
    small = sum(x.nbytes for x in arguments[1:3] if isinstance(x, torch.Tensor)) if case.op == "token_restore" else 8
    assert case.forward.bytes == pytest.approx(read + written, abs=small)


def rows_of(document: str, head: str) -> list[list[str]]:
    """The cells of the table of a document whose first column is named so."""
    lines = (ROOT / "docs" / document).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    end = next((i for i, line in enumerate(lines[start:], start) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 : end]]


def test_documented_floors_and_accepted_times_are_those_that_are_measured_against():
    rows = rows_of("benchmarks.md", "Operation")
    asked = set()
    for op, shape, which, floor, accept, _ in rows:
        case = next(case for case in FULL.values() if (f"`{case.op}`", case.shape) == (op, shape))
        work = case.passes()[which]
        exact = work.floor_us(4.3e12, 790e12)
        assert float(floor) == pytest.approx(exact, abs=0.5 if exact > 10 else 0.05)
        assert float(accept) == pytest.approx(work.accept_us or work.accept_floor * exact, abs=0.5)
        asked.add((case.name, which))
    # Every accepted time in microseconds is in the table (floors' multiples hold for all taps: one shape stands for them).
    assert asked >= {(c.name, w) for c in FULL.values() for w, work in c.passes().items() if work.accept_us}
    assert {op.strip("`") for op, *_ in rows} | {"feature_loss", "info_nce_statistics"} == set(registry.OPERATIONS)


def test_each_kernels_page_says_what_is_asked_and_what_was_measured():
    text = (ROOT / "docs/kernels.md").read_text()
    asked = rows_of("benchmarks.md", "Operation")
    for op in dict.fromkeys(row[0].strip("`") for row in asked):
        page = text.partition(f"\n## {op}")[2].partition("\n## ")[0]
        assert f"kernels/{op.replace('tap', 'loss')}.svg" in page and "\nFloor" in page
        (line,) = (line for line in page.splitlines() if line.startswith("Asked of an H200: "))
        numbers = re.findall(r"(\d+) µs", line)
        assert {row[4] for row in asked if row[0].strip("`") == op} <= set(numbers), line
        told = all(row[5] == "not measured" for row in asked if row[0].strip("`") == op)
        assert line.endswith("Measured: not yet on a GPU.") == told
