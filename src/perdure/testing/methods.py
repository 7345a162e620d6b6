"""What every method has to satisfy, as a class of pytest tests."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from perdure.checkpoint import load_state, save_state
from perdure.errors import PerdureWarning
from perdure.learner import Learner
from perdure.methods.base import Method
from perdure.models.heads import GrowingHead
from perdure.models.mlp import MLP
from perdure.saving import learner_state, load_learner_state
from perdure.streams.benchmarks import split_digits


class MethodSuite:
    """Inherit, say how to build the method, and let pytest collect the class.

    Example
    -------
    ::

        class TestMine(MethodSuite):
            def on(self): return Mine(strength=1.0)
            def off(self): return Mine(strength=0.0)
    """

    scenario = "class"

    def on(self) -> Method:
        """The method, strong enough to make a difference on a few tasks of digits."""
        raise TypeError(f"{type(self).__name__} has to say how to build the method: def on(self)")

    def off(self) -> Method | None:
        """The method switched off, or None if it has no such setting."""
        return None

    def prepared(self, model: nn.Module) -> nn.Module:
        """A plain model as the method needs it (with mean-field layers, say); changed in place or a new one."""
        return model

    # -- tests ----------------------------------------------------------------------------------------------------

    def test_switched_off_it_is_fine_tuning_bit_for_bit(self) -> None:
        method = self.off()
        if method is not None:
            assert torch.equal(self._train([method]), self._train([]))

    def test_switched_on_it_differs(self) -> None:
        assert not torch.equal(self._train([self.on()]), self._train([]))

    def test_the_first_task_and_every_rerun_are_deterministic(self) -> None:
        assert torch.equal(self._train([self.on()]), self._train([self.on()]))

    def test_it_draws_from_its_own_generator_alone(self) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = self._train([self.on()])
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        torch.manual_seed(2)
        assert torch.equal(self._train([self.on()]), first)

    def test_it_resumes_inside_a_task_to_the_same_bits(self, tmp_path: Path) -> None:
        for stop in ((0, 3), (1, 0), (2, 5)):
            whole, cut = self._learner([self.on()]), self._learner([self.on()])
            self._run(whole)
            self._run(cut, until=stop)
            save_state(tmp_path / "state", learner_state(cut))
            other = self._learner([self.on()])
            load_learner_state(other, load_state(tmp_path / "state"))
            self._run(other, since=stop)
            assert torch.equal(other.parameters.theta, whole.parameters.theta), f"stopped at task, step {stop}"

    def test_no_state_is_a_view_of_the_parameters(self) -> None:
        learner = self._learner([self.on()])
        self._run(learner)
        before = {path: tensor.clone() for path, tensor in _tensors(learner.methods[0].state_dict(), "")}
        with torch.no_grad():
            learner.parameters.theta.add_(1.0)
        after = dict(_tensors(learner.methods[0].state_dict(), ""))
        assert all(torch.equal(tensor, after[path]) for path, tensor in before.items())

    def test_it_grows_with_the_model(self) -> None:
        learner = self._learner([self.on()], GrowingHead(12, seed=4))
        self._run(learner)
        for attribute in learner.methods[0].aligned:
            vector = getattr(learner.methods[0], attribute)
            assert vector is None or vector.shape == learner.parameters.theta.shape, attribute
            gaps = ~learner.parameters.mask()
            assert vector is None or not vector[gaps].any(), f"{attribute} is not zero between two parameters"

    def test_training_mode_and_running_statistics_are_left_alone_between_tasks(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
        model[2].requires_grad_(False)
        model[2].eval()
        self.prepared(model)
        learner = Learner(model, partial(torch.optim.SGD, lr=0.05), [self.on()], scenario=self.scenario)
        statistics = {name: tensor.clone() for name, tensor in model.named_buffers()}
        self._run(learner)
        assert [module.training for module in model] == [True, True, False, True, True]
        assert all(torch.equal(tensor, statistics[name]) for name, tensor in model.named_buffers())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    def test_it_does_the_same_on_a_gpu(self) -> None:
        there = self._learner([self.on()], device="cuda")
        self._run(there)
        torch.testing.assert_close(there.parameters.theta.cpu(), self._train([self.on()]), rtol=0, atol=1e-3)
        assert there.methods[0].memory_bytes() > 0

    # -- how they train -------------------------------------------------------------------------------------------

    def _learner(self, methods: list[Method], head: nn.Module | None = None, device: str | None = None) -> Learner:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerdureWarning)
            model = self.prepared(MLP(64, [12], 10, head=head, seed=3))
            learner = Learner(model, partial(torch.optim.SGD, lr=0.05, momentum=0.5), methods, device=device)
            learner.adopt(split_digits(scenario=self.scenario, seed=0))
            return learner

    def _train(self, methods: list[Method]) -> Tensor:
        learner = self._learner(methods)
        self._run(learner)
        return learner.parameters.theta.clone()

    def _run(
        self, learner: Learner, since: tuple[int, int] = (0, 0), until: tuple[int, int] | None = None, steps: int = 8
    ) -> None:
        """Three tasks of `steps` updates, from one (task, step) to another."""
        stream = split_digits(scenario=self.scenario, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerdureWarning)
            learner.adopt(stream)
        for task in stream[since[0] : 3]:
            learner.begin_task(task)
            assert learner.task is not None
            train = learner.task.train
            for number, rows in enumerate(stream.plan(learner.task, steps=steps, batch_size=16)):
                if until == (task.index, number):
                    return
                if (task.index, number) >= since:
                    x, y = train.gather(rows)
                    learner.step(x, y, index=rows)
            learner.end_task()


def _tensors(tree: object, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _tensors(value, f"{path}/{key}")]
    if isinstance(tree, (list, tuple)):
        return [pair for number, value in enumerate(tree) for pair in _tensors(value, f"{path}/{number}")]
    return []
