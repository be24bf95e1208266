"""The demo end to end, as `make demo` runs it, with few small faces and few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mcf import checkpoint, demo
from mcf.track.jsonl import read

# Eight steps are enough: the first from random weights lower every term by a fifth and more.
KEYS = (
    "batch=32 micro_batch=32 model.width=64 model.heads=2 model.depth=2 model.decoder.width=64 model.decoder.depth=1 "
    "model.projection.hidden=128 train.steps=8 train.log_every=1 optimizer.warmup_epochs=1 checkpoint.every=4 "
    "track.images_every=4"
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mcf.demo", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def told(out: str) -> dict[str, str]:
    """The closing lines, by what they begin with."""
    closing = out[out.rindex("\nloss term ") :]
    return {first: rest for line in closing.splitlines() if line for first, _, rest in [line.partition("  ")]}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder in which the demo has run once on drawn faces."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder, "faces=80", "size=64", f"launch={KEYS}")


def test_it_ends_by_saying_what_fell_and_where_everything_is(first):
    folder, done = first
    assert done.returncode == 0, done.stdout + done.stderr
    said = told(done.stdout)
    records = [r for r in read(folder / "demo/runs/demo-drawn/metrics.jsonl") if "loss/total" in r]
    assert [r["step"] for r in records] == list(range(1, 9))
    for term in ("feature", "contrast", "total"):
        start, end, verdict = said[term].split()
        assert float(start) == pytest.approx(records[0][f"loss/{term}"], rel=1e-4)
        assert float(end) == pytest.approx(records[-1][f"loss/{term}"], rel=1e-4)
        assert (float(end) < float(start), verdict) == (True, "fell")
    assert re.search(r"^\d+ images/s \(median\), 8 steps, \d+ s in all$", done.stdout, re.MULTILINE)

    paths = {name: folder / said[name].strip() for name in ("checkpoint", "reconstructions", "metrics")}
    assert checkpoint.verify(paths["checkpoint"]) is None
    assert checkpoint.step_of(paths["checkpoint"]) == 8
    assert min(Image.open(paths["reconstructions"]).size) > 64
    assert paths["metrics"].is_file()
    program, _, rest = said["MLflow page"].strip().partition(" ")
    assert os.access(program, os.X_OK)
    store = re.search(r"'sqlite:///(.+?)'", rest)
    assert store and Path(store[1]).is_file()


def test_a_second_call_starts_a_second_run_and_draws_and_packs_nothing(first, monkeypatch, capfd):
    """In this process, with a launcher that trains nothing: it must not be asked for the first run again."""
    folder, _ = first
    monkeypatch.chdir(folder)
    made = {p: p.stat().st_mtime_ns for p in folder.glob("demo/*/**/*.jp*g")}
    made |= {p: p.stat().st_mtime_ns for p in folder.glob("demo/shards/*/*")}
    assert len(made) > 80
    asked = []
    plain = demo.call

    def call(module, *arguments):
        if module != "mcf.launch":
            return plain(module, *arguments)
        asked.append(dict(a.split("=", 1) for a in arguments))
        made_up_run(Path(asked[0]["output"]) / asked[0]["name"], [2.0, 1.0], [2.0, 1.0])
        return None

    monkeypatch.setattr(demo, "call", call)
    assert demo.main(["faces=80", "size=64"]) == 0
    assert (asked[0]["output"], asked[0]["name"]) == ("demo/runs", "demo-drawn-2")
    assert made == {p: p.stat().st_mtime_ns for p in made}
    assert capfd.readouterr().err == ""

    # A run that has not ended is gone on with; other faces are other files.
    (folder / "demo/runs/demo-drawn-2/events.jsonl").write_text(json.dumps({"kind": "stopped", "mlflow": "off"}) + "\n")
    asked.clear()
    assert demo.main(["faces=60", "size=64"]) == 0
    assert asked[0]["name"] == "demo-drawn-2"
    assert made == {p: p.stat().st_mtime_ns for p in made}
    assert json.loads((Path(asked[0]["data.path"]) / "manifest.json").read_text())["samples"] == 60


def test_a_folder_of_your_own(first, tmp_path):
    folder, _ = first
    mine = tmp_path / "my faces"
    mine.mkdir()
    for number, file in enumerate(sorted(folder.glob("demo/faces-80-64/images/*"))[:64]):
        if number % 8:
            shutil.copy(file, mine)
        else:
            Image.open(file).convert("L").save(mine / f"{file.stem}.png")
    (mine / "broken.jpg").write_bytes(b"none")
    keys = KEYS.replace("train.steps=8", "train.steps=4") + " track.mlflow=off"
    done = run(tmp_path, f"data={mine}", "size=64", f"launch={keys}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"$ python -m mcf.pack 'source={mine}' out=demo/shards/" in done.stdout  # a line for a shell
    said = told(done.stdout)
    assert said["feature"].endswith("  fell")
    name = f"{tmp_path.name}-my-faces"
    assert said["checkpoint"].strip() == f"demo/runs/demo-{name}/checkpoints/step-00000004"
    assert said["MLflow page"].strip() == "off"
    assert json.loads((tmp_path / f"demo/shards/{name}-64/manifest.json").read_text())["samples"] == 64
    assert not list(tmp_path.glob("demo/faces*"))


def test_stopped_with_ctrl_c_it_saves_and_goes_on(tmp_path):
    """As a terminal sends it: SIGINT to the whole foreground group, the demo and what it has started."""
    longer = KEYS.replace("train.steps=8", "train.steps=30").replace("checkpoint.every=4", "checkpoint.every=100")
    keys = ["faces=80", "size=64", f"launch={longer} track.mlflow=off"]
    run_dir = tmp_path / "demo/runs/demo-drawn"
    with (tmp_path / "said").open("w+") as said:
        started = subprocess.Popen(
            [sys.executable, "-m", "mcf.demo", *keys], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run in the background
        )  # fmt: skip
        while started.poll() is None and not read(run_dir / "metrics.jsonl"):
            time.sleep(0.02)
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGINT)
        status = started.wait(120)
        said.seek(0)
        text = said.read()
    assert status == 130, text
    assert "Traceback" not in text and "loss term" not in text, text
    assert [event["kind"] for event in read(run_dir / "events.jsonl")][-1] == "stopped", text
    (saved,) = (run_dir / "checkpoints").glob("step-*")
    step = checkpoint.step_of(saved)
    assert checkpoint.verify(saved) is None and 0 < step < 30
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)  # nobody of it goes on

    done = run(tmp_path, *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [record["step"] for record in read(run_dir / "metrics.jsonl") if "loss/total" in record]
    assert steps == list(range(1, 31))
    assert [path.name for path in (tmp_path / "demo/runs").iterdir() if path.is_dir()] == ["demo-drawn"]


def test_a_folder_that_is_not_there(tmp_path):
    done = run(tmp_path, "data=nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data=nowhere: no such folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("/a/lfw/images", "lfw-images"), ("/faces", "faces"), ("/my pictures/ä & b", "my-pictures--b"), ("/", "")],
)
def test_names_of_runs(folder, name):
    assert demo.run_name(Path(folder)) == name


def made_up_run(run_dir: Path, feature: list[float], contrast: list[float]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step, (one, other) in enumerate(zip(feature, contrast), 1):
            record = {"step": step, "loss/feature": one, "loss/contrast": other, "loss/total": one + other}
            file.write(json.dumps(record | {"rate/images_per_s": 10.0 * step}) + "\n")
    (run_dir / "events.jsonl").write_text(json.dumps({"kind": "finished", "mlflow": "open http://host"}) + "\n")


@pytest.mark.parametrize(
    ("feature", "contrast", "status"),
    [([3, 2, 1], [2, 9, 1], 0), ([3, 2, 4], [2, 2, 1], 1), ([3, 2, 1], [2, 1, 2], 1), ([1, 2, 3], [2, 3, 4], 1)],
)
def test_a_term_that_has_not_fallen_fails_the_demo(tmp_path, capsys, feature, contrast, status):
    made_up_run(tmp_path, feature, contrast)
    assert demo.report(tmp_path, 1.0) == status
    out, err = capsys.readouterr()
    rose = [values[-1] >= values[0] for values in (feature, contrast, [a + b for a, b in zip(feature, contrast)])]
    assert out.count("did NOT fall") == sum(rose)
    assert ("has not fallen" in err) == bool(status)
    assert "30 images/s" in out  # the first record, with what starts up in it, does not count
    assert "MLflow page      open http://host" in out
