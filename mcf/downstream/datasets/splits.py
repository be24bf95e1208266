"""Which faces are trained on, and which are held out."""

from __future__ import annotations

import numpy as np

from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets.faceset import Face


def chosen_faces(train: list[Face], config: FinetuneConfig) -> tuple[list[Face], list[Face]]:
    """Faces to train on, and those held out to choose the epoch; `labels` of the former, spread over the split."""
    held: list[Face] = []
    if config.validation:
        train, held = split_by_person(train, config.validation)
    if config.labels is not None and config.labels < len(train):
        train = [train[i] for i in np.linspace(0, len(train) - 1, config.labels).round().astype(int)]
    return train, held


def split_by_person(faces: list[Face], share: float) -> tuple[list[Face], list[Face]]:
    """Faces cut in two, the second part holding about `share` of the people: nobody stands on both sides.

    People are taken in the order of their names, spread evenly; faces without a person are each their own.
    """
    people = sorted({face.person or face.name for face in faces})
    held = (
        {people[int(i)] for i in np.linspace(0, len(people) - 1, max(1, round(len(people) * share)))}
        if people
        else set()
    )
    return (
        [face for face in faces if (face.person or face.name) not in held],
        [face for face in faces if (face.person or face.name) in held],
    )
