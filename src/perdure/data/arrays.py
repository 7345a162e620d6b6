"""What every reader returns: inputs, labels and their names, as they were stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Arrays:
    """A labelled data set in memory, in its stored dtype.

    Attributes
    ----------
    x, y
        Training inputs [N, ...] and targets [N]: int64 positions in `class_names`, or float32 for regression.
    x_test, y_test
        The publisher's test part, if there is one.
    class_names
        The name of every label; empty for regression.
    groups, group_names
        The superclass of every class (CIFAR-100), if there are superclasses.
    domains, domain_names
        The domain of every training row (a column of a table), if there is one.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor | None = None
    y_test: Tensor | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    group_names: tuple[str, ...] = ()
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()
