"""The runs of the comparison: which there are, what each waits for, and running them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mcf.errors import UserError
from mcf.results.options import ResultsConfig
from mcf.results.table import INITIALISATIONS, SHOWN
from mcf.track.jsonl import EVENTS, read

# Small squares, a narrow head, an average that forgets its start within the few steps (docs/downstream.md).
HEADS = {
    "both": ("freeze=true", "batch=10", "micro_batch=10", "head.channels=32", "ema=0.97",
             "optimizer.lr=1e-2", "track.mlflow=off", "train.threads=1", "train.readers=1", "pictures=4"),
    "alignment": ("warp_size=64", "input_size=64", "train.epochs=30", "optimizer.drop_epoch=24", "heatmap.size=32",
                  "heatmap.radius=2.5"),
    "parsing": ("warp_size=96", "input_size=96", "train.epochs=60", "optimizer.drop_epoch=48"),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run: its name, its verb with arguments, the runs that must be there before, and the file that it ends with."""

    name: str
    verb: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()


def jobs_of(out: Path, config: ResultsConfig) -> list[Job]:
    """All runs, those that others wait for first."""
    teachers: list[Job] = []
    students: list[Job] = []
    heads: list[Job] = []
    half = config.steps // 2
    for seed in config.seeds:
        if not (config.one_pretraining and teachers):
            teachers.append(pretraining(out, config, "teacher", seed, half))
            students.append(pretraining(out, config, "mcf", seed, config.steps - half))
            students.append(pretraining(out, config, "mae", seed, config.steps))
        heads += [finetuning(out, config, task, kind, seed) for task in SHOWN for kind in INITIALISATIONS]
    return [*teachers, *students, *heads]


def pretraining(out: Path, config: ResultsConfig, kind: str, seed: int, steps: int) -> Job:
    """A run of mcf.train: the method, or the pixel loss alone."""
    teacher = f"teacher-{seed}"
    method = kind == "mcf"
    arguments = [
        f"recipe={'faces_small' if method else 'faces_small_mae'}", f"name={kind}-{seed}",
        f"output={out / 'runs'}", f"data.path={out / 'shards'}", f"seed={seed}", f"train.steps={steps}",
    ]  # fmt: skip
    if method:
        arguments.append(f"teacher.path={out / 'runs' / teacher}")
    return Job(f"{kind}-{seed}", "train", merged(arguments, config.train), (teacher,) if method else ())


def finetuning(out: Path, config: ResultsConfig, task: str, kind: str, seed: int) -> Job:
    """A run of mcf.finetune: a head for a task on one of the encoders; the test split is looked at once, at the end."""
    dataset, data, labels = {
        "alignment": (config.alignment_set, config.alignment, config.alignment_labels),
        "parsing": (config.parsing_set, config.parsing, config.parsing_labels),
    }[task]
    # Of a random encoder only the shape is another's; its weights are a function of the head's seed.
    source = f"{'teacher' if kind == 'random' else kind}-{config.seeds[0] if config.one_pretraining else seed}"
    keys = merged([*HEADS["both"], *HEADS[task]], config.finetune)
    (epochs,) = (key.partition("=")[2] for key in keys if key.startswith("train.epochs="))
    arguments = (
        f"task={task}", f"dataset={dataset}", f"data={data}", f"weights={out / 'runs' / source}",
        f"random={str(kind == 'random').lower()}", f"name={task}-{kind}-{seed}", f"output={out / 'runs'}", f"seed={seed}",
        f"labels={labels}", f"evaluate_every={epochs}", *keys,
    )  # fmt: skip
    return Job(f"{task}-{kind}-{seed}", "finetune", arguments, (source,))


def merged(keys: Iterable[str], further: str) -> tuple[str, ...]:
    """Keys `name=value`, overridden by those that a user has given."""
    pairs = dict(key.partition("=")[::2] for key in [*keys, *further.split()])
    return tuple(f"{name}={value}" for name, value in pairs.items())


def run_all(out: Path, jobs: Sequence[Job], at_once: int) -> None:
    """Run them, each after those that it waits for; UserError, once the running ones have ended, if one fails."""
    ended: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for job in jobs:
            # Threads take jobs in this order: what a job waits for is running or done, so that none waits for ever.
            before = [ended[name] for name in job.after]
            ended[job.name] = pool.submit(follow, out, job, before)
        try:
            for future in ended.values():
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def follow(out: Path, job: Job, before: Iterable[Future[None]]) -> None:
    """A job after others, unless it is done already."""
    for other in before:
        other.result()
    if not is_done(out / "runs" / job.name):
        call(out, job)


def is_done(run_dir: Path) -> bool:
    """Whether a run has come to its end."""
    events = run_dir / EVENTS
    return events.exists() and any(event.get("kind") == "finished" for event in read(events))


def call(out: Path, job: Job) -> None:
    """Run a verb, its output in a log; UserError with the last line of it if it fails."""
    log = out / "logs" / f"{job.name}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"$ python -m mcf.{job.verb} {' '.join(job.arguments)}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", f"mcf.{job.verb}", *job.arguments]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        last = (log.read_text(errors="replace").splitlines() or ["nothing"])[-1]
        raise UserError(
            f"{log}: {job.name} ended with status {status} ({last}); mend that, and start again: with the same keys it goes on"
        )
