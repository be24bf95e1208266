"""The demo: from faces to a pre-trained encoder in minutes, through the same verbs a cluster run uses.

    faces    drawn from parameters (mcf.data.faces), or a folder of your own
    pack     mcf.pack: JPEG shards, index, manifest, report
    launch   mcf.launch recipe=demo mode=local: DALI, DeepSpeed, MLflow
    report   what the losses did, how fast it went, where everything is

Every step says the command it runs, so that the demo can be followed by hand. Stopped in the middle, `make demo` goes on.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from pydantic import Field

from mcf import cli
from mcf.config import Positive, Section
from mcf.errors import UserError
from mcf.track.jsonl import EVENTS, METRICS, read


class DemoConfig(Section):
    """What the demo can be told."""

    data: str | None = Field(None, description="folder of face images; without it, faces are drawn")
    out: str = Field("demo", description="folder everything goes into")
    faces: Positive = Field(1500, description="faces that are drawn when there is no data=")
    size: Positive = Field(128, description="side of the stored crops, pixels")
    launch: str = Field("", description="further keys for mcf.launch, separated by spaces")


TERMS = ("loss/feature", "loss/contrast")


@cli.main
def main(argv: list[str] | None = None) -> int:
    """Run the demo; exit status 1 if a loss term has not fallen."""
    config = cli.parse(DemoConfig, sys.argv[1:] if argv is None else argv, verb="demo")
    started = time.monotonic()
    out = Path(config.out)
    if config.data and not Path(config.data).is_dir():
        raise UserError(f"data={config.data}: no such folder; give a folder of face images, or none to draw faces")
    source = Path(config.data) if config.data else draw_faces(out, config)
    name = run_name(source) if config.data else "drawn"
    # One folder for each choice of keys: neither faces nor shards are made over.
    shards = out / "shards" / (f"{name}-{config.size}" if config.data else source.parent.name)
    call("mcf.pack", f"source={source}", f"out={shards}", "crop=square", f"size={config.size}")
    run_dir = next_run(out / "runs", f"demo-{name}")
    call(
        "mcf.launch",
        "recipe=demo",
        "mode=local",
        f"name={run_dir.name}",
        f"output={run_dir.parent}",
        f"data.path={shards}",
        *config.launch.split(),
    )
    return report(run_dir, time.monotonic() - started)


def run_name(source: Path) -> str:
    """A folder's last two names as a part of a run's name, which has few signs to choose from."""
    return re.sub(r"[^\w.+-]+", "-", "-".join(source.resolve().parts[1:][-2:]), flags=re.ASCII)


def draw_faces(out: Path, config: DemoConfig) -> Path:
    """Draw faces, unless they are there."""
    folder = out / f"faces-{config.faces}-{config.size}"
    call("mcf.data.faces", f"out={folder}", f"count={config.faces}", f"size={config.size}")
    return folder / "images"


def next_run(runs: Path, name: str) -> Path:
    """The run to go on with: the newest of this name if it is not finished, else a new one beside it."""
    number = 1
    while finished(run := runs / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return run


def finished(run_dir: Path) -> bool:
    """Whether a run has done all its steps."""
    events = run_dir / EVENTS
    return events.exists() and any(event.get("kind") == "finished" for event in read(events))


def call(module: str, *arguments: str) -> None:
    """Run a verb as a user would, and end with it if it fails or is stopped: it has said why.

    Ctrl-C is the verb's own affair, which gets it too: its end is waited for, since a launcher saves first.
    """
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", module, *arguments])
    stopped = False
    while child.returncode is None:
        stopped |= not waited(child)
    if child.returncode:
        raise SystemExit(child.returncode)
    if stopped:
        raise KeyboardInterrupt


def waited(child: subprocess.Popen[bytes]) -> bool:
    """Wait for the end of a process; False if ctrl-C came first."""
    try:
        child.wait()
    except KeyboardInterrupt:
        return False
    return True


def report(run_dir: Path, seconds: float) -> int:
    """Print what came of it; 1 if a loss term has not fallen."""
    records = [r for r in read(run_dir / METRICS) if "loss/total" in r]
    # The mean of a few lines at either end: single steps are noisy.
    few = max(1, len(records) // 20)
    fallen = True
    print(f"\n{'loss term':<16}{'start':>12}{'end':>12}")
    for term in (*TERMS, "loss/pixel", "loss/total"):
        if term not in records[0]:
            continue
        start, end = (sum(r[term] for r in part) / few for part in (records[:few], records[-few:]))
        fallen &= end < start or term not in TERMS
        print(
            f"{term.removeprefix('loss/'):<16}{start:>12.5g}{end:>12.5g}  {'fell' if end < start else 'did NOT fall'}"
        )
    rates = sorted(r["rate/images_per_s"] for r in records[1:] or records)
    pictures = sorted((run_dir / "images").glob("*-reconstruction.png"))
    checkpoint = max((run_dir / "checkpoints").glob("step-*"), default=None)
    print(f"\n{rates[len(rates) // 2]:.0f} images/s (median), {records[-1]['step']} steps, {seconds:.0f} s in all\n")
    print(f"checkpoint       {checkpoint}")
    print(f"reconstructions  {pictures[-1] if pictures else 'none'}")
    print(f"metrics          {run_dir / 'metrics.jsonl'}")
    page = [event["mlflow"] for event in read(run_dir / EVENTS) if event.get("mlflow")][-1]
    # The program stands beside this Python, whose folder is on nobody's path.
    print("MLflow page      " + (f"{Path(sys.executable).parent}/{page}" if page.startswith("mlflow ") else page))
    if not fallen:
        print("\nA loss term has not fallen: the demo failed.", file=sys.stderr)
    return 0 if fallen else 1


if __name__ == "__main__":
    sys.exit(main())
