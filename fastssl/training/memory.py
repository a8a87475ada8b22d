"""Keep freed memory for the next step instead of giving it back to the system after every tensor.

glibc maps each block above 32 MB anew and trims its heap, so a training step on the CPU pays for the same
pages again and again; a thread that makes batches has a heap of its own, which is trimmed whatever is asked for.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_BYTES = (1 << 31) - 1  # mallopt takes an int
MAPPED_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Ask malloc to reuse freed blocks up to 1 GB; the process then keeps its peak. False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, MAPPED_BYTES), (M_TRIM_THRESHOLD, LARGEST_BYTES), (M_ARENA_MAX, 1))
    kept = [mallopt(name, value) for name, value in wanted]
    return kept == [1, 1, 1]
