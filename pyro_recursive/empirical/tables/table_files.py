"""Files of tensors: written whole or not at all, and read without running what they hold."""

import hashlib
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["TableError", "digest", "read", "write"]

FORMAT = 1  # raised whenever older files could no longer be read, or would hold other neighbours


class TableError(RuntimeError):
    """A file of a table is damaged, or is none."""


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to a file, which holds the old or the new ones whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may fill one cache
    try:
        with part.open("wb") as file:
            torch.save({"format": torch.tensor(FORMAT), **tensors}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Tensor]:
    """Read what `write` wrote, on the CPU; raise TableError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare checksums when it reads
        if damaged is not None:
            raise TableError(f"the checksum of its entry '{damaged}' is wrong")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file may cause
        raise TableError(
            f"'{path}' cannot be read as a table: {error}. Delete it, and compute it again."
        ) from error
    found = tensors.pop("format", None) if isinstance(tensors, dict) else None
    if not isinstance(found, Tensor) or int(found) != FORMAT:
        raise TableError(
            f"'{path}' is no table of format {FORMAT} (found {found}). Delete it, and compute it "
            "again."
        )
    return tensors


def digest(*parts: Tensor | str | None) -> str:
    """Return the SHA-256 of tensors, with dtypes and shapes, and of words."""
    found = hashlib.sha256(f"format {FORMAT}".encode())
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"|{part.dtype}{list(part.shape)}".encode())
            numbers = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            found.update(numbers.numpy().data)
        else:
            found.update(f"|{part}".encode())
    return found.hexdigest()
