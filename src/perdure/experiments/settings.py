"""What several experiments were made with, for a report: what they share once, and what differs by label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SECTIONS = ("train", "stream", "model", "boundaries")


def settings_of(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sections with the values that all experiments share, methods with their arguments, and the rest by label.

    Parameters
    ----------
    written
        The content of a `config.yaml` by label. It is shown and not interpreted, so that a report needs neither the
        data nor the methods of the run.

    >>> one = {"train": {"lr": 0.1, "epochs": 1}, "methods": [{"name": "replay", "capacity": 5}]}
    >>> two = {"train": {"lr": 0.1, "epochs": 2}, "methods": []}
    >>> settings_of({"replay": one, "finetune": two})
    {'train': {'lr': 0.1}, 'replay: train': {'epochs': 1}, 'finetune: train': {'epochs': 2}, 'replay': {'capacity': 5}}
    """
    settings: dict[str, Any] = {}
    for section in SECTIONS:
        values = {label: mapping.get(section) or {} for label, mapping in written.items()}
        first, *others = values.values() or [{}]
        shared = [key for key in first if all(key in other and other[key] == first[key] for other in others)]
        settings[section] = {key: first[key] for key in shared if first[key] is not None}
        for label, own in values.items():
            settings[f"{label}: {section}"] = {key: value for key, value in own.items() if key not in shared}
    for label, mapping in written.items():
        for entry in mapping.get("methods") or []:
            arguments = {key: value for key, value in entry.items() if key != "name"}
            if settings.setdefault(entry["name"], arguments) != arguments:
                settings[f"{label}: {entry['name']}"] = arguments
    return {name: values for name, values in settings.items() if values}
