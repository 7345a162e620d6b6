"""From a configuration to the objects of one seed: stream, model, optimizer, methods, learner."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from perdure.boundaries import Boundaries
from perdure.errors import UsageError
from perdure.experiments.config import BESIDE_DETECTOR, GIVEN, HIDDEN, Experiment, Part, Train
from perdure.fitting import check_passes
from perdure.learner import Learner
from perdure.models.vae import VAE
from perdure.registry import detectors, methods, models, nearest

if TYPE_CHECKING:
    from perdure.streams.task import Stream

OPTIMIZERS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "radam": "RAdam",
    "adamax": "Adamax",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "adafactor": "Adafactor",
}

FIT_OPTIONS = (
    "epochs",
    "steps",
    "batch_size",
    "drop_last",
    "evaluate_every",
    "eval_future",
    "checkpoint_every",
    "reset_optimizer",
    "prequential",
)


@dataclass(frozen=True)
class Prepared:
    """What one seed of an experiment needs before its first step."""

    stream: Stream
    learner: Learner
    fit_options: dict[str, Any]


def prepare(experiment: Experiment, seed: int, narrow: Callable[[Stream], Stream] | None = None) -> Prepared:
    """Build everything for one seed and check that it works together; nothing is written or trained.

    `narrow` makes the stream that is trained on of the experiment's own.

    Raises
    ------
    UsageError, IncompatibleError, DataError, ModelError
        For whatever cannot work, before any training.
    """
    train = experiment.train
    device = device_of(experiment.device)
    stream = experiment.source.build(experiment.scenario, seed, experiment.stream, experiment.data_root)
    if narrow is not None:
        stream = narrow(stream)
    model = models.get(experiment.model.name)(
        input_shape=stream.input_shape, outputs=stream.columns, seed=seed, **experiment.model.arguments
    )
    if isinstance(model, VAE):
        raise UsageError(
            f"the model '{experiment.model.name}' generates inputs and gives no class scores; choose another and add "
            "the method generative_replay, which has a generator of its own"
        )
    learner = Learner(
        model,
        optimizer_of(train),
        [methods.get(part.name)(**part.arguments) for part in experiment.methods],
        seed=seed,
        device=device,
        precision=train.precision,
        clip_norm=train.clip_norm,
        clip_value=train.clip_value,
        micro_batches=train.micro_batches,
        active_classes=train.active_classes,
        augment=train.augment,
        boundaries=boundaries_of(experiment.boundaries),
    )
    check_passes(stream, train.epochs, train.batch_size, train.steps, train.drop_last)
    learner.adopt(stream)
    options = {name: getattr(train, name) for name in FIT_OPTIONS}
    if experiment.boundaries.name == HIDDEN:
        options["announce"] = False
    return Prepared(stream, learner, options)


def boundaries_of(part: Part) -> Boundaries | None:
    """What finds the tasks; None where they are announced, or where nobody asks."""
    if part.name in (GIVEN, HIDDEN):
        return None
    beside = {key: value for key, value in part.arguments.items() if key in BESIDE_DETECTOR}
    own = {key: value for key, value in part.arguments.items() if key not in BESIDE_DETECTOR}
    return Boundaries(detectors.get(part.name)(**own), **beside)


def on_this_machine(experiment: Experiment) -> Experiment:
    """The experiment with device and threads as they are here, where it left them open."""
    threads = experiment.threads or torch.get_num_threads()
    return dataclasses.replace(experiment, device=str(device_of(experiment.device)), threads=threads)


def optimizer_of(train: Train) -> Any:
    """The optimizer factory of a `train` section."""
    kind = getattr(torch.optim, OPTIMIZERS[train.optimizer])
    takes = inspect.signature(kind).parameters
    options = {"lr": train.lr, "weight_decay": train.weight_decay}
    if train.momentum:
        options["momentum"] = train.momentum
    if train.fused:
        if "fused" not in takes:
            raise UsageError(f"train.fused is true, but torch has no fused {train.optimizer}; leave it out")
        options["fused"] = True
    return partial(kind, **options)


def device_of(name: str | None) -> torch.device:
    """The device by its name; the GPU if there is one, else the CPU, if nobody says.

    Raises
    ------
    UsageError
        If torch has no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        kinds = [kind for kind, there in here.items() if there]
        hint = nearest(name, kinds) or ";"
        raise UsageError(f"device '{name}' is not usable here{hint} there is {', '.join(kinds)}") from error
    return device
