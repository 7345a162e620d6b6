"""Streams of tasks: what arrives, in which order, the same for every method."""

from perdure.streams.generated import generated
from perdure.streams.imbalance import imbalanced
from perdure.streams.online import blurry, online
from perdure.streams.order import difficulties
from perdure.streams.own import stream_from_path
from perdure.streams.repetition import repeated
from perdure.streams.scenarios import class_incremental, domain_incremental, task_incremental
from perdure.streams.task import Stream, Task

__all__ = [
    "Stream",
    "Task",
    "blurry",
    "class_incremental",
    "difficulties",
    "domain_incremental",
    "generated",
    "imbalanced",
    "online",
    "repeated",
    "stream_from_path",
    "task_incremental",
]
