"""What a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def perdure_version() -> str:
    """The installed version, or "0+unknown" in a source tree that was not installed."""
    try:
        return version("perdure")
    except PackageNotFoundError:
        return "0+unknown"


def versions() -> dict[str, str]:
    """Versions of everything that decides a result's bits."""
    import numpy
    import torch

    return {
        "perdure": perdure_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
