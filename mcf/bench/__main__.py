"""`python -m mcf.bench part=PART key=value …`: hands over to the part's module, which has its own keys."""

from __future__ import annotations

import importlib
import sys

from mcf import caches, cli
from mcf.errors import UserError

PARTS = {
    "loader": "images/s of the data's way, beside plain loops",
    "pack": "images/s of cutting faces out of tars",
    "step": "images/s of the training step",
    "levers": "what each lever of the step's speed is worth, alone and together",
    "traffic": "what the step's networks move and multiply, counted: bounds of images/s on a GPU",
    "fed": "what the training step loses to the loader that feeds it",
    "attention": "times of attention's implementations, and the table that `attention: auto` goes by",
}


@cli.main
def main(argv: list[str]) -> int:
    """Run the benchmark that `part` names."""
    named = [word.removeprefix("part=") for word in argv if word.startswith("part=")]
    rest = [word for word in argv if not word.startswith("part=")]
    if not named and any(word in ("-h", "--help", "help") for word in rest):
        print(f"mcf.bench: {cli.VERBS['bench']}\n")
        print("usage: python -m mcf.bench part=PART key=value …   (part=PART --help lists its keys)")
        print("\n".join(f"  part={part:10} {does}" for part, does in PARTS.items()))
        return 0
    if len(named) != 1 or named[0] not in PARTS:
        raise UserError(f"part={','.join(named) or 'not set'}; give one of: {', '.join(f'part={p}' for p in PARTS)}")
    caches.keep_local()
    return importlib.import_module(f"mcf.bench.{named[0]}").main(rest)


if __name__ == "__main__":
    sys.exit(main(None))
