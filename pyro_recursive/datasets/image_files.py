"""Gzipped IDX files of images: where they are, how they are read, downloaded and checked.

Omniglot is downloaded as drawings, from which its IDX files are made once.
"""

import gzip
import importlib
import math
import os
import secrets
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
# Where each data set comes from: files, their address, and their SHA-256 sums in the same order, as
# published in `url_checksums` of github.com/tensorflow/datasets.
DOWNLOADS = {
    "mnist": (
        MNIST_FILES,
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": (
        MNIST_FILES,
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "omniglot": (
        OMNIGLOT_ARCHIVES,
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python",
        (
            "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
        ),
    ),
}
MAX_BYTES = 2**30  # of an uncompressed file


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
    for file, sha256 in zip(files, sums, strict=True):
        url = f"{address}/{file}"
        try:
            pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=file, path=folder)
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
    folder = path.parent.name
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file. Set {VARIABLE} or `root` to a folder with {folder}/{path.name},"
            f" or call load({folder!r}, download=True)."
        )
    try:
        with gzip.open(path) as file:
            shape, dtype = _read_header(path, file.read(4 + 4 * dims), dims)
            size = math.prod(shape) * dtype.itemsize
            if size > MAX_BYTES:
                raise DatasetError(f"{path}: its header promises {size} bytes, over {MAX_BYTES}.")
            body = file.read(size + 1)  # no more, however much a damaged file would unpack to
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DatasetError(f"{path}: not a sound gzip file ({error}). Fetch it again.") from error
    if len(body) != size:
        raise DatasetError(f"{path}: its header promises {size} bytes, but {len(body)} follow.")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_header(path: Path, header: bytes, dims: int) -> tuple[list[int], np.dtype[Any]]:
    """Return the shape and the type of the numbers that follow."""
    dtypes = {magic: dtype for magic, dtype in IDX_TYPES.items() if magic.endswith(str(dims))}
    if header[:4].hex() not in dtypes or len(header) < 4 + 4 * dims:
        magic = " or ".join(dtypes)
        raise DatasetError(f"{path}: its header is '{header.hex()}', and must begin with {magic}.")
    return np.frombuffer(header[4:], ">u4").tolist(), np.dtype(dtypes[header[:4].hex()])


def _write_idx(path: Path, array: Array) -> None:
    magic = next(m for m, t in IDX_TYPES.items() if array.dtype == t and m[-1] == str(array.ndim))
    header = bytes.fromhex(magic) + np.array(array.shape, ">u4").tobytes()
    # Renamed at the end, so that a killed conversion leaves no truncated file; "x" follows no link.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with part.open("xb") as file:
        file.write(gzip.compress(header + array.tobytes(), mtime=0))
    part.replace(path)
