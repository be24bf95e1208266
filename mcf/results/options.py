"""The keys of `mcf.results`."""

from __future__ import annotations

from pydantic import Field

from mcf.config import NonNegative, Positive, Section


class ResultsConfig(Section):
    """Compare encoders: random, pre-trained by the pixel loss alone, and by the method.

    Alignment and parsing with a frozen encoder and few labels. Started again with the same keys, it goes on where it was.
    """

    alignment: str = Field(description="folder of the faces with points; its people must not be in both splits")
    alignment_set: str = Field("csv", description="how that folder is laid out: a dataset of mcf.finetune")
    parsing: str = Field(description="folder of the faces with masks")
    parsing_set: str = Field("masks", description="how that folder is laid out")
    out: str = Field("results", description="folder for crops, shards, runs, results.csv and results.md")
    seeds: tuple[NonNegative, ...] = Field(
        (0, 1, 2), min_length=1, description="each a pre-training and heads of its own"
    )
    one_pretraining: bool = Field(
        False,
        description="pre-train with the first seed only: the spread is then of heads, and of random encoders, alone",
    )
    steps: Positive = Field(800, ge=2, description="steps of pre-training in all; the method's two stages share them")
    size: Positive = Field(96, description="side of the crops that are pre-trained on, pixels")
    alignment_labels: Positive = Field(100, description="labelled faces that alignment is learned from")
    parsing_labels: Positive = Field(50, description="labelled faces that parsing is learned from")
    jobs: Positive = Field(2, description="runs at a time, one thread each")
    train: str = Field("", description="further keys for mcf.train, separated by spaces")
    finetune: str = Field("", description="further keys for mcf.finetune, separated by spaces")

    def decisive(self) -> dict:
        """The keys that numbers depend on."""
        return self.model_dump(mode="json", exclude={"out", "jobs", "seeds"})
