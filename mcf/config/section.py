"""What recipes and their sections are made of."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One block of a recipe: unknown keys are refused, numbers are finite, values do not change after the checks."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Run(Section):
    """The keys of a whole run, which goes on with the same ones: but for those below, other keys are another run."""

    # How it is run, not what is computed. A name stands for all keys under it.
    OF_THE_LAUNCH: ClassVar[tuple[str, ...]] = ()
    # Where files lie. They may move; that their content is the old one is checked by its fingerprint.
    PLACES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def is_of_the_launch(cls, key: str) -> bool:
        """Whether a dotted key says how a run is run, and not what it computes."""
        return _is_under(key, cls.OF_THE_LAUNCH)

    @classmethod
    def may_differ(cls, key: str) -> bool:
        """Whether a dotted key may have another value when a run goes on."""
        return _is_under(key, cls.OF_THE_LAUNCH + cls.PLACES)


def _is_under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
