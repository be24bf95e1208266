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


@pytest.mark.slurm
def test_nodes_submits_an_array_and_a_merge_after_it(cluster, tmp_path):
    laion.tree(tmp_path, laion.coloured(), parts=(0,), tars=2, per_tar=12, sizes=(120, 200))
    named = ["source=images", "detections=detections", "size=48", "min_face=40"]
    asked = ["nodes=2", "slurm.mem=0", "slurm.cpus_per_task=1", "slurm.time=10"]
    environment = {"PYTHONPATH": str(ROOT)}

    def ask(*words: str):
        return cluster.attempt(sys.executable, "-m", "mcf.pack", *named, *words, cwd=tmp_path, env=environment)

    done = ask("out=many", *asked)
    assert done.returncode == 0, done.stderr
    array, merge = re.search(r"as job (\d+), .* as job (\d+)", done.stdout).groups()
    assert f"afterok:{array}" in cluster.job(merge)["Dependency"]
    jobs = f"--jobs={array},{merge}"
    wait_for(lambda: not cluster.run("squeue", "--noheader", jobs).strip(), "the merge's end", seconds=400)
    said = {file.stem: file.read_text() for file in tmp_path.glob("slurm-*.out")}
    assert len(said) == 3 and all("crops of" not in said[f"slurm-{array}_{i}"] for i in range(2)), said
    assert "crops of" in said[f"slurm-{merge}"], said
    assert ask("out=one", "workers=1").returncode == 0
    shards = sorted((tmp_path / "one").glob("shard-*"))
    assert shards and all((tmp_path / "many" / file.name).read_bytes() == file.read_bytes() for file in shards)

    refused = ask("out=more", *asked, "slurm.partition=nowhere")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "Slurm refused the job" in refused.stderr
