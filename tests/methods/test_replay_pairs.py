"""Every method that replays or keeps exemplars beside every other: trained in any order of the list, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_problems import sgd, toy_model, toy_stream, weights

import perdure
from perdure.checkpoint import load_state, save_state
from perdure.data.examples import Examples
from perdure.methods import (
    AGEM,
    DER,
    ERACE,
    EWC,
    GEM,
    L2,
    MAS,
    MIR,
    SI,
    WA,
    BiC,
    DERpp,
    GDumb,
    ICaRL,
    Joint,
    LwF,
    Method,
    Replay,
)
from perdure.saving import learner_state, load_learner_state

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")

OURS: dict[str, Callable[[], Method]] = {
    "er_ace": lambda: ERACE(capacity=20),
    "mir": lambda: MIR(capacity=20, candidates=10, batch_size=4),
    "gdumb": lambda: GDumb(capacity=20, epochs=1),
    "icarl": lambda: ICaRL(capacity=18),
    "nearest mean": lambda: ICaRL(capacity=18, use="prediction"),
    "wa": lambda: WA(capacity=18),
    "bic": lambda: BiC(capacity=18),
}
OTHERS: dict[str, Callable[[], Method]] = {
    "l2": lambda: L2(strength=0.1),
    "ewc": lambda: EWC(strength=1.0),
    "si": lambda: SI(strength=0.1),
    "mas": lambda: MAS(strength=0.01),
    "lwf": LwF,
    "replay": lambda: Replay(capacity=20),
    "der": lambda: DER(capacity=20),
    "derpp": lambda: DERpp(capacity=20),
    "gem": lambda: GEM(per_task=6),
    "agem": lambda: AGEM(per_task=6),
    "joint": Joint,
} | OURS
EXEMPLARS = {"icarl", "nearest mean", "wa", "bic"}
REFUSED = {
    **{frozenset({"gdumb", other}): "replaces the whole step|both own" for other in OTHERS if other != "gdumb"},
    **{frozenset({one, two}): "both own" for one in EXEMPLARS for two in EXEMPLARS | {"joint"} if one != two},
    frozenset({"er_ace", "icarl"}): "both own criterion",
}
PAIRS = sorted(
    {tuple(sorted((one, two))) for one in OURS for two in OTHERS if one != two} - {("icarl", "nearest mean")}
)
LEGAL = [pair for pair in PAIRS if frozenset(pair) not in REFUSED]


def learner_of(names: tuple[str, ...]) -> perdure.Learner:
    learner = perdure.Learner(toy_model(), sgd, [OTHERS[name]() for name in names])
    learner.adopt(toy_stream("class"))
    return learner


def run(learner: perdure.Learner, since: int = 0, until: int = 8) -> None:
    """Two tasks of four updates; `until` stops inside the second."""
    stream = toy_stream("class")
    for task in stream[since // 4 : 2]:
        learner.begin_task(task)
        for number, rows in enumerate(stream.plan(learner.task, steps=4, batch_size=8), 4 * task.index):
            if number == until:
                return
            if number >= since:
                x, y = learner.task.train.gather(rows)
                learner.step(x, y, index=rows)
        learner.end_task()


@pytest.mark.parametrize("pair", LEGAL, ids=" + ".join)
def test_a_legal_pair_trains_in_any_order_and_resumes_inside_a_task(pair: tuple[str, ...], tmp_path: Path) -> None:
    whole, turned, cut = learner_of(pair), learner_of(pair[::-1]), learner_of(pair)
    run(whole)
    run(turned)
    assert bool(whole.parameters.theta.isfinite().all())
    assert torch.equal(whole.parameters.theta, turned.parameters.theta)
    for single, other in (pair, pair[::-1]):
        alone = learner_of((single,))
        run(alone)
        # The nearest mean never acts on the weights, and a projection only where something is violated.
        if other not in ("nearest mean", "gem", "agem"):
            assert not torch.equal(alone.parameters.theta, whole.parameters.theta), f"{other} did nothing"
    run(cut, until=6)
    save_state(tmp_path / "state", learner_state(cut))
    again = learner_of(pair)
    load_learner_state(again, load_state(tmp_path / "state"))
    run(again, since=6)
    assert torch.equal(again.parameters.theta, whole.parameters.theta)
    x = toy_stream("class")[1].test.x
    assert torch.equal(again.predict(x), whole.predict(x))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if frozenset(pair) in REFUSED], ids=" + ".join)
def test_an_illegal_pair_is_refused_with_both_names(pair: tuple[str, ...]) -> None:
    with pytest.raises(perdure.errors.IncompatibleError, match=REFUSED[frozenset(pair)]) as caught:
        learner_of(pair)
    assert all(f"'{OTHERS[name]().name}'" in str(caught.value) for name in pair)


@pytest.mark.parametrize("name", ["er_ace", "mir", "gdumb"])
def test_what_is_remembered_is_augmented_when_it_is_drawn(name: str) -> None:
    """Inputs moved by one at every draw train as a stream that is moved by one."""
    stream, found = toy_stream("class"), []
    for by_hand in (0, 1):
        learner = perdure.Learner(
            toy_model(), sgd, [OURS[name]()], scenario="class", augment=None if by_hand else lambda x, draw: x + 1
        )
        for task in stream:
            moved = Examples(task.train.x + by_hand, task.train.targets)
            learner.fit_task(replace(task, train=moved), batch_size=8)
        method = learner.methods[0]
        tensors = method.fit().values() if name == "gdumb" else [weights(learner.model)]
        found.append(torch.cat([tensor.flatten() for tensor in tensors]))
        stored = method.buffer.view("x") - by_hand
        originals = torch.cat([task.train.x for task in stream])
        assert all(bool(torch.isclose(originals, row, atol=1e-5).all(1).any()) for row in stored)
    assert torch.allclose(found[0], found[1], atol=1e-4)
