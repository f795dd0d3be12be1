"""The C library's memory allocator, told to keep what training frees.

The one idea: a step frees and takes the same large buffers again and again. glibc gives each of them back to the kernel,
which clears every page when it is taken anew; kept in the process, the pages are there already.
"""

from __future__ import annotations

import ctypes
import sys

# The numbers of mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 256 * 2**20  # by which the heap grows at a time


def keep_freed_memory() -> bool:
    """From now on this process keeps freed memory for its own next buffers; False where the C library is not glibc.

    It keeps as much as it once had in use at the same moment, and some more where pieces lie between (fragmentation).
    Values are those of mallopt(3): no buffer is mapped on its own, and the heap's end is never given back.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all([library.mallopt(parameter, value) for parameter, value in settings])
