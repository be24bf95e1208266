"""Times of every implementation of attention that exists here, and rows for the table that `attention: auto` goes by:
`python -m mcf.bench part=attention key=value …`.

    qkv [B, N, 3, heads, d] ──► attention ──► [B, N, heads·d]        forward alone, nothing kept
    qkv ──► attention ──► output ──► gradient of qkv                 both passes together

Each is first held against the formula in float64: what is wrong is not timed. All take turns, round by round. Inputs and
outputs lie in memory as in a block of the transformer. torch alone is needed, so that `make gpu-check` runs it on a bare
machine. `record=true` writes the rows into mcf/attention_table.csv of this checkout.
"""

from __future__ import annotations

import csv
import itertools
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from mcf import attention, attention_table, memory
from mcf.attention_table import Key, Row, Table
from mcf.errors import UserError
from mcf.kernels.arguments import ArgumentError, chosen, number, parse
from mcf.kernels.bench import timing
from mcf.kernels.bench.table import here

KEYS = {
    "shapes": ("all", "encoder, teacher, decoder (ViT-B's), or TOKENSxHEADSxWIDTH like 197x12x64, by commas"),
    "precision": ("all", "types of q, k and v, by commas: fp32, bf16"),
    "batch": ("", "images a call; default 8, on a GPU 256"),
    "rounds": ("15", "rounds, in each of which every implementation has its turn"),
    "threads": (
        "",
        "CPU threads, default torch's choice, at most four a processor; of one, processor time counts, whatever else the "
        "machine does",
    ),
    "seconds": ("600", "begin with no further shape after so long"),
    "csv_file": ("", "file for the numbers of all implementations, written after each shape"),
    "record": ("false", "write the rows into the table that `attention: auto` reads"),
}
SHAPES = {"encoder": (50, 12, 64), "teacher": (197, 12, 64), "decoder": (197, 16, 32)}
"""Tokens, heads and width of a head in ViT-B/16 at 224 pixels."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative errors that are an implementation's own. float32 adds up to 197 products within 1e-6; in TF32, which nobody asked
for, it would be 5e-4. bfloat16 rounds by 2e-3, scores, probabilities and output: a few of those."""
# On a GPU a call is shorter than what the events of a sample take from it.
CALLS = {"cpu": 2, "cuda": 5}


@dataclass
class Measured:
    """One implementation's passes: columns of `csv_file`, which says of each row the device and torch's version too.

    us: median microseconds of a call, None where it failed.
    times: how many times as fast it is as what `auto` would be without a table: the median of the rounds' ratios.
    error: ‖a − b‖ / ‖b‖ of the output from float64's; with a gradient, the larger one of output and gradient.
    failed: why it was not timed.
    broken: whether that is a fault, and not just what it does not do here.
    """

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    gradient: bool
    implementation: str
    us: float | None = None
    times: float | None = None
    error: float | None = None
    failed: str = ""
    broken: bool = False


Shape = tuple[int, int, int]


def case(shape: Shape, dtype: torch.dtype, batch: int, device: torch.device, gradient: bool) -> tuple[Tensor, Tensor]:
    """qkv [B, N, 3, heads, d] as a block's linear layer leaves them, and a gradient of the output [B, N, heads·d]."""
    tokens, heads, head_dim = shape
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, device=device).to(dtype)
    above = torch.randn(batch, tokens, heads * head_dim, generator=generator, device=device).to(dtype)
    return qkv.requires_grad_(gradient), above


def call(implementation: str, qkv: Tensor, above: Tensor) -> tuple[Tensor, ...]:
    """Output [B, N, heads·d], and the gradient of qkv if it wants one."""
    with torch.set_grad_enabled(qkv.requires_grad):
        out = attention.compute(implementation, *qkv.unbind(2)).flatten(2)
    return (out, *torch.autograd.grad(out, qkv, above)) if qkv.requires_grad else (out,)


def exact(qkv: Tensor, above: Tensor) -> tuple[Tensor, ...]:
    """The same in float64, by the formula."""
    qkv = qkv.detach().double().requires_grad_(qkv.requires_grad)
    with torch.set_grad_enabled(qkv.requires_grad):
        q, k, v = qkv.unbind(2)
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
    return (out, *torch.autograd.grad(out, qkv, above.double())) if qkv.requires_grad else (out,)


def measure(
    shape: Shape, dtype: torch.dtype, gradient: bool, device: torch.device, *, batch: int, rounds: int
) -> list[Measured]:
    """All implementations on one shape: those that this device has."""
    tokens, heads, head_dim = shape
    name = str(dtype).removeprefix("torch.")
    found, able = [], {}
    inputs, lacking = None, ""
    try:
        inputs = case(shape, dtype, batch, device, gradient)
    except Exception as problem:  # too large for memory, or for a number of elements: this shape's failure
        lacking = f"batch={batch}: inputs cannot be made: {_first_line(problem)}; give a smaller batch"
    for implementation in attention_table.NAMES:
        if device.type != "cuda" and implementation in attention.GPU_ONLY:
            continue
        row = Measured(tokens, heads, head_dim, name, gradient, implementation)
        found.append(row)
        try:
            row.failed = attention.refusal(implementation, device.type, dtype, head_dim, gradient)
            if not row.failed and lacking:
                row.broken, row.failed = True, lacking
            if not row.failed:
                row.error = error(implementation, case(shape, dtype, 2, device, gradient))
                row.broken = not row.error <= LIMITS[dtype]
                row.failed = f"wrong: {row.error:.1e} from float64" if row.broken else ""
            if inputs and not row.failed:
                call(implementation, *inputs)  # some fail at full size alone
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as problem:  # what a backend can break is its own business, and costs no other its row
            row.broken, row.failed = True, _first_line(problem)
        if not row.failed:
            able[implementation] = row
    samples = take_turns(list(able), inputs, device, rounds) if inputs else {}
    usual, _ = attention.usual(device.type, dtype, head_dim)
    for implementation, row in able.items():
        row.us = statistics.median(samples[implementation])
        if usual in samples:
            row.times = statistics.median(b / a for a, b in zip(samples[implementation], samples[usual]))
    return found


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"


def error(implementation: str, inputs: tuple[Tensor, Tensor]) -> float:
    """The largest relative error, by norm, of output and gradient."""
    pairs = zip(*([t.detach() for t in found] for found in (call(implementation, *inputs), exact(*inputs))))
    return max(((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)


class BusyClock(timing.CpuClock):
    """The processor time of this process."""

    def mark(self) -> float:
        """Now, in seconds."""
        return time.process_time()


def clock(device: torch.device) -> timing.Clock:
    """The clock of a device. Several threads wait for one another, which is part of their time; one does not."""
    return BusyClock() if device.type == "cpu" and torch.get_num_threads() == 1 else timing.clock(device)


def take_turns(
    implementations: list[str], inputs: tuple[Tensor, Tensor], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of a call of each in each round; two rounds before do not count."""
    # A clock of each one's own: a GPU's is held back for as long as queueing the last sample took.
    watches = {name: clock(device) for name in implementations}
    taken: dict[str, list[float]] = {name: [] for name in implementations}
    calls = CALLS[device.type]
    for index in range(rounds + 2):
        for name in implementations[:: 1 if index % 2 else -1]:
            watch = watches[name]
            watch.begin()
            # One for the caches, which are full of the former one's.
            call(name, *inputs)
            start = watch.mark()
            for _ in range(calls):
                call(name, *inputs)
            stop = watch.mark()
            watch.end()
            taken[name].append(watch.between(start, stop) / calls)
    return {name: samples[2:] for name, samples in taken.items()}


def entry(rows: list[Measured], device: torch.device, batch: int, origin: dict[str, str]) -> Table:
    """The table's row of a shape; none where nothing could be measured."""
    us = {row.implementation: row.us for row in rows if row.us is not None}
    if not us:
        return {}
    first = rows[0]
    key = Key(attention_table.chip_of(device.type), first.dtype, first.tokens, first.head_dim, first.gradient)
    usual, _ = attention.usual(device.type, getattr(torch, first.dtype), first.head_dim)
    return {key: Row(attention_table.choose(us, usual), us, batch, first.heads, **origin)}


def lines(rows: list[Measured], taken: Table) -> str:
    """A shape's rows for a person; the one that the table would take has a star."""
    choice = next(iter(taken.values())).choice if taken else ""
    first = rows[0]
    shape = f"{first.tokens}x{first.heads}x{first.head_dim} {first.dtype} {'both' if first.gradient else 'forward'}"
    found = []
    for row in rows:
        head = f"{shape:31}{row.implementation + ('*' if row.implementation == choice else ''):12}"
        if row.us is None:
            found.append(head + row.failed)
        else:
            times = f"{row.times:8.2f}" if row.times is not None else f"{'':8}"
            found.append(f"{head}{row.us:9.1f}{times}{row.error:10.1e}")
    return "\n".join(found)


def main(argv: list[str]) -> int:
    """The benchmark; 0, or 1 where an implementation was wrong or broke."""
    try:
        return run(argv, parse("mcf.bench part=attention", "times attention's implementations", KEYS, argv))
    except (ArgumentError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(argv: list[str], values: dict[str, str]) -> int:
    """The benchmark with the values of all KEYS; argv is kept as the origin of rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, types = _shapes(values["shapes"]), chosen("precision", values["precision"], list(PRECISIONS))
    batch = _whole("batch", values["batch"] or ("256" if device.type == "cuda" else "8"))
    if values["threads"]:
        torch.set_num_threads(_threads(values["threads"]))
    rounds, seconds = _whole("rounds", values["rounds"]), number("seconds", values["seconds"], 0)
    record = chosen("record", values["record"], ["true", "false"]) == ["true"]
    file = Path(values["csv_file"]) if values["csv_file"] else None
    if file and not file.parent.is_dir():
        raise ArgumentError(f"csv_file={file}: its folder does not exist; make it, or give another file")
    # As in training: or every matrix of scores would be made of new pages, which takes as long as to compute it.
    memory.keep_freed_memory()
    machine = here(device)
    words = [word for word in argv if not word.startswith(("csv_file=", "record=", "seconds="))]
    origin = {
        "device": machine.device if device.type == "cuda" else f"{machine.device}, threads: {torch.get_num_threads()}",
        "torch": machine.torch,
        "command": f"{' '.join(['python -m mcf.bench part=attention', *words])} (commit {machine.commit})",
    }
    print(
        f"{origin['device']}, {attention_table.chip_of(device.type)}, torch {torch.__version__}, batch {batch}\n"
        f"{'shape':31}{'':12}{'µs':>9}{'times':>8}{'error':>10}",
        flush=True,
    )
    began = time.monotonic()
    table: Table = {}
    everything: list[Measured] = []
    for shape, precision, gradient in itertools.product(shapes, types, (False, True)):
        if time.monotonic() - began > seconds:
            print(f"left out from here on: {seconds:.0f} s were over")
            break
        rows = measure(shape, PRECISIONS[precision], gradient, device, batch=batch, rounds=rounds)
        found = entry(rows, device, batch, origin)
        everything, table = everything + rows, table | found
        print(lines(rows, found), flush=True)
        if file:
            _write(file, everything, origin)
    print("\nRows of mcf/attention_table.csv:")
    csv.writer(sys.stdout, lineterminator="\n").writerows(attention_table.cells(*item) for item in table.items())
    if record:
        try:
            attention_table.write(attention_table.FILE, attention_table.read(attention_table.FILE) | table)
        except OSError as error:
            raise ArgumentError(
                f"record=true: {attention_table.FILE} cannot be written ({error.strerror}); add the rows above to it"
            ) from None
        print(f"written into {attention_table.FILE}")
    return 1 if any(row.broken for row in everything) else 0


def _shapes(text: str) -> list[Shape]:
    found = []
    for word in list(SHAPES) if text == "all" else text.split(","):
        sizes = SHAPES.get(word) or tuple(int(size) for size in word.split("x") if size.isdecimal())
        if len(sizes) != 3 or min(sizes) < 1 or (word not in SHAPES and word != "x".join(map(str, sizes))):
            raise ArgumentError(f"shapes={word}: must be one of {', '.join(SHAPES)}, all, or TOKENSxHEADSxWIDTH")
        found.append((sizes[0], sizes[1], sizes[2]))
    return found


def _whole(key: str, text: str) -> int:
    value = number(key, text, 1)
    if value != int(value):
        raise ArgumentError(f"{key}={text}: must be a whole number")
    return int(value)


def _threads(text: str) -> int:
    """Threads by the thousand end the process where torch makes them, without a word."""
    value, most = _whole("threads", text), 4 * (os.cpu_count() or 1)
    if value > most:
        raise ArgumentError(f"threads={text}: must be at most {most}, four for each processor of this machine")
    return value


def _write(file: Path, rows: list[Measured], origin: dict[str, str]) -> None:
    try:
        with file.open("w", newline="") as stream:
            machine = {name: origin[name] for name in ("device", "torch")}
            writer = csv.DictWriter(stream, [*(field.name for field in fields(Measured)), *machine])
            writer.writeheader()
            writer.writerows(asdict(row) | machine for row in rows)
    except OSError as error:
        raise ArgumentError(f"csv_file={file}: cannot be written ({error.strerror}); give another file") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
