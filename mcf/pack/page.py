"""`mcf.pack report=DIR`: one HTML page from which a person sees what went into a packed folder.

Figures and reasons come from report.json, the pictures from the shards: some random crops of each, the same ones each
time the page is made. The page is one file without scripts or links: it can be mailed.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from mcf import atomic
from mcf.data.shards import Manifest, load_manifest
from mcf.data.sheet import sheet
from mcf.errors import UserError
from mcf.pack.report import REPORT, balance, tables

PAGE = "report.html"
SHARDS = 40  # shown at most, spread evenly over the folder
PICTURES = 24  # of each
_COLUMNS, _CELL = 12, 88  # pixels
_FILES = 300  # left-out files listed
_HISTOGRAMS = ("Shorter side of the face's box, pixels", "Shorter side as stored, pixels")

_STYLE = """
body { font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .4em } p { margin: .4em 0 }
table { border-collapse: collapse; } td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bar { width: 420px } td.bar div { background: #4a7fb5; height: .85em; min-width: 1px }
.two { display: flex; flex-wrap: wrap; gap: 0 4em } figure { margin: 0 0 1.1em } figcaption { color: #555; font-size: .88em; margin-bottom: .2em }
img { max-width: 100%; display: block } .quiet { color: #555 } code { font-size: .92em; overflow-wrap: anywhere }
"""


def write_page(folder: Path) -> Path:
    """Make the page of a packed folder; where it lies. Raises UserError if the folder is none."""
    manifest = load_manifest(folder, key="report")
    file = folder / REPORT
    try:
        content = json.loads(file.read_text())
        body = _body(manifest, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); pack the folder again to have one") from None
    title = f"Packed: {folder.resolve().name}"
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )
    atomic.write(folder / PAGE, page.encode())
    return folder / PAGE


def _body(manifest: Manifest, content: dict[str, Any]) -> str:
    size = sum(shard.bytes for shard in manifest.shards)
    shown = _spread(len(manifest.shards))
    parts = [
        f"<p>{html.escape(balance(content))}</p>",
        f'<p class="quiet">{manifest.samples:,} JPEGs in {len(manifest.shards):,} shards, {_bytes(size)}; '
        f"{_bytes(size / manifest.samples)} each. Data fingerprint <code>{manifest.fingerprint}</code>.</p>",
        *(f'<p class="quiet">{html.escape(note)}</p>' for note in content["notes"]),
        '<div class="two">',
    ]
    for title, rows in tables(content):
        parts.append(f"<div><h2>{html.escape(title)}</h2>{_bars(rows, title in _HISTOGRAMS)}</div>")
    parts.append("</div><h2>Random pictures of each shard</h2>")
    if len(shown) < len(manifest.shards):
        parts.append(f'<p class="quiet">{len(shown)} of {len(manifest.shards):,} shards, spread evenly.</p>')
    parts += [_figure(manifest, shard) for shard in shown]
    parts.append(_left_out(content))
    settings = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in content["settings"].items()
        if value is not None
    )
    parts.append(f"<h2>Settings</h2><table>{settings}</table>")
    return "\n".join(parts)


def _spread(count: int) -> list[int]:
    """At most SHARDS of `count` numbers, evenly over all."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, SHARDS)).round()})


def _bars(rows: dict[str, int], histogram: bool) -> str:
    """A table of counts; those of a histogram with bars and shares."""
    most, total = max(rows.values()), sum(rows.values())
    cells = []
    for key, count in rows.items():
        bar = f'<td class="n quiet">{count / total:.1%}</td>'
        if histogram:
            bar += f'<td class="bar"><div style="width:{100 * count / most:.1f}%"></div></td>'
        cells.append(f'<tr><td>{html.escape(str(key))}</td><td class="n">{count:,}</td>{bar}</tr>')
    return f"<table>{''.join(cells)}</table>"


def _figure(manifest: Manifest, shard: int) -> str:
    stream = io.BytesIO()
    pictures = some_jpegs(manifest, shard, PICTURES)
    sheet(pictures, _COLUMNS, _CELL).save(stream, "JPEG", quality=85)
    name = f"{manifest.shards[shard].name}, {manifest.shards[shard].samples:,} pictures"
    source = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><figcaption>{html.escape(name)}</figcaption><img alt="{html.escape(name)}" '
        f'src="data:image/jpeg;base64,{source}"></figure>'
    )


def some_jpegs(manifest: Manifest, shard: int, count: int) -> list[bytes]:
    """Random JPEGs of a shard, the same ones each time, in the order they lie in."""
    index = manifest.index(shard)
    rows = np.sort(np.random.default_rng([0, shard]).permutation(len(index))[:count])
    with (manifest.path / manifest.shards[shard].name).open("rb") as file:
        result = []
        for offset, size in zip(index["offset"][rows].tolist(), index["size"][rows].tolist()):
            file.seek(offset)
            result.append(file.read(size))
    return result


def _left_out(content: dict[str, Any]) -> str:
    files = content["files_left_out"]
    if not files:
        return ""
    rows = "".join(
        f"<tr><td><code>{_text(file['name'])}</code></td><td>{_text(file['reason'])}</td><td>{_text(file['detail'])}</td></tr>"
        for file in files[:_FILES]
    )
    more = sum(content["left_out"].values()) - min(len(files), _FILES)
    note = f'<p class="quiet">… and {more:,} more; {REPORT} and the lists in left_out/ have them.</p>' if more else ""
    return f"<h2>Left out</h2><table><tr><th>File</th><th>Reason</th><th>Details</th></tr>{rows}</table>{note}"


def _text(value: str) -> str:
    return html.escape(value.encode("utf-8", "backslashreplace").decode())


def _bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
