"""mcf: pre-training of face encoders by masked image modelling and contrastive learning (MCF, ACM MM 2023)."""

import os
import signal
import sys
from types import FrameType

__version__ = "0.1.0.dev0"


def _at_ctrl_c(number: int, frame: FrameType | None) -> None:
    """While a verb's imports are under way, seconds for some, nothing is begun: leave, with 130. Later as ever."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "__main__" and frame.f_code.co_flags & 1:  # a function, CO_OPTIMIZED
            raise KeyboardInterrupt
        frame = frame.f_back
    os._exit(130)


# Under `python -m mcf.VERB` alone: while Python looks for that module, argv begins with -m. A program that imports mcf
# keeps its handlers.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    _started = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if _started == "mcf" or _started.startswith("mcf."):
        signal.signal(signal.SIGINT, _at_ctrl_c)
