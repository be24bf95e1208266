"""All that only a GPU can show, in eight minutes: `make gpu-check OUT=FOLDER`, or `python gpu_check.py FOLDER`.

    tests marked gpu ──► benchmark ──► attention ──► levers of the networks ──► compute-sanitizer, where it is installed

It needs torch, triton, numpy and pytest, and nothing installed of mcf: this file alone is run, and gives what it starts
an import path on which mcf.kernels is the folder it lies in, and of mcf what needs torch alone. On a GPU that kernels cannot be
launched on it refuses: the tests would pass by the reference. The results lie in FOLDER:

    machine.txt        nvidia-smi, versions
    tests-*.txt .xml   the tests of each operation, in words and as JUnit XML
    bench.txt .csv .md the benchmark
    attention.txt .csv attention's implementations at ViT-B's shapes, and rows for the table that `attention: auto` goes by
    levers.txt .csv    encoder, decoder and teacher of ViT-B: what each lever of their speed is worth
    sanitizer-*.txt    memcheck and racecheck over every kernel
    summary.txt        what passed, what did not, what was left out

Each is written as it comes: whatever ends this, what was found out until then is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
ROOT = KERNELS.parent
MINUTES = 8
TESTS = ("mask", "patch_gather", "token_restore", "feature_loss", "info_nce"), ("kernel_bench_timing",)
"""Files of tests that run at once, each in a process of its own: they compile more than they compute, and an illegal access
in one kernel spoils everything else that its process does on the GPU. The clock's tests want the machine for themselves."""
RESERVE_S = 15
"""What is kept of the eight minutes for starting and ending."""
TESTS_S, SANITIZER_S = 160, 70
"""How long the tests may take, and the first tool of the sanitizer; the second has what is left."""
BENCH_S = 90
"""How long the kernels are timed at least, also where the rest took longer than was thought."""
GRACE_S = 10
"""What is out of time is interrupted, and has so long to write what it has before it is killed."""
LEVERS_S = 100
"""How long levers are tried at least: they have all that is left but the sanitizer's, for compiling takes a minute or two."""
LEVER_S = 30
"""What is left of that when the last lever is begun."""
ATTENTION_S = 30
"""How long attention is timed, each shape begun before its end."""
LENT = (
    "errors.py", "memory.py", "processor.py", "linear.py", "attention.py", "attention_table.py", "attention_table.csv",
    *(f"models/{name}.py" for name in ("vit", "patches", "decoder", "teacher", "float8", "regional")),
    "bench/blocks.py", "bench/attention.py",
)  # fmt: skip
"""What of mcf needs torch alone, for `mcf.bench.blocks` and `mcf.bench.attention`."""
VERSIONS = """
import platform, numpy, pytest, torch, triton
from mcf.kernels import dispatch
print(f"python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda}), triton "
      f"{triton.__version__}, numpy {numpy.__version__}, pytest {pytest.__version__}")
if not torch.cuda.is_available():
    print("no CUDA device")
else:
    print(torch.cuda.get_device_name())
    if why := dispatch.unavailable(torch.device("cuda")):
        print(f"kernels cannot be launched: {why}")
"""


class Check:
    """Runs one part after the other under what is left of the time, and keeps how each ended."""

    def __init__(self, out: Path, path: Path):
        self.out = out
        self.path = path
        self.until = time.monotonic() + 60 * MINUTES - RESERVE_S
        paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.environment["MCF_TEST_GPU"] = "1"  # else the tests do not look for one
        # Kernels must be compiled here, whatever the shell says.
        self.environment.pop("TRITON_INTERPRET", None)
        self.lines: list[str] = []
        self.failed = False

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def run(self, name: str, command: list[str], seconds: float, **environment: str) -> str:
        """Run a command with its output in `name`.txt, and on the screen where it fails; the output."""
        return self.run_together({name: command}, seconds, **environment)[name]

    def run_together(self, commands: dict[str, list[str]], seconds: float, **environment: str) -> dict[str, str]:
        """Run commands at once, each as `run` does; their outputs, empty ones where there is no time left to begin."""
        # Less than it takes to begin and to be interrupted would be over the eight minutes.
        if self.left() < GRACE_S + 2:
            self.say(f"{', '.join(commands)}: no time left", False)
            return dict.fromkeys(commands, "")
        print(f"gpu-check: {', '.join(commands)} …", flush=True)
        started = time.monotonic()
        running: dict[str, subprocess.Popen[bytes]] = {}
        outputs = {}
        try:
            with _held() as came:
                for name, command in commands.items():
                    running[name] = self._start(name, command, environment)
            for number in came:
                signal.raise_signal(number)
            for name, process in running.items():
                try:
                    status = str(process.wait(max(1, min(started + seconds - time.monotonic(), self.left()))))
                except subprocess.TimeoutExpired:
                    _end(process)
                    status = "out of time"
                outputs[name] = self._tell(name, status, time.monotonic() - started)
        except BaseException:
            left = [name for name in commands if name not in outputs]
            self.say(f"{', '.join(left)}: interrupted after {time.monotonic() - started:.0f} s", False)
            raise
        finally:
            for process in running.values():
                _end(process)
        return outputs

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("w") as file:
            # Not in OUT: `python -m` looks into the current folder first, and OUT may be a checkout.
            return subprocess.Popen(
                command, cwd=self.path, env={**self.environment, **environment}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _tell(self, name: str, status: str, took: float) -> str:
        passed = status == "0"
        self.say(f"{name}: {'passed' if passed else f'FAILED ({status})'} in {took:.0f} s", passed)
        output = self._log(name).read_text(errors="replace")
        if not passed:
            print(output[-6000:], flush=True)
        return output

    def _log(self, name: str) -> Path:
        return self.out / f"{name}.txt"

    def say(self, line: str, passed: bool = True) -> None:
        """Keep a line for the summary, and whether the whole fails by it."""
        self.failed = self.failed or not passed
        self.lines.append(line)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        print(f"gpu-check: {line}", flush=True)


@contextlib.contextmanager
def _held() -> Iterator[list[int]]:
    """Only note signals that end this: a process that is just being started is not yet known to who would end it."""
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(argv: list[str]) -> int:
    """Run everything; 0 only if there was a GPU and all passed."""
    if len(argv) != 1 or not argv[0]:
        print("error: name a folder for the results: make gpu-check OUT=FOLDER", file=sys.stderr)
        return 2
    out = Path(argv[0]).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: OUT={argv[0]}: cannot be made: {error.strerror}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "mcf")
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "kernels").symlink_to(KERNELS, target_is_directory=True)
        lend(package)
        check = Check(out, Path(folder))
        _parts(check)
    return 1 if check.failed else 0


def lend(package: Path) -> None:
    """Link what of mcf needs torch alone into a folder that is imported as mcf."""
    for name in LENT:
        file = package / name
        if not file.parent.exists():
            file.parent.mkdir()
            (file.parent / "__init__.py").touch()
        file.symlink_to(ROOT / "mcf" / name)


def _parts(check: Check) -> None:
    python = sys.executable
    there = check.run("machine", [python, "-c", VERSIONS], 120)
    if check.failed:
        check.say("torch, triton, numpy and pytest must be installed for this Python: nothing was tested", False)
        return
    print(there.strip())
    gpu = "no CUDA device" not in there
    if gpu:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True) if shutil.which("nvidia-smi") else None
        (check.out / "machine.txt").write_text(there + (smi.stdout if smi else ""), encoding="utf-8")
        if found := re.search(r"^kernels cannot be launched: .+", there, re.MULTILINE):
            check.say(f"{found[0]}: nothing was tested; mend that, and run this again", False)
            return
    for group in TESTS:
        tests = {f"tests-{name}": _pytest(check, name) for name in group}
        for name, output in check.run_together(tests, TESTS_S).items():
            if output:
                check.say(f"{name}: " + output.strip().rpartition("\n")[2].strip("= "))

    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    reserved = SANITIZER_S if sanitizer and gpu else 0
    _bench(check, max(BENCH_S, check.left() - reserved - LEVERS_S - ATTENTION_S - 50))

    # Without a GPU a small one of each shows that it runs.
    small = ["rounds=10"] if gpu else ["shapes=encoder", "batch=1", "rounds=1"]
    attention = [python, "-m", "mcf.bench.attention", f"csv_file={check.out / 'attention.csv'}", *small]
    check.run("attention", [*attention, f"seconds={ATTENTION_S}"], ATTENTION_S + 20)
    small = [] if gpu else ["only=sdpa", "size=32", "depth=1", "batch=2", "rounds=1"]
    # All that is left but for both tools of the sanitizer, which levers would leave nothing to.
    levers = max(LEVERS_S, check.left() - 2 * reserved - 20)
    blocks = [python, "-m", "mcf.bench.blocks", f"out={check.out}", f"seconds={levers - LEVER_S:.0f}", *small]
    check.run("levers", blocks, levers + 20)

    if not gpu:
        check.say("no CUDA device was found: the tests that need one were skipped, and no time above is a GPU's", False)
    elif not sanitizer:
        check.say("compute-sanitizer is not installed: kernels were not run under it")
    else:
        every = [python, "-m", "mcf.kernels.bench", "sizes=small", "timing=no"]
        for tool, seconds in (("memcheck", SANITIZER_S), ("racecheck", check.left() - SANITIZER_S)):
            # Without the allocator's cache each tensor is an allocation of its own, whose ends memcheck knows.
            command = [
                sanitizer,
                "--tool",
                tool,
                "--target-processes",
                "application-only",
                # torch and Triton see to calls that fail, and some do by intention.
                "--report-api-errors",
                "no",
                "--error-exitcode",
                "9",
                *every,
            ]
            check.run(f"sanitizer-{tool}", command, max(SANITIZER_S, seconds), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _pytest(check: Check, name: str) -> list[str]:
    """The GPU's tests of a file, by name, one a line: what was passed is seen whatever comes after."""
    return [
        sys.executable, "-m", "pytest", str(ROOT / f"tests/kernels/test_{name}.py"), "-m", "gpu", "-v", "-p", "no:cacheprovider",
        "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", f"--junitxml={check.out / f'tests-{name}.xml'}",
        "-W", "ignore::pytest.PytestConfigWarning",  # options of plugins that are not here are nothing to warn of
    ]  # fmt: skip


def _bench(check: Check, seconds: float) -> None:
    """Time the kernels; once more without the operation that the GPU was lost by, which takes all others with it."""
    until = time.monotonic() + seconds
    command = [sys.executable, "-m", "mcf.kernels.bench", f"out={check.out}", f"seconds={seconds:.0f}"]
    output = check.run("bench", command, seconds + 60)
    if found := re.search(r"^\* (\d+ rows were not reached)", output, re.MULTILINE):
        check.say(f"bench: {found[1]} in time")
    if found := re.search(r"the GPU was lost by .*; go on with (op=\S+)", output):
        rest = max(30.0, until - time.monotonic())
        again = [
            sys.executable,
            "-m",
            "mcf.kernels.bench",
            f"out={check.out / 'again'}",
            f"seconds={rest:.0f}",
            found[1],
        ]
        check.run("bench-again", again, rest + 60)


def _leave(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # As ctrl-C does: what was started is ended, too.
    signal.signal(signal.SIGTERM, _leave)
    # What a shell starts in the background ignores it, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)
