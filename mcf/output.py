"""What others write into a file, shown here as it comes: on a terminal with a live step line, elsewhere as it is."""

from __future__ import annotations

import codecs
import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcf.track.console import Screen

ERROR = "error: "  # how a verb begins the one line of a user's mistake, with which it ends with status 2


class Output:
    """Shows the lines that are added to a file which others write; what is an error there goes to stderr.

    An unfinished line waits for its end, or for `close`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._position = 0
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        self._screen = _screen()

    def show_new(self) -> None:
        """Show what is new."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._position)
            new = file.read()
            self._position += len(new)
            *lines, self._rest = (self._rest + self._decode(new)).split("\n")
            for line in lines:
                self._show(line)

    def close(self) -> None:
        """Show the rest, and give the terminal back."""
        if self._rest:
            self._show(self._rest)
            self._rest = ""
        if self._screen:
            with terminal_may_be_gone():
                self._screen.close()

    def _show(self, line: str) -> None:
        with terminal_may_be_gone():
            if line.startswith(ERROR):
                if self._screen:
                    # Beside a live line nothing reaches stderr.
                    self._screen.close()
                print(line, file=sys.stderr, flush=True)
            elif self._screen:
                self._screen.show(line)
            else:
                print(line, flush=True)


def _screen() -> Screen | None:
    """The terminal, if there is one to move about on."""
    if not sys.stdout.isatty():
        return None
    from mcf.track.console import Screen, can_move

    return Screen(sys.stdout) if can_move(sys.stdout) else None


@contextlib.contextmanager
def terminal_may_be_gone() -> Iterator[None]:
    """Its end (SIGHUP) is an order to save and stop, which must not be lost over a line that nobody can read."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def say(line: str) -> None:
    """Print a line, wherever that goes."""
    with terminal_may_be_gone():
        print(line, flush=True)
