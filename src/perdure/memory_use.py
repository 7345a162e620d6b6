"""How much memory a run took."""

from __future__ import annotations

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: of the GPU allocator, or of this process where the work is done on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # no such module on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
