"""No methods, or methods switched off, equal a hand-written PyTorch loop bit for bit; switched on, they differ."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.methods import (
    AGEM,
    DER,
    EWC,
    GEM,
    HAT,
    KD,
    L2,
    MAS,
    SI,
    SPG,
    DERpp,
    LwF,
    Method,
    MomentumKD,
    Replay,
)
from perdure.models.heads import MultiHead

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
    "adam": partial(torch.optim.Adam, lr=1e-3, fused=False),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "adam foreach": partial(torch.optim.Adam, lr=1e-3, foreach=True),
    "adam fused": partial(torch.optim.Adam, lr=1e-3, fused=True),
    "momentum foreach": partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True),
    "momentum fused": partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
}


def grouped(named: Any) -> torch.optim.Optimizer:
    """Biases without decay and with a rate of their own."""
    pairs = list(named)
    if pairs and isinstance(pairs[0], tuple):
        pairs = [p for _, p in pairs]
    matrices, rest = [p for p in pairs if p.dim() > 1], [p for p in pairs if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "lr": 1e-2}], lr=1e-3)


OPTIMIZERS["groups"] = grouped

OFF: dict[str, Method] = {
    "ewc": EWC(strength=0),
    "ewc prox": EWC(strength=0, solver="prox"),
    "l2": L2(strength=0),
    "mas": MAS(strength=0),
    "si": SI(strength=0),
    "kd": KD(alpha=0),
    "lwf": LwF(strength=0),
    "momentum_kd": MomentumKD(strength=0),
    "replay capacity": Replay(capacity=0),
    "replay ratio": Replay(ratio=0),
    "der": DER(alpha=0),
    "der capacity": DER(capacity=0),
    "derpp": DERpp(alpha=0, beta=0),
    "gem": GEM(per_task=0),
    "agem": AGEM(per_task=0),
}

ON: dict[str, Method] = {
    "ewc": EWC(strength=1),
    "ewc prox": EWC(strength=1, solver="prox"),
    "ewc online": EWC(strength=1, mode="online", gamma=0.9),
    "l2": L2(strength=0.1),
    "mas": MAS(strength=0.01),
    "si": SI(strength=0.1),
    "kd": KD(),
    "lwf": LwF(),
    "momentum_kd": MomentumKD(),
    "replay": Replay(capacity=50),
    "replay sum": Replay(capacity=50, weighting="sum", forward="separate"),
    "replay 1/t": Replay(capacity=50, weighting="1/t"),
    "der": DER(capacity=50),
    "derpp": DERpp(capacity=50),
    "gem": GEM(per_task=10),
    "agem": AGEM(per_task=10),
}

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")


def odd_mlp(head: nn.Module | None = None) -> nn.Module:
    """Layer sizes that end in the middle of every vector register."""
    return perdure.models.MLP(64, [33, 17], 10, head=head, seed=3)


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, stream: perdure.Stream) -> None:
    """The loop anybody would write, on the same plan."""
    for task in stream:
        for rows in stream.plan(task, epochs=2, batch_size=16):
            x, y = task.train.gather(rows)
            optimizer.zero_grad()
            logits = model(x.float() / 16)
            if stream.scenario == "task":
                first, last = task.classes[0], task.classes[-1] + 1
                logits, y = logits[:, first:last], y - first
            F.cross_entropy(logits, y).backward()
            optimizer.step()


def fitted(methods: list[Method], optimizer: Any, scenario: str = "class", **options: Any) -> nn.Module:
    stream = perdure.benchmarks.split_digits(scenario=scenario, seed=0)
    model = odd_mlp()
    perdure.Learner(model, optimizer, methods, **options).fit(stream, epochs=2, batch_size=16)
    return model


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_methods_equal_a_hand_written_loop(name: str, scenario: str) -> None:
    stream = perdure.benchmarks.split_digits(scenario=scenario, seed=0)
    reference = odd_mlp()
    loop(reference, OPTIMIZERS[name](reference.parameters()), stream)
    assert same(fitted([], OPTIMIZERS[name], scenario), reference)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("name", OFF)
def test_a_method_switched_off_is_fine_tuning(name: str, optimizer: str) -> None:
    assert same(fitted([OFF[name]], OPTIMIZERS[optimizer]), fitted([], OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("mask", [SPG, HAT], ids=["spg", "hat"])
def test_a_mask_switched_off_is_fine_tuning_and_switched_on_is_not(mask: type[Method], optimizer: str) -> None:
    plain = fitted([], OPTIMIZERS[optimizer], "task")
    assert same(fitted([mask(strength=0)], OPTIMIZERS[optimizer], "task"), plain)  # type: ignore[call-arg]
    on = fitted([mask()], OPTIMIZERS[optimizer], "task").get_parameter("body.0.weight")
    assert not torch.equal(on, plain.get_parameter("body.0.weight"))


def random_case(seed: int, dtype: torch.dtype) -> tuple[Callable[[], nn.Module], list[tuple[Tensor, Tensor]]]:
    """A network of random widths, often 1, and batches of a random size."""
    draw = random.Random(seed)
    inputs, outputs, rows = draw.randint(1, 40), draw.randint(2, 7), draw.choice([1, 3, 8, 16])
    widths = [draw.choice([1, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64]) for _ in range(draw.randint(1, 3))]
    data = torch.Generator().manual_seed(seed)
    x, y = torch.rand(8, rows, inputs, generator=data, dtype=dtype), torch.randint(outputs, (8, rows), generator=data)
    build = partial(perdure.models.MLP, inputs, widths, outputs, seed=seed)
    return lambda: build().to(dtype), list(zip(x.unbind(), y.unbind(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("off", [None, *OFF])
def test_networks_of_any_widths_equal_a_hand_written_loop(off: str | None, dtype: torch.dtype) -> None:
    """Where a tensor starts in memory decides which kernel multiplies it, and with it the last bits."""
    optimizers = [OPTIMIZERS[name] for name in ("sgd", "momentum", "adam", "rmsprop")]
    for seed in range(60 if off is None else 20):
        build, data = random_case(seed, dtype)
        ours, theirs, make = build(), build(), optimizers[seed % len(optimizers)]
        learner = perdure.Learner(ours, make, [] if off is None else [OFF[off]], scenario="domain")
        reference = make(theirs.parameters())
        for task in range(2):
            train = data[4 * task : 4 * task + 4]
            learner.begin_task(str(task), tuple(torch.cat(part) for part in zip(*train, strict=True)))
            for x, y in train:
                learner.step(x, y)
                reference.zero_grad()
                F.cross_entropy(theirs(x), y).backward()
                reference.step()
            learner.end_task()
        assert same(ours, theirs), (seed, [tuple(p.shape) for p in theirs.parameters()])


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("name", ON)
def test_a_method_switched_on_differs(name: str, scenario: str) -> None:
    assert not same(fitted([ON[name]], OPTIMIZERS["sgd"], scenario), fitted([], OPTIMIZERS["sgd"], scenario))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_several_heads_equal_a_hand_written_loop(name: str) -> None:
    stream = perdure.benchmarks.split_digits(scenario="task", seed=0)
    ours = odd_mlp(MultiHead(17, seed=5))
    perdure.Learner(ours, OPTIMIZERS[name]).fit(stream, epochs=2, batch_size=16)

    theirs = odd_mlp(MultiHead(17, seed=5))
    for task in stream:
        theirs.head.add(task.index, task.classes)
    optimizer = OPTIMIZERS[name](theirs.parameters())
    for task in stream:
        for rows in stream.plan(task, epochs=2, batch_size=16):
            x, y = task.train.gather(rows)
            optimizer.zero_grad()
            head = theirs.head.heads[f"task_{task.index}"]
            F.cross_entropy(head(theirs.features(x.float() / 16)), y - task.classes[0]).backward()
            optimizer.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("methods", [[], [EWC(strength=1), SI(strength=1)]], ids=["none", "ewc+si"])
def test_another_tasks_head_keeps_its_bits_under_adamw(methods: list[Method]) -> None:
    stream = perdure.benchmarks.split_digits(scenario="task", seed=0)
    model = odd_mlp(MultiHead(17, seed=5))
    learner = perdure.Learner(model, OPTIMIZERS["adamw"], methods)
    learner.fit_task(stream[0], epochs=2, batch_size=16)
    before = [p.detach().clone() for p in model.head.heads["task_0"].parameters()]
    body = [p.detach().clone() for p in model.body.parameters()]
    for task in stream[1:]:
        learner.fit_task(task, epochs=2, batch_size=16)
    assert all(torch.equal(p, q) for p, q in zip(model.head.heads["task_0"].parameters(), before, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.body.parameters(), body, strict=True))


def test_convolutions_run_in_channels_last_and_equal_that_loop() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 255, (64, 3, 16, 16), dtype=torch.uint8)
    y = torch.arange(64) % 4
    build = partial(perdure.models.SlimResNet18, 3, 4, seed=1, filters=4)
    ours, theirs = build(), build().to(memory_format=torch.channels_last)
    learner = perdure.Learner(ours, OPTIMIZERS["momentum"])
    optimizer = OPTIMIZERS["momentum"](theirs.parameters())
    for start in range(0, 64, 16):
        rows = slice(start, start + 16)
        learner.partial_fit(x[rows], y[rows])
        optimizer.zero_grad()
        images = (x[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        F.cross_entropy(theirs(images), y[rows]).backward()
        optimizer.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrized_layers_equal_a_hand_written_loop(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), wrap(nn.Linear(64, 13)), nn.ReLU(), nn.Linear(13, 10))

    stream = perdure.benchmarks.split_digits(seed=0)
    ours, theirs = build(), build()
    perdure.Learner(ours, OPTIMIZERS["adam"]).fit(stream, epochs=2, batch_size=16)
    loop(theirs, OPTIMIZERS["adam"](theirs.parameters()), stream)
    assert same(ours, theirs)


def muon(named: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    named = list(named)
    return [
        torch.optim.Muon([p for _, p in named if p.dim() == 2], lr=0.01),
        torch.optim.AdamW([p for _, p in named if p.dim() != 2], lr=1e-3),
    ]


def test_two_optimizers_equal_a_hand_written_loop() -> None:
    class Both:
        def __init__(self, model: nn.Module) -> None:
            self.all = muon(model.named_parameters())

        def zero_grad(self) -> None:
            for optimizer in self.all:
                optimizer.zero_grad()

        def step(self) -> None:
            for optimizer in self.all:
                optimizer.step()

    reference = odd_mlp()
    loop(reference, Both(reference), perdure.benchmarks.split_digits(seed=0))  # type: ignore[arg-type]
    assert same(fitted([], muon), reference)
    assert not same(fitted([EWC(strength=1), SI(strength=0.1), AGEM(per_task=10)], muon), reference)


PAIRS = [
    lambda: [EWC(strength=1), SI(strength=0.1)],
    lambda: [EWC(strength=1, solver="prox"), SI(strength=0.1)],
    lambda: [EWC(strength=1), Replay(capacity=50), AGEM(per_task=10)],
    lambda: [DERpp(capacity=50), Replay(capacity=50)],
    lambda: [LwF(), Replay(capacity=50), SI(strength=0.1)],
    lambda: [GEM(per_task=10), L2(strength=0.1), DER(capacity=30)],
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "+".join(m.name for m in p()))
def test_the_order_of_methods_changes_nothing(pair: Callable[[], list[Method]]) -> None:
    assert same(fitted(pair(), OPTIMIZERS["momentum"]), fitted(pair()[::-1], OPTIMIZERS["momentum"]))


def test_the_callers_list_is_left_alone() -> None:
    methods: list[Method] = [SI(), L2(strength=0)]
    names = [m.name for m in methods]
    fitted(methods, OPTIMIZERS["sgd"])
    assert [m.name for m in methods] == names
