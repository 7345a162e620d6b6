"""Squared or absolute per-sample gradients of a whole model: by layer hooks, by vmap, or one sample after the other.

All three take the gradient of sum(v * outputs) for cotangents v and give, for every parameter, the sum over samples and
cotangents of its size (`torch.square` or `torch.abs`). Hooks cost little more than a plain backward pass; what they do
not know falls back to `torch.func.vmap`, and what vmap cannot trace to a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.errors import DataError
from perdure.methods.layer_sums import Rule, Size, rule_for
from perdure.methods.side_passes import eval_mode
from perdure.parameters import unwrap
from perdure.tree import rows, take, tree_map

# Values that vmap may hold as per-sample gradients at a time.
CHUNK = 2**24

Sums = dict[str, Tensor]
Cotangents = Iterable[Tensor]


class UnsupportedError(Exception):
    """The layer hooks cannot account for this model; another way has to be taken."""


def mean_over_samples(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    cotangents: Callable[[Tensor, Tensor], Cotangents],
    *,
    names: Mapping[str, nn.Parameter],
    samples: int | None = None,
    size: Size = torch.square,
) -> Sums:
    """The mean over samples of the size of the gradient of sum(v * outputs), summed over the cotangents v.

    The model runs in evaluation mode and is left as it was: modes, gradients, running statistics and torch's global
    generator do not change.

    Parameters
    ----------
    batches
        (x, y) pairs, ready for the model.
    cotangents
        Maps a batch's outputs and its y to tensors like the outputs.
    names
        The parameters wanted, by name.
    samples
        Use exactly so many samples (all by default).
    size
        `torch.square` or `torch.abs`.

    Returns
    -------
    dict
        One float32 tensor a name, of the parameter's shape, on its device; zero for parameters that took no part.

    Raises
    ------
    DataError
        If there is no sample.
    """
    sums = PerSampleSums(model, names, size)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    used = 0
    # Layer hooks and vmap need the modules themselves, not a graph compiled without them.
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    eagerly = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eval_mode(model), torch.random.fork_rng(devices=devices), eagerly:
        for x, y in batches:
            count = rows(x)
            if samples is not None and used + count > samples:
                count = samples - used
                x, y = take(x, slice(count)), y[:count]
            if count:
                sums.add(x, lambda outputs, y=y: cotangents(outputs, y))  # type: ignore[misc]
            used += count
            if used == samples:
                break
    if not used:
        raise DataError("importances need at least one sample; the data is empty")
    return {name: (total / used).float() for name, total in sums.total.items()}


def call(model: nn.Module, x: Any) -> Tensor:
    """The model's raw outputs; a dictionary is passed as keywords, `.logits` is taken from the answer."""
    answer = model(**x) if isinstance(x, dict) else model(x)
    logits: Tensor = answer.logits if hasattr(answer, "logits") else answer
    return logits


class LayerHooks:
    """A forward pass whose backward passes add sizes of per-sample gradients to `sums`, without a parameter graph.

    Raises UnsupportedError for modules without a rule, weights in two places, modules called twice, and layers whose
    first dimension is not the sample.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], sums: Sums, size: Size = torch.square
    ) -> None:
        self.model = model
        self.size = size
        self._rows = 0
        self._anchor = torch.empty(0)
        self._called: set[nn.Module] = set()
        self._sums: dict[nn.Module, dict[str, Tensor]] = {}
        names = {id(parameter): name for name, parameter in parameters.items()}
        seen: set[str] = set()
        for module in model.modules():
            wanted = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
            if not seen.isdisjoint(wanted.values()):
                raise UnsupportedError("a parameter is used in several places")
            seen.update(wanted.values())
            if wanted:
                self._sums[module] = {key: sums[name] for key, name in wanted.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in place and parameters without gradients."""
        handles: list[RemovableHandle] = []
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            handles += [m.register_forward_hook(partial(self._after, rule_for(m))) for m in self._sums]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)

    def forward(self, x: Any) -> Tensor:
        self._called.clear()
        self._rows = rows(x)
        self._anchor = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            return call(self.model, x)

    def backward(self, outputs: Tensor, cotangents: Cotangents) -> None:
        """Add up the sizes for each of `cotangents`, tensors like the outputs."""
        if outputs.requires_grad:
            for cotangent in cotangents:
                torch.autograd.grad(outputs, self._anchor, cotangent, retain_graph=True, allow_unused=True)

    def _after(self, rule: Rule | None, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        if rule is None:
            raise UnsupportedError(f"there is no rule for {type(module).__name__}")
        if module in self._called:
            raise UnsupportedError(f"{type(module).__name__} is called twice")
        if len(inputs) != 1 or not isinstance(output, Tensor) or not len(inputs[0]) == len(output) == self._rows:
            raise UnsupportedError(f"the first dimension of a {type(module).__name__} is not the sample")
        self._called.add(module)
        if not output.requires_grad:
            output = _Root.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        # A hook on the tensor sees the gradient of the layer's own output even if that is overwritten later.
        output.register_hook(partial(self._accumulate, rule, module, inputs[0].detach()))
        rooted: Tensor = output
        return rooted

    def _accumulate(self, rule: Rule, module: nn.Module, a: Tensor, g: Tensor) -> None:
        sums = self._sums[module]
        kind = next(iter(sums.values())).dtype
        rule(module, a.to(kind) if a.is_floating_point() else a, g.detach().to(kind), self.size, sums)


class _Root(torch.autograd.Function):
    """The identity, which makes a tensor require a gradient without computing any beyond it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def by_vmap(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    x: Any,
    cotangents: Cotangents,
    chunk: int | None = None,
    size: Size = torch.square,
) -> Sums:
    """Sizes summed over samples and cotangents, with per-sample gradients in chunks of samples."""
    fixed, trained = _split(model, parameters)
    sums = zeros(parameters)

    def objective(values: dict[str, Tensor], row: Any, cotangent: Tensor) -> Tensor:
        state = {**fixed, **{place: values[name] for name, places in trained.items() for place in places}}
        single = tree_map(lambda leaf: leaf[None], row)
        arguments = ((), single) if isinstance(single, dict) else ((single,), None)
        answer = torch.func.functional_call(model, state, *arguments, tie_weights=False)
        logits = (answer.logits if hasattr(answer, "logits") else answer)[0]
        total: Tensor = (logits.masked_fill(cotangent == 0, 0) * cotangent).sum()
        return total

    values = {name: parameters[name].detach() for name in trained}
    most = chunk or max(1, min(32, CHUNK // max(1, sum(value.numel() for value in values.values()))))
    gradient: Callable[..., Sums] = torch.func.vmap(
        torch.func.grad(objective), in_dims=(None, 0, 0), randomness="different"
    )
    for cotangent in cotangents:
        for start in range(0, len(cotangent), most):
            part = slice(start, start + most)
            for name, each in gradient(values, take(x, part), cotangent[part]).items():
                sums[name] += size(each.to(sums[name].dtype)).sum(0)
    return sums


def by_loop(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    x: Any,
    cotangents: Cotangents,
    size: Size = torch.square,
) -> Sums:
    """Sizes summed over samples and cotangents, one backward pass each."""
    sums = zeros(parameters)
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        together = list(cotangents)
        for n in range(rows(x)):
            with torch.enable_grad():
                outputs = call(model, take(x, slice(n, n + 1)))
            if not outputs.requires_grad:
                continue
            for cotangent in together:
                gradients = torch.autograd.grad(
                    outputs, list(parameters.values()), cotangent[n : n + 1], retain_graph=True, allow_unused=True
                )
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total += size(gradient.to(total.dtype))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return sums


def _split(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """All tensors that stay fixed, and for every wanted parameter the places in the model where it is."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    fixed: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    trained: dict[str, list[str]] = {}
    for place, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            trained.setdefault(names[id(parameter)], []).append(place)
        else:
            fixed[place] = parameter.detach()
    return fixed, trained


def zeros(parameters: Mapping[str, nn.Parameter]) -> Sums:
    """Sums at zero, in float32 at least."""
    return {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()}


class PerSampleSums:
    """Adds up squared or absolute per-sample gradients over batches, the fastest way that is right for the model.

    The layer hooks are checked against plain autograd on one sample before they are trusted. The model should be in
    evaluation mode.

    Parameters
    ----------
    model
        Called on the batches; outputs [n, ...].
    parameters
        Whose gradients are wanted, by name; `total` has the same names.
    size
        `torch.square` or `torch.abs`, of every entry of a sample's gradient.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], size: Size = torch.square) -> None:
        self.model = unwrap(model)
        self.parameters = dict(parameters)
        self.size = size
        self.total = zeros(parameters)
        self.way = "hooks"
        self._hooks: LayerHooks | None = None

    def add(self, x: Any, cotangents: Callable[[Tensor], Cotangents]) -> None:
        """Add a batch; `cotangents` maps its outputs to tensors of their shape."""
        if self.way == "hooks":
            try:
                if self._hooks is None:
                    self._hooks = self._checked_hooks(take(x, slice(1)))
                with self._hooks.attached():
                    outputs = self._hooks.forward(x)
                    self._hooks.backward(outputs, cotangents(outputs.detach()))
                return
            except UnsupportedError:
                self.way = "vmap"
        with torch.no_grad():
            together = list(cotangents(call(self.model, x)))
        found = None
        if self.way == "vmap":
            try:
                found = by_vmap(self.model, self.parameters, x, together, size=self.size)
            except Exception:  # whatever vmap cannot trace; an error of the model's own comes again in the loop
                self.way = "loop"
        if found is None:
            found = by_loop(self.model, self.parameters, x, together, self.size)
        for name, sums in found.items():
            self.total[name] += sums

    def _checked_hooks(self, x: Any) -> LayerHooks:
        """Hooks that add to `total`, if on one row they do what plain autograd does."""
        trial = zeros(self.parameters)
        hooks = LayerHooks(self.model, self.parameters, trial, self.size)
        with hooks.attached():
            try:
                outputs = hooks.forward(x)
            except UnsupportedError:
                raise
            except Exception:
                # A model that cannot take a single row can be run by hooks alone.
                return LayerHooks(self.model, self.parameters, self.total, self.size)
            signs = torch.ones_like(outputs).flatten()
            signs[1::2] = -1
            cotangent = [signs.view_as(outputs).masked_fill(~outputs.isfinite(), 0)]
            hooks.backward(outputs, cotangent)
        expected = by_loop(self.model, self.parameters, x, cotangent, self.size)
        for name, sums in expected.items():
            # What is not finite cannot be compared; whoever wants the importances will find them so.
            if (
                sums.numel()
                and sums.isfinite().all()
                and not torch.allclose(trial[name], sums, rtol=0, atol=0.02 * float(sums.max()))
            ):
                raise UnsupportedError(f"parameter '{name}' is used outside its module")
        return LayerHooks(self.model, self.parameters, self.total, self.size)
