"""Files of tables, and names for them that tell what they are made of."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from pyro_recursive.tracing.tensor_files import read_whole, write_whole

__all__ = ["TableError", "digest", "read", "write"]

FORMAT = 1  # raised whenever older files could no longer be read, or would hold other neighbours


class TableError(RuntimeError):
    """A file of a table is damaged, or is none."""


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to a file, which holds the old or the new ones whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may fill one cache
    write_whole(path, {"format": torch.tensor(FORMAT), **tensors}, part)


def read(path: Path) -> dict[str, Tensor]:
    """Read what `write` wrote, on the CPU; raise TableError for anything else."""
    remedy = "Delete it, and compute it again."
    tensors = read_whole(path, TableError, f"'{path}' cannot be read as a table: {{}}. {remedy}")
    found = tensors.pop("format", None) if isinstance(tensors, dict) else None
    if not isinstance(found, Tensor) or int(found) != FORMAT:
        raise TableError(f"'{path}' is no table of format {FORMAT} (found {found}). {remedy}")
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
