"""Files of tensors: written whole or not at all, and read without running what they hold."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, content: Mapping[str, Any], temporary: Path) -> None:
    """Write tensors and plain containers to a file, which holds the old or the new ones whole.

    They go to a ``temporary`` file in the same folder, which then takes the place of the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_whole(path: Path, error: type[Exception], message: str) -> Any:
    """Read what `write_whole` wrote, on the CPU.

    What a damaged file causes is raised as ``error``, in place of ``{}`` in the message.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare checksums when it reads
        if damaged is not None:
            raise ValueError(f"the checksum of its entry '{damaged}' is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as cause:
        raise error(message.replace("{}", str(cause))) from cause
