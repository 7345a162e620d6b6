"""Hard attention gates: the units of a layer, what reads them, and how that is found out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.errors import IncompatibleError
from perdure.methods.side_passes import eval_mode
from perdure.parameters import ParameterVector
from perdure.tree import leaves, tree_map

GATE = "hat_gate"
"""The name under which a layer holds the gates of its units."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Gate(nn.Module):
    """The embeddings of one layer's units [units], one a task, registered on the layer that they gate."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._like: Tensor = layer.weight  # type: ignore[assignment]
        self.units = len(self._like)
        self.embeddings = nn.ParameterDict()
        self.training = layer.training

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_like":
            object.__setattr__(self, name, value)  # the layer's own weight, which is not to be registered twice
        else:
            super().__setattr__(name, value)

    def __contains__(self, task: int) -> bool:
        return _name(task) in self.embeddings

    def embedding(self, task: int) -> Tensor:
        found: Tensor = self.embeddings[_name(task)]
        return found

    def draw(self, task: int, generator: torch.Generator) -> None:
        """A new embedding from the normal law, and no gradient for those before it."""
        for embedding in self.embeddings.values():
            embedding.requires_grad_(False)
        self._put(_name(task), torch.randn(self.units, generator=generator))

    def _put(self, name: str, value: Tensor) -> None:
        self.embeddings[name] = nn.Parameter(value.to(self._like.device, self._like.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}embeddings."
        saved = [key.removeprefix(start) for key in state_dict if key.startswith(start)]
        for name in [name for name in self.embeddings if name not in saved]:
            del self.embeddings[name]
        for name in sorted(saved, key=_index):
            if name not in self.embeddings:
                self._put(name, state_dict[start + name])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _name(task: int) -> str:
    return f"task_{task}"


def _index(name: str) -> int:
    return int(name.removeprefix("task_"))


@dataclass(frozen=True)
class Link:
    """What a layer reads: the units of layer `source`, each `repeat` times in a row (a flattened map); None: no units.

    `dim` is where they lie in the input.
    """

    source: str | None
    repeat: int
    dim: int

    def spread(self, units: Tensor) -> Tensor:
        """One value a unit as one an input feature."""
        return units if self.repeat == 1 else units.repeat_interleave(self.repeat)

    def gate(self, x: Tensor, units: Tensor) -> Tensor:
        """Input `x` times a gate [units]."""
        a = self.spread(units.to(x.dtype))
        return x * (a if self.dim == -1 else a.view(-1, *[1] * (x.dim() - 2)))


def gated_layers(model: nn.Module, heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Linear and convolutional layers that train, by name, but for those of the head."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and not _within(name, heads) and module.weight.requires_grad:
            if getattr(module, "groups", 1) != 1:
                raise IncompatibleError(
                    f"'hat' gates the units of a layer one by one, and '{name}' has {module.groups} groups; use a "
                    "model without grouped convolutions"
                )
            found[name] = module
    if not found:
        raise IncompatibleError(
            "'hat' found no Linear or convolutional layer before the head; there is nothing to gate"
        )
    return found


def check_covered(
    parameters: ParameterVector, layers: Mapping[str, nn.Module], heads: Mapping[str, nn.Module], others: Tensor
) -> None:
    """Raise IncompatibleError for a trainable parameter that nothing protects; `others` [P] are taken care of."""
    places: dict[int, list[str]] = {}
    for name, parameter in parameters.module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for slot, (name, parameter) in zip(parameters.layout, parameters.members.items(), strict=True):
        owner, _, attribute = name.rpartition(".")
        mine = owner in layers and attribute in ("weight", "bias")
        if len(places[id(parameter)]) > 1 and (mine or _within(name, heads)):
            raise IncompatibleError(f"'hat' cannot gate the weight '{name}', which two layers share; untie it")
        gates = f".{GATE}." in name
        covered = mine or gates or _within(name, heads) or bool(slot.view(others).all())
        if parameter.requires_grad and not covered:
            raise IncompatibleError(
                f"'hat' protects weights between gated units, and '{name}' is not one; freeze it, or let it learn in "
                f"the first task alone with first_task_only=['{name}']"
            )


def trace(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    heads: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Link]:
    """What every layer and head reads, found by autograd on one forward pass; nothing of the model changes.

    Raises
    ------
    IncompatibleError
        Where a gate on the units would not keep a later layer from what is gated off: connections around a layer,
        operations that mix units, layers that are called twice or not at all.
    """
    reads: dict[str, Tensor] = {}
    cut: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    readers = {**layers, **heads}

    def before(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in reads:
            raise IncompatibleError(f"'hat' cannot gate '{name}', which is called twice in a forward pass")
        reads[name] = args[0]
        cut[name] = args[0].detach().requires_grad_()
        return (cut[name], *args[1:])

    def after(name: str, output: Tensor) -> None:
        writes[name] = output

    with _hooked(readers, before, after), eval_mode(model), torch.enable_grad():
        args = tree_map(_tracked, args)
        kwargs = tree_map(_tracked, kwargs)
        answer = model(*args, **kwargs)
        outputs = getattr(answer, "logits", answer)
        missing = [name for name in readers if name not in reads]
        if missing:
            raise IncompatibleError(f"'hat' found that '{missing[0]}' takes no part in the forward pass; remove it")
        inputs = [leaf for leaf in (*leaves(args), *leaves(kwargs)) if leaf.requires_grad]
        links = {name: _link(name, readers[name], reads, cut, writes, layers, inputs) for name in readers}
        for name in layers:
            if not any(link.source == name for link in links.values()):
                raise IncompatibleError(f"'hat' found no layer that reads the units of '{name}'; there must be a head")
        past = [name for name in _sources(outputs, cut, inputs) if name not in heads]
        if past:
            raise IncompatibleError(
                f"'hat' found a way from the input of '{past[0] or 'the model'}' to the outputs around the head "
                f"({', '.join(heads)}); name all layers that give the outputs with head=[...]"
            )
    return links


def _link(
    name: str,
    reader: nn.Module,
    reads: dict[str, Tensor],
    cut: dict[str, Tensor],
    writes: dict[str, Tensor],
    layers: Mapping[str, nn.Module],
    inputs: list[Tensor],
) -> Link:
    x = reads[name]
    dim = 1 if isinstance(reader, _CONVOLUTIONS) else -1
    others = {each: leaf for each, leaf in cut.items() if each != name}
    sources = _sources(x, others, inputs)
    if len(sources) > 1:
        ways = " and ".join(f"'{source}'" if source else "the model's input" for source in sources)
        raise IncompatibleError(
            f"'hat' cannot gate the input of '{name}', to which ways lead from {ways}: through a connection around a "
            "layer, units that are off would still be seen; use a model without skip connections"
        )
    if not sources or not sources[0]:
        return Link(None, 1, dim)
    source = sources[0]
    units = len(layers[source].weight) if source in layers else 0  # type: ignore[arg-type]
    features = x.shape[dim]
    if not units or features % units:
        raise IncompatibleError(
            f"'hat' cannot tell which of the {features} inputs of '{name}' come from which unit of '{source}'"
        )
    link = Link(source, features // units, dim)
    _check_unmixed(name, x, writes[source], link, 1 if isinstance(layers[source], _CONVOLUTIONS) else -1)
    return link


def _check_unmixed(name: str, x: Tensor, units: Tensor, link: Link, dim: int) -> None:
    """Every input of a reader must depend on its own unit alone: not through a norm over units, or attention."""
    draw = torch.Generator().manual_seed(0)
    half = torch.arange(units.shape[dim]) % 2 == 0
    for chosen in (half, ~half):
        weights = torch.randn(x.shape, generator=draw).to(x.device, x.dtype)
        picked = link.gate(weights, chosen.to(x.device))
        (gradient,) = torch.autograd.grad(x, units, picked, retain_graph=True, allow_unused=True)
        if gradient is not None and bool(gradient.movedim(dim, 0)[~chosen.to(x.device)].any()):
            raise IncompatibleError(
                f"'hat' cannot gate the units of '{link.source}', which are mixed before '{name}' reads them (a norm "
                "over units, attention); use batch norm or none"
            )


def _sources(x: Tensor, cut: Mapping[str, Tensor], inputs: list[Tensor]) -> list[str]:
    """The names of the readers whose inputs `x` depends on; "" for the model's input."""
    if not x.requires_grad:
        return []
    tensors = [*cut.values(), *inputs]
    total = x[x.isfinite()].sum()
    found = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True) if tensors else ()
    names = [*cut, *["" for _ in inputs]]
    return list(dict.fromkeys(name for name, gradient in zip(names, found, strict=True) if gradient is not None))


@contextmanager
def _hooked(readers: Mapping[str, nn.Module], before: Any, after: Any) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for name, module in readers.items():
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
            handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: after(name, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tracked(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf


def _within(name: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in modules)
