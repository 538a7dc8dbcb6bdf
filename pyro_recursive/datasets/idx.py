"""Gzipped IDX files: arrays with a header of their sizes, checked before they are believed."""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["VARIABLE", "Array", "DatasetError", "read_idx", "write_idx"]

VARIABLE = "PYRO_RECURSIVE_DATA"  # names the folder that holds the files
Array = npt.NDArray[Any]
# By magic number, whose last digit counts the dimensions.
_IDX_TYPES = {"00000803": "u1", "00000801": "u1", "00000c01": ">i4"}
# Of the uncompressed bytes: the gzip wrapper differs from mirror to mirror.
_CONTENT_MD5 = {
    "mnist/train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "mnist/t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
}


class DatasetError(RuntimeError):
    """A data file is missing, damaged or not the one expected; the message says what to do."""


def read_idx(path: Path, dims: int) -> Array:
    """Read an array of ``dims`` dimensions from a gzipped IDX file.

    Raises :class:`DatasetError` where the file, its checksum, header or size is not as it must be.
    """
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
            f"{path}: no such file; set {VARIABLE} (or `root`) to a folder that holds {name}, "
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


def write_idx(path: Path, array: Array) -> None:
    """Write an array of one of the known dtypes and dimensions as a gzipped IDX file."""
    magic = next(m for m, t in _IDX_TYPES.items() if array.dtype == t and m[-1] == str(array.ndim))
    header = bytes.fromhex(magic) + np.array(array.shape, ">u4").tobytes()
    # Renamed when whole, so that a stopped conversion leaves no half file behind.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
    part.replace(path)
