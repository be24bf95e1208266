"""The guard: a non-finite step changes nothing, is written down, and too many in a row end the run.

The engine decides with all ranks whether a step is applied (a non-finite loss or gradient on any of them vetoes it).
The guard keeps count, leaves the keys of the samples that were in such a step, so that a person can look at them, and
warns when the queries fall together (collapse), which no loss term shows by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from mcf.config import GuardConfig
from mcf.errors import UserError

log = logging.getLogger(__name__)


class Guard:
    """Watches the steps of one rank.

    Every rank writes the keys of its own samples, to RUN/bad_steps/step-00000123.rank0.json.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, rank: int):
        self.config = config
        self.folder = Path(run_dir) / "bad_steps"
        self.rank = rank
        self.in_a_row = 0
        self._collapse_told = False

    def observe(self, step: int, applied: bool, keys: list[str], numbers: dict[str, float] | None = None) -> None:
        """Take note of a step: `keys` of this rank's samples, `numbers` whatever helps to understand it.

        `applied` is the same on all ranks. Raises UserError after `max_bad_steps` in a row that were not.
        """
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        file = self._write(step, keys, numbers or {})
        if self.rank == 0:
            log.warning("step %d is not finite and was not applied (%d in a row): %s", step, self.in_a_row, file)
        if self.in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"step {step}: {self.in_a_row} non-finite steps in a row (guard.max_bad_steps="
                f"{self.config.max_bad_steps}); their sample keys are in {self.folder}; the last checkpoint is good: "
                "look at the samples, or lower the rate of learning (optimizer.blr, or optimizer.lr where that is set), then launch again"
            )

    def _write(self, step: int, keys: list[str], numbers: dict[str, float]) -> Path:
        file = self.folder / f"step-{step:08d}.rank{self.rank}.json"
        # Numbers as text: JSON has no NaN.
        content = {"step": step, "rank": self.rank, "numbers": {k: str(v) for k, v in numbers.items()}, "keys": keys}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content, indent=1))
        except OSError as error:
            log.warning("the keys of bad step %d could not be written to %s: %s", step, file, error.strerror)
        return file

    def watch_collapse(self, query_std: float) -> str | None:
        """A warning, once per fall, when the spread of the queries says that they are all becoming the same.

        `query_std` is the mean over dimensions of the standard deviation over samples of L2-normalised queries, times
        √dim: about 1 for queries spread evenly over the sphere, 0 when all are equal.
        """
        limit, told = self.config.collapse_std, self._collapse_told
        self._collapse_told = query_std < limit
        if told or not self._collapse_told:
            return None
        return (
            f"the queries are collapsing: their spread is {query_std:.3f} of an even one (guard.collapse_std={limit:g})"
        )


# How torch's allocator and Triton, cuBLAS, and NCCL say that a GPU's memory does not suffice.
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "CUDA malloc")


@contextlib.contextmanager
def memory_suffices(micro_batch: int, first: bool, instead: str) -> Iterator[None]:
    """Within, a GPU's memory that does not suffice is a UserError in the `first` step, which no other start would change.

    Later, when it has sufficed, the error stays what it is: another process may have taken the memory, and the next start
    of the job may go on.

    instead: what the line advises beside a smaller micro-batch, as a user types it.
    """
    try:
        yield
    except RuntimeError as error:
        if not first or not any(said in str(error) for said in NO_MEMORY):
            raise
        raise UserError(
            f"micro_batch={micro_batch}: the GPU's memory does not suffice for a step ({str(error).splitlines()[0]}); use a "
            f"smaller one, or {instead}"
        ) from None
