"""Output layers that follow the tasks: growing, one a task, cosine.

Every head writes global class columns. What a head has become (its rows, its tasks) can be read from its state
dictionary, and loading one gives a fresh head that structure first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import UnknownNameError, UsageError
from perdure.models.layers import initialise, linear
from perdure.registry import nearest
from perdure.seeding import Part, derive
from perdure.seeding import generator as private


class GrowingHead(nn.Linear):
    """A linear layer whose rows are added while it lives.

    Row i is drawn from a generator that belongs to (seed, i) alone, by torch's default law, so it does not matter in
    how many steps the head grew, and growing draws nothing from elsewhere.

    Parameters
    ----------
    features
        Width of the input.
    outputs
        Rows to begin with, possibly none.
    seed
        Of the private generators.

    >>> head = GrowingHead(3)
    >>> head(torch.ones(2, 3)).shape
    torch.Size([2, 0])
    >>> head.grow(4)
    >>> head(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, features: int, outputs: int = 0, seed: int = 0, *, bias: bool = True) -> None:
        self.seed = seed
        super().__init__(features, outputs, bias=bias)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self._draw(self.weight, self.bias, 0)

    @torch.no_grad()
    def grow(self, outputs: int) -> None:
        """Become `outputs` rows wide; old rows keep their bits. A narrower width changes nothing."""
        old = self.out_features
        if outputs <= old:
            return
        weight, bias = self.weight, self.bias
        self._resize(outputs)
        self.weight[:old] = weight
        if self.bias is not None:
            self.bias[:old] = bias
        self._draw(self.weight, self.bias, old)

    def _resize(self, outputs: int) -> None:
        """New, empty parameters of that many rows, of the old ones' kind."""
        for name in ("weight", "bias"):
            old = getattr(self, name)
            if old is not None:
                new = torch.empty((outputs, *old.shape[1:]), dtype=old.dtype, device=old.device)
                setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
        self.out_features = outputs

    def _draw(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        for row in range(first, len(weight)):
            values = torch.empty(1, self.in_features), torch.empty(1)
            initialise(*values, private(self.seed, "head row", row))
            weight[row : row + 1] = values[0]
            if bias is not None:
                bias[row : row + 1] = values[1]

    def get_extra_state(self) -> Tensor:
        """The seed, so that a head that was loaded grows as the saved one would have."""
        return torch.tensor(self.seed)

    def set_extra_state(self, state: Tensor) -> None:
        self.seed = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())  # a plain linear layer has none
        saved = state_dict.get(prefix + "weight")
        if isinstance(saved, Tensor) and saved.ndim == 2 and len(saved) != self.out_features:
            self._resize(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


class CosineHead(GrowingHead):
    """Logits `scale * cos(features, row)`, without a bias, so that no class wins by the length of its row.

    Parameters
    ----------
    features, outputs, seed
        As for `GrowingHead`.
    scale
        Factor on the cosine.
    learnable
        Whether the scale is a parameter (shape [1]) or a constant buffer.

    Source: Hou et al. 2019, Learning a Unified Classifier Incrementally via Rebalancing (CVPR).

    >>> head = CosineHead(3, 2, scale=5.0)
    >>> bool(head(torch.randn(4, 3)).abs().max() <= 5)
    True
    """

    scale: Tensor

    def __init__(
        self, features: int, outputs: int = 0, seed: int = 0, *, scale: float = 10.0, learnable: bool = False
    ) -> None:
        super().__init__(features, outputs, seed, bias=False)
        value = torch.full((1,), float(scale))
        if learnable:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))


class TaskHead(nn.Linear):
    """The head of one task: row i writes class column `columns[i]`."""

    columns: Tensor

    def __init__(self, features: int, columns: tuple[int, ...], seed: int) -> None:
        self._seed = seed
        super().__init__(features, len(columns))
        # A tuple beside the buffer: reading it does not wait for a device.
        self.owned = columns
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64))

    def reset_parameters(self) -> None:
        initialise(self.weight, self.bias, torch.Generator().manual_seed(self._seed))


class MultiHead(nn.Module):
    """One linear head a task on shared features; the output has one column a class seen so far.

    `activate(key)` selects the head that writes; columns it does not own are -inf. With `activate(None)` every head
    writes its columns (of two heads that own the same column, the later one wins). A head's values depend on the seed
    and its key alone, and adding one changes no other.

    Parameters
    ----------
    features
        Width of the input.
    seed
        Of the private generators.

    >>> head = MultiHead(3)
    >>> head.add("birds", (0, 1)); head.add("fish", (2,))
    >>> head.activate("fish")
    >>> head(torch.zeros(1, 3))[:, :2]
    tensor([[-inf, -inf]], grad_fn=<SliceBackward0>)
    """

    def __init__(self, features: int, seed: int = 0) -> None:
        super().__init__()
        self.features = features
        self.seed = seed
        self.heads = nn.ModuleDict()
        self.active: tuple[str, ...] | None = None
        # Says device and dtype while there is no head yet.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def columns(self) -> int:
        """Number of output columns so far."""
        return max((column for head in self._heads() for column in head.owned), default=-1) + 1

    def __contains__(self, key: Part) -> bool:
        return _module_name(key) in self.heads

    def add(self, key: str | int, columns: Iterable[int]) -> None:
        """Make a head for the task `key` (3 and "3" are one key) that writes these class columns.

        Raises
        ------
        UsageError
            If the task has a head with other columns.
        """
        wanted = tuple(int(column) for column in columns)
        name = _module_name(key)
        if name in self.heads:
            owned = self._head(name).owned
            if owned != wanted:
                raise UsageError(f"task '{key}' has a head for columns {owned}, not {wanted}; use another task key")
            return
        self._attach(name, wanted)

    def _attach(self, name: str, columns: tuple[int, ...]) -> None:
        like: Tensor = self._like  # type: ignore[assignment]
        head = TaskHead(self.features, columns, derive(self.seed, name))
        self.heads[name] = head.to(like.device, like.dtype).train(self.training)

    def activate(self, key: str | int | tuple[str | int, ...] | None) -> None:
        """Select the head that writes, several of them (a tuple), or all (None).

        Raises
        ------
        UnknownNameError
            If that task has no head yet.
        """
        keys = key if isinstance(key, tuple) else () if key is None else (key,)
        for one in keys:
            if one not in self:
                known = [_key(name) for name in self.heads]
                hint = nearest(str(one), known) or ";"
                there = ", ".join(known) or "none"
                raise UnknownNameError(f"task '{one}' has no head{hint} there are heads for {there}")
        self.active = None if key is None else tuple(_module_name(one) for one in keys)

    def together(self, keys: Iterable[str | int]) -> bool:
        """Whether these tasks' heads write different columns, so that one pass can serve rows of all of them."""
        columns = [column for key in keys for column in self._head(_module_name(key)).owned]
        return len(columns) == len(set(columns))

    def forward(self, x: Tensor) -> Tensor:
        width = self.columns
        heads = self._heads() if self.active is None else [self._head(name) for name in self.active]
        output: Tensor | None = None
        for head in heads:
            logits = head(x)
            if output is None:
                output = logits.new_full((*logits.shape[:-1], width), float("-inf"))
            output = output.index_copy(-1, head.columns, logits)
        return x.new_zeros((*x.shape[:-1], 0)) if output is None else output

    def part(self, key: Part) -> TaskHead:
        """The head of the task `key`."""
        return self._head(_module_name(key))

    def _head(self, name: str) -> TaskHead:
        return cast(TaskHead, self.heads[name])

    def _heads(self) -> list[TaskHead]:
        return [self._head(name) for name in self.heads]

    def get_extra_state(self) -> Tensor:
        """The seed, so that a head added after loading is the one that would have been added before."""
        return torch.tensor(self.seed)

    def set_extra_state(self, state: Tensor) -> None:
        self.seed = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start, end = prefix + "heads.", ".columns"
        saved = {
            key.removeprefix(start).removesuffix(end): tuple(state_dict[key].tolist())
            for key in state_dict
            if key.startswith(start) and key.endswith(end)
        }
        if saved:
            for name in [name for name in self.heads if name not in saved]:
                del self.heads[name]
        for name, columns in saved.items():
            if name not in self.heads or self._head(name).owned != columns:
                self._attach(name, columns)
        if any(name not in self.heads for name in self.active or ()):
            self.active = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _module_name(key: Part) -> str:
    """A key as a module's name, which may hold no dot; the prefix keeps it apart from a dictionary's own methods."""
    return "task_" + str(key).replace("%", "%25").replace(".", "%2E")


def _key(name: str) -> str:
    return name.removeprefix("task_").replace("%2E", ".").replace("%25", "%")


def open_columns(model: nn.Module, task: int, columns: tuple[int, ...]) -> None:
    """A task with these class columns begins: heads that grow do, and a head of its own is made where each has one."""
    for module in list(model.modules()):
        if callable(getattr(module, "grow", None)):
            module.grow(max(columns) + 1)  # type: ignore[operator]
        elif callable(getattr(module, "activate", None)) and callable(getattr(module, "add", None)):
            module.add(task, columns)  # type: ignore[operator]


HEADS = ("wide", "growing", "multi", "cosine")


def make_head(
    head: str | nn.Module | None, features: int, outputs: int, generator: torch.Generator | None = None
) -> nn.Module:
    """The head of that name: "wide" (linear, the default), "growing" and "multi" (both begin empty), "cosine" (wide).

    Raises
    ------
    UnknownNameError
        For another name.
    """
    if isinstance(head, nn.Module):
        return head
    if head is None or head == "wide":
        return linear(features, outputs, generator)
    if head not in HEADS:
        hint = nearest(head, HEADS) or ";"
        raise UnknownNameError(f"unknown head '{head}'{hint} there are {', '.join(HEADS)}")
    seed = int(torch.randint(2**62, (), generator=generator))
    if head == "growing":
        return GrowingHead(features, seed=seed)
    return MultiHead(features, seed) if head == "multi" else CosineHead(features, outputs, seed)
