"""Inputs that are a tensor, or dictionaries, lists and tuples of tensors (a tokenizer's output, several views)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply `function` to every tensor of `tree` and return a tree of the same shape."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, value) for value in tree)
    return tree


def to_device(tree: Any, device: torch.device) -> Any:
    """Every tensor of `tree` on a device; the copy does not wait."""
    if isinstance(tree, Tensor):
        return tree if tree.device == device else tree.to(device, non_blocking=True)
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True), tree)


def as_tensors(value: Any) -> Any:
    """Numpy arrays and lists of numbers as tensors; trees of tensors as they are."""
    return value if isinstance(value, (Tensor, dict, tuple)) else torch.as_tensor(value)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of `tree` in a fixed order (dictionaries in insertion order)."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return []


def rows(tree: Any) -> int:
    """Number of rows: the length of the first tensor's first dimension."""
    return tree.shape[0] if isinstance(tree, Tensor) else leaves(tree)[0].shape[0]


def take(tree: Any, index: Any) -> Any:
    """Select rows of every tensor; an int64 tensor gathers, a slice gives views."""
    if isinstance(index, Tensor) and index.dtype == torch.int64:
        return tree_map(lambda leaf: leaf.index_select(0, index.to(leaf.device)), tree)
    return tree_map(lambda leaf: leaf[index], tree)


def cat(trees: Sequence[Any]) -> Any:
    """Concatenate trees of the same shape along their rows."""
    first = trees[0]
    if len(trees) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(trees))
    if isinstance(first, dict):
        return {key: cat([tree[key] for tree in trees]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(cat(list(parts)) for parts in zip(*trees, strict=True))
    return first
