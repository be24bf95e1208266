"""`key=value` on the command lines of this package, which reads nothing of the rest of mcf.

values = parse("mcf.kernels.bench", "what it does", {"op": ("all", "the operations")}, argv)
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Mapping


class ArgumentError(Exception):
    """What a user typed, or asked of this machine, cannot be done: one line that says what, and what can."""


def parse(verb: str, does: str, keys: Mapping[str, tuple[str, str]], argv: list[str]) -> dict[str, str]:
    """The values of all keys, as text.

    Args:
        verb: the module's name, for errors and help.
        does: one sentence for the help.
        keys: key → (default, meaning).
        argv: the words of the command line.

    Raises:
        ArgumentError: a word that is no key=value, an unknown key, or one that is given twice.
        SystemExit: help was asked for, and is printed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal has no letter for becomes `?`
    if any(word in ("-h", "--help", "help") for word in argv):
        print(f"{verb}: {does}\n\nusage: python -m {verb} key=value …\n")
        print("\n".join(f"  {key}={default or '…':12} {meaning}" for key, (default, meaning) in keys.items()))
        raise SystemExit(0)
    values: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals:
            raise ArgumentError(f"{word!r} is not key=value; keys: {', '.join(keys)}")
        if key not in keys:
            raise ArgumentError(
                f"unknown key {key!r}{nearest(key, keys)}; keys: {', '.join(keys)} (`--help` tells them)"
            )
        if key in values:
            raise ArgumentError(f"{key} is given twice: {values[key]!r} and {value!r}")
        values[key] = os.path.expanduser(value)  # noqa: PTH111 – not every value is a path
    return {key: values.get(key, default) for key, (default, _) in keys.items()}


def chosen(key: str, text: str, possible: list[str]) -> list[str]:
    """The words of a list like `mask,info_nce`, each one of the possible; `all` stands for all of them."""
    words = possible if text == "all" else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in possible:
            raise ArgumentError(f"{key}={word}: must be one of {', '.join(possible)}, all{nearest(word, possible)}")
    return words


def number(key: str, text: str, least: float) -> float:
    """A number that is not under the least."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ArgumentError(f"{key}={text}: must be a number ≥ {least:g}")
    return value


def nearest(word: str, possible: Mapping[str, object] | list[str]) -> str:
    """`; did you mean …?` where one of the possible words resembles this one."""
    close = difflib.get_close_matches(word, list(possible), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def said(error: ArgumentError) -> int:
    """Prints an error as all verbs do; the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 2
