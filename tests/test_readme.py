"""The README's code runs as it is written, and its table names every method."""

import re
from pathlib import Path

import pytest
import torch

from perdure import registry

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "runs/quick-start/results.json").is_file()
    assert names["results"].metrics()["final_average_accuracy"] > 0.7  # type: ignore[attr-defined]


def test_every_method_is_in_the_table() -> None:
    named = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(named) == sorted([*registry.methods.names(), "finetune"])
