"""Images as rows of intensities, which are Bernoulli means, and two ways to make them binary.

The extra ``pip install 'pyro_recursive[data]'`` has the digits and the downloads; IDX files in a
folder need neither.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_recursive.datasets.image_files import (
    FILES,
    SHAPE,
    Array,
    DatasetError,
    find_folder,
    import_extra,
    read_idx,
    split,
)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Grey images as rows of intensities in [0, 1], with their labels.

    ``train`` and ``test`` are float32 ``N x D``, ``train_labels`` and ``test_labels`` int64 ``N``;
    ``shape`` is the height and width of an image, with product ``D``.
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    shape: tuple[int, int]

    def split_validation(self, size: int) -> "Dataset":
        """Return the training rows as a data set of their own, the last ``size`` as its ``test``.

        Example:
            >>> load("digits").split_validation(100)
            Dataset('digits-validation', train=[1337, 64], test=[100, 64], shape=(8, 8))
        """
        if not 0 < size < len(self.train):
            raise ValueError(f"size must be from 1 to {len(self.train) - 1}, got {size}.")
        return replace(
            self,
            name=f"{self.name}-validation",
            train=self.train[:-size],
            test=self.train[-size:],
            train_labels=self.train_labels[:-size],
            test_labels=self.train_labels[-size:],
        )

    def __repr__(self) -> str:
        """Show the shapes instead of the numbers."""
        train, test = list(self.train.shape), list(self.test.shape)
        return f"Dataset({self.name!r}, train={train}, test={test}, shape={self.shape})"


def load(
    name: str = "digits", *, root: str | os.PathLike[str] | None = None, download: bool = False
) -> Dataset:
    """Load a data set: ``digits``, ``mnist``, ``fashion_mnist`` or ``omniglot``.

    The digits are scikit-learn's (8x8, a fixed 1,437 + 360 split) and need no file. The others are
    IDX files in ``root/name``. Omniglot is downloaded as drawings, box-averaged from 105x105 to
    28x28 and split at random with a fixed seed into 24,345 + 8,115: its nats are not comparable
    with those of the file of Burda et al. (arXiv 1509.00519).

    Args:
        name: one of the four.
        root: by default the folder that the environment variable ``PYRO_RECURSIVE_DATA`` names,
            else pooch's cache.
        download: whether to fill pooch's cache, and use it, where ``root`` lacks a file.

    Raises:
        DatasetError: a file is missing, damaged or wrong.

    Example:
        >>> load("digits")
        Dataset('digits', train=[1437, 64], test=[360, 64], shape=(8, 8))
    """
    if name == "digits":
        return _load_digits()
    if name not in FILES:
        raise ValueError(f"load got {name!r}. Give one of {', '.join(['digits', *FILES])}.")
    folder = find_folder(name, root, download)
    images, labels, test_images, test_labels = (folder / file for file in FILES[name])
    train, test = _read_split(images, labels), _read_split(test_images, test_labels)
    return Dataset(name, train[0], test[0], train[1], test[1], SHAPE)


def dynamic_binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw binary images anew from Bernoulli(``x``), of the same shape and dtype.

    Intensities outside [0, 1] raise ValueError on the CPU; on CUDA `torch.bernoulli` stops with a
    device-side assertion, as a check would make each step wait for the device.

    Example:
        >>> dynamic_binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    if x.device.type == "cpu":
        _check_intensities(x)
    return torch.bernoulli(x, generator=generator)


def fixed_binarize(x: Tensor, seed: int = 0) -> Tensor:
    """Draw binary images from Bernoulli(``x``), the same for the same ``seed`` on any device.

    Keeps shape and dtype; intensities outside [0, 1] raise ValueError.

    Example:
        >>> x = torch.full((2, 3), 0.5)
        >>> bool((fixed_binarize(x, seed=1) == fixed_binarize(x, seed=1)).all())
        True
    """
    _check_intensities(x)
    # Uniforms from the CPU: each kind of device has a random stream of its own.
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (uniform.to(x.device) < x).to(x.dtype)


def _check_intensities(x: Tensor) -> None:
    if not ((x >= 0) & (x <= 1)).all():  # NaN fails, an empty tensor passes
        low, high = x.min().item(), x.max().item()
        raise ValueError(f"Intensities must lie in [0, 1], got values from {low:g} to {high:g}.")


def _load_digits() -> Dataset:
    datasets = import_extra("sklearn.datasets", "the digits come with scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = _as_tensors(images, labels, white=16)
    train, test = split(len(images), test_size=360)
    return Dataset("digits", images[train], images[test], labels[train], labels[test], (8, 8))


def _read_split(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
    if images.shape[1:] != SHAPE:
        raise DatasetError(f"{images_path}: images of {images.shape[1:]} pixels, not {SHAPE}.")
    if len(images) != len(labels):
        raise DatasetError(f"{images_path}: {len(images)} images, but {len(labels)} labels.")
    return _as_tensors(images, labels, white=255)


def _as_tensors(images: Array, labels: Array, white: int) -> tuple[Tensor, Tensor]:
    intensities = torch.from_numpy(images.astype(np.float32)).div_(white).flatten(1)
    return intensities, torch.from_numpy(labels.astype(np.int64))
