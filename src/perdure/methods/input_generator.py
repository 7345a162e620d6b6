"""A generator that learns the inputs of a stream, and the frozen one of the generation before that it learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from perdure.errors import DataError
from perdure.methods.frozen import frozen_copy
from perdure.methods.side_passes import eval_mode
from perdure.models.vae import VAE
from perdure.optimizers import Optimizers
from perdure.parameters import average_over_processes
from perdure.seeding import derive, generator

if TYPE_CHECKING:
    from perdure.learner import Learner


class InputGenerator:
    """A variational autoencoder with an optimizer and random numbers of its own, built when the first rows come.

    Parameters
    ----------
    learner
        Whose model it helps, on whose device it lives.
    seed
        Of everything random here.
    likelihood
        "bernoulli", "gaussian", or "auto": the first where the first rows lie in [0, 1].
    lr
        Of Adam.
    per_value
        Divide the loss by the number of values of a row.
    network, hidden, latent
        Of the `VAE`.

    Attributes
    ----------
    vae, optimizer
        None until there are rows.
    old
        The tensors of the frozen decoder, or None in the first generation.
    """

    def __init__(
        self,
        learner: Learner,
        seed: int,
        *,
        network: str,
        hidden: Sequence[int],
        latent: int,
        likelihood: str,
        lr: float,
        per_value: bool,
    ) -> None:
        self.learner, self.seed = learner, seed
        self.network, self.hidden, self.latent = network, tuple(hidden), latent
        self.likelihood, self.lr, self.per_value = likelihood, lr, per_value
        self.sampling, self.noise = generator(seed, "sampling"), generator(seed, "noise")
        self.vae: VAE | None = None
        self.optimizer: Optimizers | None = None
        self.plan: dict[str, Any] | None = None
        self.old: dict[str, Tensor] | None = None

    def check(self, x: Tensor) -> None:
        """Raise DataError for rows [n, ...] that this generator cannot make."""
        if self.plan is not None and list(x.shape[1:]) != self.plan["shape"]:
            was, now = tuple(self.plan["shape"]), tuple(x.shape[1:])
            raise DataError(f"the generator makes rows of shape {was}, and these have {now}; give all tasks one shape")
        likelihood = self.likelihood if self.plan is None else self.plan["likelihood"]
        if likelihood == "bernoulli" and not _in_unit_interval(x):
            low, high = (float(value) for value in x.aminmax())
            raise DataError(
                f"the generator makes values in [0, 1], and these inputs go from {low:g} to {high:g}; "
                "set likelihood to 'gaussian'"
            )

    def build(self, x: Tensor, classes: int) -> None:
        """Make the generator of rows like `x` [n, ...]; with `classes` it is conditional."""
        likelihood = self.likelihood
        if likelihood == "auto":
            likelihood = "bernoulli" if _in_unit_interval(x) else "gaussian"
        self._build({"shape": list(x.shape[1:]), "likelihood": likelihood, "classes": classes})
        assert self.vae is not None
        self.vae.decoder.scale_to(x)

    def _build(self, plan: dict[str, Any]) -> None:
        theta = self.learner.parameters.theta
        self.plan = dict(plan)
        self.vae = VAE(
            plan["shape"],
            network=self.network,
            hidden=self.hidden,
            latent=self.latent,
            likelihood=plan["likelihood"],
            classes=plan["classes"],
            seed=derive(self.seed, "weights"),
        )
        # Half precision would be too coarse for the small steps of Adam.
        self.vae.to(theta.device, torch.float64 if theta.dtype == torch.float64 else torch.float32)
        adam = partial(torch.optim.Adam, lr=self.lr, fused=theta.device.type in ("cpu", "cuda"))
        self.optimizer = Optimizers(adam, list(self.vae.named_parameters()))

    def grow(self, classes: int) -> None:
        """Make room for more classes in a conditional generator."""
        if self.vae is None or self.plan is None or not 0 < self.vae.classes < classes:
            return
        self.vae.grow(classes, generator(self.seed, "labels", classes))
        self.plan["classes"] = classes
        self._rebind()

    def _rebind(self) -> None:
        assert self.vae is not None
        assert self.optimizer is not None
        self.optimizer.rebind(list(self.vae.named_parameters()))

    def freeze(self, reset_optimizer: bool = False) -> None:
        """From here on rows are drawn from the generator as it is now."""
        assert self.vae is not None
        assert self.optimizer is not None
        self.vae.to(self.learner.parameters.theta.device)
        self._rebind()
        if reset_optimizer:
            self.optimizer.reset()
        self.old = frozen_copy(self.vae.decoder)

    @torch.no_grad()
    def draw(self, count: int, y: Tensor | None = None) -> Tensor:
        """New rows [count, ...] of the frozen generation, of classes `y` [count] if it is conditional."""
        assert self.vae is not None
        assert self.old is not None
        decoder = self.vae.decoder
        z = self._normal(self.sampling, count, self.latent)
        noise = None if decoder.log_variance is None else self._normal(self.sampling, count, *self.vae.shape)
        with eval_mode(decoder):
            x: Tensor = functional_call(decoder, self.old, (z, y, noise))
        return x

    @torch.no_grad()
    def show(self, draw: torch.Generator, count: int, y: Tensor | None = None) -> Tensor:
        """What the generator of now makes of codes from a generator of the caller's: means [count, ...]."""
        assert self.vae is not None
        with eval_mode(self.vae.decoder):
            x: Tensor = self.vae.decoder(self._normal(draw, count, self.latent), y)
        return x

    def learn(self, rows: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """One update on the sum of weight times mean loss over each (x [n, ...], y [n], weight)."""
        assert self.vae is not None
        assert self.optimizer is not None
        like = self.vae.decoder.first.weight
        x = torch.cat([x.to(like) for x, _, _ in rows]) if len(rows) > 1 else rows[0][0].to(like)
        y = torch.cat([y.to(like.device) for _, y, _ in rows]) if self.vae.classes else None
        values = self.vae.losses(x, self._normal(self.noise, len(x), self.latent), y)
        if self.per_value:
            values = values / math.prod(self.vae.shape)
        if len(rows) == 1 and rows[0][2] == 1.0:
            loss = values.mean()
        else:
            parts = values.split_with_sizes([len(x) for x, _, _ in rows])
            loss = torch.stack([part.mean() * row[2] for part, row in zip(parts, rows, strict=True)]).sum()
        torch.autograd.backward(loss)
        self._average()
        self.optimizer.step()
        for parameter in self.vae.parameters():
            parameter.grad = None

    def _average(self) -> None:
        """Where several processes train the model together, they train one generator."""
        assert self.vae is not None
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        gradients = [p.grad for p in self.vae.parameters() if p.grad is not None]
        mean = average_over_processes(self.learner.model, torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, mean.split_with_sizes([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _normal(self, draw: torch.Generator, *shape: int) -> Tensor:
        """Standard normal noise, drawn on the CPU so that it is the same on every device."""
        assert self.vae is not None
        like = self.vae.decoder.first.weight
        return torch.randn(shape, generator=draw, dtype=like.dtype).to(like.device, non_blocking=True)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "vae": None if self.vae is None else self.vae.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "old": self.old,
            "sampling": self.sampling,
            "noise": self.noise,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae = self.optimizer = self.plan = self.old = None
        if state["plan"] is not None:
            self._build(state["plan"])
            assert self.vae is not None
            assert self.optimizer is not None
            self.vae.load_state_dict(state["vae"])
            self.optimizer.load_state_dict(state["optimizer"])
        if state["old"] is not None:
            device = self.learner.parameters.theta.device
            self.old = {name: tensor.to(device, copy=True) for name, tensor in state["old"].items()}
        for draw in ("sampling", "noise"):
            saved = state[draw]
            getattr(self, draw).set_state(saved if isinstance(saved, Tensor) else saved.get_state())


def _in_unit_interval(x: Tensor) -> bool:
    low, high = x.aminmax()
    return float(low) >= 0 and float(high) <= 1
