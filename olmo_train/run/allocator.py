"""Memory between steps: the C library's allocator, a GPU's segments, Python's garbage.

The one idea: a step frees and takes the same large buffers again and again. glibc gives each of them back to the kernel,
which clears every page when it is taken anew; kept in the process, the pages are there already.
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


def grow_gpu_segments() -> None:
    """Let a GPU's memory grow in place, so that little is lost between tensors of changing sizes; the user's own setting
    comes first. Read by torch when it first takes memory of a GPU."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextlib.contextmanager
def garbage_held() -> Iterator[None]:
    """Python looks for cyclic garbage when it is asked (`gc.collect`), not in the middle of a step, where on many ranks one
    after the other would keep all waiting; what is there already is not looked at again."""
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
