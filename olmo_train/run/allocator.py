"""Memory settings of a run: the C library's allocator, a GPU's segments, Python's garbage collector.

Every step frees and allocates the same large buffers. glibc would return each to the kernel, which clears the pages before it
hands them out again; a process that keeps its freed memory saves that time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

# The numbers of mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 256 * 2**20  # by which the heap grows at a time


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for its next buffers; returns False where the C library is not glibc.

    It keeps as much as its peak use, and somewhat more through fragmentation. The values are those of mallopt(3): no buffer is
    mapped separately, and the heap is never trimmed.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all([library.mallopt(parameter, value) for parameter, value in settings])


def grow_gpu_segments() -> None:
    """Let a GPU's memory segments grow in place, which reduces fragmentation. A setting of the user takes precedence. torch reads
    the variable at its first GPU allocation."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextlib.contextmanager
def no_automatic_gc() -> Iterator[None]:
    """No automatic garbage collection while training: collections at different steps on different ranks would stall all of
    them. Objects that exist already are frozen, so `gc.collect` does not scan them."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
