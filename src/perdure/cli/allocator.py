"""Memory that is freed stays with the process: a training step then takes no page from the system, step after step."""

from __future__ import annotations

import ctypes
import os
import sys

# Names and numbers of glibc's malloc.h: sizes above which memory is mapped, and free memory at the top given back.
_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}


def keep_freed_memory() -> None:
    """Raise glibc's thresholds, here and (through the environment) in the processes started from here; else nothing.

    Gradients and activations are freed and asked for again in every step. For the command line alone: a library has no
    business in the allocator of a process that is not its own.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (option, value) in _THRESHOLDS.items():
        if name not in os.environ:
            os.environ[name] = str(value)
            if mallopt is not None:
                mallopt(option, value)
