"""Remembered examples: a buffer of preallocated columns, one policy that writes and one that reads."""

from perdure.memory.buffer import Buffer
from perdure.memory.class_balanced import ClassBalanced
from perdure.memory.greedy_balanced import GreedyBalanced
from perdure.memory.loss_aware import LossAware
from perdure.memory.ranked import Ranked
from perdure.memory.reading import Balanced, ReadingPolicy, Uniform
from perdure.memory.reservoir import Reservoir
from perdure.memory.ring import Ring
from perdure.memory.writing import WritingPolicy

__all__ = [
    "Balanced",
    "Buffer",
    "ClassBalanced",
    "GreedyBalanced",
    "LossAware",
    "Ranked",
    "ReadingPolicy",
    "Reservoir",
    "Ring",
    "Uniform",
    "WritingPolicy",
]
