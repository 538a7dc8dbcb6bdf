"""Gzipped IDX files of images: where they are, how they are read, downloaded and checked.

Omniglot is downloaded as drawings, from which its IDX files are made once.
"""

import gzip
import importlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

VARIABLE = "PYRO_RECURSIVE_DATA"  # names the folder that holds the files
SHAPE = (28, 28)
SPLIT_SEED = 0
IDX_TYPES = {"00000803": "u1", "00000801": "u1", "00000c01": ">i4"}  # the last digit: dimensions
MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
FILES = {
    "mnist": MNIST_FILES,
    "fashion_mnist": MNIST_FILES,
    "omniglot": (
        "omniglot28-train-images-idx3-ubyte.gz",
        "omniglot28-train-labels-idx1-int32.gz",
        "omniglot28-test-images-idx3-ubyte.gz",
        "omniglot28-test-labels-idx1-int32.gz",
    ),
}
OMNIGLOT_ARCHIVES = ("images_background.zip", "images_evaluation.zip")
# Where each data set comes from: files, their address, and their MD5 sums in the same order.
DOWNLOADS = {
    "mnist": (
        MNIST_FILES,
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": (
        MNIST_FILES,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "omniglot": (
        OMNIGLOT_ARCHIVES,
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python",
        "68d2efa1b9178cc56df9314c21c6e718 6b91aef0f799c5bb55b94e3f2daec811",
    ),
}


class DatasetError(RuntimeError):
    """A data file is missing, damaged or not the one expected; the message has the remedy."""


def find_folder(name: str, root: str | os.PathLike[str] | None, download: bool) -> Path:
    """Return the folder of a data set's files; they are checked when they are read."""
    given = root if root is not None else os.environ.get(VARIABLE)
    if given:
        folder = Path(given).expanduser() / name
        if not download or _holds_all(folder, name):
            return folder
    pooch = import_extra("pooch", f"without `root` and {VARIABLE}, {name} is kept by pooch")
    folder = Path(pooch.os_cache("pyro_recursive")) / name
    if download:
        _download(pooch, name, folder)
    return folder


def _holds_all(folder: Path, name: str) -> bool:
    return all((folder / file).is_file() for file in FILES[name])


def _download(pooch: Any, name: str, folder: Path) -> None:
    files, address, sums = DOWNLOADS[name]
    for file, md5 in zip(files, sums.split(), strict=True):
        url = f"{address}/{file}"
        try:
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=folder)
        except (OSError, ValueError) as error:  # the network, and the checksum
            raise DatasetError(
                f"{folder / file}: the download from {url} failed ({error}). Try again, or set "
                f"{VARIABLE} to a folder that holds {name}/."
            ) from error
    if name == "omniglot" and not _holds_all(folder, name):
        _convert_omniglot(folder)


def _convert_omniglot(folder: Path) -> None:
    """Write the four IDX files of Omniglot from the two archives of drawings."""
    drawings = [pair for file in OMNIGLOT_ARCHIVES for pair in _drawings(folder / file)]
    images = np.stack([image for _, image in drawings])
    _, labels = np.unique([character for character, _ in drawings], return_inverse=True)
    labels = labels.astype(">i4")
    train, test = split(len(images), test_size=len(images) // 4)
    arrays: tuple[Array, ...] = images[train], labels[train], images[test], labels[test]
    for file, array in zip(FILES["omniglot"], arrays, strict=True):
        _write_idx(folder / file, array)


def _drawings(archive: Path) -> Iterator[tuple[str, Array]]:
    """Yield each drawing's character and its image, 28 x 28 with ink 255, in order of name."""
    pil = import_extra("PIL.Image", "the drawings of Omniglot are PNG files")
    with zipfile.ZipFile(archive) as file:
        # An archiver may have left other folders.
        names = [name for name in file.namelist() if name.startswith(f"{archive.stem}/")]
        for name in sorted(name for name in names if name.endswith(".png")):
            drawing = pil.open(BytesIO(file.read(name))).convert("L")
            paper = np.asarray(drawing.resize(SHAPE, pil.Resampling.BOX))
            yield name.rpartition("/")[0], 255 - paper


def split(count: int, test_size: int) -> tuple[Array, Array]:
    """Split the indices below ``count`` at random, the same each time: training rows, test rows."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    return order[test_size:], order[:test_size]


def import_extra(module: str, reason: str) -> Any:
    """Import a module of the ``data`` extra; ImportError has the reason and the remedy."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{reason}: run pip install 'pyro_recursive[data]'") from error


def read_idx(path: Path, dims: int) -> Array:
    """Read an array of ``dims`` dimensions from a gzipped IDX file."""
    data, start = _read_content(path), 4 + 4 * dims
    header, body = data[:start], data[start:]
    dtypes = {magic: dtype for magic, dtype in IDX_TYPES.items() if magic.endswith(str(dims))}
    if header[:4].hex() not in dtypes or len(header) < start:
        magic = " or ".join(dtypes)
        raise DatasetError(f"{path}: its header is '{header.hex()}', and must begin with {magic}.")
    shape, dtype = np.frombuffer(header[4:], ">u4").tolist(), np.dtype(dtypes[header[:4].hex()])
    size = math.prod(shape) * dtype.itemsize
    if len(body) != size:
        raise DatasetError(f"{path}: its header promises {size} bytes, but {len(body)} follow.")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_content(path: Path) -> bytes:
    """Return the uncompressed bytes of a file."""
    folder = path.parent.name
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file. Set {VARIABLE} or `root` to a folder with {folder}/{path.name},"
            f" or call load({folder!r}, download=True)."
        )
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DatasetError(f"{path}: not a sound gzip file ({error}). Fetch it again.") from error


def _write_idx(path: Path, array: Array) -> None:
    magic = next(m for m, t in IDX_TYPES.items() if array.dtype == t and m[-1] == str(array.ndim))
    header = bytes.fromhex(magic) + np.array(array.shape, ">u4").tobytes()
    # Renamed at the end, so that a killed conversion leaves no truncated file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
    part.replace(path)
