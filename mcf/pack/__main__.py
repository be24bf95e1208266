"""`python -m mcf.pack source=IMAGES out=SHARDS`: images or tars become JPEG shards, an index, a manifest, a report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcf import cli
from mcf.data.shards import load_manifest, verify
from mcf.errors import UserError
from mcf.pack.array import submit
from mcf.pack.options import PackConfig
from mcf.pack.page import write_page
from mcf.pack.writing import pack


@cli.main
def main(argv: list[str]) -> int:
    """Pack, here or with `nodes=N` on Slurm; or with `verify=true` check what was packed, or with `report=DIR` show it."""
    options = cli.parse(PackConfig, argv, verb="pack")
    if options.report is not None:
        if options.source or options.out:
            raise UserError(
                "report=DIR packs nothing: leave out source= and out=, or pack first and ask for the page then"
            )
        print(write_page(Path(options.report)))
        return 0
    if options.nodes is not None:
        submit(options, argv)
        return 0
    if not options.verify:
        with _gpus_left_alone(options):
            pack(options)
        return 0
    if not options.out:
        raise UserError("out is missing; say python -m mcf.pack out=SHARDS verify=true")
    manifest = load_manifest(Path(options.out), key="out")
    with _gpus_left_alone(options):
        verify(manifest)
    print(f"{options.out}: {manifest.samples:,} images in {len(manifest.shards):,} shards, all as they were written")
    return 0


@contextmanager
def _gpus_left_alone(options: PackConfig) -> Iterator[None]:
    """All is done on the CPU, and DALI's codecs would still open a GPU in every worker. A detector of the user's own may want it."""
    if ":" in (options.detector or ""):
        yield
        return
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


if __name__ == "__main__":
    raise SystemExit(main(None))
