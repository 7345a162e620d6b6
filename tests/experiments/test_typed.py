from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytest

from perdure import registry
from perdure.errors import UsageError
from perdure.experiments.typed import REQUIRED, arguments, in_words, structured

if TYPE_CHECKING:
    from somewhere import Unknown  # type: ignore[import-not-found]

EVERYTHING = [
    (kind, name)
    for kind in ("methods", "benchmarks", "models")
    for name in getattr(registry, kind).names()
]  # fmt: skip


def one(annotation: Any, value: Any) -> Any:
    def target(*, it: Any) -> None: ...

    target.__annotations__["it"] = annotation
    return structured(target, {"it": value}, "here")["it"]


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_the_defaults_of_everything_registered_are_values_that_a_file_can_hold(kind: str, name: str) -> None:
    target = getattr(registry, kind).get(name)
    defaults = {a.name: a.default for a in arguments(target).values() if a.default is not REQUIRED}
    required = {a.name: (1, 4, 4) if a.name == "input_shape" else 2 for a in arguments(target).values()}
    typed = structured(target, required | defaults, name)
    plain = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in typed.items()}
    expected = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in defaults.items()}
    assert {key: plain[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        (float, "1e-3", 0.001),  # YAML 1.1 reads it as text
        (float, 3, 3.0),
        (int, "1e3", 1000),
        (str, 2019, "2019"),
        (int | None, None, None),
        (int | None, "None", None),
        (str | None, "none", "none"),
        (Literal["sum", "1/t"] | float, "sum", "sum"),
        (Literal["sum", "1/t"] | float, "0.5", 0.5),
        (bool | int, True, True),
        (int | Sequence[int], [3, 2], [3, 2]),
        (str | Sequence[int] | None, "natural", "natural"),
        (str | Sequence[int] | None, "3, 1", [3, 1]),
        (Sequence[str], "id,when", ["id", "when"]),
        (Sequence[float], 5, [5.0]),
        (tuple[int, int], [8, 9], (8, 9)),
        (int | Callable[[], int], 4, 4),
    ],
)
def test_values_get_the_type_of_their_annotation(annotation: Any, value: Any, result: Any) -> None:
    found = one(annotation, value)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, True),
        (int, 2.5),
        (int, "many"),
        (int, float("inf")),
        (int, None),
        (float, True),
        (float, "fast"),
        (float, [1.0]),
        (bool, 1),
        (bool, "yes please"),
        (str, True),
        (str, ["a"]),
        (Literal["sum"], "mean"),
        (int | None, "x"),
        (Sequence[int], ["a"]),
        (Sequence[int], {"a": 1}),
        (Mapping[str, int], 3),
        (Callable[[], int], 3),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_path_itself_and_what_is_allowed(
    annotation: Any, value: Any
) -> None:
    with pytest.raises(UsageError) as error:
        one(annotation, value)
    assert str(error.value) == f"here.it is {value!r}, it must be {in_words(annotation)}"


def test_an_unknown_key_is_refused_with_its_path_the_nearest_and_all_that_are_allowed() -> None:
    def target(*, capacity: int = 1, ratio: float = 1.0) -> None: ...

    with pytest.raises(UsageError) as error:
        structured(target, {"capcity": 5}, "replay")
    assert str(error.value) == "unknown key 'replay.capcity'; did you mean 'capacity'? replay takes capacity, ratio"
    with pytest.raises(UsageError, match="did you mean 'capacity'"):
        structured(target, {"buffer_size": 5}, "replay")


def test_a_missing_argument_is_named() -> None:
    def target(*, width: int) -> None: ...

    with pytest.raises(UsageError, match=r"'model.width' is missing; it must be a whole number"):
        structured(target, {}, "model")


def test_annotations_for_type_checkers_only_allow_anything() -> None:
    def target(*, thing: Unknown = 3) -> None: ...

    assert structured(target, {"thing": "whatever"}, "x") == {"thing": "whatever"}


def test_defaults_that_are_mutable_are_not_shared() -> None:
    def target(*, widths: Sequence[int] = (4, 4)) -> None: ...

    structured(target, {"widths": [1]}, "x")
    assert structured(target, {}, "x") == {"widths": (4, 4)}
