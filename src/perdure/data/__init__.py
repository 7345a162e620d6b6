"""Readers, one a format, the catalogue of public data sets, and examples held in memory."""

from perdure.data.arrays import Arrays
from perdure.data.examples import DatasetExamples, Examples, as_examples
from perdure.data.source import read_path
from perdure.data.store import load, locate

__all__ = ["Arrays", "DatasetExamples", "Examples", "as_examples", "load", "locate", "read_path"]
