"""Plain values from a file or the command line, turned into typed arguments; what does not fit is named with its path.

What a method, a benchmark or a model takes is read from its own signature, so nothing is declared twice.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import cattrs
from cattrs.gen import make_dict_structure_fn

from perdure.errors import UsageError
from perdure.registry import nearest

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING
OTHER_WORDS = {
    "learning_rate": "lr",
    "lambda": "strength",
    "lam": "strength",
    "memory_size": "capacity",
    "buffer_size": "capacity",
    "batch": "batch_size",
    "n_tasks": "tasks",
}


@dataclass(frozen=True)
class Argument:
    """One argument of a class or function: its annotation and its default (`REQUIRED` if it has none)."""

    name: str
    annotation: Any
    default: Any

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        return in_words(self.annotation)


def arguments(target: Callable[..., Any], leave_out: Sequence[str] = ()) -> dict[str, Argument]:
    """The keyword arguments of a dataclass, class or function, in order.

    >>> def blur(*, radius: float = 1.5, seed: int = 0) -> None: ...
    >>> [(a.name, a.allowed, a.default) for a in arguments(blur, leave_out=["seed"]).values()]
    [('radius', 'a number', 1.5)]
    """
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in leave_out or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = REQUIRED if parameter.default is parameter.empty else _default(target, name, parameter.default)
        found[name] = Argument(name, _evaluated(target, name, parameter.annotation), default)
    return found


def structured(
    target: Callable[..., Any], values: Mapping[str, Any], path: str, leave_out: Sequence[str] = ()
) -> dict[str, Any]:
    """All arguments of `target`: `values` in the types of its annotations, and its defaults for the rest.

    Raises
    ------
    UsageError
        For a key that it does not take, a value of another type, or an argument that is missing.

    >>> def blur(*, radius: float = 1.5) -> None: ...
    >>> structured(blur, {"radius": "1e-2"}, "blur")
    {'radius': 0.01}
    >>> structured(blur, {"radus": 2}, "blur")
    Traceback (most recent call last):
    perdure.errors.UsageError: unknown key 'blur.radus'; did you mean 'radius'? blur takes radius
    """
    known = arguments(target, leave_out)
    fields = [(argument.name, argument.annotation, _field(argument)) for argument in known.values()]
    made: Any = into(dataclasses.make_dataclass("Arguments", fields, kw_only=True), values, path)
    return {name: getattr(made, name) for name in known}


def into(shape: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass `shape` from plain values; `path` is where they stand, for the error messages.

    Raises
    ------
    UsageError
        As `structured`.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{path or 'the experiment'} is {values!r}, it must be a mapping of keys to values")
    structure = make_dict_structure_fn(shape, _converter(), _cattrs_forbid_extra_keys=True)
    try:
        return structure(dict(values), shape)
    except cattrs.ClassValidationError as error:
        raise UsageError(_sentence(error, shape, values, path)) from None


def in_words(annotation: Any) -> str:
    """What a value of the annotated type may be.

    >>> in_words(Literal["sum", "1/t"] | float | None)
    "'sum' or '1/t', a number, or null"
    """
    if annotation in (Any, inspect.Parameter.empty):
        return "any value"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if _is_union(annotation):
        kinds = list(dict.fromkeys(in_words(arg) for arg in args if arg is not type(None) and _is_plain(arg)))
        kinds += ["null"] if type(None) in args else []
        return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])}{',' * (len(kinds) > 2)} or {kinds[-1]}"
    if _is_list(annotation):
        item = next((arg for arg in args if arg is not Ellipsis), Any)
        plural = {int: "whole numbers", float: "numbers", str: "words"}.get(item, "values")
        return f"a list of {plural}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if annotation in words:
        return words[annotation]
    return "a mapping" if _is_mapping(annotation) else "a value that only Python code can pass"


# -- from annotations to values -----------------------------------------------------------------------------------


@cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(bool, _bool)
    converter.register_structure_hook(int, _int)
    converter.register_structure_hook(float, _float)
    converter.register_structure_hook(str, _str)
    converter.register_structure_hook_func(_is_union, _member_of(converter))
    converter.register_structure_hook_func(_is_list, _listed(converter))
    converter.register_structure_hook_func(lambda t: not _is_plain(t), _refuse)
    return converter


def _bool(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: Any, _: Any) -> int:
    number = _float(value, float)
    if number != int(number):
        raise ValueError
    return value if isinstance(value, int) else int(number)


def _float(value: Any, _: Any) -> float:
    # YAML 1.1 reads 1e-3 as text, and everybody means a number.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value)


def _str(value: Any, _: Any) -> str:
    # A csv column may be called 2019.
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError
    return str(value)


def _member_of(converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    def structure(value: Any, union: Any) -> Any:
        if type(None) in get_args(union) and value in (None, "None"):
            return None
        for member in sorted((m for m in get_args(union) if m is not type(None)), key=lambda m: _precedence(m, value)):
            try:
                return converter.structure(value, member)
            except Exception:
                continue
        raise ValueError

    return structure


def _precedence(member: Any, value: Any) -> int:
    if get_origin(member) is Literal:
        return 0
    if member is str:
        return 4 if isinstance(value, str) and "," in value else 2
    return 1 if member in (bool, int, float) else 3


def _listed(converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    def structure(value: Any, annotation: Any) -> Any:
        item = next((arg for arg in get_args(annotation) if arg is not Ellipsis), Any)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        items = [converter.structure(part, item) for part in value]
        return tuple(items) if get_origin(annotation) is tuple else items

    return structure


def _refuse(value: Any, annotation: Any) -> Any:
    raise ValueError


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_list(annotation: Any) -> bool:
    return (get_origin(annotation) or annotation) in (list, tuple, Sequence)


def _is_mapping(annotation: Any) -> bool:
    return (get_origin(annotation) or annotation) in (dict, Mapping)


def _is_plain(annotation: Any) -> bool:
    """Whether a file or a command line can hold such a value."""
    if annotation in (Any, inspect.Parameter.empty, bool, int, float, str, type(None)):
        return True
    if _is_union(annotation):
        return any(_is_plain(arg) for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is Literal or dataclasses.is_dataclass(annotation):
        return True
    return _is_list(annotation) or _is_mapping(annotation)


# -- from signatures to annotations -------------------------------------------------------------------------------


def _evaluated(target: Any, name: str, annotation: Any) -> Any:
    """The annotation as an object; one that names what is imported for type checkers only becomes `Any`."""
    if not isinstance(annotation, str):
        return annotation
    owners = [c for c in getattr(target, "__mro__", ()) if name in inspect.get_annotations(c)] or [target]
    module = sys.modules[owners[0].__module__]
    try:
        return eval(annotation, vars(module))
    except NameError:
        return Any


def _default(target: Any, name: str, default: Any) -> Any:
    """Dataclasses show the default of a mutable field as a marker."""
    if dataclasses.is_dataclass(target):
        field = target.__dataclass_fields__[name]
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return default


def _field(argument: Argument) -> Any:
    if argument.default is REQUIRED:
        return dataclasses.field()
    return dataclasses.field(default_factory=lambda: argument.default)


# -- from errors to sentences -------------------------------------------------------------------------------------


def _sentence(error: cattrs.ClassValidationError, shape: Any, values: Mapping[str, Any], path: str) -> str:
    noted, others = error.group_exceptions()
    known = [field.name for field in dataclasses.fields(shape)]
    where = f"{path}." if path else ""
    for other in others:
        if isinstance(other, cattrs.ForbiddenExtraKeysError):
            key = sorted(map(str, other.extra_fields))[0]
            synonym = OTHER_WORDS.get(key)
            hint = f"; did you mean '{synonym}'?" if synonym in known else nearest(key, known) or ";"
            return f"unknown key '{where}{key}'{hint} {path or 'an experiment'} takes {', '.join(known) or 'no keys'}"
    if not noted:
        return str(others[0])
    note = noted[0][1]
    if note.name not in values:
        return f"'{where}{note.name}' is missing; it must be {in_words(note.type)}"
    return f"{where}{note.name} is {values[note.name]!r}, it must be {in_words(note.type)}"
