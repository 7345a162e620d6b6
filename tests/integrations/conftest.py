from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> Iterator[None]:
    """The trainers collect garbage for every training, which takes most of a small one's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
