"""Streams from one's own data: class-, task- and domain-incremental.

Source of the three scenarios: G. M. van de Ven, T. Tuytelaars, A. S. Tolias, Three types of incremental learning, 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from perdure.data.arrays import Arrays
from perdure.data.examples import Examples, as_examples
from perdure.data.source import read_path
from perdure.errors import DataError, UsageError
from perdure.seeding import generator
from perdure.streams.classes import ClassOrder, hold_out, order_classes, task_sizes, to_columns
from perdure.streams.task import ANNOUNCED, Stream, Task, check_scenario

Transform = Callable[[Tensor], Tensor]


def class_incremental(data: Any, test: Any = None, **arguments: Any) -> Stream:
    """New classes arrive with every task and one output covers all; see `split_classes` for the arguments.

    A path also takes `target` and `ignore` (columns of a table) and `size` (of images).

    >>> x, y = torch.rand(60, 3), torch.arange(60) % 6
    >>> stream = class_incremental((x, y), tasks=3, class_order=[5, 4, 3, 2, 1, 0])
    >>> [task.classes for task in stream], stream.class_names[0]
    ([(0, 1), (2, 3), (4, 5)], '5')
    """
    return split_classes(_read(data, arguments), test, scenario="class", **arguments)


def task_incremental(data: Any, test: Any = None, **arguments: Any) -> Stream:
    """New classes arrive with every task, which is known when predicting; see `split_classes` for the arguments."""
    return split_classes(_read(data, arguments), test, scenario="task", **arguments)


def domain_incremental(
    data: Any,
    test: Any = None,
    *,
    domains: Any = None,
    domain_names: Sequence[str] | None = None,
    tasks: int | Sequence[int] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    class_order: ClassOrder = None,
    class_names: Sequence[str] | None = None,
    name: str = "domain_incremental",
    **arguments: Any,
) -> Stream:
    """The same labels arrive with new inputs.

    Parameters
    ----------
    data, test
        What `as_examples` takes; or a list of such, one a task.
    domains
        int [N], the domain of every row: each is a task, in the order in which they first appear. Or "rows": `tasks`
        consecutive blocks of rows, for data in the order of time. Default: classes are split over the tasks as in
        `split_classes`, and a target is its class's position within the task.
    domain_names
        The names of the domains, by number.
    tasks
        The number of tasks; for a split by class see `split_classes`.
    test_fraction
        The share of every task's rows (of every class alike) that is held out for testing if there is no `test`.
    seed, class_order, class_names, name, arguments
        As in `split_classes`.

    Raises
    ------
    UsageError
        If `tasks` does not fit.
    DataError
        If the data cannot be used, a label is outside the classes, or `domains` and the rows differ in number.

    >>> old, new = (torch.zeros(10, 2), torch.arange(10) % 2), (torch.ones(10, 2), torch.arange(10) % 2)
    >>> [len(task.train) for task in domain_incremental([old, new])]
    [8, 8]
    """
    data = _read(data, arguments)
    if domains is None and not isinstance(data, list):
        return split_classes(
            data,
            test,
            scenario="domain",
            tasks=tasks,
            test_fraction=test_fraction,
            seed=seed,
            class_order=class_order,
            class_names=class_names,
            name=name,
            **arguments,
        )
    if isinstance(data, list):
        parts = [as_examples(part) for part in data]
        tests: list[Examples | None] = [None] * len(parts) if test is None else [as_examples(part) for part in test]
        names = domain_names
    else:
        train, own_test, own_names = sources(data, None)
        if own_test is not None or (test is not None and not isinstance(test, list)):
            raise UsageError(
                "one test set for several domains hides what is forgotten; give test= as a list, one a task"
            )
        class_names = class_names or own_names or None
        parts, names = _by_domain(train, domains, domain_names, tasks)
        tests = [None] * len(parts) if test is None else [as_examples(part) for part in test]
    if len(tests) != len(parts):
        raise UsageError(f"there are {len(parts)} tasks but {len(tests)} test sets; give one a task")
    if isinstance(tasks, int) and tasks != len(parts):
        raise UsageError(f"tasks={tasks} but the data have {len(parts)} domains; leave tasks= out or make them agree")
    labels = torch.cat([part.targets for part in parts])
    regression = labels.is_floating_point()
    order = () if regression else order_classes(class_order, class_labels(labels), seed)
    built = []
    for index, (part, part_test) in enumerate(zip(parts, tests, strict=True)):
        if not regression:
            part = part.with_targets(to_columns(class_labels(part.targets), order, "training"))
            if part_test is not None:
                part_test = part_test.with_targets(to_columns(class_labels(part_test.targets), order, "test"))
        elif not part.targets.is_floating_point():
            raise DataError(f"task {index} has class labels but another task has float targets")
        if part_test is None:
            part, part_test = _split_off(part, test_fraction, seed, index)
        task_name = names[index] if names else f"part {index}"
        built.append(Task(index, task_name, part, part_test, tuple(range(len(order)))))
    return Stream(
        built,
        scenario="domain",
        seed=seed,
        name=name,
        class_order=order or None,
        class_names=[column_name(label, class_names) for label in order] or None,
        **arguments,
    )


def split_classes(
    data: Any,
    test: Any = None,
    *,
    scenario: str,
    tasks: int | Sequence[int] | None = None,
    classes_per_task: int | None = None,
    class_order: ClassOrder = None,
    class_names: Sequence[str] | None = None,
    task_names: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    **arguments: Any,
) -> Stream:
    """Split a class data set into tasks of consecutive columns: column c is the original label `class_order[c]`.

    Parameters
    ----------
    data, test
        What `as_examples` takes: a pair (x, y) of tensors or arrays (their memory is shared by all tasks), a
        `Dataset`, a path; or `Arrays`.
    scenario
        "class", "task" or "domain"; in the last a target is its class's position within the task.
    tasks
        The number of tasks, or the number of classes of each.
    classes_per_task
        Instead of `tasks`.
    class_order
        None or "natural" (ascending labels), "shuffled" (drawn from the seed), or all labels in order of arrival.
    class_names
        The names of the labels, by label.
    task_names
        The names of the tasks; default: their classes'.
    test_fraction
        The share of every class that is held out for testing if there is no `test`; 0 for no test sets.
    seed
        The seed of the order, the held-out rows and the plans.
    arguments
        `prepare` and `options` of `Stream`.

    Raises
    ------
    UsageError
        If the classes cannot be split like that.
    DataError
        If the data cannot be used or a label is outside the classes.
    """
    check_scenario(scenario, ANNOUNCED)
    train, test_examples, own_names = sources(data, test)
    class_names = class_names or own_names or None
    labels = class_labels(train.targets)
    order = order_classes(class_order, labels, seed)
    sizes = task_sizes(tasks, classes_per_task, len(order))
    if scenario == "domain" and len(set(sizes)) > 1:
        raise UsageError(f"tasks={sizes}: a domain-incremental split by class needs as many classes in every task")
    columns = to_columns(labels, order, "training")
    if test_examples is None:
        rows, test_rows = hold_out(columns, test_fraction, generator(seed, "test"))
        if len(test_rows):
            test_examples, test_columns = train.subset(test_rows), columns[test_rows]
        train, columns = train.subset(rows), columns[rows]
    else:
        test_columns = to_columns(class_labels(test_examples.targets), order, "test")
    names = [column_name(label, class_names) for label in order]
    built = []
    # What was read here belongs to nobody else, so it may be laid out by task, which gathers a quarter faster.
    pack = isinstance(data, (str, PathLike, Arrays))
    parts = _by_task(train, columns, sizes, pack)
    test_parts: Sequence[Examples | None] = [None] * len(sizes)
    if test_examples is not None:
        test_parts = _by_task(test_examples, test_columns, sizes, pack)
    start = 0
    for index, (size, part, part_test) in enumerate(zip(sizes, parts, test_parts, strict=True)):
        stop = start + size
        shift = start if scenario == "domain" else 0
        if shift:
            part = part.with_targets(part.targets - shift)
            part_test = None if part_test is None else part_test.with_targets(part_test.targets - shift)
        task_name = task_names[index] if task_names else _task_name(names[start:stop])
        built.append(Task(index, task_name, part, part_test or None, tuple(range(start - shift, stop - shift))))
        start = stop
    if scenario == "domain":
        names = ["/".join(names[column :: sizes[0]]) for column in range(sizes[0])]
    return Stream(
        built,
        scenario=scenario,
        seed=seed,
        name=name or f"{scenario}_incremental",
        class_names=names,
        class_order=order,
        **arguments,
    )


def transformed(
    train: Examples,
    test: Examples,
    transforms: Sequence[Transform | None],
    *,
    scenario: str,
    task_names: Sequence[str],
    class_order: ClassOrder = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Stream:
    """Show the whole data set in every task, each time through another transform.

    Domain-incremental tasks share their columns; in the other scenarios the classes of every task are new ones: class k
    of C in task t is column t C + k.
    """
    check_scenario(scenario, ANNOUNCED)
    order = order_classes(class_order, class_labels(train.targets), seed)
    columns = to_columns(train.targets, order, "training")
    test_columns = to_columns(class_labels(test.targets), order, "test")
    width = len(order)
    names = [column_name(label, class_names) for label in order]
    built = []
    for index, transform in enumerate(transforms):
        shift = 0 if scenario == "domain" else index * width
        part, part_test = train.with_targets(columns + shift), test.with_targets(test_columns + shift)
        if transform is not None:
            part, part_test = part.with_transform(transform), part_test.with_transform(transform)
        built.append(Task(index, task_names[index], part, part_test, tuple(range(shift, shift + width))))
    if scenario != "domain":
        names = [f"{label} ({task.name})" for task in built for label in names]
        order = order * len(built)
    return Stream(built, scenario=scenario, seed=seed, class_names=names, class_order=order, **arguments)


def _read(data: Any, arguments: dict[str, Any]) -> Any:
    """A path's content, read with the reader's own arguments, which are taken out of `arguments`."""
    reader = {key: arguments.pop(key) for key in ("target", "ignore", "size") if key in arguments}
    if isinstance(data, (str, PathLike)):
        return read_path(data, **reader)
    if reader:
        raise UsageError(f"{next(iter(reader))}= is for files and folders; the data are a {type(data).__name__}")
    return data


def sources(data: Any, test: Any) -> tuple[Examples, Examples | None, tuple[str, ...]]:
    """Return training examples, test examples if there are any, and class names if the data bring them."""
    arrays = read_path(data) if isinstance(data, (str, PathLike)) else data
    if not isinstance(arrays, Arrays):
        return as_examples(data), None if test is None else as_examples(test), ()
    if test is None and arrays.x_test is not None:
        test = (arrays.x_test, arrays.y_test)
    return as_examples((arrays.x, arrays.y)), None if test is None else as_examples(test), arrays.class_names


def class_labels(targets: Tensor) -> Tensor:
    """Return `targets` if they are class labels, int64 [N]; raise a `DataError` if they are something else."""
    if targets.is_floating_point() or targets.ndim != 1:
        raise DataError(
            f"the targets are {str(targets.dtype).removeprefix('torch.')} {list(targets.shape)} but classes need one "
            "integer a row"
        )
    return targets


def column_name(label: int, class_names: Sequence[str] | None) -> str:
    """Return the name of an original label."""
    return class_names[label] if class_names and label < len(class_names) else str(label)


def _split_off(examples: Examples, fraction: float, seed: int, index: int) -> tuple[Examples, Examples | None]:
    rows, test_rows = hold_out(examples.targets, fraction, generator(seed, "test", index))
    return examples.subset(rows), examples.subset(test_rows) if len(test_rows) else None


def _by_task(examples: Examples, columns: Tensor, sizes: Sequence[int], pack: bool) -> list[Examples]:
    ends = torch.tensor(sizes).cumsum(0)
    tasks = torch.bucketize(columns, ends, right=True)
    order = tasks.argsort(stable=True)
    counts = torch.bincount(tasks, minlength=len(sizes)).tolist()
    parts = [examples.subset(rows).with_targets(columns[rows]) for rows in torch.split(order, counts)]
    if not pack:
        return parts
    inputs = torch.split(examples.gather(order)[0], counts)
    return [Examples(x, part.targets) for x, part in zip(inputs, parts, strict=True)]


def _task_name(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{names[0]} ... {names[-1]}"


def _by_domain(
    train: Examples, domains: Any, domain_names: Sequence[str] | None, tasks: int | Sequence[int] | None
) -> tuple[list[Examples], list[str]]:
    if isinstance(domains, str):
        if domains != "rows":
            raise UsageError(f"domains='{domains}' should be 'rows' or one domain number a row")
        if not isinstance(tasks, int) or not 1 <= tasks <= len(train):
            raise UsageError(f"tasks={tasks} should be a number of blocks from 1 to the {len(train)} rows")
        blocks = torch.arange(len(train)).tensor_split(tasks)
        return [train.subset(rows) for rows in blocks], [f"rows {int(rows[0])}-{int(rows[-1])}" for rows in blocks]
    numbers = torch.as_tensor(domains)
    if numbers.ndim != 1 or len(numbers) != len(train):
        raise DataError(f"there are {len(train)} rows but domains of shape {list(numbers.shape)}; give one a row")
    present = list(dict.fromkeys(numbers.tolist()))
    names = [column_name(number, domain_names) if domain_names else f"domain {number}" for number in present]
    return [train.subset((numbers == number).nonzero().flatten()) for number in present], names
