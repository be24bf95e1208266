"""The model card beside exported weights: what they are, how they were trained, how well, and what to mind in passing them on.

The front matter is the one that the Hugging Face Hub reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mcf.errors import UserError

CARD = "README.md"
TERMS = {
    "moco_v3": "The files of MoCo v3 are published under CC BY-NC 4.0: not for commercial use.",
    "timm": "The teacher's file has a licence of its own; MAE's, for one, are published under CC BY-NC 4.0.",
    "mae": "MAE's files are published under CC BY-NC 4.0: not for commercial use.",
    "mcf": "The released MCF's files state no licence: ask their authors before passing on what they taught.",
    "farl": "FaRL's code is published under the MIT licence; its weights learned from LAION-Face, whose pictures have their own.",
    "checkpoint": "The teacher was itself trained with mcf: its own card and its own teacher count too.",
    "random": "The teacher was random: these weights show that a run works, and no more.",
}


@dataclass(frozen=True)
class Card:
    """What a card says.

    file: name of the weights. title, what: a heading, and sentences. use: Python that opens the file. trained: rows of
    (name, value). metrics: numbers by name. recipe: keys of the run, as plain values. terms: notes on licences.
    pipeline: what the Hub calls such a task.
    """

    file: str
    title: str
    what: str
    use: str
    trained: list[tuple[str, str]]
    metrics: Mapping[str, Any]
    measured: str
    recipe: Mapping[str, Any]
    terms: list[str]
    tags: list[str] = field(default_factory=list)
    pipeline: str = "image-feature-extraction"

    def text(self) -> str:
        """The card, Markdown."""
        front = {"license": "other", "tags": ["mcf", "face", *self.tags], "pipeline_tag": self.pipeline}
        parts = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{_mark(self.file)}\n# {self.title}",
            self.what,
            f"```python\n{self.use}\n```",
            "## Training",
            _table(("", ""), self.trained),
            "## Metrics",
            f"{self.measured}\n\n{_table(('metric', 'value'), _rows(self.metrics))}"
            if self.metrics
            else "None were found beside the checkpoint.",
            "## Licence and provenance",
            "\n".join(f"* {term}" for term in self.terms),
        ]
        if self.recipe:
            recipe = yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True, width=120)
            parts += ["## Recipe", f"```yaml\n{recipe}```"]
        return "\n\n".join(parts) + "\n"


def write(card: Card, folder: Path) -> Path:
    """Write a card into a folder as README.md, or as FILE.README.md beside a README.md of something else. Returns its path.

    Raises UserError if it cannot be written.
    """
    path = folder / CARD
    try:
        if path.exists() and _mark(card.file) not in path.read_text(errors="replace"):
            path = folder / f"{card.file}.{CARD}"
        path.write_text(card.text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the model card cannot be written ({error.strerror}); the weights are whole") from None
    return path


def terms(recipe: Mapping[str, Any]) -> list[str]:
    """What is known of the rights in weights that a pre-training recipe made."""
    teacher, data = recipe.get("teacher", {}), recipe.get("data", {})
    known = [
        "mcf gives these weights no licence. Whoever passes them on chooses one that the images and the teacher allow.",
        f"Images: {data.get('path') or 'unknown'}. Pictures found on the web, as LAION-Face's, belong to their makers, and faces "
        "are personal data: mind the law where the weights are used.",
    ]
    source = teacher.get("source")
    if source in TERMS and recipe.get("loss", {}).get("feature"):
        known.append(f"Teacher: {source}, {teacher.get('path') or 'no file'}. {TERMS[source]}")
    return known


def finetuned_terms(dataset: str, weights: Any) -> list[str]:
    """The same of a fine-tuned model."""
    return [
        "mcf gives these weights no licence. Whoever passes them on chooses one that the data and the encoder allow.",
        f"Labels and images: {dataset}. Most published sets of faces are for research alone; read the terms of yours.",
        f"Encoder: {weights or 'unknown'}; its own card says what it was trained on.",
    ]


def _mark(file: str) -> str:
    """By which a card of a file is known again."""
    return f"<!-- mcf.export: {json.dumps(file)} -->"


def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"`{name}`", f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in metrics.items()
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
