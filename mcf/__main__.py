"""`python -m mcf`: what there is."""

from __future__ import annotations

from mcf.cli import VERBS, main


@main
def _list(argv: list[str]) -> int:
    print("usage: python -m mcf.VERB key=value …      (--help lists the keys of a verb)\n")
    width = max(map(len, VERBS)) + 2
    print("\n".join(f"  mcf.{verb:<{width}}{does}" for verb, does in VERBS.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(_list())
