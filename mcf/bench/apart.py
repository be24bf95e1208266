"""A program of the step in a process of its own, which is told when to take a step: what one does to its process (the
allocator, compiled code, collected garbage, memory) says nothing of the other.

    benchmark ── index ──► process: the step ── losses, seconds ──► benchmark
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch

from mcf.bench import alone, programs
from mcf.bench.meter import now, peak_memory, reset_peak
from mcf.bench.work import Done, Work
from mcf.config import Recipe
from mcf.distributed import World
from mcf.errors import UserError


@dataclass(frozen=True)
class Taken:
    """A step that was taken: its losses, and what it took, seconds."""

    losses: dict[str, float]
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Failed:
    """What a process answers when it cannot go on."""

    why: str


def take(program: programs.Program, index: int, device: torch.device) -> Taken:
    """Take a step, on the clock."""
    start, cpu = now(device), time.process_time()
    losses = program(index)
    return Taken(losses, now(device) - start, time.process_time() - cpu)


class Apart:
    """A program in its own process, started at once: `step(index)`, `peak()`, `close()`.

    Raises:
        UserError: what the program is refused for, or that the process has ended, as it does where memory fails.
    """

    def __init__(self, name: Literal["mcf", "reference"], recipe: Recipe, threads: int):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, recipe, threads), daemon=True)
        self._process.start()
        theirs.close()

    def step(self, index: int) -> Taken:
        """Take the step of a number there, and wait for it."""
        return self._ask("step", index)

    def peak(self) -> int:
        """The most bytes that it held since its first step."""
        return self._ask("peak", None)

    def gradients(self) -> bytes:
        """The first step's gradients, float32 one after the other, of a program of `mcf`."""
        return self._ask("gradients", None)

    def done(self) -> Done:
        """What its steps have done so far, of a program of `reference`."""
        return self._ask("done", None)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, what: str, index: int | None) -> Any:
        try:
            self._pipe.send((what, index))
            answer = self._pipe.recv()
            if isinstance(answer, Failed):
                raise UserError(answer.why)
            return answer
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise UserError(
                f"the process of {self.name} has ended (status {self._process.exitcode}); what it said stands above, and "
                "if it said nothing, memory may not suffice for both: give a smaller batch"
            ) from None


def _serve(pipe: Connection, name: str, recipe: Recipe, threads: int) -> None:
    """What the process does: build the program, then what it is asked for, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is told to end by ctrl-C is the benchmark, which ends this
    try:
        with alone.world(threads) as world:
            _answer(pipe, name, recipe, world)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody asks any more
    except Exception as error:
        # Who asks next is told why; what is a mistake of the program has its traceback on stderr.
        why = " ".join(str(error).split())[:300] or type(error).__name__
        with contextlib.suppress(OSError):
            pipe.send(Failed(f"{name}: {why}"))
        if not isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise


def _answer(pipe: Connection, name: str, recipe: Recipe, world: World) -> None:
    gradients: list[bytes] = []
    work: Work | None = None
    if name == "mcf":
        step, program = programs.ours(recipe, world)
        programs.keep_first_gradients(step, gradients)
    else:
        work, program = programs.reference(recipe, world)
    reset_peak(world.device)
    while True:
        what, index = pipe.recv()
        if what == "step":
            pipe.send(take(program, index, world.device))
        elif what == "peak":
            pipe.send(peak_memory(world.device))
        else:
            pipe.send(gradients[0] if work is None else work.done())
