"""Suites that every method passes, also a stranger's: inherit from one and say how to build yours."""

from perdure.testing.methods import MethodSuite

__all__ = ["MethodSuite"]
