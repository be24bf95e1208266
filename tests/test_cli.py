"""The command line: what is read, and the one line that is said of everything that cannot be."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mcf import cli, settings
from mcf.config import Recipe, Section
from mcf.errors import UserError
from mcf.kernels.arguments import parse
from mcf.pack.options import PackConfig


def recipe(*argv: str) -> Recipe:
    # The default teacher is a file, which a whole recipe must name.
    return cli.load_recipe(["teacher.path=t.pth", *argv])


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optimizer.blr=1e-4", 1e-4),  # text in YAML 1.1
        ("optimizer.blr=1.5E-4", 1.5e-4),
        ("optimizer.eps=.5", 0.5),
        ("optimizer.lr=null", None),
        ("optimizer.lr=", None),
        ("data.samples=20_000_000", 20_000_000),
        ("data.samples=2e7", 20_000_000),
        ("seed=010", 10),  # octal in YAML 1.1
        ("optimizer.betas=[0.8, 0.99]", (0.8, 0.99)),
        ("teacher.taps=[3,7]", (3, 7)),
        ("loss.pixel_normalise=false", False),
        ("track.mlflow=off", "off"),  # false in YAML 1.1
        ("track.mlflow=http://user:pw@host:5000/a=b?c=d", "http://user:pw@host:5000/a=b?c=d"),
        ("track.experiment=a: b #c", "a: b #c"),
        ("name=007", "007"),
        ("name=1e-4", "1e-4"),
        ("name='quoted'", "quoted"),
        ("data.path=/data/with space/[x]", "/data/with space/[x]"),
        ("data.path=null", None),
        ("slurm.mem=512G", "512G"),
        ("slurm.extra={gres: 'gpu:8'}", {"gres": "gpu:8"}),
        ("slurm.extra.gres=gpu:8", {"gres": "gpu:8"}),
        ("slurm.extra.exclusive=true", {"exclusive": True}),
    ],
)
def test_values(argument, value):
    read = cli.flatten(recipe(argument))[argument.partition("=")[0].removesuffix(".gres").removesuffix(".exclusive")]
    assert read == value
    assert type(read) is type(value)


def test_table_keys_add_up():
    assert recipe("slurm.extra={a: 1}", "slurm.extra.b=2").slurm.extra == {"a": 1, "b": 2}


def test_negative_numbers_reach_the_check_of_the_key():
    assert refusal("train.epochs=-1") == "train.epochs=-1: expected a number > 0"


@hypothesis.settings(deadline=None)  # a machine may be shared by many
@given(st.floats(min_value=1e-300, max_value=1e300, allow_nan=False))
def test_every_float_comes_back_from_the_command_line_and_from_a_dump(value):
    argument = f"optimizer.eps={cli.render(value)}"
    read = cli.parse(Recipe, [argument], verb="x")
    assert read.optimizer.eps == value
    assert yaml.load(cli.dump(read), Loader=settings._Loader)["optimizer"]["eps"] == value


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("optimizer.blrr=1", ["optimizer.blrr=1", "unknown key", "did you mean optimizer.blr?", "--help"]),
        ("blr=1", ["did you mean optimizer.blr?"]),
        ("micro_bach=4", ["did you mean micro_batch?"]),
        ("optimiser.weight_decay=0", ["did you mean optimizer.weight_decay?"]),
        ("xyzzy=4", ["xyzzy=4: unknown key; `--help`"]),
        ("slurm.extra.a.b=3", ["unknown key"]),
        ("model=3", ["model is a section", "model.image_size"]),
        ("batch=4o96", ["batch=4o96: expected a whole number > 0"]),
        ("batch=1.5", ["batch=1.5: expected a whole number > 0"]),
        ("batch=true", ["batch=true: expected a whole number > 0"]),
        ("loss.feature=true", ["loss.feature=true: expected a number >= 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr=nan: expected a number > 0 or null"]),
        ("optimizer.weight_decay=.inf", ["optimizer.weight_decay=inf: expected a number >= 0"]),
        ("optimizer.betas=0.9", ["optimizer.betas=0.9: expected a list of 2 values like [1,2]"]),
        (
            "optimizer.betas=[0.9]",
            ["optimizer.betas=[0.9]: expected a list of 2 values like [1,2], each a number >= 0"],
        ),
        ("optimizer.betas=[0.9,2]", ["optimizer.betas=[0.9,2]", "each a number >= 0 and < 1"]),
        ("teacher.taps=[1,-2]", ["teacher.taps=[1,-2]"]),
        ("teacher.source=mocov3", ["expected one of moco_v3, timm", "did you mean moco_v3?"]),
        ("train.zero_stage=4", ["train.zero_stage=4: expected one of 0, 1, 2, 3"]),
        ("batch=[1", ["batch=[1", "not valid YAML"]),
        ("name=a/b", ["name=a/b: expected text matching"]),
        ("--batch=3", ["keys have no dashes", "write batch=3"]),
        ("batch", ["'batch' is no key=value pair", "did you mean batch?"]),
        ("model.image_size=225", ["model.image_size=225 is no multiple of model.patch_size=16; use 224"]),
    ],
)
def test_refused_in_one_line(argument, parts):
    message = refusal(argument)
    for part in parts:
        assert part in message


def test_a_key_given_twice_is_refused():
    assert "batch is given twice" in refusal("batch=64", "batch=64")


def test_unset_required_key_names_its_meaning():
    class Needs(Section):
        source: str = Field(description="folder of images")

    with pytest.raises(UserError, match=r"pack: source is missing \(folder of images\); add source=VALUE"):
        cli.parse(Needs, [], verb="pack")


def test_home_is_meant_by_a_tilde_whatever_the_key_and_the_verb(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = recipe("data.path=~/shards", "output=~/runs", "track.mlflow=s3://~/x", "slurm.extra.output=~/log")
    assert (read.data.path, read.output) == (f"{tmp_path}/shards", f"{tmp_path}/runs")
    assert (read.track.mlflow, read.slurm.extra["output"]) == ("s3://~/x", f"{tmp_path}/log")
    assert recipe("data.path=a/~/b", "data.stage=~").data.model_dump()["path"] == "a/~/b"
    path = write(tmp_path, "a.yaml", "data: {path: ~/shards}\nteacher: {path: ~/t.pth}\n")
    assert cli.load_recipe([f"recipe={path}"]).teacher.path == f"{tmp_path}/t.pth"

    packed = cli.parse(PackConfig, ["source=~/a", "out=~/zz"], verb="pack")
    assert (packed.source, packed.out) == (f"{tmp_path}/a", f"{tmp_path}/zz")
    assert parse("mcf.kernels.bench", "", {"out": ("", "folder")}, ["out=~/k"]) == {"out": f"{tmp_path}/k"}


# --- files --------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_base_file_command_line_in_this_order(tmp_path):
    write(tmp_path, "base.yaml", "name: other\nbatch: 64\nmicro_batch: 8\nseed: 1\ndata: {streams: 8, window: 7}\n")
    path = write(tmp_path, "mine.yaml", "base: base.yaml\nmicro_batch: 16\nseed: 2\ndata:\n  flip: 0.25\n")
    read = recipe(f"recipe={path}", "seed=3")
    assert (read.batch, read.micro_batch, read.seed) == (64, 16, 3)
    assert (read.data.streams, read.data.window, read.data.flip) == (8, 7, 0.25)
    assert read.name == "mine"  # not the base's: that would go on with its run
    assert recipe(f"recipe={path}", "name=x").name == "x"


def test_base_by_name_finds_shipped_recipes_and_neighbours(tmp_path):
    write(tmp_path, "near.yaml", "seed: 5\n")
    assert recipe(f"recipe={write(tmp_path, 'a.yaml', 'base: near')}").seed == 5
    assert recipe(f"recipe={write(tmp_path, 'b.yaml', 'base: vit_b_20m')}").batch == 4096


def test_plain_words_of_a_file_stay_text(tmp_path):
    path = write(
        tmp_path, "a.yaml", "name: 007\ntrack: {mlflow: off, experiment: 1e-4}\nslurm: {mem: 64}\ndata: {path: ~}\n"
    )
    read = recipe(f"recipe={path}")
    assert (read.name, read.track.mlflow, read.track.experiment, read.slurm.mem) == ("007", "off", "1e-4", "64")
    assert read.data.path is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch: 64\nmicro_bach: 8\n", ["a.yaml:2", "micro_bach", "did you mean micro_batch?"]),
        ("batch: 64\nbatch: 32\n", ["a.yaml:2", "batch is given twice", "a.yaml:1"]),
        ("optimizer:\n  blr: fast\n", ["a.yaml:2", "optimizer.blr=fast: expected a number > 0"]),
        ("optimizer: 3\n", ["a.yaml:1", "optimizer is a section"]),
        ("optimizer.blr: 3\n", ["a.yaml:1", "optimizer.blr", "nest blr"]),
        ("batch: [1\n", ["a.yaml:2", "not valid YAML"]),
        ("- 1\n", ["a.yaml", "mapping of keys to values"]),
        ("base: nowhere.yaml\n", ["a.yaml:1", "nowhere.yaml: no such file"]),
        ("batch: true\n", ["a.yaml:1", "batch=true: expected a whole number"]),
        ("model:\n  depth: 0\n", ["a.yaml:2: model.depth=0: expected a whole number > 0"]),
    ],
)
def test_mistakes_in_a_file_name_file_line_and_key(tmp_path, text, parts):
    path = write(tmp_path, "a.yaml", text)
    message = refusal(f"recipe={path}")
    for part in parts:
        assert part in message


def test_a_key_without_effect_beside_another_is_refused_with_what_gives_it_one(tmp_path):
    message = refusal("recipe=demo", "optimizer.blr=1e-9")
    assert re.fullmatch(
        r"optimizer.blr=1e-09 has no effect beside optimizer.lr=0.002 \(\S+demo.yaml:\d+\); "
        r"add optimizer.lr=null, or leave optimizer.blr out",
        message,
    )
    assert recipe("recipe=demo", "optimizer.blr=1e-9", "optimizer.lr=null").optimizer.lr is None
    message = refusal("recipe=faces_small_mae", "train.epochs=1e300")
    assert "train.epochs=1e+300 has no effect beside train.steps=600 (" in message
    assert "add train.steps=null" in message
    assert recipe("recipe=faces_small_mae", "train.epochs=8", "train.steps=").train.steps is None
    assert "(command line)" in refusal("train.epochs=3", "train.steps=9")

    derived = write(tmp_path, "mine.yaml", "base: demo\noptimizer:\n  blr: 1e-4\n")
    message = refusal(f"recipe={derived}")
    assert message.startswith(f"{derived}:3: optimizer.blr=0.0001 has no effect beside optimizer.lr=0.002 (")
    write(tmp_path, "mine.yaml", "base: demo\noptimizer:\n  blr: 1e-4\n  lr: null\n")
    assert recipe(f"recipe={derived}", "train.steps=8").optimizer.lr is None
    # The other way round the key that is given wins; and a run's own recipe states both.
    assert recipe("recipe=vit_b_20m", "optimizer.lr=1e-3").optimizer.lr == 1e-3
    own = write(tmp_path, "own.yaml", cli.dump(recipe("recipe=demo")))
    assert recipe(f"recipe={own}", "train.steps=9").train.steps == 9


def test_a_base_with_a_base_is_refused(tmp_path):
    write(tmp_path, "one.yaml", "seed: 1\n")
    write(tmp_path, "two.yaml", "base: one.yaml\n")
    message = refusal(f"recipe={write(tmp_path, 'three.yaml', 'base: two.yaml')}")
    assert "three.yaml:1" in message
    assert "one level deep" in message


def test_unknown_recipe_names_the_nearest_and_all():
    message = refusal("recipe=vit_b_20")
    assert "did you mean vit_b_20m?" in message
    assert "demo" in message


def test_a_folder_or_binary_as_recipe_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refusal(f"recipe={tmp_path / 'x.yaml'}")
    assert "is a folder" in refusal(f"recipe={tmp_path}/")
    (tmp_path / "empty.yaml").touch()
    assert "empty.yaml: the recipe is empty" in refusal(f"recipe={tmp_path / 'empty.yaml'}")


def test_without_any_argument_a_recipe_is_asked_for():
    with pytest.raises(UserError, match=r"launch: no recipe is given; say recipe=NAME \(demo, "):
        cli.load_recipe([])


def test_a_dumped_recipe_reads_back_equal(tmp_path):
    first = recipe(
        "recipe=demo", "name=1e-4", "track.experiment=off", "slurm.extra.gres=gpu:8", "optimizer.eps=3e-9",
        "data.path=~", "slurm.mem=64", "slurm.partition='null'",
    )  # fmt: skip
    path = write(tmp_path, "recipe.yaml", cli.dump(first))
    assert recipe(f"recipe={path}") == first


# --- verbs --------------------------------------------------------------------------------------------------------


class Options(Section):
    """Options of a verb beside the recipe's."""

    mode: Literal["a", "b"] = Field("a", description="how")


def test_load_separates_the_verbs_keys_from_the_recipes():
    read, options = cli.load(["mode=b", "recipe=demo", "seed=9"], Options, verb="x")
    assert (read.seed, options.mode) == (9, "b")
    with pytest.raises(UserError, match=r"mode=c: expected one of a, b"):
        cli.load(["mode=c"], Options, verb="x")
    with pytest.raises(UserError, match="did you mean mode"):
        cli.load(["mod=a"], Options, verb="x")


def test_help_lists_every_key_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as left:
        cli.load(["batch=3", "--help"], Options, verb="x")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, key in cli.keys(Recipe).items():
        assert name in text
        assert " ".join(key.field.description.split())[:40] in text
    assert "mode how [one of a, b; default a]" in text
    assert "vit_b_20m" in text
    assert "learning rate; lr = blr · batch / 256 [a number > 0; default 0.00015]" in text


def test_every_key_has_a_meaning():
    assert [name for name, key in cli.keys(Recipe).items() if not key.field.description] == []


def test_main_turns_errors_into_a_line_and_a_status(capsys):
    def verb(argv):
        if argv == ["user"]:
            raise UserError("what,\n where")
        if argv == ["ctrl-c"]:
            raise KeyboardInterrupt
        if argv == ["bug"]:
            raise RuntimeError
        return 7

    main = cli.main(verb)
    assert main(["user"]) == 2
    assert capsys.readouterr().err == "error: what, where\n"
    assert main(["ctrl-c"]) == 130
    assert main([]) == 7
    with pytest.raises(RuntimeError):
        main(["bug"])


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EACCES, 2),
        (errno.ENOSPC, 2),
        (errno.EISDIR, 2),
        (errno.EIO, 69),
        (errno.ESTALE, 69),
        (errno.ENOENT, None),
    ],
)
def test_what_the_machine_refuses_is_a_line_and_other_errors_are_not_hidden(capsys, number, status):
    @cli.main
    def verb(argv):
        raise OSError(number, os.strerror(number), "/some/file")

    if status is None:
        with pytest.raises(OSError, match="/some/file"):
            verb([])
        return
    assert verb([]) == status
    assert capsys.readouterr().err.startswith(f"error: /some/file: {os.strerror(number)}; mend that")


def test_a_directory_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(lambda argv: 0)([]) == 2
    assert "the current directory has been deleted" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m mcf.launch --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout == f"mcf.launch: {cli.VERBS['launch']}\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    ["mcf", "mcf.launch --help", "mcf.launch recipe=demo data.samples=99 mode=print", "mcf.kernels.aot --help"],
)
def test_a_terminal_without_some_letter_is_shown_the_rest(words):
    command = [sys.executable, "-m", *words.split()]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout  # one of … → ≈
    text = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, capture_output=True).stdout.decode()
    assert done.stdout.decode("latin-1") == text.encode("latin-1", errors="replace").decode("latin-1")


def test_ctrl_c_while_a_verb_is_imported_is_no_traceback(tmp_path):
    """It comes with the import of yaml here, which every verb needs. A program that imports mcf keeps its handlers."""
    write(tmp_path, "yaml.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    write(tmp_path, "program.py", "import mcf.cli\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], env=os.environ | {"PYTHONPATH": path}, capture_output=True)

    for words in (["-m", "mcf"], ["-m", "mcf.launch", "recipe=demo"], ["-mmcf.train", "--help"]):
        done = run(*words)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    for words in (["-c", "import mcf.cli"], ["-m", "program", "mcf.launch"]):
        done = run(*words)
        assert done.returncode == -signal.SIGINT
        assert done.stderr.endswith(b"KeyboardInterrupt\n")


def test_mcf_alone_lists_every_verb_there_is():
    done = subprocess.run([sys.executable, "-m", "mcf"], capture_output=True, text=True, check=True)
    root = Path(cli.__file__).parent
    found = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
        for path in root.rglob("*.py")
        if "@cli.main\n" in path.read_text()
    }
    # The kernels' verbs read nothing of the rest: they have a command line of their own, which says the same.
    kernels = {
        verb: does
        for path in (root.parent / "kernels").rglob("*.py")
        for verb, does in re.findall(r'parse\(\s*"mcf\.([\w.]+)",\s*"([^"]+)"', path.read_text())
    }
    parts = {verb for verb in (*found, *kernels) if re.search(r"bench\.", verb)}
    assert set(cli.VERBS) == {*found, *kernels} - parts
    assert kernels.items() <= cli.VERBS.items() | {(verb, kernels[verb]) for verb in parts & kernels.keys()}
    for verb, does in cli.VERBS.items():
        assert re.search(rf"^  mcf\.{re.escape(verb)} +{re.escape(does)}$", done.stdout, re.MULTILINE)


def test_help_says_first_what_the_verb_does_and_what_sections_are_about(capsys):
    with pytest.raises(SystemExit):
        cli.load(["--help"], Options, verb="launch")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mcf.launch: {cli.VERBS['launch']}"
    for title in ("keys", "recipe: a whole run", "model.decoder: the decoder M0", "slurm: what Slurm is asked for"):
        assert any(line.startswith(title) for line in lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("verb", ["launch", "convert", "export"])
def test_help_loads_nothing_heavy(verb):
    code = (
        f"import sys; from mcf import {verb}\ntry: {verb}.main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_error_that_cannot_be_written_still_is_the_exit_status():
    """As of a rank whose log lies on a disk that is full; status 1 would send its job back to the queue."""
    code = "from mcf import cli, exits, errors\n@cli.main\ndef main(argv):\n    raise errors.UserError('no')\n"
    command = f"'{sys.executable}' -u -c \"$CODE\" > /dev/full 2>&1"
    for end in ("raise SystemExit(main([]))", "exits.leave_with(lambda: main([]))"):
        assert subprocess.run(command, shell=True, env={**os.environ, "CODE": code + end}).returncode == 2


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ("return 75", 75, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit()", 0, ""),
        (
            "raise RuntimeError('CUDA error: uncorrectable ECC error')",
            1,
            "RuntimeError: CUDA error: uncorrectable ECC error",
        ),
    ],
)
def test_a_rank_ends_at_once_however_it_ends(ends, status, said):
    """Without what Python and libraries tidy up: what is registered for the end would hang here."""
    code = f"import atexit, time\nfrom mcf import exits\natexit.register(time.sleep, 60)\ndef main():\n    {ends}\nexits.leave_with(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == status
    assert (done.stderr.splitlines() or [""])[-1] == said
