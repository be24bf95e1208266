"""The command line of every verb: `python -m mcf.VERB key=value …`, checked against a pydantic schema.

    argv ──► settings (mcf.settings) ──► schema ──► `mcf.checks` for whole recipes

Whatever is wrong is one line: the key, the value, where it was written, what was expected and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mcf import checks
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE, USER_ERROR
from mcf.keys import Key, dump, flatten, keys, render
from mcf.settings import put_over, read_command_line, read_recipe, recipe_names, validate

__all__ = ["dump", "flatten", "keys", "load", "load_recipe", "main", "parse", "recipe_names", "render", "wants_help"]

# Every verb, in the order in which a newcomer meets them, and what it does.
VERBS = {
    "demo": "from faces to a pre-trained encoder in a few minutes, on this machine",
    "data.faces": "draw a folder of faces with masks and landmarks, to try everything else on",
    "pack": "turn images, or LAION-Face's tars, into JPEG shards for training",
    "inspect": "look at packed data, or at the very batch of a step with its masks",
    "launch": "start a run, or go on with it where it stopped: on this machine or through Slurm",
    "follow": "show what a run on Slurm prints until it has ended",
    "finetune": "train a head for alignment or parsing on an encoder, and evaluate it",
    "probe": "ask an encoder's features of labelled faces: identity, landmarks, rank, uniformity",
    "results": "compare encoders by alignment and parsing: random, by the pixel loss alone, by the method",
    "predict": "draw the points or classes that a fine-tuned model finds on your own pictures",
    "train": "what every rank of a run does; run=RUN_DIR is what mcf.launch gives it",
    "task": "one rank of a run in a batch script of one's own: mcf.train, watched",
    "job": "what a batch script does before and after srun: look at the nodes, go back to the queue",
    "export": "write what a run has learned for timm, transformers or ONNX, with a model card",
    "convert": "turn weights of MoCo v3, MAE, timm or the released MCF into a ViT with timm's names",
    "parity": "compare one training step with golden numbers of the reference",
    "bench": "measure images/s of the data's way or of the training step",
    "kernels.bench": "measure the kernels beside PyTorch's own operations, once they are shown to be right",
    "kernels.aot": "compile every kernel for sm_80 and sm_90, on any machine, and see whether it is fit for them",
}

# What a machine can refuse at any place. Other errors of the system may be mistakes of the program: a traceback is due.
_SURROUNDINGS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG,
                 errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # fmt: skip
# What may have passed at the next try, without anybody's help: a file system that fails over.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)

T = TypeVar("T", bound=BaseModel)
O = TypeVar("O", bound=BaseModel)  # noqa: E741


def main(function: Callable[[list[str]], int]) -> Callable[..., int]:
    """Make a verb's `main(argv) -> status` out of a function: a UserError is one line and its status (2), ctrl-C is 130."""

    @functools.wraps(function)
    def wrapped(argv: list[str] | None = None) -> int:
        _look_after_streams()
        try:
            _check_directory()
            return function(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            _complain(f"error: {error}")
            return error.status
        except KeyboardInterrupt:
            return 130
        except OSError as error:
            if error.errno in (*_SURROUNDINGS, *_PASSING):
                where = f"{error.filename}: " if error.filename else ""
                _complain(f"error: {where}{error.strerror}; mend that, and give the same command again")
                return UNAVAILABLE if error.errno in _PASSING else USER_ERROR
            if error.errno != errno.EPIPE:
                raise
            return 141  # the reader (`| head`) has gone: nothing is wrong
        finally:
            _flush()

    return wrapped


def parse(schema: type[T], argv: list[str], *, verb: str) -> T:
    """Read `key=value …` into a schema.

    `--help` prints the keys and leaves with status 0. Raises UserError for whatever is wrong with the arguments.
    """
    known = keys(schema)
    if wants_help(argv):
        _print_help(verb, schema, {"keys": known})
    return validate(schema, read_command_line(argv, known, verb), verb)


def load_recipe(argv: list[str], *, verb: str = "launch") -> Recipe:
    """Read `recipe=NAME|FILE.yaml key=value …` into a whole, checked recipe.

    Raises UserError for whatever is wrong with it and can be seen without data, devices or heavy packages.
    """
    return load(argv, _RecipeOnly, verb=verb)[0]


def load(
    argv: list[str], options: type[O], *, verb: str, adapt: Callable[[Recipe], Recipe] = lambda recipe: recipe
) -> tuple[Recipe, O]:
    """`load_recipe` for verbs with keys of their own beside the recipe's (`mode=print`): (recipe, options).

    adapt: what a verb makes of the recipe before it is checked.
    """
    own = keys(options)
    known = {**own, "recipe": Key("recipe", _RECIPE_KEY), **keys(Recipe)}
    if wants_help(argv):
        _print_help(verb, options, {"keys": {"recipe": known["recipe"], **own}, **_sections(Recipe)})
    if not argv:
        raise UserError(
            f"{verb}: no recipe is given; say recipe=NAME ({', '.join(recipe_names()[:3])}, …) or recipe=FILE.yaml; "
            "`--help` lists all"
        )
    settings = read_command_line(argv, known, verb)
    chosen = settings.pop("recipe", None)
    mine = {name: settings.pop(name) for name in list(settings) if name.partition(".")[0] in options.model_fields}
    below = read_recipe(str(chosen.value)) if chosen is not None and chosen.value else {}
    settings = put_over(below, settings)
    own_values = validate(options, mine, verb)
    recipe = adapt(validate(Recipe, settings, verb))
    checks.check(recipe)
    return recipe, own_values


def _complain(line: str) -> None:
    """Write an error line; where it cannot be written (a log on a full disk), the exit status still says it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _flush() -> None:
    """Flush stdout, or let go of one that nobody reads any more: the interpreter would complain of it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current directory has been deleted; change into another one") from None


def _look_after_streams() -> None:
    """Streams that the caller has closed (`>&-`) are None in Python; what a terminal has no letter for becomes `?`."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # stderr escapes such letters by itself


class _RecipeOnly(BaseModel):
    """No keys beside the recipe's."""


_RECIPE_KEY = FieldInfo(annotation=str | None, default=None, description="recipe by name, or a YAML file")  # type: ignore[arg-type]


# --- help -----------------------------------------------------------------------------------------------------------


def wants_help(argv: list[str]) -> bool:
    """Whether the arguments ask for help rather than for anything to be done."""
    return any(token in ("--help", "-h", "help") for token in argv)


def _sections(schema: type[BaseModel], prefix: str = "") -> dict[str, dict[str, Key]]:
    """The keys of a schema by section; the titles say what the sections are about."""
    plain = {name: key for name, key in keys(schema, prefix).items() if "." not in name.removeprefix(prefix)}
    about = " ".join((schema.__doc__ or "").split()).rstrip(".")
    groups = {f"{prefix.rstrip('.') or 'recipe'}: {about[:1].lower()}{about[1:]}": plain}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            groups |= _sections(field.annotation, f"{prefix}{name}.")
    return groups


def _print_help(verb: str, schema: type[BaseModel], groups: dict[str, dict[str, Key]]) -> None:
    """Print what a verb does and all its keys with meaning, type and default, and leave."""
    width = min(shutil.get_terminal_size((120, 40)).columns, 140)
    name, _, part = verb.partition(" ")
    print(f"mcf.{verb}: {VERBS[name]}\n" if name in VERBS else f"mcf.{verb}\n")
    print(f"usage: python -m mcf.{name}{f' {part}' if part else ''} key=value …")
    print("       values are YAML: 1e-4, true, null, [1,2]; words and paths need no quotes\n")
    # The first sentence of a schema is for readers of the code; the user has read it above.
    _, _, more = " ".join((schema.__doc__ or "").split()).partition(". ")
    if more:
        print(textwrap.fill(more, width), end="\n\n")
    for title, group in groups.items():
        print(textwrap.fill(title, width, subsequent_indent="  "))
        for key in group.values():
            _print_key(key, width)
        print()
    if "recipe" in groups["keys"]:
        print(textwrap.fill(f"recipes: {', '.join(recipe_names())}", width, subsequent_indent="  "))
    raise SystemExit(0)


def _print_key(key: Key, width: int, column: int = 30) -> None:
    default = "must be given" if key.field.is_required() else f"default {key.default or repr('')}"
    text = f"{key.field.description or ''} [{key.expects}; {default}]".strip()
    lines = textwrap.wrap(text, max(width - column, 40))
    head = f"  {key.name}".ljust(column - 1)
    if len(head) >= column:
        print(head)
    else:
        print(f"{head} {lines.pop(0)}")
    for line in lines:
        print(" " * column + line)
