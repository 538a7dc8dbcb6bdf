"""Files of tensors: written whole or not at all, and read without running what they hold."""

import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain containers to a file, which holds the old or the new ones whole.

    They go to a file of a random name in the same folder, which then takes the place of the old
    one, or of the file that a symbolic link points to.

    Raises OSError, with the path, where the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"'{path}' is no regular file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may write here: the name is new ("x"), and cannot be a link that someone made.
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except (OSError, RuntimeError) as error:  # torch has messages of its own for a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        number = cause.errno if isinstance(cause, OSError) else errno.EIO
        raise OSError(number, f"cannot be written ({cause or error})", str(path)) from error
    finally:
        with suppress(OSError):
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
