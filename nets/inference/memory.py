"""What a process does with memory that it frees, for predictions on a CPU."""

import ctypes
import sys


def keep_freed_memory(longest_side):
    """Lets the process keep blocks below 256 MiB that it frees, with glibc; larger ones go back.

    For prediction on a CPU: else each map is memory that the system clears anew, a fifth of a
    first prediction's time. Nothing changes where pictures may be large (longest_side: in pixels,
    None: the model's own, 0: any), as gaps would take a fifth more memory at 12 megapixels, nor is
    it for training in full size.
    """
    if longest_side is not None and not 0 < longest_side <= 1024:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    # Other C libraries have no mallopt, and old versions no threshold of more than 32 MiB.
    if mallopt and (mallopt(m_mmap_threshold, 1 << 28) or mallopt(m_mmap_threshold, 1 << 25)):
        mallopt(m_trim_threshold, 1 << 29)  # so much at the end of the heap; more goes back, too
