"""The command line of every verb: `python -m mcf.VERB key=value …`, checked against a pydantic schema.

    argv, YAML files ──► settings: (dotted key, value, where it was written), later ones win
                     ──► unknown keys refused with the nearest one ──► schema ──► `mcf.checks` for whole recipes

Whatever is wrong is one line: the key, the value, where it was written, what was expected and the remedy. Values are
YAML, read by the rules of YAML 1.2 (`1e-4` is a number; `on`, `off`, `yes`, `no` are words); a key that wants text
gets the text as it was written, so URIs, paths and run names like `007` need no quotes.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mcf import checks
from mcf.config import Recipe
from mcf.errors import UserError

T = TypeVar("T", bound=BaseModel)
O = TypeVar("O", bound=BaseModel)  # noqa: E741

COMMAND_LINE = "command line"
RECIPES = "mcf.recipes"


@dataclass(frozen=True)
class Key:
    """One key of a schema: dotted name, the type it was declared with, its constraints, default and meaning."""

    name: str
    field: FieldInfo

    @property
    def text(self) -> bool:
        """Whether the key takes text (then values are taken as written)."""
        return any(t is str or (get_origin(t) is Literal and isinstance(get_args(t)[0], str)) for t in self._choices)

    @property
    def table(self) -> bool:
        """Whether the key is a table with names of the user's choice (`slurm.extra`)."""
        return any(get_origin(t) is dict for t in self._choices)

    @property
    def _choices(self) -> list[Any]:
        return [_bare(t) for t in _alternatives(self.field.annotation)]

    @property
    def expects(self) -> str:
        """What a value must be, in words: `a whole number > 0`, `one of a, b`."""
        return _expects(self.field.annotation, self.field.metadata)

    @property
    def default(self) -> str:
        """The default as it would be written on the command line; empty if the key must be given."""
        if self.field.is_required():
            return ""
        value = self.field.get_default(call_default_factory=True)
        return render(value)


@dataclass(frozen=True)
class Setting:
    """A value of a key, and where it was written (`command line`, `FILE:LINE`)."""

    value: Any
    origin: str


def keys(schema: type[BaseModel], prefix: str = "") -> dict[str, Key]:
    """All dotted keys of a schema, in the order of declaration."""
    found: dict[str, Key] = {}
    for name, field in schema.model_fields.items():
        if _is_section(field.annotation):
            found |= keys(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found[prefix + name] = Key(prefix + name, field)
    return found


def parse(schema: type[T], argv: list[str], *, verb: str) -> T:
    """Read `key=value …` into a schema.

    `--help` prints the keys and leaves with status 0. Raises UserError for whatever is wrong with the arguments.
    """
    known = keys(schema)
    if _wants_help(argv):
        _print_help(verb, schema, {"": known})
    return _validate(schema, _command_line(argv, known, verb), verb)


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
    settings = _command_line(argv, known, verb)
    chosen = settings.pop("recipe", None)
    mine = {name: settings.pop(name) for name in list(settings) if name.partition(".")[0] in options.model_fields}
    if chosen is not None and chosen.value:
        settings = {**read_recipe(str(chosen.value)), **settings}
    own_values = _validate(options, mine, verb)
    recipe = _validate(Recipe, settings, verb)
    checks.check(recipe)
    return recipe, own_values


def read_recipe(recipe: str) -> dict[str, Setting]:
    """The settings of a recipe file (or of a recipe's name), over those of its `base`.

    A recipe without a name of its own is named after its file: inheriting the base's would resume the base's run.
    """
    path = find_recipe(recipe)
    settings = _read_file(path)
    base = settings.pop("base", None)
    settings.setdefault("name", Setting(Path(str(path)).stem, str(path)))
    if base is None:
        return settings
    below = _read_file(find_recipe(str(base.value), beside=path, origin=base.origin))
    if "base" in below:
        raise UserError(
            f"{base.origin}: base={base.value} has a base itself ({below['base'].value}), and bases go one level deep; "
            f"build on {below['base'].value} and repeat the few keys of {base.value}"
        )
    below.pop("name", None)
    return {**below, **settings}


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
        raise UserError(f"{origin}: recipe={recipe}: no such file; a name without .yaml means one of mcf's own recipes")
    names = recipe_names()
    if recipe in names:
        return Path(str(importlib.resources.files(RECIPES) / f"{recipe}.yaml"))
    if beside is not None and (sibling := beside.with_name(f"{recipe}.yaml")).is_file():
        return sibling
    raise UserError(
        f"{origin}: recipe={recipe}: no such recipe{_nearest(recipe, names)}; there are: {', '.join(names)}"
    )


def dump(model: BaseModel) -> str:
    """A recipe (or other schema) as YAML that `recipe=FILE` reads back to an equal one."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(model: BaseModel) -> dict[str, Any]:
    """The values of a schema by dotted key."""
    values: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            values |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        else:
            values[name] = value
    return values


def render(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(render, value)) + "]"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1 << 20)
    return text.removesuffix("...\n").strip()


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


class _RecipeOnly(BaseModel):
    """No keys beside the recipe's."""


_RECIPE_KEY = FieldInfo(annotation=str | None, default=None, description="recipe by name, or a YAML file")  # type: ignore[arg-type]


# --- from arguments and files to settings ---------------------------------------------------------------------------


def _command_line(argv: list[str], known: dict[str, Key], verb: str) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for token in argv:
        name, equals, text = token.partition("=")
        if not equals:
            hint = _nearest(name.lstrip("-"), known) if name else ""
            raise UserError(f"{verb}: {token!r} is no key=value pair{hint}; `--help` lists the keys")
        if name.startswith("-"):
            raise UserError(f"{verb}: {token!r}: keys have no dashes in front; write {token.lstrip('-')}")
        _refuse_unknown(name, known, f"{verb}: {name}={text}")
        if name in settings:
            raise UserError(f"{verb}: {name} is given twice ({settings[name].value!r} and {text!r}); keep one of them")
        settings[name] = Setting(_value(text, known.get(name), f"{verb}: {name}={text}"), COMMAND_LINE)
    return settings


def _read_file(path: Path) -> dict[str, Setting]:
    known = keys(Recipe)
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
        return {}
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
        section = _sections(known).get(name)
        if "." in part and not _in_table(name, known):
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


# --- from settings to a schema --------------------------------------------------------------------------------------


def _validate(schema: type[T], settings: dict[str, Setting], verb: str) -> T:
    known = keys(schema)
    nested: dict[str, Any] = {}
    for name, setting in settings.items():
        if isinstance(setting.value, bool) and (key := known.get(name)) and bool not in key._choices:
            # pydantic would take true for 1.
            raise _wrong(name, setting, key)
        place = nested
        *parents, last = _parts(name, known)
        for parent in parents:
            place = place.setdefault(parent, {})
        if isinstance(place.get(last), dict) and isinstance(setting.value, dict):
            place[last] |= setting.value
        else:
            place[last] = setting.value
    try:
        return schema.model_validate(nested)
    except ValidationError as error:
        raise _explain(error, settings, known, verb) from None


def _explain(error: ValidationError, settings: dict[str, Setting], known: dict[str, Key], verb: str) -> UserError:
    """The first of pydantic's complaints as a line of ours."""
    first = error.errors(include_url=False)[0]
    name = ""
    for part in map(str, first["loc"]):
        if name in known:
            break
        name = f"{name}.{part}" if name else part
    key = known.get(name)
    if first["type"] == "missing":
        meaning = f" ({key.field.description})" if key and key.field.description else ""
        return UserError(f"{verb}: {name} is missing{meaning}; add {name}={(key.expects if key else 'VALUE')!r}")
    if first["type"] in ("value_error", "assertion_error") or key is None:
        said = str(first.get("ctx", {}).get("error", first["msg"])).removeprefix("Value error, ")
        return UserError(f"{verb}: {said}" if key is None else f"{_origin(settings.get(name), verb)}{name}: {said}")
    return _wrong(name, settings.get(name, Setting(first["input"], verb)), key)


def _wrong(name: str, setting: Setting, key: Key) -> UserError:
    hint = ""
    if isinstance(setting.value, str):
        hint = _nearest(
            setting.value, [c for t in key._choices if get_origin(t) is Literal for c in map(str, get_args(t))]
        )
    return UserError(f"{_origin(setting)}{name}={render(setting.value)}: expected {key.expects}{hint}")


def _origin(setting: Setting | None, verb: str = "") -> str:
    if setting is None or setting.origin == COMMAND_LINE:
        return f"{verb}: " if verb else ""
    return f"{setting.origin}: "


def _refuse_unknown(name: str, known: dict[str, Key], where: str) -> None:
    if name in known or _in_table(name, known):
        return
    if inner := _sections(known).get(name):
        raise UserError(f"{where}: {name} is a section; set its keys: {inner}")
    remedy = _nearest(name, known) or ";"
    raise UserError(f"{where}: unknown key{remedy} `--help` lists the keys".replace("? `", "?; `"))


def _nearest(word: str, candidates: Any) -> str:
    """`, did you mean X?`, or nothing if nothing is near.

    A key that was given without its section (`blr`) is nearest to the one that ends so.
    """
    names = list(candidates)
    same_end = [n for n in names if "." in n and n.rpartition(".")[2] == word.rpartition(".")[2]]
    near = same_end if len(same_end) == 1 else difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not near and (ends := {n.rpartition(".")[2]: n for n in names}):
        near = [ends[e] for e in difflib.get_close_matches(word.rpartition(".")[2], ends, n=1, cutoff=0.7)]
    near = same_end if not near and same_end else near
    return f", did you mean {near[0]}?" if near else ""


def _sections(known: dict[str, Key]) -> dict[str, str]:
    """Every section of a schema with a few of its keys, for messages."""
    inner: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            inner.setdefault(".".join(parts[:depth]), []).append(name)
    return {section: ", ".join(names[:4]) + (", …" if len(names) > 4 else "") for section, names in inner.items()}


def _in_table(name: str, known: dict[str, Key]) -> bool:
    parent, _, last = name.rpartition(".")
    return bool(last) and parent in known and known[parent].table


def _parts(name: str, known: dict[str, Key]) -> list[str]:
    if _in_table(name, known):
        parent, _, last = name.rpartition(".")
        return [*parent.split("."), last]
    return name.split(".")


# --- words for types ------------------------------------------------------------------------------------------------


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> list[Any]:
    union = get_origin(annotation) in (Union, UnionType)
    return [t for t in get_args(annotation) if t is not NoneType] if union else [annotation]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _expects(annotation: Any, metadata: Any = ()) -> str:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        flat = [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return _expects(inner, [*flat, *metadata])
    if get_origin(annotation) in (Union, UnionType):
        words = [_expects(t, metadata) for t in _alternatives(annotation)]
        return " or ".join(words + (["null"] if NoneType in get_args(annotation) else []))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (tuple, list):
        inner = get_args(annotation)
        count = "" if get_origin(annotation) is list or Ellipsis in inner else f" of {len(inner)} values"
        return f"a list{count} like [1,2], each {_expects(inner[0])}"
    if get_origin(annotation) is dict:
        return "a table like {name: value}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    word = names.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return " ".join([word, " and ".join(_limits(metadata))]).strip()


def _limits(metadata: Any) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of", "pattern": "matching"}
    found = ((sign, getattr(m, name, None)) for m in metadata for name, sign in signs.items())
    return [f"{sign} {render(value)}" for sign, value in found if value is not None]


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


def _quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}:{mark.line + 1}" if mark else str(path)


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
