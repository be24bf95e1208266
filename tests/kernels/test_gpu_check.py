"""`make gpu-check`: with nothing installed, in its time, and what it leaves when it is ended."""

import contextlib
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mcf.kernels import dispatch
from mcf.kernels.bench import gpu_check, registry, table

# What torch, triton, numpy and pytest need themselves, and nothing else that is installed here.
BARE = (
    "torch", "torchgen", "functorch", "triton", "numpy", "numpy.libs", "pytest", "_pytest", "iniconfig", "pluggy", "packaging",
    "pygments", "py.py", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec",
)  # fmt: skip


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """A Python that has torch, triton, numpy and pytest, without pip, without mcf, and without all that mcf installs."""
    if not hasattr(os, "symlink"):
        pytest.skip("links are how packages are lent")
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (target,) = folder.glob("lib/python3*/site-packages")
    source = Path(torch.__file__).parent.parent
    for name in BARE:
        if (source / name).exists():
            (target / name).symlink_to(source / name)
    for info in source.glob("*.dist-info"):
        if info.name.partition("-")[0] in BARE:
            (target / info.name).symlink_to(info)
    return folder / "bin/python"


def test_gpu_check_runs_with_nothing_installed(bare_python, tmp_path):
    """Without a GPU it runs all that can run, skips the rest with reasons, and fails, saying that there was no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run make gpu-check itself")
    there = subprocess.run(
        [bare_python, "-c", "import torch, triton, numpy, pytest\nimport pydantic"], capture_output=True, text=True
    )
    assert "No module named 'pydantic'" in there.stderr
    root = Path(gpu_check.__file__).resolve().parents[2]
    out = tmp_path / "results"
    make = shutil.which("make")
    command = ["make", "-C", str(root), "gpu-check", f"OUT={out}", f"PYTHON={bare_python}"]
    if not make:
        command = [str(bare_python), str(root / "kernels/bench/gpu_check.py"), str(out)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode != 0
    summary = (out / "summary.txt").read_text()
    assert "no CUDA device was found" in summary and "bench: passed" in summary, done.stdout[-4000:]
    assert "attention: passed" in summary and "levers: passed" in summary, done.stdout[-4000:]
    assert (out / "attention.csv").read_text().count("\n50,12,64,") == 12, (
        "three implementations, two types, two passes"
    )
    for name in ("attention.csv", "levers.csv"):
        rows = list(csv.DictReader((out / name).open()))
        assert rows and all(row["device"].startswith("CPU (") and row["torch"] == torch.__version__ for row in rows)
    names = [f"tests-{name}" for group in gpu_check.TESTS for name in group]
    for name in names:
        said = (out / f"{name}.txt").read_text()
        assert "needs a CUDA device" in said and "error" not in said
        assert f"{name}: passed" in summary and (out / f"{name}.xml").read_text().count("<skipped") >= 1
    assert "skipped" in summary and "warning" not in summary
    assert "NOT GPU numbers" in (out / "bench.txt").read_text()
    rows, _ = table.read_csv(out / "bench.csv")
    assert {row.op for row in rows} == set(registry.OPERATIONS)
    assert not (out / "roofline.png").exists()


def test_gpu_check_runs_every_file_that_has_tests_for_a_gpu():
    here = Path(__file__).parent
    marked = {file.stem.removeprefix("test_") for file in here.glob("test_*.py") if "mark.gpu" in file.read_text()}
    assert marked - {"gpu_check"} == {name for group in gpu_check.TESTS for name in group}


def test_parts_that_run_at_once_are_told_apart(tmp_path):
    """One ends badly and one is out of time; each has a log and a line of its own."""
    check = gpu_check.Check(tmp_path, tmp_path)
    code = {"well": "print('fine')", "badly": "raise SystemExit(3)", "late": "import time; time.sleep(600)"}
    outputs = check.run_together({name: [sys.executable, "-c", text] for name, text in code.items()}, 20)
    assert (
        outputs["well"] == "fine\n"
        and outputs["badly"] == ""
        and "KeyboardInterrupt" in outputs["late"]
        and check.failed
    )
    assert [line.split(" in ")[0] for line in check.lines] == [
        "well: passed", "badly: FAILED (3)", "late: FAILED (out of time)",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [[], [""], ["a", "b"], ["/dev/null/x"]])
def test_gpu_check_needs_a_folder(words, capsys):
    assert gpu_check.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_gpu_check_ends_in_time_and_reports_what_failed(tmp_path):
    check = gpu_check.Check(tmp_path, tmp_path)
    check.run("fine", [sys.executable, "-c", "print('well')"], 60)
    assert (tmp_path / "fine.txt").read_text() == "well\n" and not check.failed
    started = time.monotonic()
    child = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    check.run("slow", [sys.executable, "-c", child], 1)
    assert time.monotonic() - started < 60 and check.failed
    assert [line.split(" in ")[0] for line in check.lines] == ["fine: passed", "slow: FAILED (out of time)"]
    assert (tmp_path / "summary.txt").read_text().splitlines() == check.lines


def test_gpu_check_may_write_into_a_checkout(tmp_path):
    """Python looks into the current folder first: a package of the same name in OUT must not be found there."""
    out, path = tmp_path / "checkout", tmp_path / "lent"
    for folder in (out, path):
        (folder / "mcf").mkdir(parents=True)
        (folder / "mcf/__init__.py").write_text(f"print({folder.name!r})")
    assert gpu_check.Check(out, path).run("which", [sys.executable, "-c", "import mcf"], 60) == "lent\n"


def test_gpu_check_lets_what_is_out_of_time_write_what_it_has(tmp_path):
    check = gpu_check.Check(tmp_path, tmp_path)
    polite = "import time\ntry: print('begun', flush=True); time.sleep(600)\nexcept KeyboardInterrupt: print('written')"
    # Many times what a Python needs to begin.
    check.run("polite", [sys.executable, "-c", polite], 5)
    assert (tmp_path / "polite.txt").read_text().split() == ["begun", "written"] and check.failed


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="what a process has started is read from /proc")
@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_gpu_check_that_is_ended_ends_what_it_began(name, status, tmp_path):
    """A kill in the middle: the part that runs ends with it, and the summary says how far it came."""
    process = subprocess.Popen([sys.executable, gpu_check.__file__, str(tmp_path)])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        deadline = time.monotonic() + 120
        # Until the first part, which imports torch for seconds, is more than a fork.
        while (
            not (child := children.read_text().split()) or "numpy" not in Path("/proc", child[0], "cmdline").read_text()
        ):
            assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == status
    finally:
        process.kill()
        process.wait()
    assert not Path("/proc", child[0]).exists()
    assert (tmp_path / "summary.txt").read_text().startswith("machine: interrupted after ")


def test_a_signal_while_a_part_is_being_started_ends_the_part(tmp_path, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            started.append(self)
            signal.raise_signal(signal.SIGINT)  # before anybody has been given the process

    monkeypatch.setattr(subprocess, "Popen", Popen)
    check = gpu_check.Check(tmp_path, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        check.run("sleeper", ["sleep", "60"], 60)
    assert len(started) == 1 and started[0].returncode == -signal.SIGINT
    assert check.lines[0].startswith("sleeper: interrupted after 0 s")


class Timed:
    """A GPU, and parts that take so many seconds each of a clock that is only pretended; what each was given."""

    def __init__(self, takes: dict[str, float], monkeypatch):
        self.now = 0.0
        self.given: dict[
            str, tuple[float, float, list[str]]
        ] = {}  # seconds that it may take, that are left, its command
        self.takes = takes
        monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(gpu_check, "_end", self.end)
        monkeypatch.setattr(gpu_check.Check, "_start", lambda check, name, command, _: self.start(check, name, command))

    def start(self, check: gpu_check.Check, name: str, command: list[str]) -> SimpleNamespace:
        (check.out / f"{name}.txt").write_text("NVIDIA H200\n")
        process, until, left = SimpleNamespace(ended=False), self.now + self.takes.get(name, 1e9), check.left()

        def wait(timeout: float) -> int:
            self.given.setdefault(name, (timeout, left, command))
            if until > self.now + timeout:
                self.now += timeout
                raise subprocess.TimeoutExpired(command, timeout)
            self.now, process.ended = max(self.now, until), True
            return 0

        process.wait = wait
        return process

    def end(self, process: SimpleNamespace) -> None:
        if not process.ended:
            self.now, process.ended = self.now + gpu_check.GRACE_S, True


QUICK = {
    "machine": 5,
    **{f"tests-{name}": 40 for group in gpu_check.TESTS for name in group},
    "bench": 100,
    "attention": 30,
}


@pytest.mark.parametrize("sanitizer, bench", [(False, 100), (True, 100), (False, 185), (True, 115)])
def test_levers_have_what_is_left(sanitizer, bench, tmp_path, monkeypatch):
    """All of it, but for the sanitizer's where there is one; never less than what they had of old."""
    timed = Timed({**QUICK, "bench": bench, "sanitizer-memcheck": 50, "sanitizer-racecheck": 50}, monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: name if sanitizer and "sanitizer" in name else None)
    check = gpu_check.Check(tmp_path, tmp_path)
    gpu_check._parts(check)
    seconds, left, command = timed.given["levers"]
    kept = 2 * gpu_check.SANITIZER_S if sanitizer else 0
    assert seconds == max(left - kept, gpu_check.LEVERS_S + 20)
    (word,) = [word for word in command if word.startswith("seconds=")]
    # Between the last lever's beginning and the end one can be compiled.
    assert float(word.partition("=")[2]) == seconds - 50
    assert timed.now <= 60 * gpu_check.MINUTES
    passed = {line.partition(":")[0] for line in check.lines if ": passed" in line}
    assert {"bench", "attention"} <= passed
    assert ({"sanitizer-memcheck", "sanitizer-racecheck"} <= passed) == sanitizer


def test_eight_minutes_are_never_passed(tmp_path, monkeypatch):
    """Nothing ends by itself, and each takes all of its grace: what comes last is not begun."""
    timed = Timed({"machine": 5}, monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: name if "sanitizer" in name else None)
    check = gpu_check.Check(tmp_path, tmp_path)
    gpu_check._parts(check)
    assert check.failed and timed.now <= 60 * gpu_check.MINUTES
    assert check.lines[-4:] == [
        f"{name}: no time left" for name in ("attention", "levers", "sanitizer-memcheck", "sanitizer-racecheck")
    ]
    assert "attention" not in timed.given


def test_what_has_no_time_left_is_not_begun(tmp_path):
    check = gpu_check.Check(tmp_path, tmp_path)
    check.until = time.monotonic() + gpu_check.GRACE_S + 1
    made = tmp_path / "made"
    command = [sys.executable, "-c", f"open({str(made)!r}, 'w')"]
    assert check.run_together({"one": command, "other": command}, 60) == {"one": "", "other": ""}
    assert check.failed and check.lines == ["one, other: no time left"]
    assert not made.exists() and not (tmp_path / "one.txt").exists()


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch says that there is a GPU, and all is there that kernels are launched with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(dispatch, "INTERPRETED", False)  # decided at import, of which gpu_check sees to its own
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "Python.h")
    monkeypatch.setenv("CC", "cc")
    dispatch._no_launcher.cache_clear()
    yield
    dispatch._no_launcher.cache_clear()


def parts_run(check: gpu_check.Check, monkeypatch) -> list[str]:
    """The parts that are run; of them the first one in earnest, but here, where a GPU is pretended."""
    names: list[str] = []

    def run_together(_, commands, *rest, **environment):
        names.extend(commands)
        said = io.StringIO()
        if "machine" in commands:
            with contextlib.redirect_stdout(said):
                exec(commands["machine"][2], {})
        return dict.fromkeys(commands, said.getvalue())

    monkeypatch.setattr(gpu_check.Check, "run_together", run_together)
    gpu_check._parts(check)
    return names


@pytest.mark.parametrize("missing", ["compiler", "headers", "capability"])
def test_gpu_check_refuses_where_kernels_cannot_be_launched(missing, pretended_gpu, tmp_path, monkeypatch):
    """Else the tests would choose the reference, and pass."""
    why = "Triton needs a C compiler to launch kernels, and there is neither gcc nor clang nor CC=…"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if missing == "compiler":
        monkeypatch.delenv("CC")
    elif missing == "headers":
        monkeypatch.setattr(Path, "is_file", lambda path: False)
        why = "Triton needs Python's headers to launch kernels, and "
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        why = "the kernels need compute capability 8.0, this device has 7.5"
    check = gpu_check.Check(tmp_path, tmp_path)
    assert parts_run(check, monkeypatch) == ["machine"] and check.failed
    (line,) = check.lines
    assert line.startswith(f"kernels cannot be launched: {why}")
    assert line.endswith(": nothing was tested; mend that, and run this again")


def test_gpu_check_goes_on_where_kernels_can_be_launched(pretended_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check = gpu_check.Check(tmp_path, tmp_path)
    assert parts_run(check, monkeypatch)[-1] == "levers" and not check.failed
    assert check.lines == ["compute-sanitizer is not installed: kernels were not run under it"]
