"""`python -m mcf`: what there is."""

from __future__ import annotations

from mcf.cli import VERBS

if __name__ == "__main__":
    print("usage: python -m mcf.VERB key=value …      (--help lists the keys of a verb)\n")
    print("\n".join(f"  mcf.{verb:<12}{does}" for verb, does in VERBS.items()))
