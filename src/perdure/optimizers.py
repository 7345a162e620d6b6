"""The caller's optimizer, kept in step with a model whose parameters grow, are replaced or thawed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.errors import ModelError, UsageError

Named = list[tuple[str, nn.Parameter]]
Factory = Callable[[Named], "Optimizer | Sequence[Optimizer]"]


class Optimizers:
    """One or several optimizers over named parameters.

    Parameters
    ----------
    source
        A factory called with (name, parameter) pairs, such as `partial(torch.optim.Adam, lr=1e-3)` or a function that
        returns one or several optimizers; or an optimizer that the caller built, which stays that object for ever.
    named
        The parameters of the vector; those that are frozen at the moment may be left out of every group.

    Raises
    ------
    ModelError
        For an optimizer that needs a closure (LBFGS), or one that leaves a parameter out or holds it twice.
    """

    def __init__(self, source: Factory | Optimizer, named: Named) -> None:
        self.factory: Factory | None = None if isinstance(source, Optimizer) else source
        if not isinstance(source, Optimizer) and not callable(source):
            raise UsageError(
                f"optimizer is {source!r}; pass functools.partial(torch.optim.Adam, lr=...) or an optimizer"
            )
        if isinstance(source, type):
            raise UsageError(
                f"optimizer is the class {source.__name__}; pass functools.partial({source.__name__}, lr=...)"
            )
        self.all = _listed(source if isinstance(source, Optimizer) else source(named))
        self.members = dict(named)
        self._dtype = named[0][1].dtype
        self._check()

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def release(self) -> None:
        """Forget the gradients of what is held beside the vector: a criterion's weights, a layer thawed in mid-task."""
        for parameter in self._strays:
            parameter.grad = None

    def reset(self) -> None:
        """Forget moments and step counts; learning rates and groups stay."""
        for optimizer in self.all:
            optimizer.state.clear()

    def groups(self) -> Iterable[dict[str, Any]]:
        """Every parameter group of every optimizer."""
        return (group for optimizer in self.all for group in optimizer.param_groups)

    def descends(self, hooks: int = 0) -> bool:
        """Whether a step is `p.add_(grad, alpha=-lr)` for every parameter and nothing else.

        Step hooks may read the gradient or change it, so there must be none, but for `hooks` that are known.
        """
        for optimizer in self.all:
            if type(optimizer) is not torch.optim.SGD or len(optimizer._optimizer_step_pre_hooks) > hooks:
                return False
            for group in optimizer.param_groups:
                if group["momentum"] or group["weight_decay"] or group["maximize"]:
                    return False
        return True

    def learning_rates(self) -> dict[str, float]:
        """The current learning rate of each parameter, by name."""
        names = {id(parameter): name for name, parameter in self.members.items()}
        return {names[id(p)]: float(group["lr"]) for group in self.groups() for p in group["params"] if id(p) in names}

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """Step with `factor` times every group's learning rate; afterwards each has its own again, the same object."""
        own = [(group, group["lr"]) for group in self.groups()] if factor != 1 else []
        try:
            for group, rate in own:
                group["lr"] = rate * factor
            yield
        finally:
            for group, rate in own:
                group["lr"] = rate

    def rebind(self, named: Named) -> None:
        """Follow parameters that were replaced, added, thawed or removed.

        A replaced tensor takes its predecessor's place and state (sides that grew are filled with zero); a new one goes
        where the factory puts it, or into the only group of an optimizer that the caller built.
        """
        before, self.members = self.members, dict(named)
        for name, parameter in named:
            old = before.get(name)
            if old is not None and old is not parameter:
                self._swap(old, parameter)
        held = {id(p) for group in self.groups() for p in group["params"]}
        added = [(name, p) for name, p in named if id(p) not in held and p.requires_grad]
        if added and self.factory is not None:
            self._regroup(named)
        elif added:
            self._append(added)
        self._convert()
        self._drop({id(p) for p in before.values()} - {id(p) for _, p in named})
        self._check()

    # -- pieces of rebind -----------------------------------------------------------------------------------------

    def _swap(self, old: nn.Parameter, new: nn.Parameter) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = {k: _grown(k, v, old, new) for k, v in optimizer.state.pop(old).items()}

    def _convert(self) -> None:
        """Follow parameters to another device or type, which `module.to` does behind an optimizer's back."""
        for optimizer in self.all:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim():
                        # A state of another type than the parameters had (float32 for bfloat16, say) keeps its own.
                        dtype = parameter.dtype if value.dtype == self._dtype else value.dtype
                        state[key] = value.to(parameter.device, dtype)
        self._dtype = next(iter(self.members.values())).dtype

    def _regroup(self, named: Named) -> None:
        assert self.factory is not None
        fresh = _listed(self.factory(named))
        if [len(o.param_groups) for o in fresh] != [len(o.param_groups) for o in self.all]:
            raise ModelError(
                "the optimizer factory makes a different number of groups for the grown model; "
                "make it return the same groups, an empty one included"
            )
        for kept, new in zip(self.all, fresh, strict=True):
            for group, wanted in zip(kept.param_groups, new.param_groups, strict=True):
                group["params"] = wanted["params"]
                if "param_names" in wanted:
                    group["param_names"] = wanted["param_names"]

    def _append(self, added: Named) -> None:
        if len(self.all) > 1 or len(self.all[0].param_groups) > 1:
            raise ModelError(
                f"parameter '{added[0][0]}' is new and the optimizer has several groups; pass a factory "
                "(a function of the named parameters) so that it is known where new ones belong"
            )
        group = self.all[0].param_groups[0]
        group["params"].extend(parameter for _, parameter in added)
        if "param_names" in group:
            group["param_names"].extend(name for name, _ in added)

    def _drop(self, missing: set[int]) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                keep = [i for i, p in enumerate(group["params"]) if id(p) not in missing]
                if len(keep) < len(group["params"]):
                    if "param_names" in group:
                        group["param_names"] = [group["param_names"][i] for i in keep]
                    group["params"] = [group["params"][i] for i in keep]
            for parameter in [p for p in optimizer.state if id(p) in missing]:
                del optimizer.state[parameter]

    def _check(self) -> None:
        for optimizer in self.all:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ModelError(
                    "LBFGS evaluates the loss several times a step through a closure, so gradient hooks cannot see one "
                    "gradient; use a first-order optimizer such as SGD or Adam"
                )
        members = {id(p) for p in self.members.values()}
        self._strays = [p for group in self.groups() for p in group["params"] if id(p) not in members]
        held = [id(p) for group in self.groups() for p in group["params"]]
        if len(held) != len(set(held)):
            raise ModelError("a parameter is in two optimizers or groups; give each parameter to one of them")
        left_out = [name for name, p in self.members.items() if p.requires_grad and id(p) not in set(held)]
        if left_out:
            raise ModelError(f"the optimizer does not hold the trainable parameter '{left_out[0]}'; add or freeze it")

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """One plain state a optimizer: groups without parameters, state by parameter name."""
        names = {id(parameter): name for name, parameter in self.members.items()}
        return [
            {
                "type": type(optimizer).__name__,
                "groups": [
                    {k: v for k, v in group.items() if k != "params"}
                    | {"param_names": [names[id(p)] for p in group["params"] if id(p) in names]}
                    for group in optimizer.param_groups
                ],
                "state": {names[id(p)]: dict(state) for p, state in optimizer.state.items() if id(p) in names},
            }
            for optimizer in self.all
        ]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        """Take over groups' options and every tensor's state; raises UsageError for another kind of optimizer."""
        kinds, ours = [s["type"] for s in saved], [type(o).__name__ for o in self.all]
        if kinds != ours or any(len(s["groups"]) != len(o.param_groups) for s, o in zip(saved, self.all, strict=True)):
            raise UsageError(
                f"the saved optimizer is {', '.join(kinds)}, this learner has {', '.join(ours)}; pass the same"
            )
        for optimizer, state in zip(self.all, saved, strict=True):
            for group, options in zip(optimizer.param_groups, state["groups"], strict=True):
                group.update({k: v for k, v in options.items() if k != "param_names"})
            optimizer.state.clear()
            for name, values in state["state"].items():
                parameter = self.members[name]
                optimizer.state[parameter] = {k: _placed(v, parameter, k, optimizer) for k, v in values.items()}


def _listed(made: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    made = [made] if isinstance(made, Optimizer) else list(made)
    if not made or not all(isinstance(optimizer, Optimizer) for optimizer in made):
        raise UsageError("the optimizer factory must return a torch optimizer or a list of them")
    return made


def _grown(key: str, value: Any, old: nn.Parameter, new: nn.Parameter) -> Any:
    """A state tensor for the grown parameter: sides equal to the parameter's grow, sides of 1 and scalars stay."""
    if not isinstance(value, Tensor) or value.dim() == 0 or old.shape == new.shape:
        return value
    if value.dim() != old.dim() or any(side not in (1, was) for side, was in zip(value.shape, old.shape, strict=True)):
        raise ModelError(
            f"the optimizer keeps '{key}' of shape {tuple(value.shape)} for a parameter of shape {tuple(old.shape)} "
            f"that grew to {tuple(new.shape)}; such state cannot grow, use another optimizer or reset it"
        )
    shape = [n if side == was else 1 for side, was, n in zip(value.shape, old.shape, new.shape, strict=True)]
    grown = value.new_zeros(shape)
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        grown = grown.to(memory_format=torch.channels_last)
    corner = tuple(slice(min(a, b)) for a, b in zip(value.shape, shape, strict=True))
    grown[corner] = value[corner]
    return grown


def _placed(value: Any, parameter: nn.Parameter, key: str, optimizer: Optimizer) -> Any:
    """A loaded state value on the parameter's device; step counts stay where the optimizer keeps them."""
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        on_device = any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
        return value.to(parameter.device) if on_device else value.clone()
    placed = value.to(parameter.device)
    if placed.shape == parameter.shape and placed.stride() != parameter.stride():
        return torch.empty_like(parameter, dtype=placed.dtype).copy_(placed)
    return placed.clone()
