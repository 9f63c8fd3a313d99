"""The C library's allocator: freed memory goes back to the system, where that can be asked for (glibc)."""

from __future__ import annotations

import ctypes

KEPT_BYTES = 32 * 10**6  # so much may stay for the next step: faulting it in again would cost small models a tenth of a step

MAPPED_BYTES = 256 * 1024
_M_MMAP_THRESHOLD = -3  # <malloc.h>


class _MallInfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`; bytes."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


def map_large_blocks() -> bool:
    """Have blocks of `MAPPED_BYTES` or more mapped one by one from now on, so that each goes back to the system when it is
    freed; whether that was done.

    Otherwise glibc soon takes blocks of up to 32 MB from its heap, where the tensors that the backward pass needs keep the
    room of freed ones between them: twice as much as is in use.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES))


def heap_figures() -> dict[str, int] | None:
    """Bytes of the C heap: `arena` (from the system), `used` and `free` in it, `mapped` (large blocks beside it).

    None without glibc 2.33 or later.
    """
    if (mallinfo2 := getattr(_LIBC, "mallinfo2", None)) is None:
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return {"arena": info.arena, "used": info.uordblks, "free": info.fordblks, "mapped": info.hblkhd}


def release_freed_memory(kept_bytes: int = KEPT_BYTES) -> bool:
    """Give what was freed back to the system if it is more than `kept_bytes`; whether that was done."""
    figures, trim = heap_figures(), getattr(_LIBC, "malloc_trim", None)
    return trim is not None and (figures is None or figures["free"] > kept_bytes) and bool(trim(0))


try:
    _LIBC: ctypes.CDLL | None = ctypes.CDLL(None)
except (OSError, TypeError):  # no C library to be had this way
    _LIBC = None
