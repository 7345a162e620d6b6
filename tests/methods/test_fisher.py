"""The Fisher diagonal: right for every layer, unbiased, independent of batching, and without a trace in the model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from perdure.errors import DataError, UnknownNameError, UsageError
from perdure.methods.fisher import ESTIMATORS, diagonal_fisher
from perdure.methods.per_sample import PerSampleSums, by_loop, by_vmap, mean_over_samples
from perdure.models import MLP, CosineHead, GrowingHead, MultiHead, SlimResNet18


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def prepared(model: nn.Module) -> nn.Module:
    """Reproducible weights, and normalisation statistics and factors that are not the neutral ones."""
    generator = seeded(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + 0.1)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def fisher(model, x, y, *, batch_size=64, seed=3, **options):
    parts = zip(
        [{k: v[i : i + batch_size] for k, v in x.items()} for i in range(0, len(y), batch_size)]
        if isinstance(x, dict)
        else x.split(batch_size),
        y.split(batch_size),
        strict=True,
    )
    options.setdefault("names", dict(model.named_parameters()))
    return diagonal_fisher(model, parts, generator=seeded(seed), **options)


def by_hand(model, x, y, columns=slice(None), weigh_labels=False):
    """The definition: one sample and one label at a time, with plain autograd."""
    model.eval()
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for n in range(len(y)):
        row = {key: value[n : n + 1] for key, value in x.items()} if isinstance(x, dict) else x[n : n + 1]
        outputs = model(**row) if isinstance(row, dict) else model(row)
        log_p = getattr(outputs, "logits", outputs)[:, columns].log_softmax(1)[0]
        terms = range(len(log_p)) if weigh_labels else [int(y[n])]
        for c in terms:
            gradients = torch.autograd.grad(log_p[c], list(model.parameters()), retain_graph=True, allow_unused=True)
            weight = log_p[c].detach().exp() if weigh_labels else 1.0
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight * gradient.double() ** 2
    model.zero_grad()
    return {name: (value / len(y)).float() for name, value in total.items()}


def assert_same(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


class Tokens(nn.Module):
    """Embedding, a linear layer over tokens, layer norm, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.mix = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> SimpleNamespace:
        hidden = self.norm(torch.tanh(self.mix(self.embedding(ids))))
        weights = torch.ones_like(ids).float() if mask is None else mask.float()
        pooled = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)
        return SimpleNamespace(logits=self.head(pooled))


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Shared(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Outside(nn.Module):
    """A weight that is also used without its module, which no hook can see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.first.weight)))


class TokensAsRows(nn.Module):
    """Tokens folded into the first dimension, so that it is not the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x.reshape(-1, 2))).view(len(x), 3, 6).sum(1))


class TokensFirst(nn.Module):
    """Length before sample, with as many tokens as the batch has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x.view(len(x), 3, 2).transpose(0, 1))).sum(0))


class Untraceable(nn.Module):
    """Asks for a value while it runs, which vmap cannot do; and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x) * self.factor
        return logits * 2 if float(x.detach().abs().sum()) >= 0 else logits


def multi_head(active: int | None) -> nn.Module:
    head = MultiHead(5)
    head.add(0, (0, 1))
    head.add(1, (3, 2))
    head.activate(active)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), head)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=(1, 2), dilation=(1, 2), bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding="same", groups=2, padding_mode="circular"),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 1, stride=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def sequences() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1, stride=2),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 5),
        nn.LayerNorm((4, 5)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 4),
    )


FLAT = noise(9, 6)
CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), FLAT, "hooks"),
    "without bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)), FLAT, "hooks"),
    "batch norm of rows": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), FLAT, "hooks"),
    "images": (images, noise(9, 3, 9, 10), "hooks"),
    "sequences": (sequences, noise(9, 3, 8), "hooks"),
    "resnet": (lambda: SlimResNet18(3, 4, filters=2), noise(5, 3, 8, 8), "hooks"),
    "tokens": (Tokens, {"ids": torch.randint(0, 11, (9, 7), generator=seeded())}, "hooks"),
    "growing head": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), GrowingHead(5, 4)), FLAT, "hooks"),
    "cosine head": (lambda: nn.Sequential(nn.Linear(6, 5), CosineHead(5, 4, learnable=True)), FLAT, "hooks"),
    "all heads": (lambda: multi_head(None), FLAT, "hooks"),
    "module called twice": (Twice, FLAT, "vmap"),
    "shared weight": (Shared, FLAT, "vmap"),
    "weight used outside": (Outside, FLAT, "vmap"),
    "tokens as rows": (TokensAsRows, FLAT, "vmap"),
    "tokens first": (TokensFirst, FLAT[:3], "vmap"),
    "unknown module": (lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 4)), FLAT, "vmap"),
    "parametrised": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)),
        FLAT,
        "vmap",
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.Linear(6, 24),
            nn.Unflatten(1, (3, 8)),
            nn.TransformerEncoderLayer(8, 2, 4, batch_first=True),
            nn.Flatten(),
            nn.Linear(24, 4),
        ),
        FLAT,
        None,
    ),
    "untraceable": (Untraceable, FLAT, "loop"),
}


def case(name):
    make, x, way = CASES[name]
    model = make()
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        model(x)
    count = len(next(iter(x.values())) if isinstance(x, dict) else x)
    return prepared(model), x, torch.arange(count) % 4, way


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_agrees_with_autograd_sample_by_sample(name):
    model, x, y, _ = case(name)
    assert_same(fisher(model, x, y, estimator="empirical"), by_hand(model, x, y))
    assert_same(fisher(model, x, y, estimator="exact"), by_hand(model, x, y, weigh_labels=True))


@pytest.mark.parametrize("name", CASES)
def test_absolute_gradients_of_every_kind_of_layer_agree_with_autograd_sample_by_sample(name):
    model, x, y, _ = case(name)
    model.eval()
    cotangents = noise(len(y), 4, seed=8)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(y)):
        row = {key: value[n : n + 1] for key, value in x.items()} if isinstance(x, dict) else x[n : n + 1]
        outputs = model(**row) if isinstance(row, dict) else model(row)
        outputs = getattr(outputs, "logits", outputs)
        value = (outputs.masked_fill(outputs.isinf(), 0) * cotangents[n : n + 1]).sum()
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        for total, gradient in zip(expected.values(), found, strict=True):
            total += 0 if gradient is None else gradient.abs() / len(y)
    names = dict(model.named_parameters())
    for size in (1, 4):
        start = 0

        def slopes(outputs, y):
            nonlocal start
            start += len(outputs)
            given = cotangents[start - len(outputs) : start]
            return [given.masked_fill(outputs.isinf(), 0)]

        parts = zip(
            [{k: v[i : i + size] for k, v in x.items()} for i in range(0, len(y), size)]
            if isinstance(x, dict)
            else x.split(size),
            y.split(size),
            strict=True,
        )
        assert_same(mean_over_samples(model, parts, slopes, names=names, size=torch.abs), expected)


@pytest.mark.parametrize("name", [name for name, (_, _, way) in CASES.items() if way])
def test_the_fastest_right_way_is_taken(name):
    model, x, _, way = case(name)
    squares = PerSampleSums(model.eval(), dict(model.named_parameters()))
    squares.add(x, lambda outputs: [torch.ones_like(outputs)])
    assert squares.way == way


@pytest.mark.parametrize("name", ["linear", "images", "sequences", "shared weight", "all heads"])
def test_hooks_vmap_and_loop_agree(name):
    model, x, _, _ = case(name)
    model.eval()
    parameters = dict(model.named_parameters())
    cotangents = [noise(9, 4, seed=8), noise(9, 4, seed=9)]
    loop = by_loop(model, parameters, x, cotangents)
    squares = PerSampleSums(model, parameters)
    squares.add(x, lambda outputs: cotangents)
    assert_same(squares.total, loop)
    for chunk in (None, 2):
        assert_same(by_vmap(model, parameters, x, cotangents, chunk), loop)


@pytest.mark.parametrize("name", ["linear", "tokens", "module called twice"])
def test_rademacher_and_sampled_labels_average_to_the_exact_fisher(name):
    model, x, y, _ = case(name)
    exact = fisher(model, x, y, estimator="exact")
    sums = sum(value.sum() for value in exact.values())
    for estimator, draws, tolerance in (("rademacher", 600, 0.05), ("sample", 600, 0.1)):
        found = fisher(model, x, y, estimator=estimator, draws=draws)
        error = sum((found[n] - exact[n]).abs().sum() for n in exact) / sums
        assert error < tolerance, (estimator, error)


def test_on_a_confident_model_rademacher_is_close_where_labels_are_hopeless():
    model, x, y, _ = case("linear")
    with torch.no_grad():
        model[2].weight.mul_(40)
    exact, rademacher, predicted = (
        sum(value.sum() for value in fisher(model, x, y, estimator=kind, draws=200).values())
        for kind in ("exact", "rademacher", "predicted")
    )
    assert rademacher == pytest.approx(exact.item(), rel=0.2)
    assert predicted < 0.2 * exact


def test_logistic_regression_has_its_closed_form():
    """With logits (0, w x) the Fisher of w is the mean of x^2 p (1 - p)."""
    model = prepared(nn.Linear(5, 2))
    x = noise(40, 5)
    p = model(x).softmax(1)[:, 1].detach()
    expected = (x**2 * (p * (1 - p))[:, None]).mean(0)
    found = fisher(model, x, torch.zeros(40, dtype=torch.int64), estimator="exact")
    for row in range(2):
        torch.testing.assert_close(found["weight"][row], expected)
        torch.testing.assert_close(found["bias"][row], (p * (1 - p)).mean())
    many = fisher(model, x, torch.zeros(40, dtype=torch.int64), draws=3000)
    torch.testing.assert_close(many["weight"][1], expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_batch_size_does_not_matter(estimator):
    model, x = prepared(MLP(6, [5], 4)), noise(300, 6)
    y = torch.arange(300) % 4
    expected = fisher(model, x, y, estimator=estimator, batch_size=300, draws=2)
    for batch_size in (1, 8, 32, 128):
        assert_same(fisher(model, x, y, estimator=estimator, batch_size=batch_size, draws=2), expected, 2e-5)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "predicted"])
def test_the_order_of_samples_does_not_matter(estimator):
    model, x, y, _ = case("images")
    order = torch.randperm(9, generator=seeded())
    assert_same(
        fisher(model, x[order], y[order], estimator=estimator, batch_size=4), fisher(model, x, y, estimator=estimator)
    )


@pytest.mark.parametrize("name", ["linear", "module called twice", "untraceable"])
def test_the_number_of_samples_is_kept_exactly(name):
    model, x, y, _ = case(name)
    for batch_size in (1, 2, 9):
        capped = fisher(model, x, y, estimator="empirical", samples=5, batch_size=batch_size)
        assert_same(capped, by_hand(model, x[:5], y[:5]))
    assert_same(fisher(model, x, y, estimator="empirical", samples=100), by_hand(model, x, y))


def test_no_batch_is_fetched_beyond_the_number_of_samples():
    model, x, y, _ = case("linear")

    def batches():
        yield x[:4], y[:4]
        raise AssertionError("fetched a batch too many")

    diagonal_fisher(model, batches(), samples=4, generator=seeded(), names=dict(model.named_parameters()))


@pytest.mark.parametrize("columns", [slice(1, 3), torch.tensor([3, 1])])
def test_only_the_active_columns_count(columns):
    model, x, _, _ = case("linear")
    active = [1, 2] if isinstance(columns, slice) else [3, 1]
    local = torch.arange(9) % 2
    y = torch.tensor(active)[local]
    found = fisher(model, x, y, estimator="empirical", columns=columns)
    assert_same(found, by_hand(model, x, local, columns=active))
    exact = fisher(model, x, y, estimator="exact", columns=columns)
    assert_same(exact, by_hand(model, x, y, columns=active, weigh_labels=True))
    idle = [c for c in range(4) if c not in active]
    assert not exact["2.weight"][idle].any()
    rademacher = fisher(model, x, y, columns=columns, draws=1000)
    error = sum((rademacher[n] - exact[n]).abs().sum() for n in exact) / sum(v.sum() for v in exact.values())
    assert error < 0.05
    with pytest.raises(DataError, match="label 0 is not among the 2 active columns"):
        fisher(model, x, torch.zeros(9, dtype=torch.int64), estimator="empirical", columns=columns)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_columns_of_idle_heads_take_no_part(estimator):
    model = prepared(multi_head(1))
    y = torch.tensor([3, 2] * 4 + [3])
    found = fisher(model, FLAT, y, estimator=estimator)
    only = fisher(model, FLAT, y, estimator=estimator, columns=torch.tensor([2, 3]))
    assert all(value.isfinite().all() for value in found.values())
    assert not found["2.heads.task_0.weight"].any()
    assert found["2.heads.task_1.weight"].any()
    if estimator in ("exact", "empirical", "predicted"):
        assert_same(found, only)


def test_sequence_targets_are_summed_over_counted_tokens():
    model = prepared(nn.Linear(3, 4))
    x, y = noise(6, 5, 3), torch.randint(0, 4, (6, 5), generator=seeded())
    y[:, 3:] = -100
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(6):
        log_p = -F.cross_entropy(model(x[n]), y[n], reduction="sum", ignore_index=-100)
        for name, gradient in zip(total, torch.autograd.grad(log_p, list(model.parameters())), strict=True):
            total[name] += gradient**2 / 6
    assert_same(fisher(model, x, y, estimator="empirical"), total)


def test_regression_is_gaussian():
    model, x = prepared(nn.Linear(5, 1)), noise(30, 5)
    expected = (x**2).mean(0, keepdim=True)
    target = noise(30)
    for estimator in ("exact", "rademacher"):
        torch.testing.assert_close(fisher(model, x, target, estimator=estimator)["weight"], expected)
    residual = model(x).detach() - target[:, None]
    torch.testing.assert_close(
        fisher(model, x, target, estimator="empirical")["weight"], (x**2 * residual**2).mean(0, keepdim=True)
    )
    sampled = fisher(model, x, target, estimator="sample", draws=3000)["weight"]
    torch.testing.assert_close(sampled, expected, rtol=0.1, atol=0)
    with pytest.raises(UsageError, match="use rademacher"):
        fisher(model, x, target, estimator="predicted")


@pytest.mark.parametrize("name", ["images", "shared weight", "unknown module", "untraceable"])
@pytest.mark.parametrize("estimator", ["rademacher", "exact"])
def test_the_model_and_the_global_generator_are_left_as_they_were(name, estimator):
    model, x, y, _ = case(name)
    model.train()
    first = next(model.children())
    first.eval()
    for number, parameter in enumerate(model.parameters()):
        if number % 2:
            parameter.grad = torch.full_like(parameter, 3.0)
    frozen = list(model.parameters())[-1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    fisher(model, x, y, estimator=estimator)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for number, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (parameter is not frozen)
        assert parameter.grad is None if number % 2 == 0 else bool((parameter.grad == 3).all())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_restored_after_an_error():
    model, x, _, _ = case("linear")
    model.train()
    with pytest.raises(DataError):
        fisher(model, x, torch.full((9,), 7), estimator="empirical")
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off():
    model = prepared(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4))).train()
    y = torch.arange(9) % 4
    assert_same(fisher(model, FLAT, y, estimator="empirical"), by_hand(model, FLAT, y))


def test_integer_and_dictionary_inputs():
    model = prepared(Tokens())
    x = {"ids": torch.randint(0, 11, (9, 7), generator=seeded()), "mask": torch.rand(9, 7, generator=seeded()) > 0.3}
    y = torch.arange(9) % 4
    found = fisher(model, x, y, estimator="empirical", batch_size=4)
    assert_same(found, by_hand(model, x, y))
    assert not found["embedding.weight"][0].any()
    assert found["embedding.weight"][1:].any()


def test_channels_last_models_give_the_same():
    model, x, y, _ = case("images")
    expected = fisher(model, x, y, estimator="exact")
    model = model.to(memory_format=torch.channels_last)
    found = fisher(model, x.to(memory_format=torch.channels_last), y, estimator="exact")
    assert_same(found, expected)


def test_frozen_and_unnamed_parameters():
    """Named parameters get their Fisher even if frozen; others are left out and cost nothing."""
    model, x, y, _ = case("linear")
    expected = fisher(model, x, y, estimator="empirical")
    model[2].weight.requires_grad_(False)
    names = {"head": model[2].weight}
    found = fisher(model, x, y, estimator="empirical", names=names)
    assert list(found) == ["head"]
    torch.testing.assert_close(found["head"], expected["2.weight"])
    for model_name in ("module called twice", "untraceable"):
        model, x, y, _ = case(model_name)
        expected = fisher(model, x, y, estimator="empirical")
        name, parameter = next(iter(model.named_parameters()))
        parameter.requires_grad_(False)
        found = fisher(model, x, y, estimator="empirical", names={name: parameter})
        torch.testing.assert_close(found[name], expected[name])
        assert not parameter.requires_grad


def test_low_precision_models_are_squared_in_float32():
    model, x, y, _ = case("linear")
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    single = fisher(model, x, y, estimator="exact")
    half = fisher(model.to(torch.bfloat16), x.to(torch.bfloat16), y, estimator="exact")
    assert all(value.dtype == torch.float32 for value in half.values())
    assert half["0.weight"].sum() == pytest.approx(single["0.weight"].sum().item(), rel=0.05)
    double = fisher(model.double(), x.double(), y, estimator="exact")
    assert all(value.dtype == torch.float32 for value in double.values())


def test_a_head_without_rows_is_no_obstacle():
    model = nn.Sequential(nn.Linear(6, 5), nn.ModuleDict({"used": GrowingHead(5, 4), "empty": GrowingHead(5)}))
    model.forward = lambda x: model[1]["used"](model[0](x))
    found = fisher(model, FLAT, torch.arange(9) % 4)
    assert found["1.empty.weight"].shape == (0, 5)
    assert found["1.used.weight"].all()


def test_bad_arguments_are_refused():
    model, x, y, _ = case("linear")
    with pytest.raises(UnknownNameError, match="did you mean 'rademacher'"):
        fisher(model, x, y, estimator="rademacer")
    with pytest.raises(UsageError, match="samples=0"):
        fisher(model, x, y, samples=0)
    with pytest.raises(UsageError, match="draws=0"):
        fisher(model, x, y, draws=0)
    with pytest.raises(DataError, match="the data is empty"):
        diagonal_fisher(model, [], generator=seeded(), names=dict(model.named_parameters()))
    with pytest.raises(DataError, match="do not fit outputs"):
        fisher(model, x, y[:, None].repeat(1, 2))
    with pytest.raises(DataError, match="do not fit outputs"):
        fisher(model, x, torch.rand(9, 3))


def test_an_error_of_the_model_itself_comes_through():
    model, _, y, _ = case("linear")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fisher(model, noise(9, 7), y)
