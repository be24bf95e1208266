"""`python -m mcf.pack nodes=N …`: packing handed to Slurm, as an array and a job after it.

    the array   N tasks, each makes its share of the parts and leaves the merge     python -m mcf.pack … merge=false
    the merge   once all of them have succeeded (afterok)                           python -m mcf.pack … task=0 tasks=1

If a task fails, Slurm drops the merge; the same command again makes what is missing. `slurm/pack.sh` is the same by hand,
where the task that ends last merges.
"""

from __future__ import annotations

import shlex
import sys

from mcf import slurm
from mcf.errors import UserError
from mcf.pack import inputs
from mcf.pack.options import PackConfig
from mcf.pack.source import Folder
from mcf.pack.writing import places

_OURS = {"nodes", "mode", "slurm"}  # keys of the submitting command alone
_DECIDED = {"task", "tasks", "merge", "workers"}  # keys of the jobs' commands that this module gives


def submit(options: PackConfig, argv: list[str]) -> None:
    """Submit both jobs, or with mode=print show their scripts. argv: the command's own words, which the jobs repeat.

    Raises UserError for what cannot be packed so, and with Slurm's words if it refuses.
    """
    source, _ = places(options)
    if not (options.by_faces or inputs.tars_in(list(Folder(source).walk()))):
        raise UserError(f"nodes={options.nodes}: a folder of whole images is packed by one process; leave out nodes")
    words = [word for word in argv if _key(word) not in _OURS]
    if decided := [word for word in words if _key(word) in _DECIDED]:
        raise UserError(f"{decided[0]}: nodes={options.nodes} decides that; leave it out")
    array, merge = scripts(options, words)
    if options.mode == "print":
        print(f"{array}\n# and once all tasks have succeeded:\n{merge}", end="")
        return
    job = slurm.sbatch(array)
    try:
        last = slurm.sbatch(merge, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    except UserError as error:
        raise UserError(f"{error}; the tasks are job {job}, and wait for no merge: scancel {job}") from None
    print(f"submitted {options.nodes} tasks as job {job}, and the merge after them as job {last}")
    print(f"  squeue --jobs={job},{last}      slurm-{job}_*.out, slurm-{last}.out      scancel {job} {last}")


def scripts(options: PackConfig, words: list[str]) -> tuple[str, str]:
    """Batch scripts of the array and of the merge."""
    assert options.nodes is not None
    array = _script(options, words, f"array=0-{options.nodes - 1}", "merge=false")
    return array, _script(options, words, "", "task=0 tasks=1")


def _script(options: PackConfig, words: list[str], array: str, more: str) -> str:
    asked = options.slurm
    wanted: dict[str, object] = {
        "job-name": "mcf-pack", "nodes": 1, "ntasks": 1, "cpus-per-task": asked.cpus_per_task, "time": asked.time,
        "partition": asked.partition, "account": asked.account, "mem": asked.mem, **asked.extra,
    }  # fmt: skip
    lines = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items() if value is not None]
    lines += ["--requeue", "--open-mode=append", *([f"--{array}"] if array else [])]
    command = [shlex.quote(sys.executable), "-u", "-m", "mcf.pack", f"workers={asked.cpus_per_task}", more]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            "export OMP_NUM_THREADS=1 # a process a core; none needs threads of its own",
            "exec " + " ".join([*command, *(shlex.quote(word) for word in words)]),
            "",
        ]
    )


def _key(word: str) -> str:
    return word.partition("=")[0].partition(".")[0]
