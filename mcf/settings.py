"""Settings: values of keys and where they were written, from the command line and from recipe files.

    argv, YAML files ──► settings: (dotted key, value, where it was written), later ones win
                     ──► unknown keys refused with the nearest one ──► schema

Values are YAML, read by the rules of YAML 1.2 (`1e-4` is a number; `on`, `off`, `yes`, `no` are words); a key that wants
text gets the text as it was written, so URIs, paths and run names like `007` need no quotes. `~/` is the home directory.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mcf.config import Recipe
from mcf.errors import UserError
from mcf.keys import Key, in_table, keys, nearest, parts_of, render, sections

T = TypeVar("T", bound=BaseModel)

COMMAND_LINE = "command line"
RECIPES = "mcf.recipes"
# What a key says where another one is null: it has no effect beside a value of that.
INSTEAD = {"optimizer.blr": "optimizer.lr", "train.epochs": "train.steps"}


@dataclass(frozen=True)
class Setting:
    """A value of a key, and where it was written (`command line`, `FILE:LINE`)."""

    value: Any
    origin: str


# --- recipes --------------------------------------------------------------------------------------------------------


def read_recipe(recipe: str) -> dict[str, Setting]:
    """The settings of a recipe file (or of a recipe's name), over those of its `base`.

    A recipe without a name of its own is named after its file: inheriting the base's would resume the base's run.
    """
    path = find_recipe(recipe)
    settings = read_file(path)
    base = settings.pop("base", None)
    settings.setdefault("name", Setting(Path(str(path)).stem, str(path)))
    if base is None:
        return settings
    below = read_file(find_recipe(str(base.value), beside=path, origin=base.origin))
    if "base" in below:
        raise UserError(
            f"{base.origin}: base={base.value} has a base itself ({below['base'].value}), and bases go one level deep; "
            f"build on {below['base'].value} and repeat the few keys of {base.value}"
        )
    below.pop("name", None)
    return put_over(below, settings)


def put_over(below: dict[str, Setting], above: dict[str, Setting]) -> dict[str, Setting]:
    """Both, where `above` wins; UserError if it says what has no effect beside a value of `below` (INSTEAD).

    Within one file both may stand: a run's own recipe.yaml states every key.
    """
    both = {**below, **above}
    for key, other in INSTEAD.items():
        if key not in above or other not in both or both[other].value is None:
            continue
        given, wins = above[key], both[other]
        if wins is below.get(other) or given.origin == COMMAND_LINE:
            raise UserError(
                f"{_origin(given)}{key}={render(given.value)} has no effect beside {other}={render(wins.value)} "
                f"({wins.origin}); add {other}=null, or leave {key} out"
            )
    return both


def recipe_names() -> list[str]:
    """Names of the recipes that come with mcf."""
    folder = importlib.resources.files(RECIPES)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_recipe(recipe: str, *, beside: Path | None = None, origin: str = COMMAND_LINE) -> Path:
    """The file of a recipe: a path (relative to the file that names it as its base), or a name of a shipped one."""
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        path = Path(recipe).expanduser()
        path = path if path.is_absolute() or beside is None else beside.parent / path
        if path.is_file():
            return path
        if path.is_dir():
            raise UserError(f"{origin}: recipe={recipe} is a folder; give a YAML file in it")
        raise UserError(f"{origin}: recipe={recipe}: no such file; a name without .yaml means one of mcf's own recipes")
    names = recipe_names()
    if recipe in names:
        return Path(str(importlib.resources.files(RECIPES) / f"{recipe}.yaml"))
    if beside is not None and (sibling := beside.with_name(f"{recipe}.yaml")).is_file():
        return sibling
    raise UserError(f"{origin}: recipe={recipe}: no such recipe{nearest(recipe, names)}; there are: {', '.join(names)}")


# --- from arguments and files to settings ---------------------------------------------------------------------------


def read_command_line(argv: list[str], known: dict[str, Key], verb: str) -> dict[str, Setting]:
    """The settings of `key=value …`; UserError for what is no such pair, unknown, or given twice."""
    settings: dict[str, Setting] = {}
    for token in argv:
        name, equals, text = token.partition("=")
        if not equals:
            hint = nearest(name.lstrip("-"), known) if name else ""
            raise UserError(f"{verb}: {token!r} is no key=value pair{hint}; `--help` lists the keys")
        if name.startswith("-"):
            raise UserError(f"{verb}: {token!r}: keys have no dashes in front; write {token.lstrip('-')}")
        _refuse_unknown(name, known, f"{verb}: {name}={text}")
        if name in settings:
            raise UserError(f"{verb}: {name} is given twice ({settings[name].value!r} and {text!r}); keep one of them")
        settings[name] = Setting(_value(text, known.get(name), f"{verb}: {name}={text}"), COMMAND_LINE)
    return settings


def read_file(path: Path, schema: type[BaseModel] = Recipe) -> dict[str, Setting]:
    """The settings of one file of a recipe (`base` among them) or another schema; UserError for what is wrong with it."""
    known = keys(schema)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a recipe is YAML in UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"{_place(path, error)}: not valid YAML ({_problem(error)}); mind indentation and colons"
        ) from None
    if node is None:
        raise UserError(f"{path}: the recipe is empty; write lines like `batch: 4096`, or `base: vit_b_20m`")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a mapping of keys to values; write lines like `batch: 4096`")
    settings: dict[str, Setting] = {}
    for name, origin, value in _walk(node, "", path, known):
        if name in settings:
            raise UserError(f"{origin}: {name} is given twice (first in {settings[name].origin}); keep one of them")
        settings[name] = Setting(value, origin)
    return settings


def _walk(node: yaml.MappingNode, prefix: str, path: Path, known: dict[str, Key]) -> Iterator[tuple[str, str, Any]]:
    for key_node, value_node in node.value:
        origin = f"{path}:{key_node.start_mark.line + 1}"
        part = str(key_node.value)
        name = prefix + part
        if not prefix and name == "base":
            yield name, origin, value_node.value
            continue
        section = sections(known).get(name)
        if "." in part and not in_table(name, known):
            raise UserError(
                f"{origin}: {name}: dotted keys are for the command line; nest {part.split('.')[-1]} under its section"
            )
        if section:
            if isinstance(value_node, yaml.MappingNode):
                yield from _walk(value_node, f"{name}.", path, known)
            elif value_node.tag != "tag:yaml.org,2002:null":
                raise UserError(f"{origin}: {name} is a section; indent its keys under it: {section}")
            continue
        _refuse_unknown(name, known, f"{origin}: {name}")
        yield name, origin, _construct(value_node, known.get(name), origin)


def _refuse_unknown(name: str, known: dict[str, Key], where: str) -> None:
    if name in known or in_table(name, known):
        return
    if inner := sections(known).get(name):
        raise UserError(f"{where}: {name} is a section; set its keys: {inner}")
    remedy = nearest(name, known) or ";"
    raise UserError(f"{where}: unknown key{remedy} `--help` lists the keys".replace("? `", "?; `"))


def _value(text: str, key: Key | None, where: str) -> Any:
    """The value of a command-line pair."""
    if key is not None and key.text and not _quoted(text):
        return None if text in ("", "~", "null") else text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({_problem(error)}); quote it, or write lists as [1,2]") from None


def _construct(node: yaml.Node, key: Key | None, origin: str) -> Any:
    """The value of a node of a file; plain words stay as written where the key wants text."""
    plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != "tag:yaml.org,2002:null"
    if plain and key is not None and key.text:
        return node.value
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML ({_problem(error)})") from None


# --- YAML -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema (and `_` inside whole numbers)."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.nan|\.NaN",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(
        node.value.replace("_", "")
        .replace(".inf", "inf")
        .replace(".Inf", "inf")
        .replace(".nan", "nan")
        .replace(".NaN", "nan")
    ),
)


def _quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}:{mark.line + 1}" if mark else str(path)


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


# --- from settings to a schema --------------------------------------------------------------------------------------


def validate(schema: type[T], settings: dict[str, Setting], verb: str) -> T:
    """The settings as an object of the schema; UserError for the first value that does not fit."""
    known = keys(schema)
    nested: dict[str, Any] = {}
    for name, setting in settings.items():
        if isinstance(setting.value, bool) and (key := known.get(name)) and bool not in key.choices:
            # pydantic would take true for 1.
            raise _wrong(name, setting, key)
        place = nested
        *parents, last = parts_of(name, known)
        for parent in parents:
            place = place.setdefault(parent, {})
        value = _at_home(setting.value)
        if isinstance(place.get(last), dict) and isinstance(value, dict):
            place[last] |= value
        else:
            place[last] = value
    try:
        return schema.model_validate(nested)
    except ValidationError as error:
        raise _explain(error, settings, known, verb) from None


def _at_home(value: Any) -> Any:
    """A path, or a list of them, with its `~/` or `~user/` said in full: a shell does so only at the start of a word."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and "://" not in value else value  # noqa: PTH111


def _explain(error: ValidationError, settings: dict[str, Setting], known: dict[str, Key], verb: str) -> UserError:
    """The first of pydantic's complaints as a line of ours."""
    first = error.errors(include_url=False)[0]
    name = ""
    for part in map(str, first["loc"]):
        if name in known:
            break
        name = f"{name}.{part}" if name else part
    key = known.get(name)
    if first["type"] == "missing" and name not in settings:  # else a list of the key's is too short
        meaning = f" ({key.field.description})" if key and key.field.description else ""
        return UserError(f"{verb}: {name} is missing{meaning}; add {name}=VALUE")
    if first["type"] in ("value_error", "assertion_error") or key is None:
        said = str(first.get("ctx", {}).get("error", first["msg"])).removeprefix("Value error, ")
        return UserError(f"{verb}: {said}" if key is None else f"{_origin(settings.get(name), verb)}{name}: {said}")
    return _wrong(name, settings.get(name, Setting(first["input"], verb)), key)


def _wrong(name: str, setting: Setting, key: Key) -> UserError:
    hint = ""
    if isinstance(setting.value, str):
        hint = nearest(
            setting.value, [c for t in key.choices if get_origin(t) is Literal for c in map(str, get_args(t))]
        )
    return UserError(f"{_origin(setting)}{name}={render(setting.value)}: expected {key.expects}{hint}")


def _origin(setting: Setting | None, verb: str = "") -> str:
    if setting is None or setting.origin == COMMAND_LINE:
        return f"{verb}: " if verb else ""
    return f"{setting.origin}: "
