"""The README's code runs as it is written, and its table names every method."""

import os
import re
import subprocess
import sys
from pathlib import Path

from perdure import registry

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CHECK = """
assert results.metrics()["final_average_accuracy"] > 0.7, results
assert "gradient_noise" in perdure.registry.methods.names()
"""


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(["import torch", "torch.manual_seed(0)", *blocks, "import perdure.registry", CHECK]))
    source = str(Path(__file__).parent.parent / "src")
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/quick-start/results.json").is_file()


def test_every_method_is_in_the_table() -> None:
    named = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(named) == sorted([*registry.methods.names(), "finetune"])
