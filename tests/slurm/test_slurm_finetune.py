"""`python -m mcf.finetune mode=slurm` on the real Slurm: submitted, warned, queued again, and done."""

import json
import re
import sys

import pytest
import torch
from runs import TUNING

from mcf.models.vit import VisionTransformer
from mcf.weights import files

pytestmark = pytest.mark.slurm


@pytest.mark.slow
def test_submitted_on_two_nodes_warned_and_done(site):
    site.draw_faces("drawn")
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, width=16, depth=4, heads=2)
    files.write(site.folder / "vit.safetensors", vit.state_dict(), {"heads": "2"})
    command = [
        sys.executable, "-m", "mcf.finetune", *TUNING, "data=drawn", "weights=vit.safetensors", "mode=slurm", "nodes=2",
        "gpus_per_node=1", "slurm.cpus_per_task=1", "slurm.time=10", "slurm.warn_seconds=30", "micro_batch=2",
        "train.threads=1",
    ]  # fmt: skip
    done = site.cluster.attempt(*command, "name=submitted", cwd=site.folder, env=site.environment(0.5))
    assert (done.returncode, done.stderr) == (0, "")
    run = site.runs / "submitted"
    job = re.fullmatch(rf"Slurm job (\d+): {run}\n  follow  python -m mcf.follow run={run}\n", done.stdout)[1]
    found = site.cluster.job(job)
    assert (found["JobName"], found["TimeLimit"], found["NumTasks"]) == ("submitted", "00:10:00", "2")
    # The same again is refused while it lives, and names the job.
    again = site.cluster.attempt(*command, "name=submitted", cwd=site.folder, env=site.environment(0.5))
    assert again.returncode == 2
    assert f"Slurm job {job} of this run is" in again.stderr

    assert site.warn_and_see_it_done("submitted", job)["ranks"] == 2
    results = json.loads((run / "metrics.json").read_text())
    assert [entry["epoch"] for entry in results["history"]] == [6]
    assert "best_on_test" in site.said("submitted")
    beats = [json.loads(path.read_text()) for path in sorted((run / "heartbeats").glob("rank-*.json"))]
    assert [(beat["rank"], beat["state"]) for beat in beats] == [(0, "done"), (1, "done")]
