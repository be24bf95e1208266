"""MLflow: what arrives there, and that nothing a server does or fails to do reaches training."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from mcf.config import Recipe
from mcf.track import Tracker
from mcf.track.jsonl import read
from mcf.track.mlflow import run as mlflow_run

pytest.importorskip("mlflow")


def recipe(tmp_path, uri="local", **changes):
    track = {"mlflow": uri, "queue": changes.pop("queue", 1000)}
    return Recipe.model_validate({"name": "run", "output": str(tmp_path), "batch": 8, "track": track, **changes})


def numbers(step):
    return {"loss/total": 10 / step, "lr": 1e-3 * step, "rate/images_per_s": 100.0}


def client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def local(tmp_path):
    return client(f"sqlite:///{tmp_path / 'mlflow.db'}")


def history(there, run_id, name="loss/total"):
    return [(m.step, m.value) for m in there.get_metric_history(run_id, name)]


def messages(tmp_path):
    return [event["message"] for event in read(tmp_path / "run/events.jsonl") if event["kind"] == "tracking"]


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_run_arrives_whole(tmp_path, quick):
    tracker = Tracker(recipe(tmp_path), tmp_path / "run", plan={"steps": 60, "lr": 0.5})
    for step in (20, 40, 60):
        tracker.metrics(step, numbers(step) | {"bad": math.nan if step == 40 else math.inf, "odd name €": 1.0})
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tracker.image(60, "reconstruction", picture)
    tracker.event("checkpoint", step=60)
    tracker.close()

    there = local(tmp_path)
    run = there.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert there.get_experiment(run.info.experiment_id).name == "mcf"
    assert history(there, tracker.run_id) == [(step, 10 / step) for step in (20, 40, 60)]
    assert history(there, tracker.run_id, "odd name _") == [(20, 1.0), (40, 1.0), (60, 1.0)]
    assert math.isnan(there.get_metric_history(tracker.run_id, "bad")[1].value)
    stamps = [m.timestamp for m in there.get_metric_history(tracker.run_id, "lr")]
    assert stamps == [int(record["time"] * 1000) for record in read(tmp_path / "run/metrics.jsonl")]
    assert run.data.params["optimizer.blr"] == "0.00015"
    assert run.data.params["model.decoder.width"] == "512"
    assert set(run.data.params) == set(mlflow_run.flatten(recipe(tmp_path).model_dump(mode="json")))
    assert "learning rate 0.5" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mcf.host"] == socket.gethostname()

    assert {f.path for f in there.list_artifacts(tracker.run_id)} == {"recipe.yaml", "events.jsonl", "images"}
    got = there.download_artifacts(tracker.run_id, f"images/{path.name}", str(tmp_path))
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(got)), picture)
    import yaml

    text = Path(there.download_artifacts(tracker.run_id, "recipe.yaml", str(tmp_path))).read_text()
    assert Recipe.model_validate(yaml.safe_load(text)) == recipe(tmp_path)
    assert (tmp_path / "mlartifacts").is_dir()


def test_one_mlflow_run_across_a_kill_and_each_step_once(tmp_path, quick, store):
    first = Tracker(recipe(tmp_path), tmp_path / "run", start=0)
    for step in range(10, 140, 10):
        first.metrics(step, numbers(step))
    wait_until(lambda: first._mlflow._sent == 130)
    # The process is gone here; the checkpoint is of step 100, and the next life has more ranks.
    second = Tracker(recipe(tmp_path, nodes=2), tmp_path / "run", run_id=first.run_id, start=100)
    for step in range(110, 160, 10):
        second.metrics(step, numbers(step))
    second.close()
    assert second.run_id == first.run_id
    there = local(tmp_path)
    expected = [(step, 10 / step) for step in range(10, 160, 10)]
    assert history(there, second.run_id) == expected
    assert [(r["step"], r["loss/total"]) for r in read(tmp_path / "run/metrics.jsonl")] == expected
    run = there.get_run(second.run_id)
    assert run.data.params["nodes"] == "1"
    assert run.data.tags["mcf.changed.nodes"] == "1 → 2"
    assert run.info.status == "FINISHED"
    first.close()


def test_what_a_killed_process_had_not_sent_is_sent_by_the_next(tmp_path, quick, store):
    program = (
        "import os, time, sys\nfrom pathlib import Path\nfrom mcf.config import Recipe\nfrom mcf.track import Tracker\n"
        f"out = Path({str(tmp_path)!r})\n"
        "t = Tracker(Recipe(name='run', output=str(out), batch=8), out / 'run', start=0)\n"
        "for step in (1, 2, 3): t.metrics(step, {'loss/total': 10 / step})\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 9
    tracker = Tracker(recipe(tmp_path), tmp_path / "run", start=3)
    tracker.metrics(4, numbers(4))
    tracker.close()
    assert history(local(tmp_path), tracker.run_id) == [(step, 10 / step) for step in (1, 2, 3, 4)]


def test_another_recipe_from_scratch_is_another_mlflow_run(tmp_path, quick, store):
    ids = []
    for seed, start in ((0, 0), (0, 0), (1, 0), (1, 20)):
        tracker = Tracker(recipe(tmp_path, seed=seed), tmp_path / "run", start=start)
        tracker.metrics(start + 10, {"loss/total": float(seed)})
        tracker.close()
        ids.append(tracker.run_id)
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert history(local(tmp_path), ids[0]) == [(10, 0.0)]
    assert history(local(tmp_path), ids[2]) == [(10, 1.0), (30, 1.0)]


@pytest.mark.parametrize(
    ("changed", "another"),
    [
        ({"micro_batch": 2, "kernels": "reference", "attention": "sdpa"}, False),
        ({"guard": {"max_bad_steps": 3}, "watchdog": {"timeout": 60.0}, "speed": {"linear": "torch"}}, False),
        ({"queue": 5, "slurm": {"partition": "gpu"}, "data": {"max_bad": 0.5}}, False),
        ({"optimizer": {"lr": 1e-3}}, True),
        # Where files lie is no matter when a run goes on; from scratch they are likely to be other files.
        ({"data": {"path": "elsewhere"}}, True),
    ],
)  # fmt: skip
def test_from_scratch_with_other_keys(tmp_path, quick, store, changed, another):
    ids = []
    for keys in ({}, changed):
        tracker = Tracker(recipe(tmp_path, **keys), tmp_path / "run", start=0)
        tracker.metrics(10, {"loss/total": 1.0})
        tracker.close()
        ids.append(tracker.run_id)
    assert (ids[0] != ids[1]) == another


def test_the_ledger_is_lost_but_the_checkpoint_knows_the_run(tmp_path, quick, store):
    first = Tracker(recipe(tmp_path), tmp_path / "run")
    first.metrics(1, numbers(1))
    first.close("stopped")
    assert local(tmp_path).get_run(first.run_id).info.status == "KILLED"
    (tmp_path / "run" / mlflow_run.LEDGER).write_text("{ torn")
    second = Tracker(recipe(tmp_path), tmp_path / "run", run_id=first.run_id)
    second.metrics(2, numbers(2))
    second.close()
    assert second.run_id == first.run_id
    assert list(json.loads((tmp_path / "run" / mlflow_run.LEDGER).read_text()).values()) == [first.run_id]


def test_a_record_the_server_refuses_does_not_hold_up_the_next(tmp_path, quick, store):
    tracker = Tracker(recipe(tmp_path), tmp_path / "run")
    tracker.metrics(1, numbers(1))
    wait_until(lambda: tracker._mlflow._sent == 1)
    tracker.metrics(2, {"x" * 300: 1.0})  # MLflow takes names of 250 letters
    wait_until(lambda: tracker._mlflow._sent == 2)
    tracker.metrics(3, numbers(3))
    tracker.close()
    assert [step for step, _ in history(local(tmp_path), tracker.run_id)] == [1, 3]
    assert sum("did not take metrics of step 2" in line for line in messages(tmp_path)) == 1


def test_numbers_do_not_wait_for_pictures_that_have_no_place(tmp_path, quick, store):
    (tmp_path / "a file").write_text("no folder can be made below it")
    local(tmp_path).create_experiment("mcf", (tmp_path / "a file" / "x").as_uri())
    tracker = Tracker(recipe(tmp_path), tmp_path / "run")
    for step in (1, 2):
        tracker.image(step, "reconstruction", np.zeros((4, 4, 3), np.uint8))
        tracker.metrics(step, numbers(step))
    tracker.close()
    assert [step for step, _ in history(local(tmp_path), tracker.run_id)] == [1, 2]
    assert local(tmp_path).get_run(tracker.run_id).info.status == "FINISHED"
    assert len(messages(tmp_path)) == 1
    assert "did not take recipe.yaml" in messages(tmp_path)[0]
    assert tracker._mlflow.refused == 4  # the recipe, two pictures, the events


def test_a_run_made_by_an_answer_that_came_too_late_is_found_again(tmp_path, quick, store, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    create, calls = MlflowClient.create_run, []

    def late(self, *arguments, **named):
        run = create(self, *arguments, **named)
        calls.append(run.info.run_id)
        raise MlflowException("timed out")

    monkeypatch.setattr(MlflowClient, "create_run", late)
    tracker = Tracker(recipe(tmp_path), tmp_path / "run")
    tracker.metrics(1, numbers(1))
    wait_until(lambda: tracker.run_id)
    tracker.close()
    assert calls == [tracker.run_id]
    assert history(local(tmp_path), tracker.run_id) == [(1, 10.0)]


def test_a_recipe_that_a_dying_server_did_not_take_is_sent_when_it_is_back(tmp_path, quick, store, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    log_text, get_run, away = MlflowClient.log_text, MlflowClient.get_run, []

    def dies(self, *arguments):
        if not away:
            away.append("the parameters are there, the recipe is not, and nobody answers")
            raise MlflowException(away[0])
        return log_text(self, *arguments)

    def answers(self, run_id):
        if len(away) == 1:
            away.append("once")
            raise MlflowException(away[0])
        return get_run(self, run_id)

    monkeypatch.setattr(MlflowClient, "log_text", dies)
    monkeypatch.setattr(MlflowClient, "get_run", answers)
    tracker = Tracker(recipe(tmp_path), tmp_path / "run")
    tracker.metrics(1, numbers(1))
    wait_until(lambda: len(away) == 2 and history(local(tmp_path), tracker.run_id) == [(1, 10.0)])
    tracker.close()
    assert "recipe.yaml" in {file.path for file in local(tmp_path).list_artifacts(tracker.run_id)}


@contextlib.contextmanager
def hanging():
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def refusing():
    """Nobody listens."""
    yield f"http://127.0.0.1:{free_port()}"


@contextlib.contextmanager
def failing():
    """Answers 500 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("trouble", "reason"), [(hanging, "timed out"), (refusing, "Connection refused"), (failing, "500 error responses")]
)
def test_a_server_in_trouble_never_slows_training(tmp_path, quick, trouble, reason):
    with trouble() as uri, Path(os.devnull).open("w") as nowhere:
        tracker = Tracker(recipe(tmp_path, uri, queue=50), tmp_path / "run", stream=nowhere)
        wait_until(lambda: messages(tmp_path))  # it has met the trouble
        times = []
        for step in range(1, 501):
            begin = time.perf_counter()
            tracker.metrics(step, numbers(step))
            times.append(time.perf_counter() - begin)
        begin = time.monotonic()
        tracker._mlflow.close(timeout=3)
        assert time.monotonic() - begin < 4  # the promised bound, and a second for a busy machine
        tracker.close()
    # A call takes tens of microseconds; single calls may meet a scheduler's pause of a shared machine, so the median
    # is held to the promise. A call that waited for the server would take the request's second.
    assert sorted(times)[250] < 1e-3
    assert max(times) < 0.5
    assert [record["step"] for record in read(tmp_path / "run/metrics.jsonl")] == list(range(1, 501))
    assert tracker._mlflow.dropped == 450
    assert sum(" fails (" in line for line in messages(tmp_path)) == 1
    assert reason in messages(tmp_path)[0]


def test_without_mlflow_there_is_one_line_and_the_file(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracker = Tracker(recipe(tmp_path), tmp_path / "run")
    tracker.metrics(1, numbers(1))
    tracker.close()
    assert [line for line in messages(tmp_path) if "mlflow is not installed" in line] == messages(tmp_path)
    assert len(messages(tmp_path)) == 1
    assert [record["step"] for record in read(tmp_path / "run/metrics.jsonl")] == [1]


class Server:
    """A real `mlflow server` on loopback; may be killed and started again at the same address."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        arguments = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--workers",
            "1",
            "--host",
            "127.0.0.1",
        ]
        arguments += ["--artifacts-destination", str(self.folder / "files"), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.answers, 120)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False

    def kill(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_real_server_killed_in_mid_run_has_everything_in_the_end(tmp_path, quick, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # the real server of a busy machine may be slow
    tracker = Tracker(recipe(tmp_path, server.uri, queue=5), tmp_path / "run")
    tracker.metrics(1, numbers(1))
    tracker.image(1, "reconstruction", np.full((8, 8, 3), 7, np.uint8))
    wait_until(lambda: tracker._mlflow._sent == 1 and not tracker._mlflow._queue)
    server.kill()
    for step in range(2, 31):
        tracker.metrics(step, numbers(step))
    wait_until(lambda: messages(tmp_path))
    server.start()
    tracker.metrics(31, numbers(31))
    wait_until(lambda: any("is back and has" in line for line in messages(tmp_path)))
    tracker.metrics(32, numbers(32))
    tracker.close()
    there = client(server.uri)
    assert history(there, tracker.run_id) == [(step, 10 / step) for step in range(1, 33)]
    assert there.get_run(tracker.run_id).info.status == "FINISHED"
    assert [f.path for f in there.list_artifacts(tracker.run_id, "images")] == ["images/step-000001-reconstruction.png"]
    assert tracker._mlflow.dropped > 0
    assert sum(" fails (" in line for line in messages(tmp_path)) == 1
    assert sum("is back and has" in line for line in messages(tmp_path)) == 1
    assert tracker.how_to_open.startswith(f"open {server.uri}/#/experiments/")
