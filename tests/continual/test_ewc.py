"""The wrapper of EWC: one Fisher information a task, wherever the caller puts `register_task`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wrapped import Batches, adam, batches, build, by_hand, loss_fn, train, weights

from perdure.continual import EWC
from perdure.errors import DataError, PerdureWarning, UsageError
from perdure.methods.fisher import diagonal_fisher
from perdure.models.heads import GrowingHead


def state(ewc: EWC) -> tuple[Tensor, Tensor, float]:
    assert ewc.method.importance is not None
    assert ewc.method.anchor is not None
    return ewc.method.importance.clone(), ewc.method.anchor.clone(), ewc.method.constant


def same(a: tuple[Tensor, Tensor, float], b: tuple[Tensor, Tensor, float]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def shuffled(task: int) -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*batches(task), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(task))


def exactly(model: nn.Module, data: Any, names: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return diagonal_fisher(model, data, estimator="exact", generator=torch.Generator(), names=names)


def test_both_orders_of_the_document_give_the_same_anchor_and_importance() -> None:
    results = []
    for order in ("before", "after", "both", "elsewhere"):
        model = build()
        ewc, optimizer = EWC(model, importance=3.0, fisher_sample_size=30), adam(model)
        for task in (1, 2):
            loader = shuffled(task)
            if order in ("before", "both"):
                ewc.register_task(task, loader)
            for x, y in loader:
                if order == "elsewhere" and task == 1:
                    by_hand(model, optimizer, [(x, y)])
                else:
                    ewc.train_step(optimizer, loss_fn, x, y, task_id=task)
            if order in ("after", "both", "elsewhere"):
                ewc.register_task(task, loader)
        if order == "before":
            ewc.register_task(3, shuffled(3))
        assert ewc._boundaries.done == [1, 2]
        results.append((state(ewc), weights(model)))
    first = results[0]
    for other in results[1:]:
        assert same(first[0], other[0])
        assert torch.equal(first[1], other[1])
    assert first[0][0].sum() > 0


def test_importance_is_the_fisher_of_each_tasks_own_data_at_its_own_end() -> None:
    model = build()
    ewc, optimizer = EWC(model, importance=3.0), adam(model)
    ewc.method.fisher = "exact"
    expected_s, expected_sf = torch.zeros_like(weights(model)), torch.zeros_like(weights(model))
    for task in (1, 2, 3):
        ewc.register_task(task, batches(task))
        train(ewc, optimizer, batches(task), task)
        if task < 3:
            found = exactly(model, batches(task), dict(model.named_parameters()))
            fisher = torch.cat([value.flatten() for value in found.values()])
            expected_s += fisher
            expected_sf += fisher * weights(model)
    real = ewc.learner.parameters.mask()
    importance, anchor, _ = state(ewc)
    torch.testing.assert_close(importance[real], expected_s, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close((importance * anchor)[real], expected_sf, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_sum_over_tasks_and_its_gradient_the_one_that_is_injected() -> None:
    model = build()
    ewc, optimizer = EWC(model, importance=3.0), adam(model)
    ewc.method.fisher = "exact"
    assert ewc.get_ewc_loss().item() == 0.0
    ewc.get_ewc_loss().backward()
    past: list[tuple[list[Tensor], list[Tensor]]] = []
    for task in (1, 2):
        train(ewc, optimizer, batches(task), task)
        ewc.register_task(task, batches(task))
        found = exactly(model, batches(task), dict(model.named_parameters()))
        past.append((list(found.values()), [p.detach().clone() for p in model.parameters()]))
    train(ewc, optimizer, batches(3), 3)
    explicit = sum(
        1.5 * (f * (p - a) ** 2).sum()
        for fisher, anchor in past
        for f, p, a in zip(fisher, model.parameters(), anchor, strict=True)
    )
    loss = ewc.get_ewc_loss()
    assert isinstance(explicit, Tensor)
    torch.testing.assert_close(loss, explicit, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(explicit, list(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    injected = torch.zeros_like(ewc.learner.parameters.theta)
    ewc.method.add_gradient(injected)
    views = ewc.learner.parameters.views(injected)
    for name, gradient in zip(views, ours, strict=True):
        torch.testing.assert_close(views[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_loop_by_hand_with_the_loss_equals_train_step() -> None:
    results = []
    for own in (True, False):
        model = build(dtype=torch.float64)
        ewc, optimizer = EWC(model, importance=3.0), torch.optim.SGD(model.parameters(), lr=0.05)
        data = [[(x.double(), y) for x, y in batches(task)] for task in (1, 2)]
        by_hand(model, optimizer, data[0])
        ewc.register_task(1, data[0])
        if own:
            by_hand(model, optimizer, data[1], ewc.get_ewc_loss)
        else:
            train(ewc, optimizer, data[1], 2)
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_a_model_that_was_trained_before_the_wrapper_existed() -> None:
    model = build()
    optimizer = adam(model)
    by_hand(model, optimizer, batches(1))
    known = weights(model)
    ewc = EWC(model, importance=3.0)
    ewc.register_task(1, batches(1))
    train(ewc, optimizer, batches(2)[:1], 2)
    importance, anchor, _ = state(ewc)
    assert importance.sum() > 0
    assert torch.equal(anchor[ewc.learner.parameters.mask()], known)
    fresh = build()
    several = EWC(fresh)
    several.register_task(1, batches(1))
    several.register_task(2, batches(2))
    train(several, adam(fresh), batches(1), 1)
    assert several.method.importance is None


@pytest.mark.parametrize("size", [1, 13, 40, 1000])
def test_exactly_as_many_samples_as_asked_for(size: int) -> None:
    model = build()
    ewc = EWC(model, fisher_sample_size=size)
    rest = [(torch.full((8, 5), float("nan")), torch.zeros(8, dtype=torch.int64))]
    by_hand(model, adam(model), batches(1))
    ewc.method.fisher = "exact"
    ewc.register_task(1, batches(1) + (rest if size <= 40 else []))
    x, y = (torch.cat(parts)[:size] for parts in zip(*batches(1), strict=True))
    found = exactly(model, [(x, y)], dict(model.named_parameters()))
    fisher = torch.cat([value.flatten() for value in found.values()])
    torch.testing.assert_close(state(ewc)[0][ewc.learner.parameters.mask()], fisher, rtol=1e-5, atol=1e-9)


def test_without_a_loader_the_last_batches_stand_in_for_it() -> None:
    states = []
    for given in (True, False):
        model = build()
        ewc, optimizer = EWC(model, fisher_sample_size=20), adam(model)
        data = [(x.clone(), y) for x, y in batches(1)]
        ewc.register_task(1, list(reversed(batches(1))) if given else None)
        for x, y in data:
            ewc.train_step(optimizer, loss_fn, x, y, 1)
            x.zero_()  # a loop that reuses its buffers must not change what is remembered
        assert len(ewc._recent) == (0 if given else 3), "rows are kept for which there is no use"
        ewc.register_task(2)
        assert not ewc._recent
        states.append(state(ewc))
    assert same(*states)


def test_a_pending_fisher_is_completed_at_its_own_anchor() -> None:
    def run(late: bool) -> tuple[EWC, nn.Module]:
        model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
        model.load_state_dict(
            {k: torch.linspace(-1, 1, v.numel()).view(v.shape).to(v.dtype).abs() for k, v in model.state_dict().items()}
        )
        ewc, optimizer = EWC(model, importance=0), adam(model)
        ewc.method.fisher = "exact"
        by_hand(model, optimizer, batches(1))
        ewc.register_task(1, None if late else batches(1))
        train(ewc, optimizer, batches(2), 2)
        ewc.register_task(2, batches(2))
        by_hand(model, optimizer, batches(3))
        if late:
            assert ewc._pending == {1}
            before = {key: value.clone() for key, value in model.state_dict().items()}
            ewc.update_fisher(1, batches(1))
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert not ewc._pending
        return ewc, model

    (late, _), (early, _) = run(True), run(False)
    torch.testing.assert_close(state(late)[0], state(early)[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state(late)[1], state(early)[1], rtol=1e-5, atol=1e-7)
    # The latest task's Fisher can still be replaced, and what came late stays.
    late.update_fisher(2, batches(2)[:2])
    early.update_fisher(2, batches(2)[:2])
    torch.testing.assert_close(state(late)[0], state(early)[0], rtol=1e-6, atol=1e-9)


def test_a_pending_fisher_protects_nothing_and_the_latest_can_be_replaced_any_number_of_times() -> None:
    model = build()
    ewc, optimizer = EWC(model, importance=3.0), adam(model)
    ewc.method.fisher = "exact"
    by_hand(model, optimizer, batches(1))
    ewc.register_task(1, None)
    assert ewc.method.importance is None
    assert ewc.get_ewc_loss().item() == 0.0
    by_hand(model, optimizer, batches(5))
    ewc.update_fisher(1, batches(1))
    once = state(ewc)
    ewc.update_fisher(1, batches(2))
    assert not torch.equal(state(ewc)[0], once[0])
    ewc.update_fisher(1, batches(1))
    assert same(state(ewc), once)


def test_update_fisher_of_an_open_task_names_its_data() -> None:
    states = []
    for late in (False, True):
        model = build()
        ewc, optimizer = EWC(model), adam(model)
        ewc.register_task(1, None if late else batches(1))
        train(ewc, optimizer, batches(1), 1)
        if late:
            ewc.update_fisher(1, batches(1))
        ewc.register_task(2, batches(2))
        states.append(state(ewc))
    assert same(*states)


def test_update_fisher_refuses_what_it_cannot_do() -> None:
    model = build()
    ewc, optimizer = EWC(model), adam(model)
    for task in (1, 2):
        by_hand(model, optimizer, batches(task))
        ewc.register_task(task, batches(task))
    kept = state(ewc)
    with pytest.raises(UsageError, match="task 1 is merged"):
        ewc.update_fisher(1, batches(1))
    with pytest.raises(UsageError, match="task 7 is not known"):
        ewc.update_fisher(7, batches(1))
    with pytest.raises(UsageError, match="needs the task's data"):
        ewc.update_fisher(2, None)
    with pytest.raises(DataError, match="at least one sample"):
        ewc.update_fisher(2, [])
    with pytest.raises(UsageError, match="dataloader is a int"):
        ewc.register_task(3, 5)
    assert same(state(ewc), kept)


def test_a_failed_consolidation_can_be_repeated() -> None:
    model = build()
    ewc, optimizer = EWC(model), adam(model)
    ewc.register_task(1, [(torch.full((4, 5), float("nan")), torch.zeros(4, dtype=torch.int64))])
    train(ewc, optimizer, batches(1), 1)
    with pytest.raises(DataError, match="not finite"):
        ewc.register_task(2, batches(2))
    ewc.register_task(1, batches(1))
    assert ewc._boundaries.done == [1]
    assert state(ewc)[0].isfinite().all()


def test_a_task_that_comes_back_is_absorbed_again() -> None:
    model = build()
    ewc, optimizer = EWC(model, importance=0), adam(model)
    ewc.method.fisher = "exact"
    sums = []
    for task in (1, 2, 1, 3):
        train(ewc, optimizer, batches(task), task)
        ewc.register_task(task, batches(task))
        sums.append(state(ewc)[0])
    assert ewc._boundaries.done == [1, 2, 3]
    found = exactly(model, batches(3), dict(model.named_parameters()))
    gained = (sums[3] - sums[2])[ewc.learner.parameters.mask()]
    torch.testing.assert_close(gained, torch.cat([v.flatten() for v in found.values()]), rtol=1e-3, atol=1e-6)
    assert (sums[2] - sums[1]).sum() > 0


def test_the_order_of_a_shuffling_loader_does_not_depend_on_the_consolidation() -> None:
    def order(consolidate: bool) -> list[Tensor]:
        loader, model = shuffled(1), build()
        ewc = EWC(model)
        by_hand(model, adam(model), list(loader))
        if consolidate:
            ewc.register_task(1, loader)
        return [y for _, y in loader]

    assert all(torch.equal(a, b) for a, b in zip(order(True), order(False), strict=True))


def test_data_sets_and_pairs_will_do() -> None:
    states = []
    x, y = (torch.cat(parts) for parts in zip(*batches(1), strict=True))
    for data in (batches(1), TensorDataset(x, y), (x, y), DataLoader(TensorDataset(x, y), batch_size=16)):
        model = build()
        ewc = EWC(model, fisher_sample_size=1000)
        ewc.method.fisher = "exact"
        by_hand(model, adam(model), batches(1))
        ewc.register_task(1, data)
        states.append(state(ewc)[0])
    for other in states[1:]:
        torch.testing.assert_close(other, states[0], rtol=1e-5, atol=1e-9)


def test_a_stiff_penalty_is_warned_about_when_the_optimizer_is_known() -> None:
    model = build()
    ewc = EWC(model, importance=1e6)
    data: Batches = batches(1)
    by_hand(model, adam(model), data)
    ewc.register_task(1, data)
    with pytest.warns(PerdureWarning, match="gradient steps on the penalty diverge"):
        ewc.train_step(torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, *data[0], 2)


def test_it_protects() -> None:
    def forgetting(importance: float) -> float:
        model = build()
        ewc, optimizer = EWC(model, importance=importance), torch.optim.SGD(model.parameters(), lr=0.05)
        train(ewc, optimizer, batches(1, count=40), 1)
        ewc.register_task(1, batches(1, count=40))
        x, y = (torch.cat(parts) for parts in zip(*batches(1, count=40), strict=True))
        before = F.cross_entropy(model(x), y).item()
        train(ewc, optimizer, batches(3, count=40), 2)
        return F.cross_entropy(model(x), y).item() - before

    assert forgetting(20.0) < 0.5 * forgetting(0)


def test_the_latest_fisher_can_be_replaced_after_the_head_has_grown() -> None:
    head = GrowingHead(9, 3, seed=1)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), head)
    ewc, optimizer = EWC(model, importance=0), adam(model)
    ewc.method.fisher = "exact"
    sums = []
    for task in (1, 2):
        train(ewc, optimizer, batches(task), task)
        ewc.register_task(task, batches(task))
        sums.append(ewc.learner.parameters.views(state(ewc)[0]))
    ended = copy.deepcopy(model)
    by_hand(model, optimizer, batches(3))
    head.grow(5)
    ended[2].grow(5)
    ewc.update_fisher(2, batches(2)[:3])
    found = exactly(ended, batches(2)[:3], dict(ended.named_parameters()))
    importance, anchor, _ = state(ewc)
    s, mu = ewc.learner.parameters.views(importance), ewc.learner.parameters.views(anchor)
    torch.testing.assert_close(s["0.weight"], sums[0]["0.weight"] + found["0.weight"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(s["2.weight"][:3], sums[0]["2.weight"] + found["2.weight"][:3], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(s["2.weight"][3:], found["2.weight"][3:], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(mu["2.weight"][3:], ended[2].weight[3:].detach(), rtol=0, atol=0)
