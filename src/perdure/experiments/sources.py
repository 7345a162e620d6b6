"""Where an experiment's stream comes from: a benchmark by name, or a file or folder of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import DataError
from perdure.experiments.typed import arguments, structured
from perdure.registry import benchmarks

if TYPE_CHECKING:
    from perdure.streams.task import Stream

_GIVEN = ("path", "scenario", "seed", "root")


@dataclass(frozen=True)
class Source:
    """A registered benchmark, or one's own data at `path`; `name` is the benchmark's name or the full path."""

    name: str
    path: Path | None = None

    @property
    def builder(self) -> Callable[..., Stream]:
        """The function that makes the stream."""
        if self.path is None:
            from perdure.streams.shaping import shapable

            found: Callable[..., Stream] = benchmarks.get(self.name)
            return shapable(found)
        from perdure.streams.own import stream_from_path

        return stream_from_path

    @property
    def default_scenario(self) -> str:
        """The scenario if nobody says another."""
        return str(arguments(self.builder)["scenario"].default)

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The section `stream`, typed and complete; raises UsageError for what the builder does not take.

        What can be done to any stream stands there only where it is done.
        """
        from perdure.streams.shaping import shape

        typed, usual = structured(self.builder, values, "stream", leave_out=_GIVEN), shape()
        return {name: value for name, value in typed.items() if name not in usual or value != usual[name]}

    def build(self, scenario: str, seed: int, options: Mapping[str, Any], root: str | None) -> Stream:
        """The stream of one seed."""
        if self.path is None:
            return self.builder(scenario=scenario, seed=seed, root=root, **options)
        return self.builder(self.path, scenario=scenario, seed=seed, **options)


def source_of(name: str) -> Source:
    """The source that `name` means: what is registered comes before what lies on the disk.

    Raises
    ------
    UnknownNameError
        If nothing is registered under the name and nothing lies there.
    DataError
        If it can only be meant as a path, and nothing lies there.
    """
    key = name.replace("-", "_")
    if key in benchmarks.names():
        return Source(key)
    path = Path(name).expanduser()
    if path.exists():
        return Source(str(path.resolve()), path.resolve())
    if len(path.parts) > 1 or path.suffix:
        raise DataError(f"'{name}' does not exist; give a .csv or .tsv file, a folder of images, or a benchmark's name")
    benchmarks.get(name)
    raise AssertionError("a registry that does not know a name says so")
