"""Does pre-training help? `python -m mcf.results alignment=FOLDER parsing=FOLDER` makes the table, and goes on with it.

    crops      of the training pictures of both sets, without their labels → shards          squares, mcf.pack
    teacher    stage one, half of the steps: MAE's pixel loss                                mcf.train
    mcf        stage two, the other half: the method, taught by stage one's encoder          mcf.train
    mae        the ablation: the pixel loss for as many steps as both stages                 mcf.train
    heads      on each frozen encoder and on a random one, from few labels, for both tasks   mcf.finetune
    table      mean, sample standard deviation and range over the seeds → results.md, results.csv

Every seed is a pre-training of its own (`one_pretraining=true`: the first alone is). What is finished is not done again;
what was cut off goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mcf import atomic, cli
from mcf.config import NonNegative, Positive, Section
from mcf.errors import UserError
from mcf.track.jsonl import EVENTS, read

if TYPE_CHECKING:
    from mcf.downstream.datasets import FaceSet
    from mcf.downstream.datasets.faceset import Task

SHARES = (1.0, 0.7)  # sides of the crops, of the shorter side: in the middle of a picture faces come in several sizes
INITIALISATIONS = {"random": "random", "mae": "MAE: pixel loss alone", "mcf": "MCF: the method"}
# What the table shows of each task: a metric of metrics.json, its heading, which way is better.
SHOWN = {
    "alignment": (("nme_inter_ocular", "NME inter-ocular, %", "↓"), ("fr_inter_ocular_10", "FR at 10 %", "↓"),
                  ("auc_inter_ocular_10", "AUC at 10 %", "↑")),
    "parsing": (("f1_mean", "mean F1, %", "↑"),),
}  # fmt: skip
# Small squares, a narrow head, an average that forgets its start within the few steps (docs/downstream.md).
HEADS = {
    "both": ("freeze=true", "batch=10", "micro_batch=10", "head.channels=32", "ema=0.97",
             "optimizer.lr=1e-2", "track.mlflow=off", "train.threads=1", "train.readers=1", "pictures=4"),
    "alignment": ("warp_size=64", "input_size=64", "train.epochs=30", "optimizer.drop_epoch=24", "heatmap.size=32",
                  "heatmap.radius=2.5"),
    "parsing": ("warp_size=96", "input_size=96", "train.epochs=60", "optimizer.drop_epoch=48"),
}  # fmt: skip


class ResultsConfig(Section):
    """Compare encoders: random, pre-trained by the pixel loss alone, and by the method.

    Alignment and parsing with a frozen encoder and few labels. Started again with the same keys, it goes on where it was.
    """

    alignment: str = Field(description="folder of the faces with points; its people must not be in both splits")
    alignment_set: str = Field("csv", description="how that folder is laid out: a dataset of mcf.finetune")
    parsing: str = Field(description="folder of the faces with masks")
    parsing_set: str = Field("masks", description="how that folder is laid out")
    out: str = Field("results", description="folder for crops, shards, runs, results.csv and results.md")
    seeds: tuple[NonNegative, ...] = Field(
        (0, 1, 2), min_length=1, description="each a pre-training and heads of its own"
    )
    one_pretraining: bool = Field(
        False,
        description="pre-train with the first seed only: the spread is then of heads, and of random encoders, alone",
    )
    steps: Positive = Field(800, ge=2, description="steps of pre-training in all; the method's two stages share them")
    size: Positive = Field(96, description="side of the crops that are pre-trained on, pixels")
    alignment_labels: Positive = Field(100, description="labelled faces that alignment is learned from")
    parsing_labels: Positive = Field(50, description="labelled faces that parsing is learned from")
    jobs: Positive = Field(2, description="runs at a time, one thread each")
    train: str = Field("", description="further keys for mcf.train, separated by spaces")
    finetune: str = Field("", description="further keys for mcf.finetune, separated by spaces")

    def decisive(self) -> dict:
        """The keys that numbers depend on."""
        return self.model_dump(mode="json", exclude={"out", "jobs", "seeds"})


@dataclass(frozen=True)
class Job:
    """A run: its name, its verb with arguments, the runs that must be there before, and the file that it ends with."""

    name: str
    verb: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One number of the table's raw data."""

    initialisation: str
    task: str
    seed: int
    metric: str
    value: float


@cli.main
def main(argv: list[str] | None = None) -> int:
    """The verb."""
    config = cli.parse(ResultsConfig, sys.argv[1:] if argv is None else argv, verb="results")
    out = Path(config.out).absolute()
    jobs = jobs_of(out, config)
    for job in jobs:
        check(job, config)
    sets = [faces_of(config, "alignment"), faces_of(config, "parsing")]
    claim(out, config)  # last: a key that was refused may be mended
    pack(out, sets, config.size)
    run_all(out, jobs, config.jobs)
    results = collect(out, config.seeds)
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result.__dataclass_fields__)
        writer.writerows((r.initialisation, r.task, r.seed, r.metric, f"{r.value:.4f}") for r in results)
    text = table(results)
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nraw numbers  {out / 'results.csv'}", flush=True)
    return 0


def check(job: Job, config: ResultsConfig) -> None:
    """Read the keys of a run as its verb will; UserError for one that it would refuse before it looks at data."""
    from mcf.downstream.config import FinetuneConfig

    try:
        if job.verb == "train":
            cli.load_recipe(list(job.arguments), verb="mcf.train")
        else:
            cli.parse(FinetuneConfig, list(job.arguments), verb="mcf.finetune")
    except UserError as error:
        raise UserError(f"{job.verb}={getattr(config, job.verb)!r}: {error}") from None


def faces_of(config: ResultsConfig, task: Task) -> FaceSet:
    """The faces of a task, checked; UserError in this verb's keys."""
    # torch comes with them: help and refusals need not wait for it.
    from mcf.downstream.datasets import open_faces

    dataset, data = {
        "alignment": (config.alignment_set, config.alignment),
        "parsing": (config.parsing_set, config.parsing),
    }[task]
    try:
        return open_faces(task, dataset, data)
    except UserError as error:
        # Readers of data sets speak of mcf.finetune's keys: data, dataset, task.
        ours = re.sub(r"(?<!\S)data(set)?=", lambda found: f"{task}{'_set' if found[1] else ''}=", str(error))
        raise UserError(re.sub(r"\btask=(?=alignment|parsing)", "", ours)) from None


def claim(out: Path, config: ResultsConfig) -> None:
    """Note the keys in the folder; UserError if something in it was made with others."""
    note, new = out / "keys.json", config.decisive()
    if note.is_file() and any((out / made).exists() for made in ("crops", "runs")):
        try:
            old = dict(json.loads(note.read_text()))
        except (ValueError, TypeError):
            raise UserError(
                f"{note}: cannot be read, so nobody knows with which keys the rest was made; give another out=, or remove "
                "this file if they are the same"
            ) from None
        if differing := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
            name = differing[0]
            raise UserError(
                f"out={config.out}: holds results of other keys ({name}={old.get(name)}, now {new.get(name)}); "
                "give the old keys, or another out="
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(note, json.dumps(new, indent=1) + "\n")


# --- pictures without labels ----------------------------------------------------------------------------------------


def pack(out: Path, sets: Sequence[FaceSet], size: int) -> None:
    """Crops of the training pictures, and shards of them; nothing that the heads are tested on is among them."""
    if (out / "shards/manifest.json").is_file():
        return
    pictures = training_pictures(sets)
    folder = out / "crops"
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        squares(picture, folder, size)
    print(f"{len(pictures):,} pictures of the training splits, {len(SHARES)} crops each: {folder}", flush=True)
    call(out, Job("pack", "pack", (f"source={folder}", f"out={out / 'shards'}", "crop=square", f"size={size}")))


def training_pictures(sets: Sequence[FaceSet]) -> list[Path]:
    """The pictures of all training splits; UserError if one of them, or a person, is in a test split too."""
    tested = {face.image.resolve() for faces in sets for face in faces.test}
    pictures: dict[Path, None] = {}
    for faces in sets:
        people = {face.person for face in faces.test if face.person}
        for face in faces.train:
            if face.person in people or face.image.resolve() in tested:
                raise UserError(
                    f"{face.image}: {face.person or 'the picture'} is in the training and in a test split; split by person"
                )
            pictures[face.image.resolve()] = None
    return list(pictures)


def squares(picture: Path, folder: Path, size: int) -> None:
    """Write the squares in the middle of a picture, as large as its shorter side and smaller, at size × size pixels."""
    from PIL import Image, ImageOps

    with Image.open(picture) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    for share in SHARES:
        side = round(min(image.size) * share)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Sets may have files of one name.
        name = f"{picture.stem}-{hashlib.sha1(str(picture).encode()).hexdigest()[:8]}-{100 * share:.0f}.png"
        cut = image.crop((left, top, left + side, top + side))
        cut.resize((size, size), Image.Resampling.LANCZOS).save(folder / name)


# --- runs -----------------------------------------------------------------------------------------------------------


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


# --- table ----------------------------------------------------------------------------------------------------------


def collect(out: Path, seeds: Sequence[int]) -> list[Result]:
    """All metrics of all heads, from their metrics.json."""
    found = []
    for kind in INITIALISATIONS:
        for task in SHOWN:
            for seed in seeds:
                told = json.loads((out / "runs" / f"{task}-{kind}-{seed}" / "metrics.json").read_text())["selected"]
                numbers = {name: value for name, value in told.items() if name not in ("epoch", "by")}
                found += [Result(kind, task, seed, name, value) for name, value in numbers.items()]
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown: a row an initialisation, in every cell mean ± sample standard deviation over the seeds, and the range."""
    columns = [(task, *shown) for task in SHOWN for shown in SHOWN[task] if any(r.metric == shown[0] for r in results)]
    lines = [
        "| Frozen encoder | "
        + " | ".join(f"{task}: {heading} {better}" for task, _, heading, better in columns)
        + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for kind, name in INITIALISATIONS.items():
        cells = []
        for task, metric, _, _ in columns:
            values = [r.value for r in results if (r.initialisation, r.task, r.metric) == (kind, task, metric)]
            cell = f"{statistics.mean(values):.2f}"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.2f} ({min(values):.2f}–{max(values):.2f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
