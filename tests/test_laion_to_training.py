"""From LAION-Face's layout to a trained step, through the verbs: pack as three tasks, look, launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import laion
import pytest
import tiny

from mcf.data.shards import load_manifest


def call(*arguments: str, cwd: Path) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1800)
def test_a_made_up_laion_face_packs_and_trains(tmp_path, shared_data):
    """Generated and real faces in two splits; 2 × 2 × 60 links are 220 images."""
    faces = laion.drawn(6, size=96) + laion.real(shared_data / "youtube_faces", 24)
    laion.tree(tmp_path, faces, tars=2, per_tar=60, sizes=(140, 320))
    named = ["source=images", "detections=detections", "out=packed", "size=32", "min_face=32", "faces=all", "workers=1"]
    for task in (2, 0, 1):
        said = call("mcf.pack", *named, f"task={task}", "tasks=3", cwd=tmp_path)
    assert "crops of 220 images into 4 shards" in said
    counts = load_manifest(tmp_path / "packed").meta["counts"]
    assert counts["kept"] > 200 and counts["images"] + sum(counts["left_out"].values()) == 220
    call("mcf.pack", "out=packed", "verify=true", cwd=tmp_path)
    assert call("mcf.pack", "report=packed", cwd=tmp_path).strip().endswith("report.html")
    call("mcf.inspect", "data=packed", cwd=tmp_path)

    run = tiny.write_recipe(tmp_path / "run", tiny.recipe(tmp_path / "run", tmp_path / "packed", train__steps=12))
    call("mcf.inspect", f"recipe={run / 'recipe.yaml'}", "step=12", "count=8", cwd=tmp_path)
    assert tiny.run(run, timeout=900) == 0, tiny.said(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all(record["bad/samples"] == 0 for record in records)
