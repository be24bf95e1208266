"""Memory that a process need not think of again: what its tensors give back, and objects that stay until its end.

glibc fetches every large tensor from the kernel and returns it when it is freed, and the kernel fills each of its pages
with zeros anew: for a step of ViT-B a sixth of the CPU's time. Kept within the process, the memory of one step serves
the next. The process stays at its highest mark, where without this it comes back to at every step.

Python's collector looks through all objects now and then, a third of a second for the half a million that torch and
DeepSpeed are made of. One rank that does so holds up all.
"""

from __future__ import annotations

import ctypes
import gc
import sys

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = -1  # read as the largest size
TOP_PAD = 64 << 20  # bytes by which the heap grows at once, and the most that is fetched in vain


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, instead of returning it to the kernel; whether it could be told.

    Of this process alone, from here on; the processes that it starts are as ever. Only glibc can be told: nothing happens
    elsewhere (musl, macOS), and nothing comes of it where another allocator is preloaded.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: TOP_PAD}
    told = [libc.mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings.items()]
    return all(answer == 1 for answer in told)


def leave_out_of_collections() -> None:
    """Have the garbage collector pass over everything that is there now, until `gc.unfreeze()`.

    Call it once all that stays has been made. What comes later is collected as ever, in microseconds.
    """
    gc.collect()  # what is garbage now would stay for good
    gc.freeze()
