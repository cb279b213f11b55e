"""Keeps freed memory in the process, for faster predictions on a CPU."""

import ctypes
import sys


def keep_freed_memory(longest_side):
    """Makes glibc keep freed blocks below 256 MiB in the process; larger blocks go back.

    For prediction on a CPU: otherwise the system clears new memory for each map, which takes a
    fifth of a first prediction's time. Does nothing where pictures may be large (longest_side: in
    pixels, None: the model's own, 0: any): gaps would take a fifth more memory at 12 megapixels.
    Do not use it for training in full size.
    """
    if longest_side is not None and not 0 < longest_side <= 1024:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    # Other C libraries have no mallopt; old versions of glibc refuse thresholds above 32 MiB.
    if mallopt and (mallopt(m_mmap_threshold, 1 << 28) or mallopt(m_mmap_threshold, 1 << 25)):
        mallopt(m_trim_threshold, 1 << 29)  # keeps up to 512 MiB free at the heap's end


def give_back():
    """Gives freed memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
