"""Real images behind one function, checksummed, and the two ways to make them binary.

:func:`load` returns grey intensities, which are Bernoulli means. Training draws binary images anew
at every step with :func:`dynamic_binarize`; a test set is drawn once with :func:`fixed_binarize`.
The extra ``pip install 'pyro_recursive[data]'`` brings the digits and the downloads; IDX files in
a folder need neither.
"""

import gzip
import hashlib
import importlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Dataset", "DatasetError", "dynamic_binarize", "fixed_binarize", "load"]

_VARIABLE = "PYRO_RECURSIVE_DATA"
_SPLIT_SEED = 0
_SHAPE = (28, 28)
_Array = npt.NDArray[Any]
# By magic number, whose last digit counts the dimensions.
_IDX_TYPES = {"00000803": "u1", "00000801": "u1", "00000c01": ">i4"}

_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_FILES = {
    "mnist": _MNIST_FILES,
    "fashion_mnist": _MNIST_FILES,
    "omniglot": (
        "omniglot28-train-images-idx3-ubyte.gz",
        "omniglot28-train-labels-idx1-int32.gz",
        "omniglot28-test-images-idx3-ubyte.gz",
        "omniglot28-test-labels-idx1-int32.gz",
    ),
}
_URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "omniglot": "https://raw.githubusercontent.com/brendenlake/omniglot/master/python",
}
_DOWNLOAD_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "omniglot": {
        "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
        "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
    },
}
# Of the uncompressed bytes: the gzip wrapper differs from mirror to mirror.
_CONTENT_MD5 = {
    "mnist/train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "mnist/t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
}


class DatasetError(RuntimeError):
    """A data file is missing, damaged or not the one expected; the message says what to do."""


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

        Choices made on the result never see the real test rows; a size of 400 leaves 59,600 rows
        of MNIST to train on. Raises ValueError unless ``0 < size < len(train)``.

        >>> load("digits").split_validation(100)
        Dataset('digits-validation', train=[1337, 64], test=[100, 64], shape=(8, 8))
        """
        if not 0 < size < len(self.train):
            raise ValueError(
                f"split_validation got size={size}; {self.name} has {len(self.train)} training "
                f"rows, so give a size from 1 to {len(self.train) - 1}"
            )
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
    IDX files in ``root/name``, by default in the folder that the environment variable
    ``PYRO_RECURSIVE_DATA`` names, else in pooch's cache, which ``download=True`` fills and
    uses where the folder does not hold all four files. A ``SHA256SUMS`` in the folder is obeyed.

    Omniglot is downloaded as drawings, box-averaged from 105x105 to 28x28 and split at random with
    a fixed seed into 24,345 + 8,115. This is not the 28x28 file of Burda et al. (arXiv:1509.00519):
    compare methods on it side by side, not with published nats.

    Raises ValueError for an unknown name, :class:`DatasetError` for a missing, damaged or wrong
    file, and ImportError where the ``data`` extra is needed.

    >>> load("digits")
    Dataset('digits', train=[1437, 64], test=[360, 64], shape=(8, 8))
    """
    if name == "digits":
        return _load_digits()
    if name not in _FILES:
        raise ValueError(f"load got {name!r}; give one of {', '.join(['digits', *_FILES])}")
    folder = _find_folder(name, root, download)
    images, labels, test_images, test_labels = (folder / file for file in _FILES[name])
    train, test = _read_split(images, labels), _read_split(test_images, test_labels)
    return Dataset(name, train[0], test[0], train[1], test[1], _SHAPE)


def dynamic_binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw binary images anew from Bernoulli(``x``), of the same shape and dtype.

    Without a ``generator`` this consumes torch's global one, so that a run that restores the
    global state resumes bit for bit. Raises ValueError for intensities outside [0, 1] or NaN where
    ``x`` is on the CPU; elsewhere reading the answer back would stall every training step, so the
    check is left to ``torch.bernoulli``, which on CUDA stops with a device-side assertion.

    >>> dynamic_binarize(torch.tensor([0.0, 1.0]))
    tensor([0., 1.])
    """
    _require_float(x)
    if x.device.type == "cpu":
        _require_intensities(x)
    return torch.bernoulli(x, generator=generator)


def fixed_binarize(x: Tensor, seed: int = 0) -> Tensor:
    """Draw binary images from Bernoulli(``x``), the same for the same ``seed`` on any device.

    Keeps shape and dtype and leaves the global generator alone. Raises ValueError for intensities
    outside [0, 1] or NaN.

    >>> x = torch.full((2, 3), 0.5)
    >>> bool((fixed_binarize(x, seed=1) == fixed_binarize(x, seed=1)).all())
    True
    """
    _require_float(x)
    _require_intensities(x)
    # Uniforms from the CPU, because each kind of device has a random stream of its own.
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (uniform.to(x.device) < x).to(x.dtype)


def _require_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"intensities must be floating point, got {x.dtype}; divide the grey values by white"
        )


def _require_intensities(x: Tensor) -> None:
    # Written so that NaN fails, and so that no rows at all pass.
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(
            f"intensities must lie in [0, 1], got values from {x.min().item():g} to "
            f"{x.max().item():g}; scale them first"
        )


def _load_digits() -> Dataset:
    datasets = _import_extra("sklearn.datasets", "the digits come with scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = _as_tensors(images, labels, white=16)
    train, test = _split(len(images), test_size=360)
    return Dataset("digits", images[train], images[test], labels[train], labels[test], (8, 8))


def _split(count: int, test_size: int) -> tuple[_Array, _Array]:
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    return order[test_size:], order[:test_size]


def _as_tensors(images: _Array, labels: _Array, white: int) -> tuple[Tensor, Tensor]:
    intensities = torch.from_numpy(images.astype(np.float32)).div_(white).flatten(1)
    return intensities, torch.from_numpy(labels.astype(np.int64))


def _read_split(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = _read_idx(images_path, dims=3), _read_idx(labels_path, dims=1)
    if images.shape[1:] != _SHAPE:
        raise DatasetError(
            f"{images_path}: images of {images.shape[1:]} pixels, not {_SHAPE}; fetch the original"
        )
    if len(images) != len(labels):
        raise DatasetError(
            f"{images_path}: {len(images)} images, but {len(labels)} labels in "
            f"{labels_path.name}; take both files from one source"
        )
    return _as_tensors(images, labels, white=255)


def _read_idx(path: Path, dims: int) -> _Array:
    """Read an array of ``dims`` dimensions from a gzipped IDX file."""
    data, start = _read_content(path), 4 + 4 * dims
    header, body = data[:start], data[start:]
    dtypes = {magic: dtype for magic, dtype in _IDX_TYPES.items() if magic.endswith(str(dims))}
    if header[:4].hex() not in dtypes or len(header) < start:
        raise DatasetError(
            f"{path}: its header is '{header.hex()}', but here an IDX file has {start} bytes that "
            f"begin with the magic number {' or '.join(dtypes)}; check what the file is"
        )
    shape, dtype = np.frombuffer(header[4:], ">u4").tolist(), np.dtype(dtypes[header[:4].hex()])
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise DatasetError(
            f"{path}: its header promises {math.prod(shape) * dtype.itemsize} bytes for shape "
            f"{shape}, but {len(body)} follow; fetch the file again"
        )
    return np.frombuffer(body, dtype).reshape(shape)


def _read_content(path: Path) -> bytes:
    """Return the uncompressed bytes of a file whose checksums, where known, hold."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file; set {_VARIABLE} (or `root`) to a folder that holds {name}, "
            f"or call load({path.parent.name!r}, download=True)"
        )
    packed = path.read_bytes()
    _check(path, "SHA-256", hashlib.sha256(packed).hexdigest(), _listed_sha256(path, name))
    try:
        content = gzip.decompress(packed)
    except EOFError as error:
        raise DatasetError(f"{path}: the gzip file is truncated; fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DatasetError(f"{path}: not a sound gzip file ({error}); fetch it again") from error
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    _check(path, "MD5 of the uncompressed bytes", digest, _CONTENT_MD5.get(name))
    return content


def _check(path: Path, kind: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise DatasetError(
            f"{path}: the {kind} is {found}, not {expected}; fetch the original file again"
        )


def _listed_sha256(path: Path, name: str) -> str | None:
    """Look the file up in the ``SHA256SUMS`` of its root, where there is one."""
    sums = path.parent.parent / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.is_file() else []
    # A star marks binary mode in the output of sha256sum.
    pairs = (line.split(maxsplit=1) for line in lines)
    listed = {pair[1].lstrip("*").removeprefix("./"): pair[0] for pair in pairs if len(pair) == 2}
    return listed.get(name)


def _find_folder(name: str, root: str | os.PathLike[str] | None, download: bool) -> Path:
    """Return where the files of ``name`` are; that they are there is for the reader to check."""
    given = root if root is not None else os.environ.get(_VARIABLE)
    if given:
        folder = Path(given).expanduser() / name
        if not download or _holds_all(folder, name):
            return folder
    pooch = _import_extra("pooch", f"without `root` and {_VARIABLE}, {name} is kept by pooch")
    folder = Path(pooch.os_cache("pyro_recursive")) / name
    if download:
        _download(pooch, name, folder)
    return folder


def _holds_all(folder: Path, name: str) -> bool:
    return all((folder / file).is_file() for file in _FILES[name])


def _download(pooch: Any, name: str, folder: Path) -> None:
    """Fill ``folder`` with the IDX files of ``name``."""
    for file, md5 in _DOWNLOAD_MD5[name].items():
        url = f"{_URLS[name]}/{file}"
        try:
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=folder)
        except (OSError, ValueError) as error:  # the network, and the checksum
            raise DatasetError(
                f"{folder / file}: the download from {url} failed ({error}); try again, or set "
                f"{_VARIABLE} to a folder that holds {name}/"
            ) from error
    if name == "omniglot" and not _holds_all(folder, name):
        _convert_omniglot(folder)


def _convert_omniglot(folder: Path) -> None:
    """Write the four IDX files of Omniglot from the two archives of drawings."""
    drawings = [pair for file in _DOWNLOAD_MD5["omniglot"] for pair in _drawings(folder / file)]
    images = np.stack([image for _, image in drawings])
    _, labels = np.unique([character for character, _ in drawings], return_inverse=True)
    labels = labels.astype(">i4")
    train, test = _split(len(images), test_size=len(images) // 4)
    arrays: tuple[_Array, ...] = images[train], labels[train], images[test], labels[test]
    for file, array in zip(_FILES["omniglot"], arrays, strict=True):
        _write_idx(folder / file, array)


def _drawings(archive: Path) -> Iterator[tuple[str, _Array]]:
    """Yield each drawing's character and its image, 28 x 28 with ink 255, in order of name."""
    pil = _import_extra("PIL.Image", "the drawings of Omniglot are PNG files")
    with zipfile.ZipFile(archive) as file:
        # Only the folder named like the archive: others may hold what an archiver left.
        names = [name for name in file.namelist() if name.startswith(f"{archive.stem}/")]
        for name in sorted(name for name in names if name.endswith(".png")):
            drawing = pil.open(BytesIO(file.read(name))).convert("L")
            paper = np.asarray(drawing.resize(_SHAPE, pil.Resampling.BOX))
            yield name.rpartition("/")[0], 255 - paper


def _write_idx(path: Path, array: _Array) -> None:
    magic = next(m for m, t in _IDX_TYPES.items() if array.dtype == t and m[-1] == str(array.ndim))
    header = bytes.fromhex(magic) + np.array(array.shape, ">u4").tobytes()
    # Renamed when whole, so that a stopped conversion leaves no half file behind.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
    part.replace(path)


def _import_extra(module: str, reason: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{reason}: run pip install 'pyro_recursive[data]'") from error
