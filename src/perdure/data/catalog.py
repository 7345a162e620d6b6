"""The public data sets by name: their files, where to get them, their checksums, licences and citations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.arrays import Arrays
from perdure.data.cifar import read_cifar, read_names
from perdure.data.digits import read_digits
from perdure.data.files import find_file
from perdure.data.idx import read_idx
from perdure.errors import DataError
from perdure.registry import datasets


@dataclass(frozen=True)
class Remote:
    """A file to download: its size in bytes, its sha256, and the addresses that hold it.

    `members` are the files that an archive holds and that are kept in its place.
    """

    file: str
    size: int
    sha256: str
    mirrors: tuple[str, ...]
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """What is known of a public data set.

    `train` and `test` are numbers of examples; `content` holds the `content_checksum` of both parts, which does not
    depend on how files were packed or rows ordered.
    """

    name: str
    description: str
    shape: tuple[int, ...]
    classes: int
    train: int
    test: int
    licence: str
    citation: str
    homepage: str
    content: tuple[str, str]
    read: Callable[[Path], Arrays]
    remotes: tuple[Remote, ...] = ()
    other_layout: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files it needs, relative to its folder; a gzipped one may lie there unpacked."""
        return tuple(name for remote in self.remotes for name in (remote.members or (remote.file,)))

    @property
    def download_size(self) -> int:
        """Bytes to download."""
        return sum(remote.size for remote in self.remotes)


IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _read_idx_set(class_names: tuple[str, ...]) -> Callable[[Path], Arrays]:
    def read(folder: Path) -> Arrays:
        x, y = part(folder, *IDX_FILES[:2])
        x_test, y_test = part(folder, *IDX_FILES[2:])
        return Arrays(x, y, x_test, y_test, class_names=class_names)

    def part(folder: Path, image_file: str, label_file: str) -> tuple[Tensor, Tensor]:
        image_path, label_path = (find_file(folder, file) or folder / file for file in (image_file, label_file))
        images, labels = read_idx(image_path, 3), read_idx(label_path, 1).long()
        if len(images) != len(labels):
            raise DataError(f"'{image_path}' has {len(images):,} images but '{label_path}' {len(labels):,} labels")
        if not len(labels) or int(labels.max()) >= len(class_names):
            highest = int(labels.max()) if len(labels) else "none"
            raise DataError(f"'{label_path}' should have labels from 0 to {len(class_names) - 1} but has {highest}")
        return images, labels

    return read


def _read_cifar10(folder: Path) -> Arrays:
    folder = folder / "cifar-10-batches-bin"
    x, y = read_cifar([folder / f"data_batch_{part}.bin" for part in range(1, 6)], limits=(10,))
    x_test, y_test = read_cifar([folder / "test_batch.bin"], limits=(10,))
    return Arrays(x, y[:, 0], x_test, y_test[:, 0], class_names=read_names(folder / "batches.meta.txt", 10))


def _read_cifar100(folder: Path) -> Arrays:
    folder = folder / "cifar-100-binary"
    x, y = read_cifar([folder / "train.bin"], limits=(20, 100))
    x_test, y_test = read_cifar([folder / "test.bin"], limits=(20, 100))
    groups = {int(fine): int(coarse) for coarse, fine in torch.unique(y, dim=0)}
    return Arrays(
        x,
        y[:, 1].contiguous(),
        x_test,
        y_test[:, 1].contiguous(),
        class_names=read_names(folder / "fine_label_names.txt", 100),
        groups=tuple(groups.get(fine, -1) for fine in range(100)),
        group_names=read_names(folder / "coarse_label_names.txt", 20),
    )


def _file(entry: DataSet) -> DataSet:
    return datasets.register(entry.name)(entry)


DIGITS = _file(
    DataSet(
        name="digits",
        description="handwritten digits of 8 x 8 pixels with values 0 to 16; comes with perdure",
        shape=(8, 8),
        classes=10,
        train=1297,
        test=500,
        licence="CC BY 4.0",
        citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI ML Repository, 1998",
        homepage="https://doi.org/10.24432/C50P49",
        content=(
            "582d2c8a03e98efea5fb694451006636460618052eb14a02edeab96e1f5f43ad",
            "883bc854d5f624689401fd2dd922e0a3ca139ea04688713595f6f00776f22711",
        ),
        read=lambda folder: read_digits(),
    )
)

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
MNIST = _file(
    DataSet(
        name="mnist",
        description="handwritten digits of 28 x 28 pixels",
        shape=(28, 28),
        classes=10,
        train=60_000,
        test=10_000,
        licence="not stated by the publishers",
        citation="Y. LeCun, C. Cortes, C. J. C. Burges: The MNIST database of handwritten digits, 1998",
        homepage="http://yann.lecun.com/exdb/mnist/",
        content=(
            "3655811c0e1223700a4714a92a51f55bd215ed7dc1fa2baa4326a2b58042d82d",
            "634538fb34c5277fce98470b8b285d1e8419eb87f328da42ef1faf690d2c3911",
        ),
        read=_read_idx_set(tuple(map(str, range(10)))),
        other_layout="MNIST/raw",
        remotes=tuple(
            Remote(file, size, sha256, tuple(mirror + file for mirror in MNIST_MIRRORS))
            for file, size, sha256 in zip(
                IDX_FILES,
                (9_912_422, 28_881, 1_648_877, 4_542),
                (
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
                strict=True,
            )
        ),
    )
)

FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
FASHION_MNIST = _file(
    DataSet(
        name="fashion_mnist",
        description="pictures of clothing of 28 x 28 pixels",
        shape=(28, 28),
        classes=10,
        train=60_000,
        test=10_000,
        licence="MIT",
        citation="H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST, 2017, arXiv:1708.07747",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        content=(
            "0c69d5cdeb902b69084012f812f066de080317bb3c64f43ca87f910d8ec86906",
            "90c92c0507755a7d443edde8297ce4d0f131e42884e2e87e7fc9b81ffe215258",
        ),
        read=_read_idx_set(
            (
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            )
        ),
        other_layout="FashionMNIST/raw",
        remotes=tuple(
            Remote(file, size, sha256, tuple(mirror + file for mirror in FASHION_MIRRORS))
            for file, size, sha256 in zip(
                IDX_FILES,
                (26_421_880, 29_515, 4_422_102, 5_148),
                (
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
                strict=True,
            )
        ),
    )
)

CIFAR_MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
CIFAR_CITATION = "A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009"
CIFAR_HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10 = _file(
    DataSet(
        name="cifar10",
        description="colour photographs of 10 kinds of things, 32 x 32 pixels",
        shape=(3, 32, 32),
        classes=10,
        train=50_000,
        test=10_000,
        licence="not stated by the publisher",
        citation=CIFAR_CITATION,
        homepage=CIFAR_HOMEPAGE,
        content=(
            "55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
            "325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
        ),
        read=_read_cifar10,
        remotes=(
            Remote(
                "cifar-10-binary.tar.gz",
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                tuple(mirror + "cifar-10-binary.tar.gz" for mirror in CIFAR_MIRRORS),
                members=(
                    *(f"cifar-10-batches-bin/data_batch_{part}.bin" for part in range(1, 6)),
                    "cifar-10-batches-bin/test_batch.bin",
                    "cifar-10-batches-bin/batches.meta.txt",
                ),
            ),
        ),
    )
)
CIFAR100 = _file(
    DataSet(
        name="cifar100",
        description="colour photographs of 100 kinds of things in 20 superclasses, 32 x 32 pixels",
        shape=(3, 32, 32),
        classes=100,
        train=50_000,
        test=10_000,
        licence="not stated by the publisher",
        citation=CIFAR_CITATION,
        homepage=CIFAR_HOMEPAGE,
        content=(
            "6d2a03c47c105e4c34d3a2ff16c2803e8df0e5d6fa0c631e46663a327aeac573",
            "381b7d98ce1e9b98232a8df0db0a22992654c39ff2433270656ab8ace5a45e65",
        ),
        read=_read_cifar100,
        remotes=(
            Remote(
                "cifar-100-binary.tar.gz",
                168_513_733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                tuple(mirror + "cifar-100-binary.tar.gz" for mirror in CIFAR_MIRRORS),
                members=(
                    "cifar-100-binary/train.bin",
                    "cifar-100-binary/test.bin",
                    "cifar-100-binary/fine_label_names.txt",
                    "cifar-100-binary/coarse_label_names.txt",
                ),
            ),
        ),
    )
)
