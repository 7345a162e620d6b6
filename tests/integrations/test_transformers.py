"""Methods inside Hugging Face's trainer do what they do in the learner."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from trainer_problems import ADAMW, BOTH, EXACT, OFF, OPTIMIZERS, RESUMED, ROUNDED, SGD, Rows, by_learner, theta
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from perdure.errors import DataError, IncompatibleError, UsageError
from perdure.integrations.padding import Padding
from perdure.integrations.transformers import Continual
from perdure.methods import EWC, HAT, L2, MAS, SI, DERpp, Joint, Method, Replay

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")

CONFIG = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.5,
}


def bert(kind: Any = BertForSequenceClassification, **config: Any) -> Any:
    torch.manual_seed(3)
    model = kind(BertConfig(**{**CONFIG, "num_labels": 4, **config}))
    model.accepts_loss_kwargs = False  # the model leaves num_items_in_batch alone
    return model


def task(seed: int, rows: int = 24, tokens: int = 5) -> Rows:
    ids = torch.randint(5, 30, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (ids[:, 0] + seed) % 4


TASKS = [task(0), task(1)]


class Columns(Dataset):
    def __init__(self, rows: Rows) -> None:
        self.x, self.y = rows

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {**{name: part[row] for name, part in self.x.items()}, "labels": self.y[row]}


def trainer(
    model: nn.Module, rows: Any, *callbacks: Any, folder: Any = "unused", make: Any = SGD, **options: Any
) -> Any:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    made = {} if make is None else {"optimizers": (make(model.parameters()), None)}
    data = rows if isinstance(rows, Dataset) else Columns(rows)
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks), **made)


def by_trainer(methods: list[Method] | None, make: Any, **options: Any) -> Any:
    model = bert()
    callbacks = [] if methods is None else [Continual(methods)]
    for rows in TASKS:
        trainer(model, rows, *callbacks, make=make, **options).train()
    return model


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "adamw") for name in EXACT), ("ewc", "sgd"), ("si", "sgd")])
def test_a_trainer_equals_the_learner_bit_for_bit(name: str, optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    reference = by_learner(bert(), TASKS, EXACT[name](), make)
    assert torch.equal(theta(by_trainer(EXACT[name](), make)), theta(reference.model))


@pytest.mark.parametrize("name", ROUNDED)
def test_a_trainer_equals_the_learner_to_rounding(name: str) -> None:
    ours = theta(by_trainer(ROUNDED[name](), SGD))
    torch.testing.assert_close(ours, theta(by_learner(bert(), TASKS, ROUNDED[name](), SGD).model), rtol=0, atol=1e-5)
    assert not torch.allclose(ours, theta(by_trainer([], SGD)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["ewc", "derpp", "pooled"])
def test_accumulated_batches_are_one_step(name: str) -> None:
    ours = by_trainer(BOTH[name](), SGD, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    reference = by_learner(bert(), TASKS, BOTH[name](), SGD)
    torch.testing.assert_close(theta(ours), theta(reference.model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["ewc", "replay"])
def test_the_sum_of_all_gradients_is_clipped(name: str) -> None:
    ours = by_trainer(BOTH[name](), SGD, max_grad_norm=0.5)
    assert torch.equal(theta(ours), theta(by_learner(bert(), TASKS, BOTH[name](), SGD, clip_norm=0.5).model))
    assert not torch.equal(theta(ours), theta(by_trainer(BOTH[name](), SGD)))


@pytest.mark.parametrize("name", OFF)
def test_strength_zero_is_no_callback(name: str) -> None:
    # The trainer's own optimizer, schedule, clipping and shuffling.
    options = {
        "make": None,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
    }
    assert torch.equal(theta(by_trainer(OFF[name](), **options)), theta(by_trainer(None, **options)))


def test_bfloat16() -> None:
    ours = by_trainer([EWC(strength=1), DERpp(20)], SGD, bf16=True)
    reference = by_learner(bert(), TASKS, [EWC(strength=1), DERpp(20)], SGD, precision="bfloat16")
    torch.testing.assert_close(theta(ours), theta(reference.model), rtol=0, atol=2e-2)
    plain = by_trainer([EWC(strength=1), DERpp(20)], SGD)
    assert not torch.equal(theta(ours), theta(plain))


def test_the_norm_that_is_logged_and_the_limit_stay_the_trainers() -> None:
    norms, limits = [], []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            norms.append(logs.get("grad_norm"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            limits.append(args.max_grad_norm)

    for callbacks in ([], [Continual([EWC(strength=1)])]):
        options = {"max_grad_norm": 0.5, "logging_strategy": "steps", "logging_steps": 1}
        trainer(bert(), TASKS[0], *callbacks, Watch(), **options).train()
    assert norms[:3] == norms[4:7]
    assert norms[0] > 0.5
    assert limits == [0.5] * 6


def test_the_loop_draws_the_same_random_numbers() -> None:
    drawn = []
    for callbacks in ([], [Continual([EWC(strength=1), Replay(10)])]):
        trainer(bert(), TASKS[0], *callbacks, train_sampling_strategy="random").train()
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_der_stores_what_the_model_said() -> None:
    model, methods = bert(), [DERpp(50)]
    x = {name: part[:8] for name, part in TASKS[0][0].items()}
    first = model(**x).logits.detach()
    trainer(model, TASKS[0], Continual(methods), max_steps=1).train()
    assert torch.equal(methods[0].buffer.view("logits"), first)
    assert sorted(methods[0].buffer.view("x")) == ["attention_mask", "input_ids"]


def test_evaluation_in_between_is_not_looked_at() -> None:
    methods = [Replay(50)]
    model = bert()
    continual = Continual(methods)
    trainer(model, TASKS[0], continual, eval_strategy="steps", eval_steps=1).train()
    assert methods[0].buffer.seen == 24
    assert continual.learner.passes["steps"] == 3


def ragged(seed: int) -> Any:
    """Rows of 2 to 6 tokens; the loader pads a batch to its longest."""

    class Ragged(Columns):
        def __getitem__(self, row: int) -> Any:
            return {"input_ids": self.x["input_ids"][row][: 2 + row % 5].tolist(), "labels": int(self.y[row])}

    return Ragged(task(seed, tokens=6))


def collate(items: list[Any]) -> dict[str, Tensor]:
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def padded(rows: Any) -> Rows:
    columns = collate([rows[i] for i in range(len(rows))])
    y = columns.pop("labels")
    return columns, y


@pytest.mark.parametrize("name", ["replay", "derpp", "ewc", "lwf"])
def test_rows_of_different_lengths(name: str) -> None:
    model, continual = bert(), Continual(BOTH[name](), length=9)
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for seed in (0, 1):
        runner = trainer(model, ragged(seed), continual, per_device_train_batch_size=3)
        runner.data_collator = collate
        runner.train()
    reference = by_learner(bert(), [padded(ragged(0)), padded(ragged(1))], BOTH[name](), SGD, size=3)
    torch.testing.assert_close(theta(model), theta(reference.model), rtol=0, atol=1e-4)
    assert max(lengths) <= 6
    if name == "replay":
        assert continual.methods[0].buffer.view("x")["input_ids"].shape[1] == 9


def test_rows_of_different_lengths_without_a_length() -> None:
    runner = trainer(bert(), ragged(0), Continual([Replay(10)]), per_device_train_batch_size=3)
    runner.data_collator = collate
    with pytest.raises(UsageError, match=r"\(4 and 6 tokens\).*length="):
        runner.train()


def test_padding_and_cutting() -> None:
    padding = Padding(5, token=7)
    x = padding.pad({"input_ids": torch.tensor([[1, 2, 3]]), "vector": torch.ones(1, 2)})
    assert x["input_ids"].tolist() == [[1, 2, 3, 7, 7]]
    assert x["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    cut = padding.cut(x)
    assert cut["input_ids"].tolist() == [[1, 2, 3]]
    assert cut["vector"].shape == (1, 2)
    with pytest.raises(DataError, match="6 tokens, but length is 5"):
        padding.pad({"input_ids": torch.zeros(1, 6, dtype=torch.long)})


@pytest.mark.parametrize("methods", [lambda: [Replay(20), EWC(strength=1)], lambda: [MAS(strength=1)]])
def test_regression(methods: Callable[[], list[Method]]) -> None:
    rows = [(x, y.float()[:, None]) for x, y in TASKS]
    model, continual = bert(num_labels=1), Continual(methods())
    for each in rows:
        trainer(model, each, continual).train()
    reference = by_learner(bert(num_labels=1), rows, methods(), SGD, criterion=nn.MSELoss())
    torch.testing.assert_close(theta(model), theta(reference.model), rtol=0, atol=1e-4)


# -- tasks and checkpoints --------------------------------------------------------------------------------------------


def test_one_trainer_for_all_tasks() -> None:
    model, continual = bert(), Continual([EWC(strength=1), DERpp(20)])
    runner = trainer(model, TASKS[0], continual, make=ADAMW)
    runner.train()
    continual.next_task("autumn", classes=range(4))
    runner.train_dataset = Columns(TASKS[1])
    runner.train()
    reference = by_learner(bert(), TASKS, [EWC(strength=1), DERpp(20)], ADAMW, fresh=False)
    assert torch.equal(theta(model), theta(reference.model))
    assert continual.learner.classes.by_task[1] == (0, 1, 2, 3)


def run(folder: Path, methods: Callable[[], list[Method]], **options: Any) -> tuple[Any, Continual]:
    model, continual = bert(), Continual(methods())
    trainer(model, TASKS[0], continual, make=ADAMW).train()
    trainer(model, TASKS[1], continual, folder=folder, make=ADAMW, **options).train()
    return model, continual


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_in_the_middle_of_a_task_is_bit_exact(name: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "train_sampling_strategy": "random"}
    model, continual = run(tmp_path, RESUMED[name], **options)
    other, resumed = bert(), Continual(RESUMED[name]())
    again = trainer(other, TASKS[1], resumed, folder=tmp_path, make=ADAMW, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(theta(model), theta(other))
    assert resumed.learner.tasks_begun == 2
    for each, callback in ((model, continual), (other, resumed)):
        trainer(each, task(2), callback).train()
    assert torch.equal(theta(model), theta(other))


def test_resuming_needs_the_state_that_belongs_to_the_weights(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path, lambda: [SI(strength=1)], **options)
    moved = shutil.move(tmp_path / "checkpoint-1" / "perdure", tmp_path / "moved")

    def resume(continual: Continual) -> None:
        runner = trainer(bert(), TASKS[1], continual, folder=tmp_path, make=ADAMW, **options)
        runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    with pytest.raises(UsageError, match="goes on at step 1, but there is no folder"):
        resume(Continual([SI(strength=1)]))
    continual = Continual([SI(strength=1)])
    continual.load(tmp_path / "checkpoint-2" / "perdure")
    with pytest.raises(UsageError, match="weights are not those with which"):
        resume(continual)
    continual = Continual([SI(strength=1)])
    continual.load(moved)
    resume(continual)
    assert continual.learner.tasks_begun == 2


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (lambda: HAT(), {}, "'hat' puts parameters of its own"),
        (lambda: Joint(), {}, "'joint' has to own a part"),
        (lambda: Replay(10), {"label_smoothing_factor": 0.1}, "'replay' cannot be used with label_smoothing_factor"),
    ],
)
def test_what_cannot_work_here(method: Any, options: Any, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        trainer(bert(), TASKS[0], Continual([method()]), **options).train()


@pytest.mark.parametrize(
    ("option", "message"), [("fp16", "use bf16=True"), ("torch_compile", "'replay' cannot be used with torch_compile")]
)
def test_methods_with_passes_of_their_own_are_particular(option: str, message: str) -> None:
    runner = trainer(bert(), TASKS[0])
    setattr(runner.args, option, True)
    given = {"model": runner.model, "optimizer": runner.optimizer, "train_dataloader": runner.get_train_dataloader()}
    with pytest.raises(IncompatibleError, match=message):
        Continual([Replay(10)]).on_train_begin(runner.args, runner.state, runner.control, **given)
    Continual([SI()]).on_train_begin(runner.args, runner.state, runner.control, **given)


def test_several_processes_are_refused() -> None:
    class Several(TrainingArguments):
        world_size = 2

    runner = trainer(bert(), TASKS[0])
    runner.args.__class__ = Several
    with pytest.raises(IncompatibleError, match="2 processes"):
        Continual([L2()]).on_train_begin(
            runner.args, runner.state, runner.control, model=None, optimizer=None, train_dataloader=None
        )


def test_labels_of_tokens_are_refused_where_rows_are_looked_at() -> None:
    x, y = TASKS[0]
    rows = x, y[:, None].expand(-1, 5).contiguous()
    with pytest.raises(UsageError, match="are not one label a row"):
        trainer(bert(BertForTokenClassification), rows, Continual([Replay(10)])).train()
    continual = Continual([SI(strength=1), L2()])
    for _ in range(2):
        trainer(bert_once(continual), rows, continual).train()
    assert continual.methods[1].importance.any()


def bert_once(continual: Continual) -> Any:
    return bert(BertForTokenClassification) if continual._guard is None else continual.learner.model


def test_losses_that_are_added_up_are_refused() -> None:
    model = bert()
    del model.accepts_loss_kwargs  # the trainer then believes that the model divides by num_items_in_batch
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    with pytest.raises(UsageError, match="accepts_loss_kwargs = False"):
        trainer(model, TASKS[0], Continual([Replay(10)]), **options).train()


def test_a_model_that_is_not_given_its_labels() -> None:
    runner = trainer(bert(), TASKS[0], Continual([Replay(10)]))
    runner.compute_loss_func = lambda outputs, labels, num_items_in_batch: nn.functional.cross_entropy(
        outputs.logits, labels
    )
    with pytest.raises(UsageError, match="without labels="):
        runner.train()
