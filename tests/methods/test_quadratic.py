"""The one anchored penalty: exact merging, analytic gradients, the proximal step, growth."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from small_problems import sgd, spread, toy_model, toy_stream, values, weights
from torch import Tensor, nn

import perdure
from perdure.errors import PerdureWarning
from perdure.methods import AGEM, EWC, L2, MAS, SI, Method
from perdure.methods.quadratic import AnchoredPenalty

pytestmark = pytest.mark.filterwarnings("ignore:.*alone on a class-incremental")


@dataclass
class Given(AnchoredPenalty):
    """A penalty whose importances the test sets."""

    name: ClassVar[str] = "given"


def with_penalty(penalty: AnchoredPenalty, model: nn.Module | None = None, lr: float = 0.1) -> perdure.Learner:
    """A learner whose loss has no gradient, so that the penalty alone moves the weights."""
    return perdure.Learner(
        nn.Linear(4, 3) if model is None else model,
        partial(torch.optim.SGD, lr=lr),
        [penalty],
        criterion=lambda outputs, y: outputs.sum(1) * 0.0,
    )


def tasks(count: int, size: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Importances (some zero, some tiny, some huge) and anchors."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        importance = torch.rand(size, generator=draw, dtype=dtype) * 10 ** torch.randint(-6, 4, (size,), generator=draw)
        importance[torch.rand(size, generator=draw) < 0.3] = 0
        made.append((importance, torch.randn(size, generator=draw, dtype=dtype)))
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merged_anchors_equal_the_explicit_sum_over_tasks_in_any_order(dtype: torch.dtype, tolerance: float) -> None:
    given = tasks(4, 15, dtype)
    theta = torch.randn(15, generator=torch.Generator().manual_seed(9), dtype=dtype)
    wide = theta.double().clone().requires_grad_()
    explicit = sum((3.0 / 2 * (f.double() * (wide - a.double()) ** 2).sum() for f, a in given), torch.zeros(()))
    (expected,) = torch.autograd.grad(explicit, wide)
    for order in itertools.permutations(given):
        penalty = Given(strength=3.0)
        learner = with_penalty(penalty, nn.Linear(4, 3).to(dtype), lr=1e-9)
        for importance, anchor in order:
            penalty.absorb(spread(learner.parameters, importance), spread(learner.parameters, anchor))
        learner.parameters.theta.copy_(spread(learner.parameters, theta))
        assert penalty.penalty() == pytest.approx(float(explicit.detach()), rel=tolerance)
        vector = torch.zeros_like(learner.parameters.theta)
        penalty.add_gradient(vector)
        gradient = values(learner.parameters, vector)
        scale = float(expected.abs().max())
        assert torch.allclose(gradient.double(), expected, rtol=tolerance, atol=tolerance * scale)


def test_injected_gradient_is_autograds_bit_for_bit_with_one_anchor() -> None:
    (importance, anchor), *_ = tasks(1, 15, torch.float32)
    penalty = Given(strength=2.0)
    learner = with_penalty(penalty, lr=1e-9)
    penalty.absorb(spread(learner.parameters, importance), spread(learner.parameters, anchor))
    theta = weights(learner.model).requires_grad_()
    (expected,) = torch.autograd.grad((importance * (theta - anchor) ** 2).sum(), theta)
    gradient = torch.zeros_like(learner.parameters.theta)
    penalty.add_gradient(gradient)
    assert torch.equal(values(learner.parameters, gradient), expected)


def test_penalty_and_gradient_vanish_on_the_anchor() -> None:
    penalty = Given(strength=1e6)
    learner = with_penalty(penalty, lr=1e-9)
    penalty.absorb(spread(learner.parameters, torch.rand(15)), learner.parameters.theta)
    gradient = torch.zeros_like(learner.parameters.theta)
    penalty.add_gradient(gradient)
    assert penalty.penalty() == 0.0
    assert not gradient.any()


def test_nothing_that_was_absorbed_is_kept_or_changed() -> None:
    penalty = Given()
    learner = with_penalty(penalty, lr=1e-9)
    given = [tuple(spread(learner.parameters, v) for v in pair) for pair in tasks(2, 15, torch.float32)]
    copies = [(f.clone(), a.clone()) for f, a in given]
    for importance, anchor in given:
        penalty.absorb(importance, anchor)
    state = penalty.importance.clone(), penalty.anchor.clone()
    assert all(torch.equal(f, g) and torch.equal(a, b) for (f, a), (g, b) in zip(given, copies, strict=True))
    for importance, anchor in given:
        importance.fill_(7), anchor.fill_(7)
    learner.parameters.theta.fill_(5)
    assert torch.equal(penalty.importance, state[0])
    assert torch.equal(penalty.anchor, state[1])


@pytest.mark.parametrize("make", [L2, EWC, MAS, SI], ids=lambda m: m.__name__)
def test_no_state_aliases_theta(make: type[AnchoredPenalty]) -> None:
    stream = toy_stream("domain")
    penalty = make(strength=0.01)
    learner = perdure.Learner(toy_model(2), sgd, [penalty])
    for index in range(2):
        learner.fit_task(stream[index], batch_size=8)
        state = {name: getattr(penalty, name).clone() for name in penalty.aligned}
        anchor = learner.parameters.theta.clone()
        learner.parameters.theta.add_(1.0)
        assert all(torch.equal(getattr(penalty, name), value) for name, value in state.items())
        learner.parameters.theta.copy_(anchor)


# -- the proximal step ------------------------------------------------------------------------------------------------


def test_the_proximal_step_shrinks_the_distance_by_one_plus_a_however_stiff() -> None:
    importance = torch.tensor([0.0, 1.0, 10.0] * 5)
    penalty = Given(strength=100.0, solver="prox")
    learner = with_penalty(penalty)  # rate 0.1: a = 0, 10 and 100
    anchor = torch.randn(15)
    penalty.absorb(spread(learner.parameters, importance), spread(learner.parameters, anchor))
    distance = weights(learner.model) - anchor
    for power in range(1, 4):
        learner.begin_task("again") if learner.task is None else None
        learner.step(torch.ones(2, 4), torch.zeros(2))
        expected = distance / (1 + 0.1 * 100 * importance) ** power
        assert torch.allclose(weights(learner.model) - anchor, expected, rtol=1e-4, atol=1e-6)


def test_gradient_steps_diverge_where_proximal_steps_do_not_and_that_is_said() -> None:
    found = {}
    for solver in ("grad", "prox"):
        penalty = Given(strength=30.0, solver=solver)
        learner = with_penalty(penalty)
        parameters = learner.parameters
        ones, anchor = parameters.pack({}, fill=1.0), spread(parameters, weights(learner.model) + 1)
        if solver == "grad":
            with pytest.warns(PerdureWarning, match="reaches 3"):
                penalty.absorb(ones, anchor)
        else:
            penalty.absorb(ones, anchor)
        learner.begin_task("b")
        for _ in range(50):
            learner.step(torch.ones(2, 4), torch.zeros(2))
        found[solver] = float((parameters.theta - penalty.anchor).abs().max())
    assert found["grad"] > 1e14
    assert found["prox"] < 1e-6


@pytest.mark.parametrize("solver", ["grad", "prox"])
def test_both_solvers_have_the_closed_form_as_fixed_point_under_plain_sgd(solver: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=draw), torch.randn(30, 1, generator=draw)
    importance, anchor = torch.tensor([0.0, 0.5, 1.0, 3.0]), torch.randn(4, generator=draw)
    penalty = Given(strength=2.0, solver=solver)
    model = nn.Linear(4, 1, bias=False)
    learner = perdure.Learner(
        model, sgd, [penalty], criterion=lambda outputs, targets: 0.5 * (outputs - targets).square().sum(1)
    )
    penalty.absorb(spread(learner.parameters, importance), spread(learner.parameters, anchor))
    learner.begin_task("b")
    for _ in range(800):
        learner.step(x, y)
    hessian = x.double().T @ x.double() / 30
    pull = 2.0 * importance.double()
    expected = torch.linalg.solve(
        hessian + pull.diag(), (x.double().T @ y.double() / 30)[:, 0] + pull * anchor.double()
    )
    assert torch.allclose(weights(model).double(), expected, atol=1e-5)


def test_the_proximal_step_uses_each_groups_rate_and_leaves_frozen_and_anchored_weights_their_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))

    def groups(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        (_, a), (_, b), (_, c) = named
        return torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b, c], "lr": 0.1}], lr=1.0)

    penalty = Given(strength=2.0, solver="prox")
    learner = perdure.Learner(model, groups, [penalty], criterion=lambda outputs, y: outputs.sum(1) * 0.0)
    before = weights(model)
    anchor = before + 1
    anchor[6:8] = before[6:8]
    penalty.absorb(learner.parameters.pack({}, fill=1.0), spread(learner.parameters, anchor))
    model[2].weight.requires_grad_(False)
    learner.begin_task("b")
    learner.step(torch.ones(2, 3), torch.zeros(2))
    theta = weights(model)
    assert torch.allclose(theta[:6] - anchor[:6], (before - anchor)[:6] / 2, atol=1e-6)
    assert torch.equal(theta[6:8], before[6:8])
    assert torch.allclose(theta[8:10] - anchor[8:10], (before - anchor)[8:10] / 1.2, atol=1e-6)
    assert torch.equal(theta[10:], before[10:])


# -- scope and growth -------------------------------------------------------------------------------------------------


def test_excluded_parameters_are_free() -> None:
    stream = toy_stream("domain")
    penalty = EWC(strength=1.0, exclude=("head", "*.bias"))
    learner = perdure.Learner(toy_model(2), sgd, [penalty])
    learner.fit_task(stream[0], batch_size=8)
    views = learner.parameters.views(penalty.importance)
    assert views["body.0.weight"].sum() > 0
    assert all(not views[name].any() for name in views if name != "body.0.weight")


@pytest.mark.parametrize("make", [L2, EWC, MAS, SI], ids=lambda m: m.__name__)
def test_rows_of_new_classes_are_free_and_old_rows_keep_their_importance(make: type[AnchoredPenalty]) -> None:
    stream = toy_stream("class")
    penalty = make(strength=0.01)
    learner = perdure.Learner(toy_model(head="growing"), sgd, [penalty])
    learner.fit_task(stream[0], batch_size=8)
    old = {name: view.clone() for name, view in learner.parameters.views(penalty.importance).items()}
    assert old["head.weight"].shape == (2, 7)
    learner.begin_task(stream[1])
    new = learner.parameters.views(penalty.importance)
    assert torch.equal(new["head.weight"][:2], old["head.weight"])
    assert torch.equal(new["body.0.weight"], old["body.0.weight"])
    assert old["head.weight"].sum() > 0
    assert not new["head.weight"][2:].any()
    assert penalty.penalty() == 0.0
    learner.parameters.views(learner.parameters.theta)["head.weight"][2:].add_(1.0)
    assert penalty.penalty() == 0.0


@pytest.mark.parametrize("solver", ["grad", "prox"])
@pytest.mark.parametrize("make", [L2, EWC, MAS, SI], ids=lambda m: m.__name__)
def test_the_first_task_is_unaffected_and_the_second_is_not(make: type[AnchoredPenalty], solver: str) -> None:
    stream = toy_stream("domain")
    penalised = perdure.Learner(toy_model(2), sgd, [make(strength=0.5, solver=solver)])
    plain = perdure.Learner(toy_model(2), sgd)
    for learner in (penalised, plain):
        learner.fit_task(stream[0], batch_size=8)
    assert torch.equal(penalised.parameters.theta, plain.parameters.theta)
    for learner in (penalised, plain):
        learner.fit_task(stream[1], batch_size=8)
    assert not torch.equal(penalised.parameters.theta, plain.parameters.theta)


def test_an_idle_heads_weights_are_not_moved_by_a_penalty() -> None:
    stream = toy_stream("task")
    learner = perdure.Learner(
        toy_model(head="multi"), partial(torch.optim.AdamW, lr=0.01), [L2(strength=1.0, mode="all")]
    )
    learner.fit_task(stream[0], batch_size=8)
    before = [p.detach().clone() for p in learner.model.head.heads["task_0"].parameters()]
    for index in (1, 2):
        learner.fit_task(stream[index], batch_size=8)
    assert all(torch.equal(p, q) for p, q in zip(learner.model.head.heads["task_0"].parameters(), before, strict=True))


@pytest.mark.parametrize("solver", ["grad", "prox"])
def test_the_order_of_the_models_parameters_does_not_matter(solver: str) -> None:
    class Net(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) * self.b(x)
            return out

    stream = toy_stream("domain")
    found = []
    reference = Net("ab").state_dict()
    for names in ("ab", "ba"):
        model = Net(names)
        model.load_state_dict(reference)
        learner = perdure.Learner(model, sgd, [EWC(strength=1.0, solver=solver)])
        for index in range(2):
            learner.fit_task(stream[index], batch_size=8)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.filterwarnings("ignore:.*each pull the same weights")
@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.5), partial(torch.optim.Adam, lr=0.01)]
)
@pytest.mark.parametrize("head", ["growing", "multi"])
def test_a_gradient_that_starts_as_the_penalty_has_the_bits_of_one_that_it_is_added_to(
    optimizer: Any, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With idle heads too, whose gradient must stay missing, and with a second penalty behind the first."""

    def trained(starts: bool) -> tuple[Tensor, int]:
        started = 0

        class Counted(EWC):
            def start_gradient(self, grad: Tensor) -> bool:
                nonlocal started
                wrote = starts and super().start_gradient(grad)
                started += wrote
                return wrote

        stream = toy_stream("task" if head == "multi" else "class")
        methods = [Counted(strength=5.0), L2(strength=0.5, mode="all")]
        learner = perdure.Learner(toy_model(head=head), optimizer, methods)
        learner.adopt(stream)
        for task in stream:
            learner.fit_task(task, batch_size=8)
        return learner.parameters.theta, started

    (fast, used), (slow, unused) = trained(True), trained(False)
    assert torch.equal(fast, slow)
    assert used > 0 == unused


SGD = partial(torch.optim.SGD, lr=0.1)


def by_gradient(cls: type[AnchoredPenalty]) -> type[AnchoredPenalty]:
    """The same method, which adds its gradient whatever the optimizer is."""
    return type(cls.__name__, (cls,), {"pulls": False})


@pytest.mark.filterwarnings("ignore:.*each pull the same weights")
@pytest.mark.parametrize("head", ["growing", "multi"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_pull_on_the_weights_is_the_step_on_the_penaltys_gradient(head: str, frozen: bool, scheduled: bool) -> None:
    """But for rounding; and idle heads, which have no gradient, stay where they are, bit for bit."""

    def trained(*methods: AnchoredPenalty) -> list[Tensor]:
        stream = toy_stream("task" if head == "multi" else "class")
        model = toy_model(head=head).double()
        decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.99) if scheduled else None
        learner = perdure.Learner(model, SGD, list(methods), scheduler=decay)
        learner.adopt(stream)
        after = []
        for task in stream:
            if frozen and task.index == 1:
                next(model.parameters()).requires_grad_(False)
            learner.fit_task(task, batch_size=8)
            after.append(learner.parameters.theta.clone())
        return after

    pulled = trained(EWC(strength=5.0), L2(strength=0.5, mode="all"), SI(strength=2.0))
    kinds = by_gradient(EWC), by_gradient(L2), by_gradient(SI)
    added = trained(kinds[0](strength=5.0), kinds[1](strength=0.5, mode="all"), kinds[2](strength=2.0))
    plain = trained()
    for one, other in zip(pulled, added, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(pulled[-1], plain[-1], atol=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(pulled, added, strict=True)), "the two went the same way"


def test_a_parameter_without_a_gradient_is_not_pulled() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["c"](self.parts["a"](x))

    l2 = L2(strength=1.0)
    learner = perdure.Learner(Two(), SGD, [l2])
    x, y = torch.randn(8, 2), torch.arange(8) % 2
    learner.fit_task("one", (x, y), batch_size=8)
    with torch.no_grad():
        learner.parameters.theta.add_(1.0)
    before = {name: p.detach().clone() for name, p in learner.parameters.members.items()}
    learner.begin_task("two")
    learner.step(x, y)
    gradients = {name: p.grad for name, p in learner.parameters.members.items()}
    for name, p in learner.parameters.members.items():
        gradient = gradients[name]
        if ".b." in name:
            assert gradient is None
            assert torch.equal(p, before[name])
        else:
            assert gradient is not None
            torch.testing.assert_close(p, before[name] - 0.1 * (gradient + 1.0), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*each pull the same weights")
@pytest.mark.parametrize("wanted", [L2(), MAS(), SI(), EWC(mode="online")], ids=lambda method: method.name)
def test_penalties_pull_the_weights_under_plain_sgd_alone(wanted: AnchoredPenalty) -> None:
    def pulls(optimizer: Any = SGD, *others: Method, **options: Any) -> bool:
        fresh = type(wanted)(**wanted.arguments())
        return perdure.Learner(toy_model(), optimizer, [fresh, *others], **options)._descends()

    assert all([pulls(), pulls(precision="bfloat16"), pulls(micro_batches=2)])
    assert not pulls(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert not pulls(partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))
    assert not pulls(partial(torch.optim.Adam, lr=0.1))
    assert not any([pulls(clip_norm=1.0), pulls(clip_value=1.0)]), "what is clipped is the whole gradient"
    assert not pulls(SGD, AGEM(per_task=8)), "a projection needs the whole gradient"
    if wanted.name != "si":
        assert not pulls(SGD, SI(clamp=False)), "one cannot merge, and two pulls in a row are not their sum"


def test_a_step_hook_sees_the_penalty_in_the_gradient() -> None:
    """Of plain SGD too: whoever reads or clips gradients in a hook of the optimizer gets all of them."""
    model = toy_model()
    seen: list[float] = []
    learner = perdure.Learner(model, SGD, [L2(strength=3.0)])
    stream = toy_stream()
    learner.adopt(stream)
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    with torch.no_grad():
        learner.parameters.theta.add_(100.0)
    handle = learner.optimizers.all[0].register_step_pre_hook(
        lambda *_: seen.append(float(next(model.parameters()).grad.mean()))  # type: ignore[union-attr]
    )
    rows = torch.arange(8)
    learner.step(*stream[1].train.gather(rows))
    handle.remove()
    learner.step(*stream[1].train.gather(rows))
    assert seen == [pytest.approx(300.0, rel=0.2)]


@pytest.mark.filterwarnings("ignore:.*each pull the same weights")
def test_a_gradient_does_not_start_as_the_penalty_where_somebody_has_to_see_it_without() -> None:
    def starter(*methods: AnchoredPenalty, **options: Any) -> Any:
        return perdure.Learner(toy_model(), methods=list(methods), **options)._starter

    assert starter(L2()) is not None
    assert starter(L2(), SI()) is None, "SI reads the gradient of the loss alone"
    assert starter(L2(), micro_batches=2) is None
    assert starter(L2(), precision="float16") is None


# -- several penalties on one learner ---------------------------------------------------------------------------------


@dataclass
class Second(AnchoredPenalty):
    name: ClassVar[str] = "second"


@dataclass
class Third(AnchoredPenalty):
    name: ClassVar[str] = "third"


KINDS = (Given, Second, Third)
STRENGTHS = (3.0, 0.2, 50.0)


def several(solver: str, dtype: torch.dtype = torch.float32) -> tuple[perdure.Learner, list[tuple[Tensor, Tensor]]]:
    """Three penalties on a learner whose loss has no gradient, and what each pulls with: importances and anchors."""
    penalties = [kind(strength=lam, solver=solver) for kind, lam in zip(KINDS, STRENGTHS, strict=True)]
    learner = perdure.Learner(
        nn.Linear(4, 3).to(dtype), sgd, penalties, criterion=lambda outputs, y: outputs.sum(1) * 0.0
    )
    given = tasks(3, 15, dtype)
    for penalty, (importance, anchor) in zip(penalties, given, strict=True):
        penalty.absorb(spread(learner.parameters, importance / 1e4), spread(learner.parameters, anchor))
    return learner, [(lam * f.double() / 1e4, a.double()) for lam, (f, a) in zip(STRENGTHS, given, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_several_penalties_add_as_one_what_they_add_one_by_one(dtype: torch.dtype, tolerance: float) -> None:
    learner, given = several("grad", dtype)
    gradient = torch.zeros_like(learner.parameters.theta)
    for method in learner.hooks["add_gradient"]:
        method.add_gradient(gradient)
    theta = weights(learner.model).double()
    expected = sum((s * (theta - a) for s, a in given), torch.zeros(()))
    size = sum((s * (theta - a).abs() for s, a in given), torch.zeros(()))
    off = (values(learner.parameters, gradient).double() - expected).abs()
    assert bool((off <= tolerance * size).all())
    assert float(expected.abs().max()) > 0.01


def test_only_the_first_of_several_penalties_touches_the_gradient_and_none_is_forgotten() -> None:
    learner, _ = several("grad")
    first, *others = learner.hooks["add_gradient"]
    zero, gradient = torch.zeros_like(learner.parameters.theta), torch.zeros_like(learner.parameters.theta)
    for method in others:
        method.add_gradient(gradient)
    assert torch.equal(gradient, zero)
    first.add_gradient(gradient)
    others[-1].replace(zero.clone(), zero.clone())
    now = torch.zeros_like(gradient)
    first.add_gradient(now)
    assert not torch.equal(now, gradient), "a change of one is a change of the sum"


def test_several_proximal_penalties_are_solved_together() -> None:
    learner, given = several("prox")
    before = weights(learner.model).double()
    learner.begin_task("again")
    learner.step(torch.ones(2, 4), torch.zeros(2))
    above = before + sum((0.1 * s * a for s, a in given), torch.zeros(()))
    expected = above / (1 + sum((0.1 * s for s, _ in given), torch.zeros(())))
    assert torch.allclose(weights(learner.model).double(), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*each pull the same weights")
@pytest.mark.parametrize("head", [None, "growing"])
def test_ewc_mas_and_si_together_train_as_when_each_adds_its_own(head: str | None) -> None:
    """Also with a growing head, where all of them have to follow the new layout."""

    class Apart(EWC):
        merges = False

    stream = toy_stream("class")
    found = []
    for kind in (EWC, Apart):
        methods = [kind(strength=3.0, fisher="exact"), MAS(strength=0.02), SI(strength=0.5)]
        learner = perdure.Learner(toy_model(head=head), sgd, methods)
        learner.fit(stream, epochs=2, batch_size=8)
        found.append(weights(learner.model))
    assert not torch.equal(*found)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*each pull the same weights")
def test_a_penalty_whose_importances_may_be_negative_stays_alone() -> None:
    si, other = SI(strength=2.0, clamp=False), L2(strength=1.0)
    learner = perdure.Learner(nn.Linear(4, 3), partial(torch.optim.SGD, lr=1e-9), [si, other])
    ones = learner.parameters.pack({}, fill=1.0)
    # Together they would have no curvature at all, but a slope.
    si.replace(-0.5 * ones, 2 * ones)
    other.replace(ones, 3 * ones)
    gradient = torch.zeros_like(ones)
    for method in learner.hooks["add_gradient"]:
        method.add_gradient(gradient)
    assert torch.allclose(gradient, -ones)
