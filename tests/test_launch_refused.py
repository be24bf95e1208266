"""What a launch says before anything starts: what it refuses, and the plan and script that it prints."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from mcf import cli, launch, submit
from mcf.config import Recipe
from mcf.errors import UserError


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    return place


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["nodes=2", "data.streams=16"], ["nodes=2 with mode=local", "use nodes=1", "mode=slurm"]),
        (["data.path=nowhere", "data.samples=1200"], ["nowhere: no such folder", "python -m mcf.pack"]),
        (["data.path=nowhere"], ["nowhere: no such folder", "python -m mcf.pack"]),
        (["data.path=nowhere", "mode=print"], ["no manifest.json in", "nowhere", "data.samples=NUMBER"]),
        (["data.path=stub.py"], ["stub.py is a file", "python -m mcf.pack"]),
        (["batch=1600", "data.streams=16"], ["1200 samples, fewer than batch=1600"]),
        (["data.path=runs", "data.samples=1200"], ["no manifest.json in it", "python -m mcf.pack"]),
        (["data.path=null", "data.samples=1200"], ["data.path is not set"]),
        (["teacher.source=timm", "teacher.path=no.pth", "teacher.allow_random=false"], ["no.pth: no such file"]),
        (["start.path=no.pth"], ["start.path=", "no.pth: no such file"]),
        (["probe.every=5", "probe.data=none"], ["probe.data=", "none: no such folder"]),
        (["probe.every=5"], ["probe.every=5 needs probe.data"]),
        (["output=driver.py"], ["cannot be made"]),
        (["mode=slurm"], ["sbatch and srun are not on this machine", "mode=local"]),
        (["moed=local"], ["did you mean mode?"]),
    ],
)
def test_refused_before_anything_starts(inside, monkeypatch, capsys, argv, parts):
    monkeypatch.setenv("PATH", "/nonexistent")
    given = {a.partition("=")[0] for a in argv}
    status = launch.main([*(a for a in inside.arguments(*argv) if a in argv or a.partition("=")[0] not in given)])
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not list(inside.folder.glob("runs/r/jobs/*"))


def test_weights_that_a_run_began_with_may_be_gone_when_it_goes_on(inside):
    run_dir = inside.folder / "runs/begun"
    recipe = Recipe.model_validate(tiny.recipe(run_dir, inside.folder / "data", start__path="gone.pth"))
    with pytest.raises(UserError, match=r"start\.path=gone\.pth: no such file"):
        launch.check_inputs(recipe)
    (run_dir / "checkpoints/step-00000004").mkdir(parents=True)
    launch.check_inputs(recipe)


def test_a_damaged_manifest(inside, capsys):
    (inside.folder / "data/manifest.json").write_text('{"samples"')
    assert launch.main(inside.arguments()) == 2
    assert "damaged manifest" in capsys.readouterr().err


def test_paths_are_made_absolute_and_uris_are_not(inside):
    recipe = cli.load_recipe(
        ["recipe=vit_b_20m", "data.path=~/x", "teacher.path=s3://bucket/t.pth", "track.mlflow=sqlite:///a.db",
         "start.path=w.pth", "probe.data=faces"]
    )  # fmt: skip
    made = launch.absolute_paths(recipe)
    assert made.data.path == str(Path.home() / "x")
    assert made.teacher.path == "s3://bucket/t.pth"
    assert (made.start.path, made.probe.data) == (f"{inside.folder}/w.pth", f"{inside.folder}/faces")
    assert made.track.mlflow == f"sqlite:///{inside.folder}/a.db"
    assert made.output == str(inside.folder / "runs")
    assert launch.absolute_paths(made) == made
    for uri in ("local", "off", "http://host:5000", "sqlite:////abs.db"):
        changed = recipe.model_copy(update={"track": recipe.track.model_copy(update={"mlflow": uri})})
        assert launch.absolute_paths(changed).track.mlflow == uri


def test_print_shows_plan_and_script_and_touches_nothing(tmp_path):
    code = (
        "import sys; from mcf import launch; status = launch.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules]); sys.exit(status)"
    )
    argv = [
        "recipe=vit_b_20m", "nodes=4", "mode=print", "slurm.partition=gpu", "slurm.account=a1", "slurm.time=600",
        "slurm.mem=512G", "slurm.extra.exclusive=true", "slurm.extra.requeue=false", "slurm.warn_seconds=90",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    assert done.stdout.splitlines()[-1] == "[]"
    assert "4,096 = 32 ranks × micro-batch 64 × accumulation 2" in done.stdout
    script = done.stdout[done.stdout.index("#!/bin/bash") :]
    run = tmp_path / "runs/vit_b_20m"
    for line in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=16", "--partition=gpu", "--account=a1",
        "--time=600", "--mem=512G", "--signal=USR2@90", "--exclusive", "--job-name=vit_b_20m", f"--chdir={run}",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --requeue" not in script
    assert f"export PYTHONPATH={run}/code" in script
    assert "--kill-on-bad-exit=1" in script
    assert f"-m submitit.core._submit {run}/jobs" in script
    assert subprocess.run(["bash", "-n"], input=script.rpartition("\n[")[0], text=True).returncode == 0


def test_slurm_may_requeue_a_job_unless_it_is_told_not_to(tmp_path):
    assert "#SBATCH --requeue\n" in submit.job_script(Recipe(), tmp_path)
    told = Recipe.model_validate({"slurm": {"extra": {"requeue": False}}})
    assert "--requeue" not in submit.job_script(told, tmp_path)


def test_missing_submitit_is_one_line(monkeypatch):
    # None in sys.modules is how Python itself notes a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^submitit is not installed, and launching needs it: pip install submitit$"):
        submit.need_submitit()
