"""Processes that each do one large piece of work at a time, and a foreman who survives them.

A piece that kills its process (a bug in a codec, the kernel's out-of-memory killer) is begun again with what the process
noted last, so that it can go carefully there and leave out what killed it twice.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mcf.errors import UserError
from mcf.pack.workers import leave_with_parent

# (piece, what was noted before each death, note) → result. `note` takes whatever may be wanted after a death, or a count.
Work = Callable[[Any, tuple[Any, ...], Callable[[str, Any], None]], Any]
_MOST_DEATHS = 40  # of one piece: then the machine is to blame


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    piece: Any = None
    noted: Any = None  # last, on this piece
    deaths: tuple[Any, ...] = ()  # what earlier processes had noted when this piece killed them


def run(
    make: Callable[..., Work],
    arguments: tuple[Any, ...],
    pieces: Iterable[Any],
    workers: int,
    told: Callable[[str, Any], None],
) -> Iterator[Any]:
    """Results of `make(*arguments)` (made once a process) on each piece, as they come.

    told(kind, value): what the work notes under any other kind than "at". One worker is this process itself. A
    UserError of the work is raised here; so is RuntimeError for what else ended it.
    """
    if workers == 1:
        work = make(*arguments)
        for piece in pieces:
            yield work(piece, (), lambda kind, value: None if kind == "at" else told(kind, value))
        return
    waiting: deque[tuple[Any, tuple[Any, ...]]] = deque((piece, ()) for piece in pieces)
    context = multiprocessing.get_context("spawn")
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.piece is not None for worker in crew):
            while waiting and len(crew) < workers:
                crew.append(_hire(context, make, arguments))
            for worker in crew:
                if worker.piece is None and waiting:
                    worker.piece, worker.deaths = waiting.popleft()
                    worker.noted = None
                    worker.pipe.send((worker.piece, worker.deaths))
            ready = multiprocessing.connection.wait([worker.pipe for worker in crew if worker.piece is not None])
            for worker in [worker for worker in crew if worker.pipe in ready]:
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    deaths = (*worker.deaths, worker.noted)
                    crew.remove(worker)
                    worker.process.join()
                    if len(deaths) > _MOST_DEATHS:
                        raise UserError(
                            f"{len(deaths)} processes died one after another (exit {worker.process.exitcode}); is memory "
                            "enough? Give fewer workers="
                        ) from None
                    waiting.appendleft((worker.piece, deaths))
                    continue
                if kind == "result":
                    worker.piece = None
                    yield value
                elif kind == "refused":
                    raise UserError(value)
                elif kind == "failed":
                    raise RuntimeError(f"a packing process failed:\n{value}")
                elif kind == "at":
                    worker.noted = value
                else:
                    told(kind, value)
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _hire(context, make: Callable[..., Work], arguments: tuple[Any, ...]) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    leave_with_parent()
    try:
        work = make(*arguments)
        while True:
            piece, noted = pipe.recv()
            pipe.send(("result", work(piece, noted, lambda kind, value: pipe.send((kind, value)))))
    except UserError as error:
        pipe.send(("refused", str(error)))
    except EOFError:
        pass
    except BaseException:
        import traceback

        pipe.send(("failed", traceback.format_exc()))
