"""A learner as a tree of state, and as a folder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perdure import registry
from perdure.augment import AUGMENTS, name_of
from perdure.boundaries import boundaries_like
from perdure.checkpoint import is_checkpoint, load_state, save_state
from perdure.data.examples import describe
from perdure.errors import CheckpointError, UnknownNameError, UsageError
from perdure.folder import RunFolder
from perdure.forward import default_prepare
from perdure.parameters import Layout, Remap
from perdure.prequential import Prequential
from perdure.streams.task import Task
from perdure.streams.transforms import Prepare

if TYPE_CHECKING:
    from perdure.learner import Learner


def learner_state(learner: Learner) -> dict[str, Any]:
    """Everything that the next step depends on, except the model's code, the data and torch's global generator."""
    module = learner.parameters.module
    return {
        **continual_state(learner),
        "model": dict(module.state_dict()),
        "modes": {name: m.training for name, m in module.named_modules()},
        "frozen": [name for name, p in learner.parameters.members.items() if not p.requires_grad],
        "optimizers": learner.optimizers.state_dict(),
        "schedulers": [schedule.state_dict() for schedule in learner.schedulers],
        "scaler": None if learner.scaler is None else learner.scaler.state_dict(),
        "settings": {
            "precision": learner.forward.precision,
            "clip_norm": learner.clip_norm,
            "clip_value": learner.clip_value,
            "micro_batches": learner.micro_batches,
            "channels_last": learner.forward.channels_last,
            "active_classes": learner.classes.active,
        },
        "prequential": None if learner.prequential is None else learner.prequential.state_dict(),
        "own": {"criterion": learner.criterion.function is not None, "prepare": _described(learner.forward.prepare)},
        "boundaries": None
        if learner.boundaries is None
        else {"settings": learner.boundaries.settings(), "state": learner.boundaries.state_dict()},
    }


def continual_state(learner: Learner) -> dict[str, Any]:
    """The methods' state and the tasks': what is saved where somebody else saves the model and the optimizer."""
    return {
        "layout": learner.parameters.layout.to_json(),
        "methods": {m.name: {"arguments": m.arguments(), "state": m.state_dict()} for m in learner.methods},
        "classes": learner.classes.state_dict(),
        "scenario": learner.scenario,
        "seed": learner.seed,
        "augment": {"name": name_of(learner.augment), "generator": learner.augment_generator.get_state()},
        "tasks_begun": learner.tasks_begun,
        "task": None if learner.task is None else [learner.task.index, learner.task.name, list(learner.task.classes)],
        "progress": learner.progress,
        "passes": dict(learner.passes),
    }


def load_continual_state(learner: Learner, state: dict[str, Any]) -> None:
    """Put the methods and the tasks of a learner, whose model is as it was saved, into a saved state."""
    check_saved_methods(learner, state)
    saved_layout = Layout.from_json(state["layout"])
    for method in learner.methods:
        method.load_state_dict(state["methods"][method.name]["state"])
    if saved_layout != learner.parameters.layout:
        learner.resize(Remap(saved_layout, learner.parameters.layout))
    learner.classes.load_state_dict(state["classes"])
    learner.scenario = state["scenario"]
    if "augment" in state:
        learner.augment_generator.set_state(state["augment"]["generator"].cpu())
    learner.tasks_begun, learner.progress = state["tasks_begun"], state["progress"]
    learner.passes = dict(state["passes"])
    learner.task = None
    if state["task"] is not None:
        index, name, classes = state["task"]
        learner.task = Task(index, name, None, None, tuple(classes))  # type: ignore[arg-type]
    learner.restored = learner.task is not None and learner.boundaries is None


def check_saved_methods(learner: Learner, state: dict[str, Any]) -> None:
    """Raise UsageError unless the methods are those that were saved."""
    ours, theirs = [m.name for m in learner.methods], sorted(state["methods"])
    if ours != theirs:
        raise UsageError(f"the saved methods are {theirs or 'none'}, this learner has {ours or 'none'}; pass the same")


def load_learner_state(learner: Learner, state: dict[str, Any]) -> None:
    """Put a learner, built with the same arguments, into a saved state.

    Raises
    ------
    UsageError
        If model, methods or optimizer are not those that were saved.
    """
    check_saved_methods(learner, state)
    found, here = state.get("boundaries"), learner.boundaries
    if (found and found["settings"]) != (here and here.settings()):
        raise UsageError(
            f"the saved learner had boundaries={found and found['settings']}, this one has {here and here.settings()}; "
            "pass the same"
        )
    module = learner.parameters.module
    for method in learner.methods:
        method.rebuild(state["methods"][method.name]["state"])
    try:
        module.load_state_dict(state["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise UsageError(f"the saved model and this one differ ({detail}); build the model as it was") from error
    saved_layout = Layout.from_json(state["layout"])
    # What was in the vector joins it again, though it may be frozen now, or be frozen still in the fresh model.
    held = {slot.name for slot in saved_layout}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.replace("_orig_mod.", "") in held)
    learner.follow_model()
    for name, parameter in learner.parameters.members.items():
        parameter.requires_grad_(name in held and name not in state["frozen"])
    for name, submodule in module.named_modules():
        submodule.training = state["modes"].get(name, submodule.training)
    learner.optimizers.load_state_dict(state["optimizers"])
    if len(learner.schedulers) != len(state["schedulers"]):
        raise UsageError(
            f"the saved learner has {len(state['schedulers'])} schedulers, this one has {len(learner.schedulers)}; "
            "pass scheduler= as it was"
        )
    for schedule, saved in zip(learner.schedulers, state["schedulers"], strict=True):
        schedule.load_state_dict(saved)
    if learner.scaler is not None and state["scaler"] is not None:
        learner.scaler.load_state_dict(state["scaler"])
    load_continual_state(learner, state)
    learner.prequential = None
    if state.get("prequential") is not None:
        learner.prequential = Prequential(learner.classes)
        learner.prequential.load_state_dict(state["prequential"])
    if learner.boundaries is not None and found is not None:
        learner.boundaries.load_state_dict(found["state"])


def save_learner(learner: Learner, folder: str | Path) -> None:
    """Write a learner to a folder: `state.json` and `tensors.safetensors`."""
    save_state(folder, {"learner": learner_state(learner)})


def load_learner(cls: type[Learner], folder: str | Path, model: nn.Module, **options: Any) -> Learner:
    """Build a learner around `model` and put it into the state saved in `folder` (or in a run folder's checkpoint).

    Methods and optimizer are built again from what was saved unless they are given; an optimizer that is not one of
    torch's own must be given.
    """
    folder = Path(folder)
    state = load_state(folder) if is_checkpoint(folder) else RunFolder.load(_existing(folder))
    if state is None or "learner" not in state:
        raise CheckpointError(f"{folder} holds no saved learner; give a folder written by save() or by a run")
    saved = state["learner"]
    if "methods" not in options:
        options["methods"] = [_method_like(name, entry["arguments"]) for name, entry in saved["methods"].items()]
    if "optimizer" not in options:
        options["optimizer"] = _optimizer_like(saved["optimizers"])
    if saved.get("boundaries") is not None and "boundaries" not in options:
        options["boundaries"] = boundaries_like(saved["boundaries"]["settings"])
    options.setdefault("seed", saved["seed"])
    for name, value in saved["settings"].items():
        options.setdefault(name, value)
    if saved["own"]["criterion"] and options.get("criterion") is None:
        raise UsageError("the saved learner had a criterion of its own, which a folder cannot hold; pass criterion=")
    augment = saved.get("augment", {}).get("name")
    if augment not in (None, *AUGMENTS) and options.get("augment") is None:
        raise UsageError(
            f"the saved learner augmented its inputs by '{augment}', which a folder cannot hold; pass augment="
        )
    options.setdefault("augment", augment)
    prepare = options.pop("prepare", None)
    learner = cls(model, **options)
    learner.forward.prepare = prepare or _known_prepare(saved["own"]["prepare"])
    load_learner_state(learner, saved)
    return learner


def _described(prepare: Any) -> str | float:
    """A preparation as its divisor if it is the library's own, else its name."""
    return prepare.divisor if type(prepare) is Prepare else describe(prepare)


def _known_prepare(saved: str | float) -> Any:
    if not isinstance(saved, str):
        return Prepare(saved)
    if saved == describe(default_prepare):
        return default_prepare
    raise UsageError(
        f"the saved learner prepared its inputs by '{saved}', which a folder cannot hold; pass prepare= as it was"
    )


def _method_like(name: str, arguments: dict[str, Any]) -> Any:
    try:
        return registry.methods.get(name)(**arguments)
    except UnknownNameError:
        raise UsageError(
            f"the saved method '{name}' is not registered here; pass methods=[...] as they were, or write "
            f"@perdure.register('{name}') above its class"
        ) from None


def _existing(folder: Path) -> RunFolder:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give one written by save() or by a run")
    return RunFolder(folder)


def _optimizer_like(saved: list[dict[str, Any]]) -> Any:
    kind = getattr(torch.optim, saved[0]["type"], None)
    if len(saved) > 1 or len(saved[0]["groups"]) > 1 or kind is None:
        raise UsageError("the saved optimizer cannot be built from its name alone; pass optimizer= as it was")
    return lambda named: kind(named, lr=saved[0]["groups"][0]["lr"])
