"""The keys of a schema: their dotted names, what a value must be, in words, and values as they are written.

schema (pydantic) ──► keys: `optimizer.blr` → declared type, constraints, default, meaning
recipe            ──► flatten, dump, render: its values by key, as YAML, as on the command line
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Key:
    """One key of a schema: dotted name, the type it was declared with, its constraints, default and meaning."""

    name: str
    field: FieldInfo

    @property
    def text(self) -> bool:
        """Whether the key takes text (then values are taken as written)."""
        return any(t is str or (get_origin(t) is Literal and isinstance(get_args(t)[0], str)) for t in self.choices)

    @property
    def table(self) -> bool:
        """Whether the key is a table with names of the user's choice (`slurm.extra`)."""
        return any(get_origin(t) is dict for t in self.choices)

    @property
    def choices(self) -> list[Any]:
        """The types that the key may be of; null beside them is not listed."""
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


def keys(schema: type[BaseModel], prefix: str = "") -> dict[str, Key]:
    """All dotted keys of a schema, in the order of declaration."""
    found: dict[str, Key] = {}
    for name, field in schema.model_fields.items():
        if _is_section(field.annotation):
            found |= keys(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found[prefix + name] = Key(prefix + name, field)
    return found


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


def dump(model: BaseModel) -> str:
    """A recipe (or other schema) as YAML that `recipe=FILE` reads back to an equal one."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


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


# --- names ----------------------------------------------------------------------------------------------------------


def nearest(word: str, candidates: Iterable[str]) -> str:
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


def sections(known: dict[str, Key]) -> dict[str, str]:
    """Every section of a schema with a few of its keys, for messages."""
    inner: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            inner.setdefault(".".join(parts[:depth]), []).append(name)
    return {section: ", ".join(names[:4]) + (", …" if len(names) > 4 else "") for section, names in inner.items()}


def in_table(name: str, known: dict[str, Key]) -> bool:
    """Whether a dotted name lies in a table of `known` (`slurm.extra.gres`)."""
    parent, _, last = name.rpartition(".")
    return bool(last) and parent in known and known[parent].table


def parts_of(name: str, known: dict[str, Key]) -> list[str]:
    """The parts of a dotted name; a name in a table may have dots of its own."""
    if in_table(name, known):
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
