"""`python -m mcf.kernels.bench [op=…] [out=…]`: right first, then fast; a table, a CSV file and plots."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from mcf.kernels.arguments import ArgumentError, chosen, number, parse, said
from mcf.kernels.bench import gate, plots, registry, timing
from mcf.kernels.bench.registry import Case, Function
from mcf.kernels.bench.table import Machine, Row, here, markdown, read_csv, write_csv
from mcf.kernels.triton_or_none import INTERPRETED

KEYS = {
    "op": ("all", f"operations, by commas: {', '.join(registry.OPERATIONS)}"),
    "out": ("", "folder for bench.csv, bench.md and plots; without it nothing is written"),
    "sizes": ("auto", "full (of training on a large GPU) or small; auto: full on a GPU"),
    "timing": ("yes", "no: only check the kernels against the reference"),
    "seconds": ("420", "start nothing new after so long; what was not reached is said"),
    "plots": ("", "a bench.csv that is only drawn, into `out` or its own folder"),
}
LOST = 3
"""Exit status: an operation has spoilt the GPU for this process, and what came after it was not measured."""
PER_FUNCTION_S = 1.0
"""Seconds of timing for one implementation of one case."""
OURS = ("triton", "eager")
"""What the project runs: the kernel, and the reference on a CPU. If one of these is wrong, the benchmark fails."""


class DeviceLost(Exception):
    """After an illegal access, everything that this process does on the GPU fails; the message is that of the access."""


def main(argv: list[str]) -> int:
    """Check and measure, or draw what was measured; 1 if an operation is wrong, 130 where ctrl-C ended it, LOST."""
    try:
        values = parse(
            "mcf.kernels.bench",
            "measure the kernels beside PyTorch's own operations, once they are shown to be right",
            KEYS,
            argv,
        )
        if values["plots"]:
            return _draw(Path(values["plots"]), values["out"])
        ops = chosen("op", values["op"], list(registry.OPERATIONS))
        sizes = _one_of("sizes", values["sizes"], "auto", "full", "small")
        timed = _one_of("timing", values["timing"], "yes", "no") == "yes"
        until = time.monotonic() + number("seconds", values["seconds"], 0)
        out = _folder(values["out"]) if values["out"] else None
    except ArgumentError as error:
        return said(error)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run(_cases(ops, sizes, device), device, timed, until, out)


def run(cases: list[Case], device: torch.device, timed: bool, until: float, out: Path | None) -> int:
    """Check all cases, time what is right, print and write the tables; 1 if an operation is wrong, 130 if interrupted.

    All kernels come first, and last what has to be compiled for minutes: where time is short, the former are known. Tables
    have the order of the cases.

    Args:
        cases: what of.
        device: where.
        timed: whether to time at all.
        until: `time.monotonic()` after which nothing new is started.
        out: the folder for results, or None.
    """
    machine = here(device)
    print(f"{machine.device}; torch {machine.torch}, triton {machine.triton or 'not installed'}; {machine.commit}")
    if device.type != "cuda":
        print("No CUDA device: what follows are NOT GPU numbers, and say nothing about the kernels' speed.")
    limits = None
    if timed:
        limits = timing.ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        print(
            f"copies {limits.bandwidth / 1e12:.3g} TB/s, multiplies {limits.throughput / 1e12:.3g} TFLOP/s, "
            f"an empty timing takes {limits.overhead_us:.2g} µs"
        )
    print()
    work = [(case, name, function) for case in cases for name, function in _functions(case, device, timed).items()]
    found: dict[int, list[Row]] = {}
    rows: list[Row] = []
    interrupted, lost = False, ""
    try:
        for index in sorted(range(len(work)), key=lambda i: (work[i][1] != "triton", work[i][1] == "compile")):
            case, name, function = work[index]
            if name == "compile":
                torch._dynamo.reset()  # each shape is compiled for itself, and the compiler counts them as one function's
            late = "the GPU was lost before" if lost else "not reached" if time.monotonic() > until else ""
            try:
                new = _rows(case, name, function, device, limits, late)
            except DeviceLost as why:
                lost = case.op
                new = _rows(case, name, function, device, limits, str(why))
            found[index] = new
            rows = [row for place in sorted(found) for row in found[place]]
            # What was not timed has the same to say of each pass.
            print("\n".join(_line(row) for row in (new if new[0].p50_us else new[:1])), flush=True)
            if out:
                _write(rows, machine, out)  # what is measured is kept, whatever ends this
    except KeyboardInterrupt:
        interrupted = True
    wrong = sorted({f"{row.op} {row.shape} {row.implementation}: {row.note}" for row in rows if _wrong(row)})
    if timed:
        print(f"\n{markdown(rows)}\n\n{_summary(rows, machine)}")
    if out:
        _plot(rows, machine, out)
        print(f"written to {out}")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if interrupted:
        print("error: interrupted; what is above had been measured", file=sys.stderr)
        return 130
    if lost:
        others = ",".join(dict.fromkeys(case.op for case in cases if case.op != lost)) or "nothing"
        print(
            f"error: the GPU was lost by {lost}, and with it all that came after; go on with op={others}",
            file=sys.stderr,
        )
        return LOST
    return 1 if wrong else 0


def _cases(ops: list[str], sizes: str, device: torch.device) -> list[Case]:
    gpu = device.type == "cuda"
    if sizes == "full" or (sizes == "auto" and gpu):
        cases = registry.cases("full", torch.bfloat16)
    else:
        dtypes = (torch.bfloat16, torch.float32) if gpu else (torch.float32,)
        cases = [case for dtype in dtypes for case in registry.cases("small", dtype)]
    # A case of ids alone is the same one for every type.
    return list({case.name: case for case in cases if case.op in ops}.values())


def _functions(case: Case, device: torch.device, timed: bool) -> dict[str, Function]:
    """What is measured: on a CPU neither the kernel, unless it is interpreted, nor torch.compile, which takes minutes."""
    if device.type == "cuda":
        return case.functions if timed else {"triton": case.functions["triton"]}
    left_out = {"compile"} if INTERPRETED else {"compile", "triton"}
    return {name: function for name, function in case.functions.items() if name not in left_out}


def _rows(
    case: Case,
    name: str,
    function: Function,
    device: torch.device,
    limits: timing.Ceilings | None,
    note: str,
) -> list[Row]:
    """The rows of one implementation: checked, and timed if it is right and there are `limits` to hold it against."""
    error: float | None = None
    times: dict[str, timing.Times] = {}
    peak: float | None = None
    try:
        if not note and name not in case.ungated:
            verdict = gate.check(case, function, device, slack=1.0 if name in OURS else gate.SLACK)
            error, note = verdict.error, f"wrong: {verdict.why}" if verdict.why else ""
        if not note and name == "triton" and INTERPRETED:
            note = "right; interpreted, not timed"
        elif not note and not limits:
            note = "right; not timed"
        elif not note:
            times = timing.measure(case, function, device, PER_FUNCTION_S)
            peak = timing.peak_mib(case, function, device)
    except torch.OutOfMemoryError:
        note = "out of memory"
    except Exception as failure:  # a baseline that this build of torch lacks must not end the others
        note = f"failed: {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        if device.type == "cuda" and not _works(device):
            raise DeviceLost(note) from None
    rows = []
    for which, work in case.passes().items():
        floor = work.floor_us(limits.bandwidth, limits.throughput) if limits else None
        # A multiple of a processor's floor is asked of nobody.
        accept = work.accept_floor * floor if work.accept_floor and floor and device.type == "cuda" else None
        taken = times.get(which)
        rows.append(
            Row(
                op=case.op,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                implementation=name,
                which=which,
                error=error,
                note=note,
                p20_us=taken.p20 if taken else None,
                p50_us=taken.p50 if taken else None,
                p80_us=taken.p80 if taken else None,
                samples=taken.samples if taken else 0,
                peak_mib=peak,
                bytes=work.bytes,
                operations=work.operations,
                floor_us=floor,
                accept_us=work.accept_us or accept,
            )
        )
    return rows


def _works(device: torch.device) -> bool:
    """Whether a GPU still does what this process asks."""
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return False
    return True


def _wrong(row: Row) -> bool:
    return row.implementation in OURS and row.note.startswith(("wrong", "failed"))


def _line(row: Row) -> str:
    head = f"{row.op} {row.shape} {row.dtype} {row.implementation}"
    error = "" if row.error is None else f", error {row.error:.1e}"
    if row.p50_us is None:
        return f"{head}: {row.note}{error}"
    return f"{head} {row.which}: {row.p50_us:.4g} µs, {row.share or 0:.0%} of the roofline{error}"


def _summary(rows: list[Row], machine: Machine) -> str:
    """What was asked of the kernels and what became of it: accepted times (of an H200), and baselines that are faster."""
    lines = []
    timed = [row for row in rows if row.implementation == "triton" and row.p50_us]
    if "H200" in machine.device:
        for row in timed:
            if row.accept_us:
                verdict = "accepted" if (row.p50_us or 0) <= row.accept_us else "NOT accepted"
                lines.append(
                    f"* {row.op} {row.shape} {row.which}: {row.p50_us:.4g} of {row.accept_us:.4g} µs, {verdict}"
                )
    else:
        lines.append("* Accepted times are those of an H200: no verdict here.")
    for row in timed:
        for other in rows:
            same = (other.op, other.shape, other.dtype, other.which) == (row.op, row.shape, row.dtype, row.which)
            if same and other.p50_us and row.p50_us and other.p50_us < row.p50_us:
                lines.append(
                    f"* {row.op} {row.shape} {row.which}: {other.implementation} is faster, {other.p50_us:.4g} µs"
                )
    unreached = sum(row.note == "not reached" for row in rows)
    if unreached:
        lines.append(f"* {unreached} rows were not reached in time: give more seconds=…")
    return "\n".join(lines)


def _write(rows: list[Row], machine: Machine, out: Path) -> None:
    warning = "" if machine.capability else "**These are not GPU numbers.** "
    where = f"{machine.device}, driver {machine.driver or '–'}, torch {machine.torch}, triton {machine.triton or '–'}"
    head = f"{warning}{where}; commit {machine.commit}, source {machine.source}, {machine.date}."
    write_csv(out / "bench.csv", rows, machine)
    (out / "bench.md").write_text(f"{head}\n\n{markdown(rows)}\n\n{_summary(rows, machine)}\n", encoding="utf-8")


def _plot(rows: list[Row], machine: Machine, out: Path) -> None:
    if not plots.possible():
        print(
            f"no plots: matplotlib is not installed; elsewhere: python -m mcf.kernels.bench plots={out / 'bench.csv'}"
        )
    elif any(row.p50_us for row in rows):
        plots.draw(rows, machine, out)


def _draw(path: Path, out: str) -> int:
    if not path.is_file():
        raise ArgumentError(f"plots={path}: there is no such file")
    try:
        rows, machine = read_csv(path)
    except (KeyError, ValueError, TypeError) as error:
        raise ArgumentError(f"plots={path}: not a bench.csv of this version ({error})") from None
    if machine is None:
        raise ArgumentError(f"plots={path}: it holds no rows")
    for plot in plots.draw(rows, machine, _folder(out) if out else path.parent):
        print(plot)
    return 0


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"out={text}: cannot be made: {error.strerror}") from None
    return path


def _one_of(key: str, text: str, *words: str) -> str:
    if text not in words:
        raise ArgumentError(f"{key}={text}: must be one of {', '.join(words)}")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
