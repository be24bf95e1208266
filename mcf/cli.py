"""The command line of every verb: `python -m mcf.VERB key=value …`, checked against a pydantic schema.

    argv ──► settings (mcf.settings) ──► schema ──► `mcf.checks` for whole recipes

Whatever is wrong is one line: the key, the value, where it was written, what was expected and the remedy.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mcf import checks
from mcf.config import Recipe
from mcf.errors import UserError
from mcf.keys import Key, dump, flatten, keys, render
from mcf.settings import read_command_line, read_recipe, recipe_names, validate

__all__ = ["dump", "flatten", "keys", "load", "load_recipe", "main", "parse", "recipe_names", "render"]

T = TypeVar("T", bound=BaseModel)
O = TypeVar("O", bound=BaseModel)  # noqa: E741


def main(function: Callable[[list[str]], int]) -> Callable[..., int]:
    """Make a verb's `main(argv) -> status` out of a function: a UserError is one line and status 2, ctrl-C is 130."""

    @functools.wraps(function)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return function(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            # The reader (`| head`) has gone: nothing is wrong, but the interpreter must not flush into the pipe again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return wrapped


def parse(schema: type[T], argv: list[str], *, verb: str) -> T:
    """Read `key=value …` into a schema.

    `--help` prints the keys and leaves with status 0. Raises UserError for whatever is wrong with the arguments.
    """
    known = keys(schema)
    if _wants_help(argv):
        _print_help(verb, schema, {"": known})
    return validate(schema, read_command_line(argv, known, verb), verb)


def load_recipe(argv: list[str], *, verb: str = "launch") -> Recipe:
    """Read `recipe=NAME|FILE.yaml key=value …` into a whole, checked recipe.

    Raises UserError for whatever is wrong with it and can be seen without data, devices or heavy packages.
    """
    return load(argv, _RecipeOnly, verb=verb)[0]


def load(argv: list[str], options: type[O], *, verb: str) -> tuple[Recipe, O]:
    """`load_recipe` for verbs with keys of their own beside the recipe's (`mode=print`): (recipe, options)."""
    own = keys(options)
    known = {**own, "recipe": Key("recipe", _RECIPE_KEY), **keys(Recipe)}
    if _wants_help(argv):
        groups = {"": {"recipe": known["recipe"], **own}, "recipe keys": keys(Recipe)}
        _print_help(verb, options if options is not _RecipeOnly else Recipe, groups)
    settings = read_command_line(argv, known, verb)
    chosen = settings.pop("recipe", None)
    mine = {name: settings.pop(name) for name in list(settings) if name.partition(".")[0] in options.model_fields}
    if chosen is not None and chosen.value:
        settings = {**read_recipe(str(chosen.value)), **settings}
    own_values = validate(options, mine, verb)
    recipe = validate(Recipe, settings, verb)
    checks.check(recipe)
    return recipe, own_values


class _RecipeOnly(BaseModel):
    """No keys beside the recipe's."""


_RECIPE_KEY = FieldInfo(annotation=str | None, default=None, description="recipe by name, or a YAML file")  # type: ignore[arg-type]


# --- help -----------------------------------------------------------------------------------------------------------


def _wants_help(argv: list[str]) -> bool:
    return any(token in ("--help", "-h", "help") for token in argv)


def _print_help(verb: str, schema: type[BaseModel], groups: dict[str, dict[str, Key]]) -> None:
    """Print all keys with meaning, type and default, and leave."""
    width = min(shutil.get_terminal_size((120, 40)).columns, 140)
    print(f"usage: python -m mcf.{verb} key=value …\n")
    print(textwrap.fill(" ".join((schema.__doc__ or "").split()), width), end="\n\n")
    for title, group in groups.items():
        if title:
            print(f"{title}:")
        for name, key in group.items():
            default = "must be given" if key.field.is_required() else f"default {key.default or repr('')}"
            text = f"{key.field.description or ''} [{key.expects}; {default}]".strip()
            lines = textwrap.wrap(text, max(width - 34, 40))
            head = f"  {name:<30}  "
            print(
                head + f"\n{'':34}".join(lines) if len(head) == 34 else head + f"\n{'':34}" + f"\n{'':34}".join(lines)
            )
        print()
    if "recipe" in groups.get("", {}):
        print(textwrap.fill(f"recipes: {', '.join(recipe_names())}", width))
    raise SystemExit(0)
