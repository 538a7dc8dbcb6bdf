"""Image data sets by name: those of the package, smaller images, and sets of several manifolds."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pyro_recursive.datasets import Dataset, load

SMALL = "-14"  # ends the name of a set of 14x14 pixels: means of 2x2 pixels of 28x28
TURNS = 4


def load_images(name: str, download: bool) -> Dataset:
    """Return a data set; "mnist-omniglot-14" has the images of both in a random order.

    "digits-rotated" has each digit four times, turned by 0, 90, 180 and 270 degrees.
    """
    if name == "digits-rotated":
        return _rotated(load("digits", download=download))
    if not name.endswith(SMALL):
        return load(name, download=download)
    parts = [load(part, download=download) for part in name.removesuffix(SMALL).split("-")]
    found = parts[0] if len(parts) == 1 else _joined(parts)
    train, test = (_means(rows) for rows in (found.train, found.test))
    return replace(found, name=name, train=train, test=test, shape=(14, 14))


def _means(rows: Tensor) -> Tensor:
    return avg_pool2d(rows.unflatten(1, (28, 28)), 2).flatten(1)


def _rotated(found: Dataset) -> Dataset:
    """Return all turns of each image one after the other: a split by rows keeps them together."""

    def turned(rows: Tensor) -> Tensor:
        images = rows.unflatten(1, found.shape)
        turns = [torch.rot90(images, turn, (1, 2)) for turn in range(TURNS)]
        return torch.stack(turns, 1).flatten(0, 1).flatten(1)

    return replace(
        found,
        name="digits-rotated",
        train=turned(found.train),
        test=turned(found.test),
        train_labels=found.train_labels.repeat_interleave(TURNS),
        test_labels=found.test_labels.repeat_interleave(TURNS),
    )


def _joined(parts: list[Dataset]) -> Dataset:
    """Return all images in a random order, the same each time."""
    generator = torch.Generator().manual_seed(0)
    columns = []
    for kind in ("train", "test"):
        rows = torch.cat([getattr(part, kind) for part in parts])
        labels = torch.cat([getattr(part, f"{kind}_labels") for part in parts])
        order = torch.randperm(len(rows), generator=generator)
        columns.append((rows[order], labels[order]))
    (train, train_labels), (test, test_labels) = columns
    return Dataset("", train, test, train_labels, test_labels, parts[0].shape)
