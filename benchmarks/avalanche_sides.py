"""The same training three times: a loop written by hand, a perdure learner, an Avalanche strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.data.examples import as_examples
from perdure.methods import EWC, Method, Replay

LEARNING_RATE = 0.05
PULL = 1e3  # of the EWC penalty: large enough that leaving it out would show in the weights
PAST = 5  # tasks that EWC has behind it

# Importances and anchors of one task, by parameter name.
Anchored = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What is trained: `steps` batches of `batch` rows are one experience."""

    what: str
    hidden: int
    batch: int
    steps: int
    memory: int = 0  # capacity of a reservoir; as many rows are drawn from it as are new
    ewc: str = ""  # "separate" or "online"
    stream: bool = False  # every batch is an experience of its own

    def data(self, task: int) -> tuple[Tensor, Tensor]:
        """MNIST's shape: float32 [steps * batch, 784] in [0, 1) and labels of all ten classes.

        The first pixel is the row's number: `avalanche_check` finds the label of a row by it.
        """
        draw = torch.Generator().manual_seed(task)
        count = self.steps * self.batch
        x = torch.rand(count, 784, generator=draw)
        x[:, 0] = torch.arange(count) / count
        return x, torch.randint(0, 10, (count,), generator=draw)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(784, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.hidden, 10))


@dataclass
class Side:
    """A model, and one more experience for it, which is what is timed."""

    model: nn.Module
    run: Callable[[], object]


def sides(setting: Setting) -> tuple[dict[str, Side], list[Anchored]]:
    """All three, in the same state, and what EWC remembers: Avalanche's importances serve all three."""
    theirs, past = avalanche(setting)
    start = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    return {"bare": bare(setting, start, past), "perdure": learner(setting, start, past), "avalanche": theirs}, past


# -- by hand ----------------------------------------------------------------------------------------------------------


class Reservoir:
    """Rows in tensors; every row ever added is kept with the same probability."""

    def __init__(self, capacity: int) -> None:
        self.x, self.y = torch.empty(capacity, 784), torch.empty(capacity, dtype=torch.int64)
        self.seen = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        turn = torch.arange(self.seen, self.seen + len(y))
        slot = torch.where(turn < len(self.y), turn, (torch.rand(len(y)) * (turn + 1)).long())
        kept = slot < len(self.y)
        self.x[slot[kept]], self.y[slot[kept]] = x[kept], y[kept]
        self.seen += len(y)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(min(self.seen, len(self.y)))[:count]
        return self.x.index_select(0, rows), self.y.index_select(0, rows)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, past: list[Anchored]) -> None:
    """One step; the penalty as its equation reads, a term for every task and parameter."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    for importances, anchors in past:
        for name, parameter in model.named_parameters():
            loss = loss + PULL * (importances[name] * (parameter - anchors[name]).pow(2)).sum()
    loss.backward()
    optimizer.step()


def bare(setting: Setting, start: dict[str, Tensor], past: list[Anchored]) -> Side:
    model = setting.model()
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x, y = setting.data(PAST)
    memory = Reservoir(setting.memory) if setting.memory else None

    def run() -> None:
        for rows in torch.randperm(len(y)).split(setting.batch):
            new_x, new_y = x.index_select(0, rows), y.index_select(0, rows)
            batch_x, batch_y = new_x, new_y
            if memory is not None and memory.seen:
                old_x, old_y = memory.draw(setting.batch)
                batch_x, batch_y = torch.cat((new_x, old_x)), torch.cat((new_y, old_y))
            update(model, optimizer, batch_x, batch_y, past)
            if memory is not None:
                memory.add(new_x, new_y)

    if memory is not None:
        run()  # fills the memory
    return Side(model, run)


# -- perdure ----------------------------------------------------------------------------------------------------------


def learner(setting: Setting, start: dict[str, Tensor], past: list[Anchored]) -> Side:
    model = setting.model()
    model.load_state_dict(start)
    methods: list[Method] = []
    if setting.memory:
        methods.append(Replay(capacity=setting.memory, batch_size=setting.batch))
    if setting.ewc:
        methods.append(EWC(strength=2 * PULL, mode=setting.ewc))  # perdure's strength counts half
    made = perdure.Learner(model, partial(torch.optim.SGD, lr=LEARNING_RATE), methods)
    if setting.ewc:
        return Side(model, _inside_a_task(made, setting, past))
    examples = as_examples(setting.data(PAST))  # checked here, as Avalanche's data set is made before the clock starts

    def run() -> None:
        made.fit_task(f"task {made.tasks_begun}", examples, batch_size=setting.batch)

    if setting.memory:
        run()  # fills the memory
    return Side(model, run)


def _inside_a_task(made: perdure.Learner, setting: Setting, past: list[Anchored]) -> Callable[[], None]:
    """The steps of a task without the importance pass at its end, which the two libraries do differently."""
    penalty = made.methods[0]
    assert isinstance(penalty, EWC)
    for importances, anchors in past:
        penalty.absorb(made.parameters.pack(importances), made.parameters.pack(anchors))
    x, y = setting.data(PAST)
    made.begin_task("now", (x, y))

    def run() -> None:
        for rows in torch.randperm(len(y)).split(setting.batch):
            made.step(x.index_select(0, rows), y.index_select(0, rows), index=rows)

    return run


# -- Avalanche --------------------------------------------------------------------------------------------------------

_declared: list[torch.library.Library] = []


def prepare_imports() -> None:
    """Make `import avalanche` work where torchvision's wheel was built for another variant of the same torch.

    Such a wheel loads without its compiled operators, and then its import fails on two that it describes but does not
    find. Nothing here uses them, so it is enough that they are declared.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # a library that is collected takes its declarations with it


def avalanche(setting: Setting) -> tuple[Side, list[Anchored]]:
    """A strategy without metrics and loggers, and what its EWC remembers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solvers and loggers that are not there
        prepare_imports()
        from avalanche.benchmarks import benchmark_from_datasets, split_online_stream
        from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
        from avalanche.training.plugins import EWCPlugin, ReplayPlugin
        from avalanche.training.storage_policy import ReservoirSamplingBuffer
        from avalanche.training.supervised import Naive

    def dataset(task: int) -> Any:
        x, y = setting.data(task)
        return AvalancheDataset(torch.utils.data.TensorDataset(x, y), data_attributes=[DataAttribute(y, "targets")])

    class Memory(ReservoirSamplingBuffer):
        def update(self, strategy: Any, **kwargs: Any) -> None:  # Avalanche's own also warns, every time
            self.post_adapt(strategy, strategy.experience)

    plugins: list[Any] = []
    if setting.memory:
        policy = Memory(setting.memory)
        plugins.append(ReplayPlugin(setting.memory, batch_size_mem=setting.batch, storage_policy=policy))
    if setting.ewc:
        plugins.append(EWCPlugin(PULL, setting.ewc, decay_factor=1.0 if setting.ewc == "online" else None))
    model = setting.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            train_mb_size=setting.batch,
            plugins=plugins,
            evaluator=None,
        )
    if setting.ewc:
        stream = benchmark_from_datasets(train=[dataset(task) for task in range(PAST + 1)]).train_stream
        return Side(model, _inside_an_experience(strategy, list(stream))), _remembered(plugins[0])
    stream = benchmark_from_datasets(train=[dataset(PAST)]).train_stream
    # Cut before the clock starts: Avalanche would cut the stream lazily, inside the loop.
    experiences = list(split_online_stream(stream, setting.batch)) if setting.stream else list(stream)

    def run() -> None:
        strategy.train(experiences, eval_streams=[])

    if setting.memory:
        run()  # fills the memory
    return Side(model, run), []


def _inside_an_experience(strategy: Any, experiences: list[Any]) -> Callable[[], None]:
    """The counterpart of `_inside_a_task`: an epoch of the last experience, again and again, and never its end."""
    strategy.train(experiences[:PAST], eval_streams=[])
    strategy.is_training, strategy.experience = True, experiences[PAST]
    strategy._before_training_exp()
    return strategy.training_epoch


def _remembered(plugin: Any) -> list[Anchored]:
    def values(held: dict[str, Any]) -> dict[str, Tensor]:
        return {name: each.data.clone() for name, each in held.items()}

    tasks = sorted(plugin.importances) if plugin.mode == "separate" else [PAST - 1]
    return [(values(plugin.importances[task]), values(plugin.saved_params[task])) for task in tasks]
