"""All trainable parameters as one vector.

`theta` is contiguous storage; the module's parameters are views of it. After a backward pass `gather()` copies the
gradients into a second vector `grad` of the same layout, and a method's arithmetic is written on these two. A shape [P]
is that of `theta`: between two parameters there may be a gap of a few zeros, so that each starts where its kernels are
those of a tensor of its own. Whatever is computed from vectors must be zero where all of them are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from perdure.errors import ModelError

# Kernels choose by alignment (a matrix product on a CPU rounds differently off a cache line), and torch's own tensors
# start on these boundaries. A parameter that did not would end with other last bits than in a hand-written loop.
_ALIGNMENT_BYTES, _CUDA_ALIGNMENT_BYTES = 64, 256


@dataclass(frozen=True)
class Slot:
    """The place of one parameter inside the vector."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, vector: Tensor) -> Tensor:
        """This parameter's part of `vector`, in the parameter's shape and strides."""
        return vector.as_strided(self.shape, self.stride, vector.storage_offset() + self.offset)


@dataclass(frozen=True)
class Layout:
    """Which parameter lies where; `length` counts alignment gaps, which stay zero."""

    slots: tuple[Slot, ...]
    length: int

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def to_json(self) -> dict[str, Any]:
        rows = [[s.name, list(s.shape), list(s.stride), s.offset] for s in self.slots]
        return {"length": self.length, "slots": rows}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Layout:
        slots = tuple(Slot(n, tuple(shape), tuple(stride), offset) for n, shape, stride, offset in saved["slots"])
        return cls(slots, saved["length"])


class Remap:
    """Moves vectors from one layout to another: by name, the common corner of every tensor, a fill elsewhere.

    Calling `remap(vector, fill)` returns a new vector of the new layout; `fill` is a number, or a vector of the new
    layout (usually the new `theta`) whose values new entries take. With `was` and `now`, the old and the new `theta`,
    the result also follows a change of device, and of type where the vector had the old one's.
    """

    def __init__(
        self,
        old: Layout,
        new: Layout,
        was: Tensor | None = None,
        now: Tensor | None = None,
        renamed: dict[str, str] | None = None,
    ) -> None:
        self.old, self.new = old, new
        self._was, self._now = was, now
        slots = {slot.name: slot for slot in old}
        # New name -> old one, where a tensor was put elsewhere in the module (a wrapper, an adapter around a layer).
        self._old_slots = slots | {name: slots[before] for name, before in (renamed or {}).items()}

    def __call__(self, vector: Tensor, fill: float | Tensor) -> Tensor:
        if vector.shape != (self.old.length,):
            raise ModelError(f"a state vector has shape {tuple(vector.shape)}, the parameters had {self.old.length}")
        if self._was is not None and self._now is not None:
            vector = vector.to(self._now.device, self._now.dtype if vector.dtype == self._was.dtype else vector.dtype)
        moved = vector.new_zeros(self.new.length)
        for slot in self.new:
            if isinstance(fill, Tensor):
                slot.view(moved).copy_(slot.view(fill))
            else:
                slot.view(moved).fill_(fill)
            before = self._old_slots.get(slot.name)
            if before is not None and len(before.shape) == len(slot.shape):
                corner = tuple(slice(min(a, b)) for a, b in zip(before.shape, slot.shape, strict=True))
                slot.view(moved)[corner].copy_(before.view(vector)[corner])
        return moved


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel wrappers."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = cast(nn.Module, module._orig_mod)
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def average_over_processes(module: nn.Module, vector: Tensor) -> Tensor:
    """`vector`, in place, as its mean over the processes of a DistributedDataParallel wrapper; else as it is."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return vector
    for each in module.modules():
        if isinstance(each, nn.parallel.DistributedDataParallel):
            torch.distributed.all_reduce(vector, group=each.process_group)
            return vector.div_(torch.distributed.get_world_size(each.process_group))
    return vector


class ParameterVector:
    """The trainable parameters of `module`, as views of one vector.

    A shared parameter appears once. A parameter that was trainable once stays in the vector while the module has it:
    frozen, it has no gradient; thawed, it still has its state.

    Parameters
    ----------
    module
        Its trainable parameters must have values, one dtype and one device.

    Raises
    ------
    ModelError
        For parameters without values (lazy, meta), sharded ones, or several dtypes or devices.

    >>> model = nn.Linear(2, 1)
    >>> vector = ParameterVector(model)
    >>> _ = vector.theta.fill_(1.0)
    >>> model.weight.tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = unwrap(module)
        self.layout = Layout((), 0)
        self.theta = torch.empty(0)
        self.grad = torch.empty(0)
        self.members: dict[str, nn.Parameter] = {}
        self._watch: list[tuple[dict[str, Any], str, nn.Parameter, int]] = []
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        self._versions: list[int] = []
        self._before: Tensor | None = None
        self._scratch: Tensor | None = None
        self.complete = self.begun = self.keeps_arrivals = False
        self.arrivals: list[Tensor | None] = []
        self.rebind()

    # -- binding ------------------------------------------------------------------------------------------------

    def rebind(self) -> Remap | None:
        """Make the parameters views of `theta` again, whatever happened to the module.

        Returns the remap that every aligned vector has to follow, or None if layout, device and type are unchanged.
        """
        members = self._collect()
        names = {id(parameter): name for name, parameter in self.members.items()}
        renamed = {name: names[id(p)] for name, p in members.items() if names.get(id(p), name) != name}
        first = next(iter(members.values()))
        boundary = _CUDA_ALIGNMENT_BYTES if first.is_cuda else _ALIGNMENT_BYTES
        layout = _lay_out(members, boundary // first.element_size())
        previous, was = self.layout, self.theta
        theta = torch.zeros(layout.length, dtype=first.dtype, device=first.device)
        with torch.no_grad():
            for slot, parameter in zip(layout, members.values(), strict=True):
                slot.view(theta).copy_(parameter)
            for slot, parameter in zip(layout, members.values(), strict=True):
                parameter.data = slot.view(theta)
                parameter.grad = None
        self.theta, self.grad, self._before, self._scratch = theta, torch.empty(0), None, None
        self.members, self.layout, self._grads, self.arrivals = members, layout, [], []
        owners = {id(p): (m._parameters, key) for m in self.module.modules() for key, p in m._parameters.items()}
        self._watch = [(*owners[id(p)], p, p.data_ptr()) for p in members.values()]
        if not previous.slots or (previous, was.device, was.dtype) == (layout, theta.device, theta.dtype):
            return None
        return Remap(previous, layout, was, theta, renamed)

    def intact(self) -> bool:
        """Whether every parameter is still the view that was bound (cheap enough for every step)."""
        return all(owner[key] is p and p.data_ptr() == pointer for owner, key, p, pointer in self._watch)

    def changed(self) -> bool:
        """Whether the module gained, lost, replaced, resized or thawed a parameter since the last binding."""
        current = dict(self._named())
        return (
            not self.intact()
            or list(current) != list(self.members)
            or any(current[name] is not parameter for name, parameter in self.members.items())
        )

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        known = {id(parameter) for parameter in self.members.values()}
        for name, parameter in self.module.named_parameters():
            name = name.replace("_orig_mod.", "")
            if parameter.requires_grad or name in self.members or id(parameter) in known:
                yield name, parameter

    def _collect(self) -> dict[str, nn.Parameter]:
        members = dict(self._named())
        if not members:
            raise ModelError("the model has no trainable parameter; set requires_grad on those that should learn")
        for name, parameter in members.items():
            if nn.parameter.is_lazy(parameter) or parameter.is_meta:
                raise ModelError(f"parameter '{name}' has no values yet; run one batch through the model first")
            if hasattr(parameter, "device_mesh") or type(parameter).__name__ == "FlatParameter":
                raise ModelError(f"parameter '{name}' is sharded; FSDP and DTensor are not supported, use DDP")
        kinds = {(str(p.dtype), str(p.device)) for p in members.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(" on ".join(kind) for kind in kinds))
            raise ModelError(f"trainable parameters differ in type or device ({found}); convert or freeze some of them")
        return members

    # -- vectors ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of trainable values (alignment gaps not counted)."""
        return sum(slot.size for slot in self.layout)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) pairs of what trains now, as optimizers accept them."""
        return [(name, p) for name, p in self.members.items() if p.requires_grad]

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in the vector; there may be gaps between them."""
        return {slot.name: slice(slot.offset, slot.offset + slot.size) for slot in self.layout}

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """`vector` [P] as one tensor a parameter, in the parameters' shapes."""
        return {slot.name: slot.view(vector) for slot in self.layout}

    def pack(self, tensors: dict[str, Tensor], fill: float = 0.0) -> Tensor:
        """The opposite of `views`: a new vector [P] from one tensor a name; names left out get `fill`, gaps zero."""
        vector = torch.zeros_like(self.theta)
        for slot in self.layout:
            if slot.name in tensors:
                slot.view(vector).copy_(tensors[slot.name])
            else:
                slot.view(vector).fill_(fill)
        return vector

    def mask(self, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Tensor:
        """Boolean vector [P]: true where a parameter's name matches a pattern of `include` and none of `exclude`.

        A pattern is a name, a prefix such as "head", or has wildcards ("*.bias"). A pattern without a match is an
        error. A gap is never part of the mask.
        """
        chosen = torch.zeros(self.layout.length, dtype=torch.bool, device=self.theta.device)
        for pattern in (*include, *exclude):
            if not any(_matches(slot.name, pattern) for slot in self.layout):
                raise ModelError(f"no parameter matches '{pattern}'; there are {', '.join(self.members)}")
        for slot in self.layout:
            wanted = any(_matches(slot.name, p) for p in include) and not any(_matches(slot.name, p) for p in exclude)
            chosen[slot.offset : slot.offset + slot.size] = wanted
        return chosen

    def snapshot(self) -> Tensor:
        """A copy of `theta` [P] in a buffer that lives until the next snapshot."""
        if self._before is None:
            self._before = torch.empty_like(self.theta)
        return self._before.copy_(self.theta)

    @property
    def scratch(self) -> Tensor:
        """A vector [P] for intermediate results, which anybody may overwrite as soon as a hook has returned."""
        if self._scratch is None:
            self._scratch = torch.zeros_like(self.theta)
        return self._scratch

    # -- gradients ----------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Forget every gradient: `p.grad = None`."""
        self.complete, self.arrivals = False, []
        for parameter in self.members.values():
            parameter.grad = None

    def taking_part(self) -> list[slice] | None:
        """Where in the vector [P] parameters have a gradient now, neighbours joined; None: all of it, as a rule."""
        present = [parameter.grad is not None for parameter in self.members.values()]
        if all(present):
            return None
        runs: list[slice] = []
        neighbour = False
        for slot, here in zip(self.layout, present, strict=True):
            if here:
                start = runs.pop().start if neighbour else slot.offset
                runs.append(slice(start, slot.offset + slot.size))
            neighbour = here
        return runs

    def gather(self, start: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Copy all gradients into `grad` [P] and make every `p.grad` a view of it.

        A parameter that took no part keeps `p.grad = None`, so no optimizer moves it; its part of `grad` is zero, and
        `complete` is false. Where `keeps_arrivals` is set, `arrivals` are the gradients as they came, one a parameter
        (None: it took no part), whatever happens to `grad`.

        `start` may write into `grad` first; then the gradients are added to that, and `begun` is true.
        """
        pairs = self._gradient_views()
        gradients = [parameter.grad for parameter, _ in pairs]
        if self.keeps_arrivals or start is not None:
            views = [view for _, view in pairs]
            gradients = [g.clone() if g is not None and g is v else g for g, v in zip(gradients, views, strict=True)]
        self.arrivals = gradients if self.keeps_arrivals else []
        self.begun = start is not None and start(self.grad)
        self.complete = True
        into, arrived = [], []
        for (parameter, view), gradient in zip(pairs, gradients, strict=True):
            if gradient is None:
                self.complete = False
                if not self.begun:
                    view.zero_()
            elif gradient.is_sparse:
                raise ModelError("a parameter has a sparse gradient; build its embedding with sparse=False")
            elif gradient is not view:
                into.append(view)
                arrived.append(gradient)
                parameter.grad = view
        if into:
            (torch._foreach_add_ if self.begun else torch._foreach_copy_)(into, arrived)
        return self.grad

    def expect(self, start: Callable[[Tensor], bool]) -> bool:
        """Let `start` write into `grad` [P] before the backward pass, which then adds to it; false if it wrote nothing.

        After a true answer and the backward pass comes `arrived` instead of `gather`.
        """
        views = self._gradient_views()
        if not start(self.grad):
            return False
        self._versions = []
        for parameter, view in views:
            parameter.grad = view
            self._versions.append(view._version)
        return True

    def arrived(self) -> Tensor:
        """What `expect` began, after the backward pass: as `gather`, but what took no part keeps what was written."""
        self.complete = self.begun = True
        for (parameter, view), version in zip(self._grads, self._versions, strict=True):
            if view._version == version:
                parameter.grad = None
                self.complete = False
        return self.grad

    def _gradient_views(self) -> list[tuple[nn.Parameter, Tensor]]:
        if not self._grads:
            self.grad = torch.zeros_like(self.theta)
            # `.data`: each view then counts its own changes, which tells whether a backward pass has reached it.
            self._grads = [
                (p, slot.view(self.grad).data) for slot, p in zip(self.layout, self.members.values(), strict=True)
            ]
        return self._grads

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of a scalar, one tensor a name, of the parameters that take part; no `p.grad` changes."""
        trainable = {name: parameter for name, parameter in self.members.items() if parameter.requires_grad}
        found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        return {name: part for name, part in zip(trainable, found, strict=True) if part is not None}

    def gradient(self, loss: Tensor, into: Tensor | None = None) -> Tensor:
        """The gradient of a scalar as a vector [P], a new one or `into` (which must be zero between parameters).

        No `p.grad` changes, and what took no part gives zero.
        """
        found = self.gradients(loss)
        vector = torch.zeros_like(self.theta) if into is None else into
        if into is not None and len(found) < len(self.members):
            vector.zero_()
        if found:
            torch._foreach_copy_(
                [slot.view(vector) for slot in self.layout if slot.name in found],
                [found[slot.name] for slot in self.layout if slot.name in found],
            )
        return vector


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _lay_out(members: dict[str, nn.Parameter], align: int) -> Layout:
    slots, offset = [], 0
    for name, parameter in members.items():
        stride = parameter.stride() if _is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
        slots.append(Slot(name, tuple(parameter.shape), tuple(stride), offset))
        offset += -(-parameter.numel() // align) * align
    return Layout(tuple(slots), offset)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one gapless block of memory, in whatever order (contiguous, channels_last, ...)."""
    sides = sorted((stride, side) for stride, side in zip(tensor.stride(), tensor.shape, strict=True) if side != 1)
    expected = [1]
    for _, side in sides:
        expected.append(expected[-1] * side)
    return tensor.numel() == 0 or [stride for stride, _ in sides] == expected[:-1]
