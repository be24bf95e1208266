"""The batch scripts in slurm/: plain sbatch, without the launcher."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from runs import TUNING, require_slurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
HERE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10", "--signal=USR2@30"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_short_and_clean(script):
    assert len(script.read_text().splitlines()) < 40
    if shutil.which("shellcheck") is None:
        require_slurm()  # which CI installs beside shellcheck
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slurm
@pytest.mark.slow
def test_pretraining_by_sbatch_is_the_same_run(site, unbroken):
    script = str(ROOT / "slurm/pretrain_full.sh")
    environment = site.environment(0.4)
    recipe = site.folder / "mine.yaml"
    recipe.write_text((site.folder / "tiny.yaml").read_text())

    def sbatch() -> str:
        command = ["sbatch", *HERE, script, "recipe=mine.yaml", "name=script", "checkpoint.every=1000"]
        done = site.cluster.attempt(*command, cwd=site.folder, env=environment)
        assert done.returncode == 0, done.stderr
        return re.search(r"batch job (\d+)", done.stdout)[1]

    job = sbatch()
    site.wait_for_step("script", 6)
    # A second job of that name is refused while the first lives, and says so in its own output.
    second = sbatch()
    site.wait_for_end("script", second, "FAILED")
    said = (site.folder / f"slurm-{second}.out").read_text()
    assert f"Slurm job {job} of this run is running" in said

    # What it started from is gone when it comes back: it needs the run directory alone.
    recipe.unlink()
    site.cluster.run("scancel", "--signal=USR2", job)
    site.wait_for_end("script", job)
    assert site.cluster.job(job)["Restarts"] == "1"
    assert [event["why"] for event in site.events("script", "requeued")] == ["saved"]
    assert site.numbers("script") == site.numbers(unbroken)
    assert len(site.starts("script")) == 2
    assert f'"mcf": "{site.runs}/script/code/mcf/__init__.py"' in (site.runs / "script/keys-1.jsonl").read_text()
    assert f"{site.runs / 'script'}; follow it with: " in (site.folder / f"slurm-{job}.out").read_text()


@pytest.mark.slurm
@pytest.mark.slow
def test_finetuning_goes_on_after_a_warning(site, unbroken):
    site.draw_faces("faces")
    keys = [*TUNING, "data=faces", f"weights=runs/{unbroken}", "name=tuned", "micro_batch=4"]
    command = ["sbatch", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10", str(ROOT / "slurm/finetune.sh"), *keys]
    done = site.cluster.attempt(*command, cwd=site.folder, env=site.environment(0.5))
    assert done.returncode == 0, done.stderr
    job = re.search(r"batch job (\d+)", done.stdout)[1]
    site.warn_and_see_it_done("tuned", job)
    assert json.loads((site.runs / "tuned/metrics.json").read_text())["history"]
