"""Fine-tune and evaluate: `python -m mcf.finetune task=… dataset=… data=DIR weights=RUN key=value …`.

mode=here     this process is the run, or a rank of it where torchrun or srun has started several       finetuning.py
mode=local    through the launcher, on this machine: a copy of the code, one process a rank            local.py
mode=slurm    through the launcher, as a Slurm job; mode=print shows its script                        submit.py
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import yaml

from mcf import atomic, caches, checkpoint, cli, snapshot
from mcf.downstream.config import FinetuneConfig
from mcf.errors import UserError
from mcf.exits import INTERRUPTED, SAVED, leave_with
from mcf.local import directory, run_here
from mcf.lock import RunLock, held
from mcf.submit import job_script, submit
from mcf.task import JOBS, Rank

COMMAND = (sys.executable, "-u", "-m", "mcf.finetune")
CONFIG, RECIPE = "finetune.yaml", "recipe.yaml"

log = logging.getLogger(__name__)


@cli.main
def main(argv: list[str] | None = None) -> int:
    """The verb; with `run=RUN_DIR` a rank that the launcher has started.

    Exit status 0: done, or a launcher's rank that ctrl-C has ended; INTERRUPTED: ended by ctrl-C without a launcher.
    SAVED: told to stop by SIGTERM or SIGUSR2, saved, and to be started again. RANK_LOST: another rank was dead or stuck.
    """
    argv = sys.argv[1:] if argv is None else argv
    runs = [argument.removeprefix("run=") for argument in argv if argument.startswith("run=")]
    if runs:
        return work(read_config(Path(runs[-1])), Path(runs[-1]), launched=True)
    config = absolute(cli.parse(FinetuneConfig, argv, verb="finetune"))
    run_dir = Path(config.output) / config.name
    return work(config, run_dir, launched=False) if config.mode == "here" else launch(config, run_dir)


def work(config: FinetuneConfig, run_dir: Path, *, launched: bool) -> int:
    """Be a rank of the run, from where it stands to its end or until told to stop; the exit status."""
    # torch comes with them: help, refusals and submitting need not wait for it.
    from mcf import distributed, linear, memory
    from mcf.finetuning import Finetuning
    from mcf.rendezvous import launch_name, rendezvous
    from mcf.stop import StopSignal
    from mcf.watchdog import Watchdog

    stop = StopSignal()
    caches.keep_local()
    place = rendezvous(os.environ)
    watched = Watchdog(place.rank, place.size, launch_name(os.environ), config.watchdog)
    with watched as watchdog, contextlib.ExitStack() as owned:
        if launched:
            watchdog.open(run_dir)
        watchdog.mark("joining")
        world = distributed.join(timeout=distributed.PATIENCE)
        if not launched:
            distributed.from_main(lambda: owned.enter_context(held(run_dir)))
            watchdog.open(run_dir)
        distributed.set_threads(world, config.train.threads)
        linear.use("auto")
        if world.device.type == "cpu":
            memory.keep_freed_memory()
        level = logging.INFO if world.is_main else logging.WARNING
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        started = time.monotonic()
        run = Finetuning(config, run_dir, world, watchdog.mark)
        done = run.run(stop)
        log.info(
            "%s after step %d of %d, %.0f s", "done" if done else "stopped, start it again to go on:", run.progress.step,
            run.steps, time.monotonic() - started,
        )  # fmt: skip
        distributed.leave()
    if run.interrupted:
        return SAVED
    return INTERRUPTED if stop.for_good and not launched else 0


def launch(config: FinetuneConfig, run_dir: Path) -> int:
    """Start all ranks through the launcher; the exit status of the run, or 0 where it was submitted."""
    recipe = config.recipe()
    if config.mode == "local" and config.nodes > 1:
        raise UserError(
            f"nodes={config.nodes} with mode=local, which is this machine alone; use nodes=1, or mode=slurm"
        )
    if config.mode == "print":
        print(job_script(recipe, run_dir))
        return 0
    checkpoint.make_run_dir(run_dir, JOBS)
    with RunLock(run_dir) as lock:
        snapshot.take(run_dir)
        # Of a job the launcher knows what stands in a recipe: its name, its ranks, what Slurm is asked for.
        for name, content in ((CONFIG, config.model_copy(update={"mode": "here"})), (RECIPE, recipe)):
            atomic.write(run_dir / name, cli.dump(content))
        task = Rank((*COMMAND, f"run={run_dir}"), run_dir, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if config.mode == "local":
            return run_here(recipe, run_dir, task, lock)
        with directory(run_dir):
            number = submit(recipe, run_dir, task)
        lock.add(slurm_job=number)
    print(f"Slurm job {number}: {run_dir}\n  follow  python -m mcf.follow run={run_dir}", flush=True)
    return 0


def read_config(run_dir: Path) -> FinetuneConfig:
    """The keys that a run was launched with."""
    file = run_dir / CONFIG
    try:
        return FinetuneConfig.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"run={run_dir}: no readable {CONFIG} in it ({error}); start the run again with its keys"
        ) from None


def absolute(config: FinetuneConfig) -> FinetuneConfig:
    """The keys with the run's name and with absolute paths: launched ranks work in the run directory."""
    paths = {name: str(Path(getattr(config, name)).expanduser().absolute()) for name in ("data", "weights", "output")}
    return config.model_copy(update={"name": config.run_name, **paths})


if __name__ == "__main__":
    leave_with(main)
