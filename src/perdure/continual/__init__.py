"""Five methods as wrappers around a model, with the interface of the Neurenix document on continual learning.

A wrapper holds one of `perdure.methods` and its state, and takes the training step with the optimizer and the loss that
it is given. `perdure.Learner` is the same machinery for a whole stream, and for several methods at once.

>>> import torch
>>> from torch import nn
>>> from perdure.continual import EWC
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> ewc = EWC(model, importance=100.0)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
>>> for task_id in (1, 2):
...     loader = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(3)]
...     ewc.register_task(task_id, loader)
...     for inputs, targets in loader:
...         loss = ewc.train_step(optimizer, nn.CrossEntropyLoss(), inputs, targets, task_id)
>>> bool(ewc.get_ewc_loss() > 0)
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure.continual.detection import detect_task_boundary
    from perdure.continual.distillation import KnowledgeDistillation
    from perdure.continual.ewc import EWC
    from perdure.continual.grid_search import GridSearch
    from perdure.continual.l2 import L2Regularization
    from perdure.continual.replay import ExperienceReplay
    from perdure.continual.si import SynapticIntelligence

_HOMES = {
    "EWC": "ewc",
    "ExperienceReplay": "replay",
    "GridSearch": "grid_search",
    "KnowledgeDistillation": "distillation",
    "L2Regularization": "l2",
    "SynapticIntelligence": "si",
    "detect_task_boundary": "detection",
}

__all__ = [
    "EWC",
    "ExperienceReplay",
    "GridSearch",
    "KnowledgeDistillation",
    "L2Regularization",
    "SynapticIntelligence",
    "detect_task_boundary",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"perdure.continual.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'perdure.continual' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
