"""An elementwise optimizer run once over the whole vector, where that gives the bits of running it tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.optimizers import Optimizers
from perdure.parameters import ParameterVector

# Every value moves by itself in these; with fused kernels it does not: the ends of tensors take another path.
ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
OPTIONS_THAT_FORBID = ("fused", "capturable", "differentiable")
LARGEST = 1 << 17
"""Values above which copying the gradients, where no method wants them copied, costs more than the calls it saves."""


class FlatStep:
    """Takes the optimizer's step on `theta` and `grad` with torch's own optimizer over one tensor.

    The caller's optimizer keeps its object, its groups and a state for each parameter: the moments become views of flat
    ones. Used on a CPU for SGD, Adam and AdamW with one group over exactly the vector's parameters, without step hooks,
    schedulers or fused kernels, and in steps in which every parameter has a gradient. SGD without momentum has nothing
    to keep and steps directly, on whatever gradients there are.
    """

    def __init__(self, parameters: ParameterVector, optimizers: Optimizers) -> None:
        self.parameters = parameters
        self.optimizers = optimizers
        self._shadow: Optimizer | None = None
        self._flat = nn.Parameter(torch.empty(0))
        self._states: list[dict[str, Any]] = []
        self._counts: dict[str, Tensor] = {}
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        # With an eps that is zero in the vector's type, Adam would divide 0 by 0 in the gaps between parameters.
        self._smallest = torch.finfo(parameters.theta.dtype).tiny
        self.possible = self._check()
        if self.possible:
            views = parameters.views(parameters.theta)
            self._views = [(parameter, views[name]) for name, parameter in parameters.members.items()]

    def _check(self) -> bool:
        if len(self.optimizers.all) != 1:
            return False
        optimizer, theta = self.optimizers.all[0], self.parameters.theta
        group = optimizer.param_groups[0]
        members = list(self.parameters.members.values())
        return (
            type(optimizer) in ELEMENTWISE
            and len(optimizer.param_groups) == 1
            and {id(p) for p in group["params"]} == {id(p) for p in members}
            and not any(group.get(option) for option in OPTIONS_THAT_FORBID)
            and not isinstance(group["lr"], Tensor)
            and not _is_watched(optimizer)
            and theta.device.type == "cpu"
            and theta.numel() > 0
        )

    @property
    def worth_gathering(self) -> bool:
        """Whether gradients should be gathered for this step's sake alone."""
        if not self.possible or self.parameters.theta.numel() > LARGEST:
            return False
        optimizer = self.optimizers.all[0]
        return not _is_bare_descent(optimizer, optimizer.param_groups[0])

    def step(self) -> bool:
        """Step all parameters at once; false if they have to be stepped one by one, and then nothing has happened."""
        optimizer = self.optimizers.all[0]
        if not self.possible or _is_watched(optimizer):
            self.leave()
            return False
        group = optimizer.param_groups[0]
        if (
            len(optimizer.param_groups) != 1
            or len(group["params"]) != len(self._views)
            or group.get("eps", 1.0) < self._smallest
        ):
            self.leave()
            return False
        if not optimizer.state and _is_bare_descent(optimizer, group) and self._descend(-group["lr"]):
            return True
        if not self.parameters.complete:
            self.leave()
            return False
        return self._step_shadow(optimizer, group)

    def _descend(self, factor: float) -> bool:
        """`theta += factor * gradient`, of what has one; false if a gradient is sparse."""
        if self.parameters.complete:
            self.parameters.theta.add_(self.parameters.grad, alpha=factor)
            return True
        views, gradients = [], []
        for parameter, view in self._views:
            gradient = parameter.grad
            if gradient is not None:
                if gradient.is_sparse:
                    return False
                views.append(view)
                gradients.append(gradient)
        if views:
            torch._foreach_add_(views, gradients, alpha=factor)
        return True

    @torch.no_grad()
    def _step_shadow(self, optimizer: Optimizer, group: dict[str, Any]) -> bool:
        if (self._shadow is None or self._touched(optimizer)) and not self._enter(optimizer, group):
            return False
        assert self._shadow is not None
        shadow_group = self._shadow.param_groups[0]
        for key, value in group.items():
            if key not in ("params", "param_names"):
                shadow_group[key] = value
        self._shadow.step()
        if not self._states:
            self._share(optimizer)
        for key, counts in self._counts.items():
            counts.copy_(self._shadow.state[self._flat][key])
        return True

    def leave(self) -> None:
        """Give every parameter a count of steps of its own again."""
        for state in self._states:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == 0:
                    state[key] = value.clone()
        self._shadow, self._states, self._counts = None, [], {}

    def _touched(self, optimizer: Optimizer) -> bool:
        """Whether somebody replaced or dropped the state of a parameter, or stepped the optimizer himself."""
        members = self.parameters.members.values()
        if not self._states:
            return any(optimizer.state.get(p) for p in members)
        if any(optimizer.state.get(p) is not known for p, known in zip(members, self._states, strict=True)):
            return True
        assert self._shadow is not None
        ours = self._shadow.state[self._flat]
        return any(float(counts[0]) != float(ours[key]) for key, counts in self._counts.items())

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _enter(self, optimizer: Optimizer, group: dict[str, Any]) -> bool:
        """Make the one tensor, and join the parameters' states; false if they are not alike."""
        self._shadow, self._states, self._counts = None, [], {}
        members = self.parameters.members
        states = {name: optimizer.state[p] for name, p in members.items() if optimizer.state.get(p)}
        if not states:
            for p in members.values():
                optimizer.state.pop(p, None)
        counts = {float(state["step"]) for state in states.values() if "step" in state}
        if (states and len(states) < len(members)) or len(counts) > 1:
            return False
        self._flat = nn.Parameter(self.parameters.theta)
        self._flat.grad = self.parameters.grad
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        kind: Any = type(optimizer)
        self._shadow = kind([{"params": [self._flat], **options}])
        if states:
            flat: dict[str, Any] = dict(next(iter(states.values())))
            for key, value in flat.items():
                if isinstance(value, Tensor) and value.dim():
                    flat[key] = self.parameters.pack({name: state[key] for name, state in states.items()})
                elif isinstance(value, Tensor):
                    flat[key] = value.clone()
            self._shadow.state[self._flat] = flat
            self._share(optimizer)
        return True

    def _share(self, optimizer: Optimizer) -> None:
        """Make the parameters' states views of the flat one; the count of steps is one for all."""
        assert self._shadow is not None
        flat = self._shadow.state.get(self._flat)
        if not flat:
            return
        views = {k: self.parameters.views(v) for k, v in flat.items() if isinstance(v, Tensor) and v.dim()}
        # Counts of steps are one block of memory, but a tensor each: one object for all would be counted up once for
        # every parameter by whoever steps the optimizer, or a copy of its state, one parameter after the other.
        size = len(self.parameters.members)
        self._counts = {k: v.repeat(size) for k, v in flat.items() if isinstance(v, Tensor) and not v.dim()}
        for index, (name, parameter) in enumerate(self.parameters.members.items()):
            state = optimizer.state[parameter]
            for key, value in flat.items():
                if key in views:
                    state[key] = views[key][name]
                else:
                    state[key] = self._counts[key][index] if key in self._counts else value
        self._states = [optimizer.state[parameter] for parameter in self.parameters.members.values()]


def _is_bare_descent(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a step is `p.add_(grad, alpha=-lr)` and nothing else."""
    return type(optimizer) is torch.optim.SGD and not (group["momentum"] or group["weight_decay"] or group["maximize"])


def _is_watched(optimizer: Optimizer) -> bool:
    """Whether somebody hears of every `step()`: by hooks, or by a method put in its place, as schedulers do."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(hooks) or "step" in vars(optimizer)
