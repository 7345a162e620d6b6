"""Tasks found by a detector: the same consolidation as if they had been announced where they changed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perdure
from perdure.boundaries import Boundaries
from perdure.checkpoint import load_state, save_state
from perdure.detection import Boundary, Detector, LossPlateau, PageHinkley, WindowDetector
from perdure.errors import DivergedError, IncompatibleError, UsageError
from perdure.methods import AGEM, EWC, GEM, L2, SI, Joint, LwF, Method, Replay
from perdure.saving import learner_state, load_learner_state

FEATURES, ROWS, TASK = 6, 16, 60
PH = partial(PageHinkley, threshold=20.0, cool_down=30, min_instances=1)

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")


class Announced(Detector):
    """Sounds an alarm at given steps and says where the change was."""

    name = "announced"

    def __init__(self, *alarms: tuple[int, int]) -> None:
        self.told = dict(alarms)
        super().__init__(standardise=0, cool_down=0)

    def _start(self) -> None:
        pass

    def observe(self, value: float) -> Boundary | None:
        self.steps += 1
        step = self.steps - 1
        return Boundary(step, self.told[step], 1.0) if step in self.told else None


def drifting(steps: int, task: int = TASK, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of one linear problem, whose labels are turned round after every `task` steps."""
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        x = torch.randn(ROWS, FEATURES, generator=draw)
        batches.append((x, ((x[:, 0] > 0).long() + step // task) % 2))
    return batches


def learner(methods: Sequence[Method] = (), boundaries: Any = None, model: nn.Module | None = None) -> perdure.Learner:
    model = model or perdure.models.MLP(FEATURES, [12], 2, seed=0)
    return perdure.Learner(model, partial(torch.optim.SGD, lr=0.3), list(methods), boundaries=boundaries)


def train(learner: perdure.Learner, batches: list[tuple[Tensor, Tensor]]) -> perdure.Learner:
    for x, y in batches:
        learner.step(x, y)
    return learner


def test_a_detector_that_never_alarms_changes_no_bit() -> None:
    batches = drifting(50)
    watched = train(learner([Replay(capacity=20)], boundaries=PageHinkley(threshold=1e9)), batches)
    plain = train(learner([Replay(capacity=20)]), batches)
    assert torch.equal(watched.parameters.theta, plain.parameters.theta)


@pytest.mark.parametrize("make", [lambda: L2(strength=0.5), lambda: SI(strength=0.5), lambda: LwF()])
@pytest.mark.parametrize("late", [0, 7])
def test_a_late_alarm_consolidates_as_if_the_task_had_ended_where_it_changed(make: Any, late: int) -> None:
    """Anchors, importances and teachers are those of a learner that was told of the boundary in time."""
    change = 20
    batches = drifting(change + late + 1, task=change)
    found = learner([make()], Boundaries(Announced((change + late, change))))
    train(found, batches)
    told = learner([make()])
    told.begin_task("a", classes=(0, 1))
    train(told, batches[:change])
    told.end_task()
    told.begin_task("b", classes=(0, 1))
    (method,), (other) = found.methods, told.methods[0]
    for name in ("importance", "anchor"):
        if hasattr(method, name):
            assert torch.equal(getattr(method, name), getattr(other, name)), name
    if isinstance(method, LwF):
        assert all(torch.equal(tensor, other.teacher[name]) for name, tensor in method.teacher.items())
    plain = train(learner(), batches)
    assert torch.equal(found.parameters.theta, plain.parameters.theta), "training goes on with the weights as they are"
    if isinstance(method, SI):
        rest = learner([make()])
        rest.begin_task("all")
        train(rest, batches)
        early = learner([make()])
        early.begin_task("all")
        train(early, batches[:change])
        expected = rest.methods[0].path - early.methods[0].path
        assert torch.equal(method.path, expected), "the new task's sum begins where the task began"
        assert bool(method.path.any())


def test_ewc_takes_its_fisher_from_clean_weights_and_rows_from_before_the_change() -> None:
    change, late = 20, 6
    batches = drifting(change + late + 1, task=change)
    found = learner([EWC(strength=0.1, fisher="exact")], Boundaries(Announced((change + late, change)), samples=10_000))
    train(found, batches)
    told = learner([EWC(strength=0.1, fisher="exact")])
    told.begin_task("a", [(x, y) for x, y in batches[:change]])
    train(told, batches[:change])
    told.end_task()
    torch.testing.assert_close(found.methods[0].importance, told.methods[0].importance)
    assert torch.equal(found.methods[0].anchor, told.methods[0].anchor)


def test_every_task_gives_its_own_rows_from_before_its_change_and_else_all_that_there_are() -> None:
    given: list[Tensor] = []

    class Look(EWC):
        name = "look"

        def end_task(self, task: Any) -> None:
            given.append(task.train.gather(torch.arange(len(task.train)))[0])
            super().end_task(task)

    batches = drifting(70)
    alarms = Announced((26, 20), (46, 40), (60, 30))
    train(learner([Look(strength=0.1)], Boundaries(alarms, samples=10_000)), batches)

    def rows(first: int, stop: int) -> set[tuple[float, ...]]:
        return {tuple(row) for x, _ in batches[first:stop] for row in x.tolist()}

    found = [{tuple(row) for row in x.tolist()} for x in given]
    assert found[0] == rows(0, 20)
    assert found[1] == rows(27, 40), "a task's rows begin at the alarm, and no row of the task before it is among them"
    assert found[2] == rows(47, 61), "the estimate lies before the task: rows that may be wrong are better than none"


def test_a_method_that_changes_weights_at_a_boundary_keeps_its_change() -> None:
    class Halve(L2):
        name = "halve"

        def end_task(self, task: Any) -> None:
            with torch.no_grad():
                self.parameters.theta.mul_(0.5)

    batches = drifting(28)
    found = train(learner([Halve()], Boundaries(Announced((27, 20)))), batches)
    clean = train(learner(), batches[:20])
    assert torch.equal(found.parameters.theta, 0.5 * clean.parameters.theta)


def test_the_newest_snapshot_before_the_change_is_taken_and_else_the_oldest() -> None:
    batches = drifting(100, task=100)
    for point, expected in [(50, 50), (49, 40), (43, 40), (12, 30)]:
        found = learner([L2(strength=0.1)], Boundaries(Announced((57, point)), snapshots=3))
        train(found, batches[:58])
        plain = train(learner(), batches[:expected])
        assert torch.equal(found.methods[0].anchor, plain.parameters.theta), point


def test_normalisation_statistics_of_the_snapshot_are_used_and_the_live_ones_kept() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    seen: list[Tensor] = []

    class Look(L2):
        name = "look"

        def end_task(self, task: Any) -> None:
            seen.append(model[1].running_mean.clone())

    batches = drifting(30)
    found = learner([Look()], Boundaries(Announced((27, 20))), model)
    train(found, batches[:20])
    clean = model[1].running_mean.clone()
    train(found, batches[20:27])
    before = model[1].running_mean.clone()
    train(found, batches[27:28])
    assert torch.equal(seen[0], clean)
    assert not torch.equal(model[1].running_mean, clean)
    assert not torch.equal(model[1].running_mean, before)


def test_a_plateau_consolidates_the_weights_as_they_are() -> None:
    found = learner([L2(strength=0.1)], LossPlateau(mean_threshold=0.5))
    for x, y in drifting(100, task=1000):
        found.step(x, y)
        if found.boundaries.found:
            break
    assert torch.equal(found.methods[0].anchor, found.parameters.theta)


def test_boundaries_are_found_in_a_loop_of_ones_own() -> None:
    found = train(learner([EWC(strength=0.1)], PH()), drifting(4 * TASK))
    assert [round(boundary.change_point / TASK) for boundary in found.boundaries.found] == [1, 2, 3]
    assert all(abs(boundary.change_point - TASK * k) <= 2 for k, boundary in enumerate(found.boundaries.found, 1))
    assert found.tasks_begun == 4
    assert found.task.name == "detected 3"
    assert found.methods[0].importance is not None
    found.end_task()
    assert found.task is None


@pytest.mark.parametrize("signal", ["loss", "accuracy", lambda outputs, batch: outputs.logsumexp(-1).mean()])
def test_the_signal_is_that_of_the_current_rows_before_the_update(signal: Any) -> None:
    values: list[float] = []

    class Listen(Announced):
        def observe(self, value: float) -> Boundary | None:
            values.append(value)
            return super().observe(value)

    watched = learner([Replay(capacity=30), L2(strength=0.1)], Boundaries(Listen((3, 4)), signal=signal))
    for x, y in drifting(12):
        with torch.no_grad():
            outputs = watched.model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        expected = {"loss": loss, "accuracy": (outputs.argmax(1) == y).double().mean()}.get(
            signal if isinstance(signal, str) else "", outputs.logsumexp(-1).mean()
        )
        watched.step(x, y)
        assert values[-1] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: EWC(strength=0.1, n_samples=50), lambda: SI(strength=0.1), LwF, lambda: AGEM(per_task=20)]
)
@pytest.mark.parametrize("stop", [25, TASK + 1, TASK + 8, 2 * TASK - 3])
def test_a_resumed_learner_finds_the_same_boundaries_and_ends_with_the_same_bits(
    make: Any, stop: int, tmp_path: Path
) -> None:
    batches = drifting(2 * TASK + 20)
    whole = train(learner([make()], PH()), batches)
    cut = train(learner([make()], PH()), batches[:stop])
    save_state(tmp_path / "state", learner_state(cut))
    other = learner([make()], PH())
    load_learner_state(other, load_state(tmp_path / "state"))
    train(other, batches[stop:])
    assert whole.boundaries.found
    assert other.boundaries.found == whole.boundaries.found
    assert torch.equal(other.parameters.theta, whole.parameters.theta)


def test_a_saved_learner_is_loaded_with_its_detector(tmp_path: Path) -> None:
    batches = drifting(2 * TASK)
    saved = train(learner([EWC(strength=0.1)], Boundaries(PH(), snapshots=4)), batches[: TASK + 3])
    saved.save(tmp_path / "saved")
    loaded = perdure.Learner.load(tmp_path / "saved", perdure.models.MLP(FEATURES, [12], 2, seed=9))
    assert loaded.boundaries.settings() == saved.boundaries.settings()
    assert torch.equal(
        train(loaded, batches[TASK + 3 :]).parameters.theta, train(saved, batches[TASK + 3 :]).parameters.theta
    )
    with pytest.raises(UsageError, match="the saved learner had boundaries="):
        load_learner_state(learner([EWC(strength=0.1)]), load_state(tmp_path / "saved")["learner"])


def test_snapshots_follow_a_parameter_vector_that_grows() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 2))
    found = learner([SI(strength=0.1)], Boundaries(Announced((27, 20))), model)
    batches = drifting(40)
    train(found, batches[:24])
    with torch.no_grad():
        wide = nn.Linear(8, 3)
        wide.weight[:2], wide.bias[:2] = model[1].weight, model[1].bias
    model[1] = wide
    train(found, batches[24:])
    assert found.methods[0].anchor.shape == found.parameters.theta.shape
    assert bool(found.parameters.theta.isfinite().all())


def test_classes_begin_with_their_first_label() -> None:
    found = learner(boundaries="page_hinkley")
    x = torch.randn(4, FEATURES)
    found.step(x, torch.zeros(4, dtype=torch.int64))
    assert found.classes.seen == (0,)
    found.step(x, torch.tensor([0, 1, 1, 0]))
    assert found.classes.seen == (0, 1)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: learner([GEM(per_task=5)], "page_hinkley"), IncompatibleError, "'gem' needs the task of every"),
        (lambda: learner([Joint()], "page_hinkley"), IncompatibleError, "'joint' needs a task's data before it begins"),
        (lambda: learner(boundaries="page_hinkly"), UsageError, "did you mean 'page_hinkley'"),
        (lambda: learner(boundaries=3), UsageError, "boundaries is 3, it must be a detector"),
        (lambda: Boundaries("page_hinkley", snapshots=0), UsageError, "snapshots is 0, it must be at least 1"),
        (lambda: Boundaries("page_hinkley", signal="lost"), UsageError, "signal is 'lost', it must be loss"),
        (lambda: learner(boundaries="page_hinkley").begin_task("a"), UsageError, "finds its tasks itself"),
        (lambda: learner(boundaries="page_hinkley").set_scenario("task"), IncompatibleError, "tells the task of every"),
        (
            lambda: learner(boundaries="page_hinkley").step(torch.full((2, FEATURES), torch.nan), torch.tensor([0, 1])),
            DivergedError,
            "the loss of step 0 is nan",
        ),
        (lambda: learner([EWC()]).set_scenario("online"), IncompatibleError, "boundaries='page_hinkley'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_methods_that_need_boundaries_may_train_on_online_streams_with_a_detector() -> None:
    found = learner([EWC()], "page_hinkley")
    found.set_scenario("online")
    assert found.scenario == "online"


# -- fit --------------------------------------------------------------------------------------------------------------


def digits(methods: Sequence[Method], boundaries: Any = None, **options: Any) -> Any:
    stream = perdure.benchmarks.split_digits(scenario="domain", tasks=2, seed=0)
    made = perdure.Learner(
        perdure.models.MLP(64, [20], 10, seed=0), partial(torch.optim.SGD, lr=0.1), list(methods),
        boundaries=boundaries,
    )  # fmt: skip
    return made, made.fit(stream, batch_size=16, **options)


def test_fit_without_announcing_gives_the_same_batches() -> None:
    told, first = digits([], epochs=2)
    untold, second = digits([], epochs=2, announce=False)
    assert torch.equal(told.parameters.theta, untold.parameters.theta)
    assert first.matrix.tolist() == second.matrix.tolist()
    assert untold.tasks_begun == 0


def test_fit_never_tells_a_learner_that_finds_its_tasks() -> None:
    found, results = digits([EWC(strength=1)], PageHinkley(cool_down=30), epochs=4)
    assert found.task.name.startswith("detected")
    assert found.boundaries.found
    assert results.matrix.shape == (2, 2)
    with pytest.raises(UsageError, match="'ewc' needs to know where tasks begin"):
        digits([EWC(strength=1)], announce=False)
    with pytest.raises(UsageError, match="reset_optimizer=True resets where a task is announced"):
        digits([], announce=False, reset_optimizer=True)


def test_a_fit_with_hidden_boundaries_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def run(folder: Path, stop: int | None) -> perdure.Learner:
        stream = perdure.benchmarks.split_digits(scenario="domain", tasks=5, seed=0)
        made = perdure.Learner(
            perdure.models.MLP(64, [20], 10, seed=0 if stop else 5), partial(torch.optim.SGD, lr=0.1),
            [EWC(strength=1)], boundaries=PageHinkley(cool_down=30, threshold=30.0),
        )  # fmt: skip
        step = made.step

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            if made.passes["steps"] == stop:
                raise StopError
            return step(*args, **kwargs)

        made.step = counted  # type: ignore[method-assign]
        try:
            made.fit(stream, epochs=4, batch_size=16, folder=folder, checkpoint_every=11, resume=True)
        except StopError:
            return run(folder, None)
        return made

    whole, resumed = run(tmp_path / "whole", 10**9), run(tmp_path / "cut", 120)
    assert whole.boundaries.found == resumed.boundaries.found != []
    assert torch.equal(whole.parameters.theta, resumed.parameters.theta)
    logs = [(tmp_path / name / "log.jsonl").read_text().count('"boundary"') for name in ("whole", "cut")]
    assert logs == [len(whole.boundaries.found)] * 2


def test_the_window_detector_is_given_accuracies() -> None:
    found = train(learner(boundaries=WindowDetector(window=20, threshold=0.3, cool_down=30)), drifting(2 * TASK))
    assert len(found.boundaries.found) == 1
    assert abs(found.boundaries.found[0].change_point - TASK) <= 2
