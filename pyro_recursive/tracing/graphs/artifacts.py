"""Compiled graphs in files: nothing in a file is used unless it is signed with this user's key.

A file is a signature and what it signs: torch's artifact of a compiled graph, and the libraries
that the C++ compiler made for it. Tried with torch 2.13.
"""

import errno
import hashlib
import hmac
import os
import pickle
import secrets
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pyro_recursive.tracing.user_warnings import warn_user

MAGIC = b"pyro_recursive artifact 1\n"
DIGEST = "sha256"
SIZE = hashlib.new(DIGEST).digest_size  # bytes
Libraries = dict[str, bytes]  # of shared objects, by the digest of their source


class ArtifactFolder:
    """A folder of compiled graphs by their keys, hexadecimal digests.

    Files are signed with a secret of this user, see `secret_file`, which is not in the folder.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if self.folder.resolve() in secret_file().resolve().parents:
            raise ValueError(
                f"The folder of compiled graphs {self.folder} must not hold the key that signs "
                f"them, {secret_file()}. Choose another one."
            )

    def has(self, key: str) -> bool:
        """Whether there is a file of a compiled graph."""
        return self._path(key).exists()

    def load(self, key: str) -> tuple[Callable[..., Any], Libraries] | None:
        """Return a compiled graph, None if there is none; warns of a file that is not as signed."""
        path, start = self._path(key), len(MAGIC) + SIZE
        try:
            content = path.read_bytes()
            signature, body = content[len(MAGIC) : start], content[start:]
            if not content.startswith(MAGIC) or not hmac.compare_digest(
                signature, _sign(key, body)
            ):
                problem = "is not as this user has written it on this machine"
            else:
                return _loaded(body)
        except FileNotFoundError:
            return None
        except Exception as error:  # torch's, too
            problem = f"cannot be loaded ({type(error).__name__}: {error})"
        warn_user(f"The compiled graph {path} {problem}. It is compiled anew.")
        return None

    def save(self, key: str, compiled: Any, libraries: Callable[[], Libraries]) -> None:
        """Write a compiled graph, at once as a whole; warns if that fails."""
        path, temporary = self._path(key), None
        try:
            body = pickle.dumps((compiled.serialize(), libraries()))
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                temporary = Path(file.name)
                file.write(MAGIC + _sign(key, body) + body)
            temporary.replace(path)
        except Exception as error:
            warn_user(f"The compiled graph cannot be saved as {path}: {error}.")
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.graph"


def secret_file() -> Path:
    """Return where the secret of this user lies, by which files are signed."""
    variable, default = (
        ("APPDATA", "~/AppData/Roaming")
        if sys.platform == "win32"
        else ("XDG_CONFIG_HOME", "~/.config")
    )
    base = Path(os.environ.get(variable) or default).expanduser().absolute()
    return base / "pyro_recursive" / "artifacts.key"


def _secret() -> bytes:
    """Return the signing key; create the key file if it is missing or readable by others."""
    path = secret_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if sys.platform != "win32" and path.parent.stat().st_mode & 0o022:
        raise PermissionError(f"others can write to the folder of the signing key, {path.parent}")
    with suppress(FileNotFoundError):
        if (found := _read_private(path)) is not None:
            return found
        path.unlink()
        warn_user(f"The signing key {path} was readable by others or incomplete. It was renewed.")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # readable by this user alone
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SIZE))
        with suppress(FileExistsError):  # of another process, which was first
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    if (found := _read_private(path)) is None:
        raise PermissionError(f"others can read the signing key {path}")
    return found


def _read_private(path: Path) -> bytes | None:
    """Return the content of a key file; None if others can read it or it is no complete key."""
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        descriptor = os.open(path, os.O_RDONLY | sum(flags))
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symbolic link
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        is_private = stat.S_ISREG(status.st_mode) and status.st_size == SIZE
        if sys.platform != "win32":
            is_private &= status.st_uid == os.getuid() and not status.st_mode & 0o077
        return file.read() if is_private else None


def _sign(key: str, body: bytes) -> bytes:
    return hmac.digest(_secret(), key.encode() + body, DIGEST)


# Private interfaces of torch.


@contextmanager
def recorded_libraries() -> Iterator[Callable[[], Libraries]]:
    """Yield a function that returns the libraries which this thread loads in the block."""
    from torch._inductor.codecache import CppCodeCache

    original, found = CppCodeCache.__dict__["load_async"], dict[str, Callable[[], Any]]()
    thread = threading.get_ident()

    def load_async(cls: Any, main_code: str, *args: Any, **kwargs: Any) -> Any:
        library = original.__func__(cls, main_code, *args, **kwargs)
        if threading.get_ident() == thread:
            found[_digest(cls, main_code, kwargs)] = library
        return library

    CppCodeCache.load_async = classmethod(load_async)  # type: ignore[method-assign, assignment]
    try:
        yield lambda: {name: _file(each()).read_bytes() for name, each in found.items()}
    finally:
        CppCodeCache.load_async = original  # type: ignore[method-assign]


def _loaded(body: bytes) -> tuple[Callable[..., Any], Libraries]:
    """Return the compiled graph of a verified file; torch reads private copies of its parts."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    artifact, libraries = pickle.loads(body)
    original, folder = CppCodeCache.__dict__["load_async"], _private_folder()

    def load_async(cls: Any, main_code: str, *args: Any, **kwargs: Any) -> Any:
        name = _digest(cls, main_code, kwargs)
        if name not in libraries:  # that another thread compiles
            return original.__func__(cls, main_code, *args, **kwargs)
        path = folder / f"{name}.so"
        path.write_bytes(libraries[name])
        library = cls._load_library(str(path), name)
        return lambda: library

    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    CppCodeCache.load_async = classmethod(load_async)  # type: ignore[method-assign, assignment]
    os.environ[variable] = str(folder)
    try:
        return AOTCompiledArtifact.deserialize(artifact), libraries
    finally:
        CppCodeCache.load_async = original  # type: ignore[method-assign]
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def forget_instructions() -> None:
    """Let torch find out anew which of the processor's instructions the C++ compiler knows."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def _digest(cls: Any, main_code: str, options: dict[str, Any]) -> str:
    text = f"{cls.__name__}\n{options.get('optimized_code')}\n{main_code}"
    return hashlib.new(DIGEST, text.encode()).hexdigest()


def _file(library: Any) -> Path:
    return Path(getattr(library, "__file__", None) or library._name)


@cache
def _folder_of_process() -> tempfile.TemporaryDirectory:
    """Return a folder that this user alone can read; deleted at exit."""
    return tempfile.TemporaryDirectory(prefix="pyro_recursive_")


def _private_folder() -> Path:
    """Return a new folder that others cannot write to; code is read from it while it runs."""
    return Path(tempfile.mkdtemp(dir=_folder_of_process().name))
