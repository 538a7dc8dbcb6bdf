"""Where the files of each data set are: a folder, or a cache that downloads fill.

Omniglot comes as drawings, from which its IDX files are made once.
"""

import importlib
import os
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pyro_recursive.datasets.idx import VARIABLE, Array, DatasetError, write_idx

__all__ = ["FILES", "SHAPE", "find_folder", "import_extra", "split"]

SHAPE = (28, 28)
_SPLIT_SEED = 0
_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
FILES = {
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


def find_folder(name: str, root: str | os.PathLike[str] | None, download: bool) -> Path:
    """Return where the files of ``name`` are; that they are there is for the reader to check."""
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
    """Fill ``folder`` with the IDX files of ``name``."""
    for file, md5 in _DOWNLOAD_MD5[name].items():
        url = f"{_URLS[name]}/{file}"
        try:
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=folder)
        except (OSError, ValueError) as error:  # the network, and the checksum
            raise DatasetError(
                f"{folder / file}: the download from {url} failed ({error}); try again, or set "
                f"{VARIABLE} to a folder that holds {name}/"
            ) from error
    if name == "omniglot" and not _holds_all(folder, name):
        _convert_omniglot(folder)


def _convert_omniglot(folder: Path) -> None:
    """Write the four IDX files of Omniglot from the two archives of drawings."""
    drawings = [pair for file in _DOWNLOAD_MD5["omniglot"] for pair in _drawings(folder / file)]
    images = np.stack([image for _, image in drawings])
    _, labels = np.unique([character for character, _ in drawings], return_inverse=True)
    labels = labels.astype(">i4")
    train, test = split(len(images), test_size=len(images) // 4)
    arrays: tuple[Array, ...] = images[train], labels[train], images[test], labels[test]
    for file, array in zip(FILES["omniglot"], arrays, strict=True):
        write_idx(folder / file, array)


def _drawings(archive: Path) -> Iterator[tuple[str, Array]]:
    """Yield each drawing's character and its image, 28 x 28 with ink 255, in order of name."""
    pil = import_extra("PIL.Image", "the drawings of Omniglot are PNG files")
    with zipfile.ZipFile(archive) as file:
        # Only the folder named like the archive: others may hold what an archiver left.
        names = [name for name in file.namelist() if name.startswith(f"{archive.stem}/")]
        for name in sorted(name for name in names if name.endswith(".png")):
            drawing = pil.open(BytesIO(file.read(name))).convert("L")
            paper = np.asarray(drawing.resize(SHAPE, pil.Resampling.BOX))
            yield name.rpartition("/")[0], 255 - paper


def split(count: int, test_size: int) -> tuple[Array, Array]:
    """Split the indices below ``count`` at random, the same each time: training rows, test rows."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    return order[test_size:], order[:test_size]


def import_extra(module: str, reason: str) -> Any:
    """Import a module of the ``data`` extra; raise ImportError with the reason and the remedy."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{reason}: run pip install 'pyro_recursive[data]'") from error
