"""Methods inside Lightning's trainer do what they do in the learner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_problems import (
    ADAMW,
    BOTH,
    EXACT,
    OFF,
    OPTIMIZERS,
    RESUMED,
    ROUNDED,
    SGD,
    Rows,
    by_learner,
    theta,
)

import perdure
from perdure.errors import CheckpointError, IncompatibleError, UsageError
from perdure.integrations.lightning import Continual
from perdure.methods import EWC, HAT, L2, SI, DERpp, Joint, Method, Replay

pytestmark = [
    pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning"),
    # Lightning's advice.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


class Module(lightning.LightningModule):
    def __init__(self, make: Any = SGD, skip: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.net = network()
        self.make, self.skip = make, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return None if index in self.skip else loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def task(seed: int, rows: int = 32) -> Rows:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :4].argmax(1) + seed) % 4


TASKS = [task(0), task(1)]


def loader(rows: Rows, size: int = 8) -> Any:
    return DataLoader(TensorDataset(*rows), batch_size=size)


def trainer(*callbacks: Any, epochs: int = 1, **options: Any) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**defaults, **options})


def by_trainer(methods: list[Method] | None, make: Any, size: int = 8, epochs: int = 1, **options: Any) -> Module:
    module = Module(make)
    callbacks = [] if methods is None else [Continual(methods)]
    for rows in TASKS:
        trainer(*callbacks, epochs=epochs, **options).fit(module, loader(rows, size))
    return module


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", EXACT)
def test_a_trainer_equals_the_learner_bit_for_bit(name: str, optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    reference = by_learner(network(), TASKS, EXACT[name](), make)
    assert torch.equal(theta(by_trainer(EXACT[name](), make)), theta(reference.model))


@pytest.mark.parametrize("name", ROUNDED)
def test_a_trainer_equals_the_learner_to_rounding(name: str) -> None:
    ours = theta(by_trainer(ROUNDED[name](), SGD))
    torch.testing.assert_close(ours, theta(by_learner(network(), TASKS, ROUNDED[name](), SGD).model), rtol=0, atol=2e-6)
    assert not torch.allclose(ours, theta(by_trainer([], SGD)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["ewc", "si", "derpp", "pooled"])
def test_accumulated_batches_are_one_step(name: str) -> None:
    ours = by_trainer(BOTH[name](), ADAMW, size=4, accumulate_grad_batches=2)
    reference = by_learner(network(), TASKS, BOTH[name](), ADAMW)
    torch.testing.assert_close(theta(ours), theta(reference.model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["ewc", "si", "replay"])
def test_the_sum_of_all_gradients_is_clipped(name: str) -> None:
    ours = by_trainer(BOTH[name](), SGD, gradient_clip_val=0.3)
    assert torch.equal(theta(ours), theta(by_learner(network(), TASKS, BOTH[name](), SGD, clip_norm=0.3).model))
    assert not torch.equal(theta(ours), theta(by_trainer(BOTH[name](), SGD)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OFF)
def test_strength_zero_is_no_callback(name: str, optimizer: str) -> None:
    make, options = OPTIMIZERS[optimizer], {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    assert torch.equal(theta(by_trainer(OFF[name](), make, **options)), theta(by_trainer(None, make, **options)))


# -- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ewc", "derpp"])
def test_bfloat16(name: str) -> None:
    ours = by_trainer(EXACT[name](), SGD, precision="bf16-mixed")
    reference = by_learner(network(), TASKS, EXACT[name](), SGD, precision="bfloat16")
    torch.testing.assert_close(theta(ours), theta(reference.model), rtol=0, atol=1e-6)
    assert not torch.equal(theta(ours), theta(by_trainer(EXACT[name](), SGD)))


def scaled(scale: float, make: Any, methods: list[Method], rows: list[Rows], **options: Any) -> Module:
    module, continual = Module(make), Continual(methods)
    for each in rows:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        trainer(continual, plugins=[plugin], **options).fit(module, loader(each))
    return module


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_before_methods_see_them(fused: bool) -> None:
    def make(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.01, fused=fused)

    options = {} if fused else {"gradient_clip_val": 0.3}
    methods = [[SI(strength=1), Replay(20)] for _ in range(2)]
    plain = scaled(1.0, make, methods[0], TASKS, **options)
    large = scaled(1024.0, make, methods[1], TASKS, **options)
    torch.testing.assert_close(theta(plain), theta(large), rtol=0, atol=1e-4)
    torch.testing.assert_close(methods[0][0].importance, methods[1][0].importance, rtol=1e-2, atol=1e-5)
    assert methods[1][0].importance.any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(fused: bool) -> None:
    def make(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.01, fused=fused)

    x, y = task(0)
    broken = x.clone()
    broken[8:16] = torch.inf
    with_hole, without = [SI(strength=1), Replay(50)], [SI(strength=1), Replay(50)]
    kept = torch.cat([x[:8], x[16:]]), torch.cat([y[:8], y[16:]])
    ours, reference = scaled(2.0, make, with_hole, [(broken, y)]), scaled(2.0, make, without, [kept])
    assert torch.isfinite(theta(ours)).all()
    assert with_hole[1].buffer.seen == without[1].buffer.seen == 24
    torch.testing.assert_close(theta(ours), theta(reference), rtol=0, atol=1e-4)


# -- the rows of a step -----------------------------------------------------------------------------------------------


def test_rows_of_steps_without_a_loss_are_not_remembered() -> None:
    module, methods = Module(skip=(1,)), [Replay(50)]
    trainer(Continual(methods)).fit(module, loader(TASKS[0]))
    assert methods[0].buffer.seen == 24
    x = TASKS[0][0]
    assert not (methods[0].buffer.view("x")[:, None] == x[8:16]).all(-1).any()


def test_a_skipped_batch_among_accumulated_ones() -> None:
    module, methods = Module(skip=(1,)), [Replay(50)]
    continual = Continual(methods)
    trainer(continual, accumulate_grad_batches=2).fit(module, loader(TASKS[0]))
    assert methods[0].buffer.seen == 24
    assert continual.learner.passes["steps"] == 2


def test_der_stores_the_logits_of_the_training_step() -> None:
    module, methods = Module(), [DERpp(50)]
    first = module.net(TASKS[0][0][:8]).detach()
    trainer(Continual(methods), max_steps=1).fit(module, loader(TASKS[0]))
    assert torch.equal(methods[0].buffer.view("logits"), first)


class Dictionaries(torch.utils.data.Dataset):
    def __init__(self, rows: Rows) -> None:
        self.x, self.y = rows

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"image": self.x[row], "label": self.y[row]}


class Bare(Module):
    """No forward(), and batches that are dictionaries."""

    forward = lightning.LightningModule.forward

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


def test_batches_and_networks_that_have_to_be_named() -> None:
    module = Bare()
    continual = Continual(
        [EWC(strength=1), DERpp(20)], rows=lambda batch: (batch["image"], batch["label"]), network="net"
    )
    for rows in TASKS:
        trainer(continual).fit(module, DataLoader(Dictionaries(rows), batch_size=8))
    reference = by_learner(network(), TASKS, [EWC(strength=1), DERpp(20)], SGD)
    assert torch.equal(theta(module), theta(reference.model))
    assert continual.learner.model is module.net


def test_rows_go_into_the_network_as_the_loop_gave_them() -> None:
    class Images(Module):
        def forward(self, x: Tensor) -> Tensor:
            kinds.append((x.dtype, int(x.max())))
            return self.net(x.float() / 255)

    kinds: list[tuple[torch.dtype, int]] = []
    x = torch.full((32, 6), 200, dtype=torch.uint8)
    trainer(Continual([EWC(strength=1), Replay(10)])).fit(Images(), loader((x, TASKS[0][1])))
    assert len(kinds) > 4 + 3  # four steps, remembered rows in three of them, and importances
    assert set(kinds) == {(torch.uint8, 200)}


def test_importances_are_of_the_batches_that_were_trained_on() -> None:
    module, methods = Module(), [EWC(strength=1)]
    trainer(Continual(methods), limit_train_batches=2).fit(module, loader(TASKS[0]))
    reference = [EWC(strength=1)]
    by_learner(network(), [(TASKS[0][0][:16], TASKS[0][1][:16])], reference, SGD)
    assert torch.equal(methods[0].importance, reference[0].importance)


def test_the_loop_draws_the_same_random_numbers() -> None:
    drawn = []
    for callbacks in ([], [Continual([EWC(strength=1), Replay(10)])]):
        torch.manual_seed(0)
        shuffled = DataLoader(TensorDataset(*TASKS[0]), batch_size=8, shuffle=True)
        trainer(*callbacks).fit(Module(), shuffled)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks_have_names_and_classes() -> None:
    seen = []

    class Watch(Method):
        name = "watch"

        def begin_task(self, task: perdure.Task) -> None:
            seen.append((task.index, task.name, task.classes))

    module, continual = Module(), Continual([Watch(), Replay(10)])
    trainer(continual).fit(module, loader(TASKS[0]))
    continual.next_task("autumn", classes=(2, 3))
    trainer(continual).fit(module, loader(TASKS[1]))
    assert seen == [(0, "task 0", ()), (1, "autumn", (2, 3))]
    assert continual.learner.task is None
    assert continual.learner.predict(TASKS[0][0]).shape == (32,)


def test_an_interrupted_fit_is_gone_on_with() -> None:
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise RuntimeError("stop")

    module, continual = Module(), Continual([L2(strength=0.1)])
    with pytest.raises(RuntimeError, match="stop"):
        trainer(continual, Stop()).fit(module, loader(TASKS[0]))
    continual.next_task("another")
    with pytest.raises(UsageError, match="'another' cannot begin, because the training of task 'task 0'"):
        trainer(continual).fit(module, loader(TASKS[0]))
    continual.next_task("task 0")
    trainer(continual).fit(module, loader(TASKS[0]))
    assert (continual.learner.task, continual.learner.tasks_begun) == (None, 1)


def test_a_task_that_a_method_refuses_can_be_described_better() -> None:
    module, continual = Module(), Continual([Replay(None, per_class=4)])
    with pytest.raises(UsageError, match="per_class needs the classes"):
        trainer(continual).fit(module, loader(TASKS[0]))
    continual.next_task("first", classes=range(4))
    trainer(continual).fit(module, loader(TASKS[0]))
    assert len(continual.methods[0].buffer) == 16


# -- checkpoints ------------------------------------------------------------------------------------------------------


def run(folder: Path, methods: Callable[[], list[Method]], make: Any) -> tuple[Module, Continual]:
    module, continual = Module(make), Continual(methods())
    trainer(continual, epochs=2).fit(module, loader(TASKS[0]))
    every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer(continual, every, epochs=4, enable_checkpointing=True).fit(module, loader(TASKS[1]))
    return module, continual


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_in_the_middle_of_a_task_is_bit_exact(name: str, tmp_path: Path) -> None:
    module, continual = run(tmp_path, RESUMED[name], ADAMW)
    other, resumed = Module(ADAMW), Continual(RESUMED[name]())
    with torch.no_grad():
        other.net[0].weight.zero_()  # what counts is in the checkpoint
    trainer(resumed, epochs=4).fit(other, loader(TASKS[1]), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(theta(module), theta(other))
    assert resumed.learner.tasks_begun == 2
    for each, callback in ((module, continual), (other, resumed)):
        trainer(callback).fit(each, loader(task(2)))
    assert torch.equal(theta(module), theta(other))


def test_testing_a_checkpoint_does_not_take_its_state_over(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: Any, index: int) -> None:
            self(batch[0])

    module, continual = Tested(), Continual([SI(strength=1)])
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    runner = trainer(continual, every, enable_checkpointing=True)
    runner.fit(module, loader(TASKS[0]))
    runner.test(module, loader(TASKS[0]), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    trainer(continual).fit(module, loader(TASKS[1]))
    assert continual.learner.tasks_begun == 2


def test_between_tasks_the_state_is_a_folder(tmp_path: Path) -> None:
    module, continual = Module(), Continual([EWC(strength=1), Replay(10)])
    trainer(continual).fit(module, loader(TASKS[0]))
    continual.save(tmp_path / "state")
    other, loaded = Module(), Continual([EWC(strength=1), Replay(10)])
    loaded.load(tmp_path / "state")
    with pytest.raises(UsageError, match="weights are not those with which"):
        trainer(loaded).fit(other, loader(TASKS[1]))
    loaded = Continual([EWC(strength=1), Replay(10)])
    loaded.load(tmp_path / "state")
    other.load_state_dict(module.state_dict())
    for each, callback in ((module, continual), (other, loaded)):
        trainer(callback).fit(each, loader(TASKS[1]))
    assert torch.equal(theta(module), theta(other))


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(CheckpointError, match="was not written by perdure"):
        Continual([]).load_state_dict({"methods": {}})


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [(lambda: HAT(), "'hat' puts parameters of its own"), (lambda: Joint(), "'joint' has to own a part")],
)
def test_methods_that_cannot_work_here(method: Any, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        trainer(Continual([method()])).fit(Module(), loader(TASKS[0]))


def test_manual_optimization_is_refused() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(IncompatibleError, match="optimizes by hand"):
        trainer(Continual([L2()])).fit(module, loader(TASKS[0]))


def test_several_processes_are_refused() -> None:
    several = trainer(strategy="ddp", devices=2)
    with pytest.raises(IncompatibleError, match="DDPStrategy and 2 processes"):
        Continual([L2()]).on_fit_start(several, Module())


def test_a_module_without_forward_has_to_name_its_network() -> None:
    with pytest.raises(UsageError, match=r"no forward.*one of net"):
        trainer(Continual([Replay(10)])).fit(Bare(), loader(TASKS[0]))
    with pytest.raises(UsageError, match="no submodule 'body'; it has net"):
        trainer(Continual([Replay(10)], network="body")).fit(Bare(), loader(TASKS[0]))


def test_a_batch_that_is_no_pair_is_refused() -> None:
    with pytest.raises(UsageError, match="a batch is a dict and not a pair"):
        trainer(Continual([Replay(10)], network="net")).fit(Bare(), DataLoader(Dictionaries(TASKS[0]), batch_size=8))


def test_another_module_is_refused() -> None:
    continual = Continual([L2()])
    trainer(continual).fit(Module(), loader(TASKS[0]))
    with pytest.raises(UsageError, match="remembers another model's past"):
        trainer(continual).fit(Module(), loader(TASKS[0]))
