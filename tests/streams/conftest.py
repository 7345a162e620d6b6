from __future__ import annotations

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path += [str(here), str(here.parent / "methods")]
