"""Streams of tasks: what arrives, in which order, the same for every method."""

from perdure.streams.own import stream_from_path
from perdure.streams.scenarios import class_incremental, domain_incremental, task_incremental
from perdure.streams.task import Stream, Task

__all__ = ["Stream", "Task", "class_incremental", "domain_incremental", "stream_from_path", "task_incremental"]
