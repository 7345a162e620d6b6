"""`register_task` as an idempotent boundary: the whole table, in every order of calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.continual.boundaries import Boundaries


class World:
    """Weights that are a number, and a log of what was finalised and opened with which weights."""

    def __init__(self) -> None:
        self.weights = self.snapshot = 0
        self.log: list[tuple[Any, ...]] = []
        self.tasks = Boundaries(lambda: self.weights != self.snapshot, self._finalise, self._begin)

    def _finalise(self, task: Any) -> None:
        self.log.append(("finalise", task, self.weights))
        self.snapshot = self.weights

    def _begin(self, task: Any) -> None:
        self.log.append(("open", task))

    def register(self, task: Any) -> None:
        self.tasks.register(task)

    def step(self, task: Any) -> bool:
        owned = self.tasks.enter(task)
        self.tasks.steps += 1
        self.weights += 1
        return owned

    def outside(self, task: Any = None) -> None:
        self.weights += 1

    def run(self, *calls: tuple[str, int]) -> World:
        for call, task in calls:
            getattr(self, call)(task)
        return self

    @property
    def finalised(self) -> list[tuple[Any, int]]:
        return [(entry[1], entry[2]) for entry in self.log if entry[0] == "finalise"]

    @property
    def state(self) -> tuple[Any, ...]:
        return self.tasks.open, self.tasks.steps, tuple(self.tasks.done), tuple(self.log)


# Situation before -> what register_task(1) does: each row of the table.
ROWS = {
    "not dirty, nothing known": ([], [("open", 1)], 1),
    "not dirty, id is open": ([("register", 1)], [], 1),
    "not dirty, id is done": ([("outside", 0), ("register", 1)], [], None),
    "not dirty, id is done and another is open": ([("outside", 0), ("register", 1), ("register", 2)], [], 2),
    "not dirty, another is open": ([("register", 2)], [("open", 1)], 1),
    "trained outside, nothing open": ([("outside", 0)], [("finalise", 1, 1)], None),
    "trained in steps, id is open": ([("step", 1)], [("finalise", 1, 1)], None),
    "trained outside, id is open": ([("register", 1), ("outside", 0)], [("finalise", 1, 1)], None),
    "trained in steps, another is open": ([("step", 2)], [("finalise", 2, 1), ("open", 1)], 1),
    "trained outside, another is open": ([("register", 2), ("outside", 0)], [("finalise", 2, 1), ("open", 1)], 1),
    "trained in steps, another is open, id is done": (
        [("step", 1), ("step", 2)],
        [("finalise", 2, 2), ("open", 1)],
        1,
    ),
}


@pytest.mark.parametrize("situation", ROWS)
def test_every_row_of_the_table(situation: str) -> None:
    calls, done, still_open = ROWS[situation]
    world = World().run(*calls)
    before = len(world.log)
    world.register(1)
    assert world.log[before:] == done
    assert world.tasks.open == still_open
    if any(entry[0] == "finalise" for entry in done):
        assert world.snapshot == world.weights
        assert world.tasks.steps == 0


STEPS = {
    "the first": ([], [("open", 1)], True),
    "of the open task": ([("step", 1)], [], True),
    "of the task that was registered": ([("register", 1)], [], True),
    "after training outside": ([("outside", 0)], [("open", 1)], False),
    "after a finalised task": ([("outside", 0), ("register", 2)], [("open", 1)], True),
    "after a finalised task and training outside": (
        [("outside", 0), ("register", 2), ("outside", 0)],
        [("open", 1)],
        False,
    ),
    "after steps of another task": ([("step", 2)], [("finalise", 2, 1), ("open", 1)], True),
    "after training outside of another": ([("register", 2), ("outside", 0)], [("finalise", 2, 1), ("open", 1)], True),
    "after one task that was known before the wrapper": ([("register", 2)], [("finalise", 2, 0), ("open", 1)], True),
    "after that task registered twice": ([("register", 2)] * 2, [("finalise", 2, 0), ("open", 1)], True),
    "after several registered in advance": ([("register", 2), ("register", 3)], [("open", 1)], True),
    "after an untrained task behind a finished one": ([("step", 3), ("register", 2)], [("open", 1)], True),
}


@pytest.mark.parametrize("situation", STEPS)
def test_a_step_performs_the_same_boundary(situation: str) -> None:
    calls, done, owned = STEPS[situation]
    world = World().run(*calls)
    before = len(world.log)
    assert world.step(1) is owned
    assert world.log[before:] == done
    assert world.tasks.open == 1


CALLS = st.lists(st.tuples(st.sampled_from(["register", "step", "outside"]), st.integers(1, 3)), max_size=14)


@settings(deadline=None, max_examples=200)
@given(CALLS, st.integers(1, 3))
def test_registering_twice_is_registering_once(calls: list[tuple[str, int]], task: int) -> None:
    world = World().run(*calls)
    world.register(task)
    once = world.state
    world.register(task)
    assert world.state == once


@settings(deadline=None, max_examples=200)
@given(CALLS)
def test_every_weight_is_finalised_at_most_once_and_trained_tasks_are_not_lost(calls: list[tuple[str, int]]) -> None:
    world = World()
    for call, task in calls:
        open_before, dirty = world.tasks.open, world.tasks.dirty
        before = len(world.finalised)
        getattr(world, call)(task)
        new = world.finalised[before:]
        assert len(new) <= 1
        if new:
            assert new[0][0] == (task if open_before is None else open_before), "finalised under another task's name"
        if call == "step" and dirty and open_before not in (None, task):
            assert new, "the trained task was dropped"
        if call == "register" and dirty:
            assert new, "registering left training without an owner"
    # Weights only grow by training: two finalisations with the same weights would count one training twice.
    moments = [weights for _, weights in world.finalised if weights]
    assert moments == sorted(set(moments))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5))
def test_naming_tasks_before_or_after_their_training_is_the_same(plan: list[tuple[int, int]]) -> None:
    plan = [(number, steps) for number, (_, steps) in enumerate(plan)]
    before, after, inside = World(), World(), World()
    for task, steps in plan:
        before.register(task)
        before.run(*[("outside", 0)] * steps)
        after.run(*[("outside", 0)] * steps)
        after.register(task)
        inside.run(*[("step", task)] * steps)
    last = (len(plan), 1)
    for world in (before, after, inside):
        world.step(last[0])
    assert before.finalised == after.finalised == inside.finalised
    assert [task for task, _ in before.finalised] == [task for task, _ in plan]


def test_a_finalisation_that_raises_changes_nothing() -> None:
    def fail(task: Any) -> None:
        raise RuntimeError(task)

    tasks = Boundaries(lambda: False, fail, lambda task: None)
    tasks.register(1)
    tasks.enter(1)
    tasks.steps += 1
    before = tasks.state_dict()
    with pytest.raises(RuntimeError):
        tasks.register(2)
    assert tasks.state_dict() == before


def test_state_round_trip() -> None:
    world = World().run(("step", 1), ("register", 2), ("step", 2))
    other = World()
    other.tasks.load_state_dict(world.tasks.state_dict())
    assert other.tasks.state_dict() == world.tasks.state_dict()
    world.step(2)
    assert other.tasks.state_dict() != world.tasks.state_dict()
