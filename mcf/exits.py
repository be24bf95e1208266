"""Exit statuses that mean something between a rank, the process that watches it, and the batch script around both.

Any other status than 0 is a failure that may be a machine's: under Slurm the run goes back to the queue.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

USER_ERROR = 2  # one line says what a user has to change: nothing gets better by trying again
UNAVAILABLE = 69  # other ranks cannot be reached: somebody may have to mend it, or the next start may (EX_UNAVAILABLE)
SAVED = 75  # told to stop, and saved: to be started again (EX_TEMPFAIL of sysexits.h)
RANK_LOST = 76  # another rank was dead or stuck (mcf.watchdog): its error line says which
INTERRUPTED = 130  # ctrl-C


def leave_at_once(status: int) -> NoReturn:
    """End a rank's process with an exit status, when all that it wanted to keep is written.

    What libraries tidy up can hang, or abort, of half a group above all: a machine's failure would be made of a user's
    mistake, or of a run that is done. A signal would do the same: Python gives it back to the system while it tidies up.
    """
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def leave_with(main: Callable[[], int]) -> NoReturn:
    """Be a rank: end its process at once with the status of `main`, or with 1 and a traceback where it raises.

    A rank whose GPU has failed would else tidy up a group that others still work in, and could hang there unwatched.
    """
    try:
        status = main()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        status = 1
    leave_at_once(status)
