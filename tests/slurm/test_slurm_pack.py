"""slurm/pack.sh: a real array of packing tasks, one of which is cancelled, packs what one process packs."""

import os
import re
import sys
from pathlib import Path

import laion
import pytest
from cluster import wait_for

from mcf.pack.options import PackConfig
from mcf.pack.writing import pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slurm
@pytest.mark.slow
def test_an_array_of_tasks_packs_what_one_process_packs(cluster, tmp_path):
    laion.tree(tmp_path, laion.coloured(), tars=4, per_tar=30, sizes=(120, 300))
    keys = {"size": 48, "min_face": 40, "workers": 1}
    named = ["source=images", "detections=detections", "out=many", *(f"{key}={value}" for key, value in keys.items())]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def sbatch(array: str) -> str:
        here = [f"--array={array}", "--mem=0", "--cpus-per-task=1", "--time=10"]
        done = cluster.attempt("sbatch", *here, str(ROOT / "slurm/pack.sh"), *named, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return re.search(r"batch job (\d+)", done.stdout)[1]

    def ended(job: str) -> bool:
        return not cluster.run("squeue", "--noheader", "--jobs", job).strip()

    job = sbatch("0-3")
    cluster.run("scancel", f"{job}_2")
    wait_for(lambda: ended(job), "the array's end", seconds=600)
    said = "".join(file.read_text() for file in tmp_path.glob(f"slurm-{job}_*.out"))
    assert not (tmp_path / "many/manifest.json").exists(), said  # two parts are missing
    assert len(list((tmp_path / "many/.packing/parts").glob("*.json"))) == 6, said
    again = sbatch("0-3")
    wait_for(lambda: ended(again), "the second array's end", seconds=600)
    said = "".join(file.read_text() for file in tmp_path.glob(f"slurm-{again}_*.out"))
    assert (tmp_path / "many/manifest.json").exists(), said
    pack(
        PackConfig(
            source=str(tmp_path / "images"), detections=str(tmp_path / "detections"), out=str(tmp_path / "one"), **keys
        )
    )
    for file in sorted((tmp_path / "one").glob("shard-*")):
        assert (tmp_path / "many" / file.name).read_bytes() == file.read_bytes()
    assert said.count("crops of") == 1
