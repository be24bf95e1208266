"""The machine that a plan's times are for: a few numbers of a GPU and its network, in a YAML file.

machine=h200            recipes/machines/h200.yaml, which comes with mcf
machine=ours.yaml       a file like it
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from pydantic import Field

from mcf.config import Section, Share
from mcf.errors import UserError
from mcf.keys import nearest
from mcf.settings import RECIPES, read_file, validate

FOLDER = "machines"


class FlopsConfig(Section):
    """Peak of a GPU's matrix units, dense."""

    bf16: float = Field(gt=0, description="bfloat16, FLOP/s")
    fp32: float = Field(gt=0, description="float32 as torch multiplies it by default, without TF32, FLOP/s")


class Machine(Section):
    """A node with GPUs: what its data sheet says, and the share of it that a training step reaches."""

    flops: FlopsConfig
    reached: Share = Field(gt=0, description="share of the peak that the whole step reaches")
    memory: float = Field(gt=0, description="of a GPU, bytes")
    memory_bandwidth: float = Field(gt=0, description="of a GPU's memory, bytes/s")
    intra_node: float = Field(gt=0, description="what a GPU sends to the others of its node, bytes/s, one direction")
    inter_node: float = Field(gt=0, description="what a node sends to other nodes, bytes/s, one direction")


def machine_names() -> list[str]:
    """Names of the machines that come with mcf."""
    folder = importlib.resources.files(RECIPES) / FOLDER
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_machine(machine: str | None) -> Machine | None:
    """The machine of the recipe's key `machine`: a name or a YAML file; None for none.

    Raises:
        UserError: no such machine, or a file that is none.
    """
    if machine is None:
        return None
    if machine.endswith((".yaml", ".yml")) or os.sep in machine:
        path = Path(machine).expanduser()
        if not path.is_file():
            raise UserError(f"machine={machine}: no such file; a name without .yaml means one of mcf's own machines")
    elif machine in (names := machine_names()):
        path = Path(str(importlib.resources.files(RECIPES) / FOLDER / f"{machine}.yaml"))
    else:
        known = ", ".join(names)
        raise UserError(f"machine={machine}: no such machine{nearest(machine, names) or ';'} there are: {known}")
    return validate(Machine, read_file(path, Machine), str(path))
