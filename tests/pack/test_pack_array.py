"""`mcf.pack nodes=N`: the scripts it shows, and what it refuses before Slurm is asked (the rest: tests/slurm)."""

from __future__ import annotations

import os
import shlex
import subprocess

import laion
import pytest
from scenes import encode, scene

from mcf.pack.__main__ import main


@pytest.fixture
def named(tmp_path):
    laion.tree(tmp_path, laion.coloured(), parts=(0,), tars=1, per_tar=2, sizes=(120, 200))
    return [f"source={tmp_path / 'images'}", f"detections={tmp_path / 'detections'}", f"out={tmp_path / 'the out'}"]


def test_print_shows_both_scripts_and_writes_nothing(named, tmp_path, capsys):
    asked = ["nodes=3", "mode=print", "slurm.partition=cpu", "slurm.extra={exclude: n1}", "slurm.cpus_per_task=4"]
    assert main([*named, "quality=90", *asked]) == 0
    array, merge = capsys.readouterr().out.split("# and once all tasks have succeeded:\n")
    for script, more in ((array, ["merge=false"]), (merge, ["task=0", "tasks=1"])):
        assert "#SBATCH --partition=cpu\n" in script and "#SBATCH --exclude=n1\n" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        words = shlex.split(script.strip().splitlines()[-1])
        assert words[2:] == ["-u", "-m", "mcf.pack", "workers=4", *more, *named, "quality=90"]
    assert "#SBATCH --array=0-2\n" in array and "--array" not in merge
    assert not (tmp_path / "the out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks=4", "task=0"], "task"),
        (["workers=2"], "workers=2"),
        (["source=nowhere"], "no such folder"),
        (["slurm.time=0"], "slurm.time"),
    ],
)
def test_what_does_not_go_together_is_one_line(named, words, said, capsys):
    keys = {word.partition("=")[0] for word in words}
    assert main([*(word for word in named if word.partition("=")[0] not in keys), "nodes=2", "mode=print", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_whole_images_are_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(encode(scene()))
    assert main([f"source={tmp_path / 'images'}", f"out={tmp_path / 'out'}", "nodes=2", "mode=print"]) == 2
    assert "one process" in capsys.readouterr().err


def test_without_slurm_it_is_one_line(named, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*named, "nodes=2"]) == 2
    assert "use mode=print" in capsys.readouterr().err


def test_the_last_task_leaves_the_merge_where_it_is_told_to(named, tmp_path, capsys):
    assert main([*named, "task=0", "tasks=1", "merge=false", "workers=1", "min_face=40"]) == 0
    assert "to be merged" in capsys.readouterr().out and not (tmp_path / "the out/manifest.json").exists()
    assert main([*named, "workers=1", "min_face=40"]) == 0
    assert (tmp_path / "the out/manifest.json").exists()


@pytest.mark.parametrize(("detector", "seen"), [(None, ""), ("face.onnx", ""), ("own:find", "0,1")])
def test_gpus_are_left_to_a_detector_of_the_users_own(named, monkeypatch, detector, seen):
    """DALI's codecs would open one in every worker, for nothing."""
    found = []
    monkeypatch.setattr("mcf.pack.__main__.pack", lambda options: found.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words = [f"detector={detector}", *(w for w in named if not w.startswith("detections="))] if detector else named
    assert main(words) == 0
    assert found == [seen] and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
