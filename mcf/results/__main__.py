"""`python -m mcf.results alignment=FOLDER parsing=FOLDER`: the table, and going on with it."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mcf import atomic, cli
from mcf.errors import UserError
from mcf.results.crops import pack
from mcf.results.options import ResultsConfig
from mcf.results.runs import Job, jobs_of, run_all
from mcf.results.table import Result, collect, table

if TYPE_CHECKING:
    from mcf.downstream.datasets import FaceSet
    from mcf.downstream.datasets.faceset import Task


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


if __name__ == "__main__":
    sys.exit(main())
