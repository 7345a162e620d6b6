"""The named benchmarks. Every function takes keyword arguments only and returns a `Stream`.

In all of them `scenario` is "class", "task", "domain", "online" or "blurry", and the keywords of
`perdure.streams.shaping.shape` make classes rare, reorder and repeat tasks or blur boundaries; `seed` is the seed of
everything random; `root` is the folder of the data sets (see `perdure.data.locate`). In the split ones `class_order` is
None or "natural", "shuffled" or a list of the labels; `tasks` is a number of tasks or the number of classes of each. A
wrong scenario or split is a `UsageError`, and missing data a `DataError` that says how to get them.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import torch

from perdure.data.arrays import Arrays
from perdure.data.examples import Examples
from perdure.data.store import load
from perdure.errors import UsageError
from perdure.registry import benchmarks
from perdure.seeding import generator
from perdure.streams.classes import ClassOrder
from perdure.streams.scenarios import Transform, split_classes, transformed
from perdure.streams.shaping import shapable
from perdure.streams.task import ANNOUNCED, Stream, check_scenario
from perdure.streams.transforms import Permute, Prepare, Rotate

Root = str | PathLike[str] | None
Tasks = int | Sequence[int]


@benchmarks.register("split_digits")
@shapable
def split_digits(
    *,
    scenario: str = "class",
    tasks: Tasks = 5,
    seed: int = 0,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """The UCI optical digits, 8 x 8 pixels, in tasks of two digits; they come with perdure, so nothing is downloaded.

    1,297 training and 500 test images; inputs [1, 8, 8] are the stored values / 16.
    Source: E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, doi 10.24432/C50P49.

    >>> stream = split_digits()
    >>> stream
    Stream('split_digits', 5 tasks, scenario='class', 10 columns, seed=0)
    >>> stream.input_shape, [task.name for task in stream]
    ((1, 8, 8), ['0, 1', '2, 3', '4, 5', '6, 7', '8, 9'])
    """
    arguments.setdefault("prepare", Prepare(16.0))
    return _split("digits", "split_digits", scenario, tasks, seed, class_order, root, arguments)


@benchmarks.register("split_mnist")
@shapable
def split_mnist(
    *,
    scenario: str = "class",
    tasks: Tasks = 5,
    seed: int = 0,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """MNIST in tasks of two digits.

    60,000 training and 10,000 test images; inputs [1, 28, 28] are the stored bytes / 255.
    Source: F. Zenke, B. Poole, S. Ganguli, Continual Learning Through Synaptic Intelligence, 2017, arXiv:1703.04200.
    """
    return _split("mnist", "split_mnist", scenario, tasks, seed, class_order, root, arguments)


@benchmarks.register("split_fashion_mnist")
@shapable
def split_fashion_mnist(
    *,
    scenario: str = "class",
    tasks: Tasks = 5,
    seed: int = 0,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """Fashion-MNIST in tasks of two kinds of clothing.

    60,000 training and 10,000 test images; inputs [1, 28, 28] are the stored bytes / 255.
    Source of the data: H. Xiao, K. Rasul, R. Vollgraf, 2017, arXiv:1708.07747.
    """
    return _split("fashion_mnist", "split_fashion_mnist", scenario, tasks, seed, class_order, root, arguments)


@benchmarks.register("split_cifar10")
@shapable
def split_cifar10(
    *,
    scenario: str = "class",
    tasks: Tasks = 5,
    seed: int = 0,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """CIFAR-10 in tasks of two classes.

    50,000 training and 10,000 test images; inputs [3, 32, 32] are the stored bytes / 255.
    Source of the data: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    return _split("cifar10", "split_cifar10", scenario, tasks, seed, class_order, root, arguments)


@benchmarks.register("split_cifar100")
@shapable
def split_cifar100(
    *,
    scenario: str = "class",
    tasks: Tasks = 10,
    seed: int = 0,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """CIFAR-100 in tasks of ten classes (`tasks=20`: of five).

    50,000 training and 10,000 test images; inputs [3, 32, 32] are the stored bytes / 255.
    Source: S.-A. Rebuffi, A. Kolesnikov, G. Sperl, C. H. Lampert, iCaRL, 2016, arXiv:1611.07725.
    """
    return _split("cifar100", "split_cifar100", scenario, tasks, seed, class_order, root, arguments)


@benchmarks.register("coarse_cifar100")
@shapable
def coarse_cifar100(*, scenario: str = "task", seed: int = 0, root: Root = None, **arguments: Any) -> Stream:
    """CIFAR-100 in 20 tasks, one a superclass: the task is which of its five classes an image shows.

    50,000 training and 10,000 test images; inputs [3, 32, 32] are the stored bytes / 255.
    Source: R. Ramesh, P. Chaudhari, Model Zoo: A Growing "Brain" That Learns Continually, 2021, arXiv:2106.03027.
    """
    check_scenario(scenario, ANNOUNCED)
    arrays = load("cifar100", root)
    order = sorted(range(100), key=lambda label: (arrays.groups[label], label))
    arguments.setdefault("task_names", arrays.group_names)
    return split_classes(
        arrays,
        scenario=scenario,
        tasks=20,
        class_order=order,
        seed=seed,
        name="coarse_cifar100",
        options=_options(scenario=scenario, seed=seed, root=root),
        **arguments,
    )


@benchmarks.register("permuted_mnist")
@shapable
def permuted_mnist(
    *,
    scenario: str = "domain",
    tasks: int = 10,
    seed: int = 0,
    permute_first: bool = True,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """All of MNIST in every task, each time with the pixels in another random order.

    The permutation of task t is drawn from (seed, "permutation", t) alone; `permute_first=False` leaves the first task
    as it is. 60,000 training and 10,000 test images a task; inputs [1, 28, 28] are the stored bytes / 255.
    Source: I. J. Goodfellow, M. Mirza, D. Xiao, A. Courville, Y. Bengio, 2013, arXiv:1312.6211.
    """
    check_scenario(scenario, ANNOUNCED)
    _check_count(tasks)
    draws = [torch.randperm(28 * 28, generator=generator(seed, "permutation", task)) for task in range(tasks)]
    transforms: list[Transform | None] = [Permute(draw) for draw in draws]
    if not permute_first:
        transforms[0] = None
    options = _options(scenario=scenario, tasks=tasks, seed=seed, class_order=class_order, root=root)
    return _transformed_mnist(
        root,
        transforms,
        name="permuted_mnist",
        task_names=[f"permutation {task}" for task in range(tasks)],
        scenario=scenario,
        seed=seed,
        class_order=class_order,
        options={**options, "permute_first": permute_first},
        **arguments,
    )


@benchmarks.register("rotated_mnist")
@shapable
def rotated_mnist(
    *,
    scenario: str = "domain",
    tasks: int = 5,
    seed: int = 0,
    angles: Sequence[float] | None = None,
    class_order: ClassOrder = None,
    root: Root = None,
    **arguments: Any,
) -> Stream:
    """All of MNIST in every task, each time turned by another angle: 0, 10, 20, ... degrees, or `angles`.

    60,000 training and 10,000 test images a task; inputs [1, 28, 28] are the stored bytes / 255.
    Source: D. Lopez-Paz, M. Ranzato, Gradient Episodic Memory for Continual Learning, 2017, arXiv:1706.08840.
    """
    check_scenario(scenario, ANNOUNCED)
    _check_count(tasks)
    degrees = [10.0 * task for task in range(tasks)] if angles is None else [float(angle) for angle in angles]
    if len(degrees) != tasks:
        raise UsageError(f"angles={degrees} are {len(degrees)} but tasks={tasks}; give one angle a task")
    options = _options(scenario=scenario, tasks=tasks, seed=seed, class_order=class_order, root=root)
    return _transformed_mnist(
        root,
        [Rotate(angle) if angle % 360 else None for angle in degrees],
        name="rotated_mnist",
        task_names=[f"{angle:g} degrees" for angle in degrees],
        scenario=scenario,
        seed=seed,
        class_order=class_order,
        options={**options, "angles": None if angles is None else degrees},
        **arguments,
    )


def _split(
    data_set: str,
    name: str,
    scenario: str,
    tasks: Tasks,
    seed: int,
    class_order: ClassOrder,
    root: Root,
    arguments: dict[str, Any],
) -> Stream:
    check_scenario(scenario, ANNOUNCED)
    return split_classes(
        load(data_set, root),
        scenario=scenario,
        tasks=tasks,
        class_order=class_order,
        seed=seed,
        name=name,
        options=_options(scenario=scenario, tasks=tasks, seed=seed, class_order=class_order, root=root),
        **arguments,
    )


def _transformed_mnist(root: Root, transforms: Sequence[Transform | None], **arguments: Any) -> Stream:
    arrays: Arrays = load("mnist", root)
    assert arrays.x_test is not None
    assert arrays.y_test is not None
    arguments.setdefault("class_names", arrays.class_names)
    train, test = Examples(arrays.x, arrays.y), Examples(arrays.x_test, arrays.y_test)
    return transformed(train, test, transforms, **arguments)


def _options(**options: Any) -> dict[str, Any]:
    if "root" in options and options["root"] is not None:
        options["root"] = fspath(options["root"])
    for key in ("tasks", "class_order"):
        if key in options and not isinstance(options[key], (int, str, type(None))):
            options[key] = [int(value) for value in options[key]]
    return options


def _check_count(tasks: int) -> None:
    if tasks < 1:
        raise UsageError(f"tasks={tasks} should be at least 1")
