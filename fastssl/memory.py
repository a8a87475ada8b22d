"""Keep freed memory for the next step instead of giving it back to the system after every tensor.

glibc maps each block above 32 MB anew and trims its heap, so a training step on the CPU pays for the same
pages again and again.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BYTES = (1 << 31) - 1  # mallopt takes an int
MAPPED_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Ask malloc to reuse freed blocks up to 1 GB; the process then keeps its peak. False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is None:
        return False
    kept = mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES), mallopt(M_TRIM_THRESHOLD, LARGEST_BYTES)
    return kept == (1, 1)
