"""Tables q(i | n): for each datum the few components that are likely to explain it."""

import hashlib
import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel_base import Kernel, LogKernel
from pyro_recursive.mapa.nearest import (
    BUDGET,
    Finder,
    backend_for,
    best_of_all,
    best_of_some,
)
from pyro_recursive.tracing.tensor_files import read_whole, write_whole

FORMAT = 1  # of files; raised when older ones can no longer be read, or would hold other neighbours


class TableError(RuntimeError):
    """A file of a table is damaged, or is none."""


class Rows(NamedTuple):
    """Some rows of a table: component indices ``[B, k]`` and their log q in nats ``[B, k]``."""

    index: Tensor  # type: ignore[assignment]
    log_q: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """The proposal q(i | n) of N data over M components, kept for k of them in each row.

    Made by `neighbours`, `Table.uniform`, `Table.from_log_weights` or `Table.from_neighbours`.
    Components that a row does not keep have q = 0.

    Args:
        index: component indices, int64 ``[N, k]``, all different within a row.
        log_q: ``[N, k]`` in nats: descending, and normalised over a row. Rows may end in -inf.
        num_components: M.
        kernel, reference: for `for_data`; the reference is ``[M, *x]``.
        backend: the search of `for_data`; see `pyro_recursive.mapa.nearest.nearest`.

    Raises:
        ValueError: indices or log q are not as above.

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby et al., arXiv 2403.08941).

    >>> table = Table.from_log_weights(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.2, 0.8]]).log())
    >>> table
    Table(rows=2, width=3, components=3)
    >>> rows = table.rows(torch.tensor([1]))
    >>> rows.index, rows.log_q.exp()
    (tensor([[2, 1, 0]]), tensor([[0.8000, 0.2000, 0.0000]]))
    """

    index: Tensor
    log_q: Tensor
    num_components: int
    kernel: LogKernel | None = None
    reference: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check indices, log q and the reference."""
        _check_index(self.index, self.num_components)
        _check_log_q(self.index, self.log_q)
        if self.reference is not None and len(self.reference) != self.num_components:
            raise ValueError(
                f"the reference has {len(self.reference)} rows for {self.num_components} components"
            )

    @classmethod
    def uniform(cls, num_rows: int, num_components: int) -> "Table":
        """Return the table in which all components are equally likely; k = M.

        A row's own component is first where N = M, then all are in order. Tensors are computed on
        access: ``index`` and ``log_q`` hold N M numbers, `rows` B M.

        >>> Table.uniform(3, 3).index
        tensor([[0, 1, 2],
                [1, 0, 2],
                [2, 0, 1]])
        """
        if num_rows < 1 or num_components < 1:
            raise ValueError(
                f"rows and components must be positive, got {num_rows} and {num_components}"
            )
        return _Uniform(num_rows, num_components)

    @classmethod
    def from_log_weights(cls, log_weights: Tensor, k: int | None = None) -> "Table":
        """Return the table of the k largest of dense log-weights ``[N, M]``, normalised.

        Ties go to a row's own component where N = M, then to the lower index. The default k = M
        keeps all. Raises ValueError for nan, +inf, and rows of -inf.

        >>> Table.from_log_weights(torch.zeros(2, 5), k=3).index
        tensor([[0, 1, 2],
                [0, 1, 2]])
        """
        if log_weights.dim() != 2 or not log_weights.numel():
            raise ValueError(f"log_weights must be [N, M], got {list(log_weights.shape)}")
        number, components = log_weights.shape
        k = components if k is None else k
        if not 1 <= k <= components:
            raise ValueError(f"k must be from 1 to the {components} components, got {k}")
        weights = log_weights.detach().double()
        _check_weights(weights)
        own = _own(number, components, weights.device)
        index, scores = best_of_all(weights, own, k)
        return cls(index, _normalised(scores, log_weights.dtype), components)

    @classmethod
    def from_neighbours(cls, index: Tensor, log_kernel: Tensor, num_components: int) -> "Table":
        """Return the table of given neighbours ``[N, k]`` with their log k, in any order.

        For example those of a library of nearest neighbours, with minus half the squared
        distances in units of a bandwidth. Raises ValueError for indices that are out of range or
        twice in a row, for nan, +inf, and rows of -inf.

        >>> table = Table.from_neighbours(torch.tensor([[4, 2]]), torch.tensor([[-3.0, -1.0]]), 9)
        >>> table.index, table.log_q
        (tensor([[2, 4]]), tensor([[-0.1269, -2.1269]]))
        """
        _check_index(index, num_components)
        if log_kernel.shape != index.shape:
            raise ValueError(
                f"index and log_kernel must be of one shape [N, k], got {list(index.shape)} and "
                f"{list(log_kernel.shape)}"
            )
        weights = log_kernel.detach().double()
        _check_weights(weights)
        own = (
            torch.arange(len(index), device=index.device) if len(index) == num_components else None
        )
        index, scores = best_of_some(weights, index, own, index.shape[1])
        return cls(index, _normalised(scores, _float_dtype(log_kernel)), num_components)

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self.index)

    @property
    def width(self) -> int:
        """The number k of components in a row."""
        return self.index.shape[1]

    def rows(self, index: Tensor) -> Rows:
        """Return the rows with given numbers ``[B]``; raise IndexError where there are none."""
        _check_rows(index, len(self))
        index = index.to(self.index.device)
        return Rows(self.index[index], self.log_q[index])

    def for_data(self, x: Tensor) -> Rows:
        """Return rows for any data ``[B, *x]``, by the table's kernel.

        The first call prepares the search. Raises ValueError where the table has no kernel.
        """
        index, log_k = self._finder(x, self.width, progress=False)
        log_q = _normalised(log_k, self.log_q.dtype)
        return Rows(index.to(self.index.device), log_q.to(self.index.device))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Table":
        """Return the table on a device, reference included; ``dtype`` is that of log q."""
        reference = None if self.reference is None else self.reference.to(device)
        log_q = _normalised(self.log_q.to(device).double(), dtype or self.log_q.dtype)
        return replace(self, index=self.index.to(device), log_q=log_q, reference=reference)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file, whole or not at all; kernel and reference are not in it."""
        sizes = {"components": torch.tensor(self.num_components)}
        _write(path, {"index": self.index, "log_q": self.log_q, **sizes})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Table":
        """Read a table that `save` wrote, on the CPU.

        Raises FileNotFoundError, and `TableError` for a damaged file or one that is no table.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.pt"
        >>> Table.uniform(10, 5).save(path)
        >>> Table.load(path)
        Table(rows=10, width=5, components=5)
        """
        remedy = "Delete it, and compute it again."
        message = f"'{path}' cannot be read as a table: {{}}. {remedy}"
        tensors = read_whole(Path(path), TableError, message)
        try:
            if int(tensors["format"]) != FORMAT:
                raise ValueError(f"its format is {int(tensors['format'])}, not {FORMAT}")
            if "index" not in tensors:
                return Table.uniform(int(tensors["rows"]), int(tensors["components"]))
            return Table(tensors["index"], tensors["log_q"], int(tensors["components"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(message.replace("{}", str(error))) from error

    @cached_property
    def _finder(self) -> Finder:
        if self.kernel is None or self.reference is None:
            raise ValueError(
                "this table has no kernel and reference for new data: use neighbours(data, kernel) "
                "or dataclasses.replace(table, kernel=..., reference=...)"
            )
        return Finder(self.kernel, self.reference, self.backend)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the search, which is prepared again on use."""
        return {name: value for name, value in self.__dict__.items() if name != "_finder"}

    def __repr__(self) -> str:
        """Show the sizes."""
        kernel = "" if self.kernel is None else f", kernel={self.kernel!r}"
        sizes = f"rows={len(self)}, width={self.width}, components={self.num_components}"
        return f"Table({sizes}{kernel})"


class _Uniform(Table):
    """The table with all components in each row, none of which is held in memory."""

    def __init__(self, num_rows: int, num_components: int, one: Tensor | None = None) -> None:
        one = torch.zeros(()) if one is None else one  # of the table's device and dtype
        # The fields are frozen; `index` and `log_q` are properties here.
        self.__dict__.update(num_rows=num_rows, num_components=num_components, one=one)

    @property
    def index(self) -> Tensor:
        return self.rows(torch.arange(len(self))).index

    @property
    def log_q(self) -> Tensor:
        return self.for_data(self._one.expand(len(self))).log_q

    @property
    def width(self) -> int:
        return self.num_components

    @property
    def _one(self) -> Tensor:
        one: Tensor = self.__dict__["one"]
        return one

    def __len__(self) -> int:
        return int(self.__dict__["num_rows"])

    def rows(self, index: Tensor) -> Rows:
        _check_rows(index, len(self))
        order, log_q = self.for_data(index)
        if len(self) != self.num_components:
            return Rows(order, log_q)
        own = index.to(order.device)[:, None]
        order = torch.where(order <= own, order - 1, order)  # all but the own, one place later
        return Rows(torch.where(order < 0, own, order), log_q)

    def for_data(self, x: Tensor) -> Rows:
        order = torch.arange(self.num_components, device=self._one.device)
        log_q = self._one - math.log(self.num_components)
        shape = (len(x), self.num_components)
        return Rows(order.expand(shape), log_q.expand(shape))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Table:
        one = self._one.to(device=device, dtype=dtype)
        return _Uniform(len(self), self.num_components, one)

    def save(self, path: str | os.PathLike[str]) -> None:
        sizes = {"rows": len(self), "components": self.num_components}
        _write(path, {name: torch.tensor(size) for name, size in sizes.items()})


def neighbours(
    data: Tensor,
    kernel: LogKernel,
    k: int = 64,
    *,
    reference: Tensor | None = None,
    backend: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    cache_key: str | None = None,
    budget: int = BUDGET,
    progress: bool = True,
) -> Table:
    """Return the table of each datum's k nearest under a kernel.

    ``q(i | n) = k(x_n, x_i) / sum_j k(x_n, x_j)`` over the k largest. The components are the data
    themselves, or the rows of ``reference``, such as prototypes. Log q have the data's dtype where
    it is floating-point, and PyTorch's default otherwise. Ties go to a row's own component, then to
    the lower index.

    Args:
        data: ``[N, *x]``.
        kernel: one of `pyro_recursive.mapa.kernels`, or any function
            ``(query [Q, *x], reference [R, *x]) -> [Q, R]`` of log-weights in nats.
        k: how many components a row keeps; all, where there are fewer.
        reference: ``[M, *x]``.
        backend, budget, progress: see `pyro_recursive.mapa.nearest.nearest`.
        cache: a folder. Its file is named by a SHA-256 of the data, the kernel and the other
            arguments; a damaged one gives a warning and is computed again.
        cache_key: a name for a kernel without a ``repr`` of its own, such as a function. Change it
            with the function.

    Raises:
        ValueError: the data do not suit the kernel; a cache has no name for the kernel; and as
            `nearest` does.

    >>> from pyro_recursive.mapa.kernels import Gaussian
    >>> table = neighbours(torch.tensor([[0.0], [1.0], [5.0]]), Gaussian(1.0), k=2)
    >>> table
    Table(rows=3, width=2, components=3, kernel=Gaussian(scale=1.0))
    >>> table.for_data(torch.tensor([[4.0]])).index
    tensor([[2, 1]])
    """
    targets = data if reference is None else reference
    k, backend = min(k, len(targets)), backend_for(kernel, targets, backend)
    path = table = None
    if cache is not None:
        name = _digest(data, reference, _cache_key(kernel, cache_key), str(k), backend)
        path = Path(cache) / f"neighbours-{name}.pt"
        table = _cached(path, (len(data), k))
    if table is None:
        finder = Finder(kernel, targets, backend, budget)
        index, log_k = finder(data, k, own=reference is None, progress=progress)
        table = Table(index, _normalised(log_k, _float_dtype(data)), len(targets))
        if path is not None:
            table.save(path)
    return replace(
        table.to(targets.device), kernel=kernel, reference=targets.detach(), backend=backend
    )


def _cache_key(kernel: LogKernel, given: str | None) -> str:
    """Return the kernel's name in a cache; without one, wrong neighbours could be loaded."""
    key = kernel.cache_key if given is None and isinstance(kernel, Kernel) else given
    if key is None or " at 0x" in key:  # the address of an object without a repr of its own
        raise ValueError(
            f"a cache needs a name for the kernel {kernel!r}: give cache_key=, and change it with "
            "the kernel"
        )
    return key


def _cached(path: Path, shape: tuple[int, int]) -> Table | None:
    """Return the table of a file; None, with a warning where it is damaged, if there is none."""
    if not path.exists():
        return None
    try:
        table = Table.load(path)
    except TableError as error:
        warnings.warn(f"The cache is computed again: {error}", stacklevel=3)
        return None
    if table.index.shape == shape:
        return table
    warnings.warn(
        f"The cache '{path}' is computed again: its table has another shape", stacklevel=3
    )
    return None


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")  # two processes may fill one cache
    write_whole(target, {"format": torch.tensor(FORMAT), **tensors}, part)


def _digest(*parts: Tensor | str | None) -> str:
    """Return the SHA-256 of tensors, with dtypes and shapes, and of words."""
    sha = hashlib.sha256(f"format {FORMAT}".encode())
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"|{part.dtype}{list(part.shape)}".encode())
            numbers = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            sha.update(numbers.numpy().data)
        else:
            sha.update(f"|{part}".encode())
    return sha.hexdigest()


def _own(rows: int, components: int, device: torch.device) -> Tensor | None:
    """Return each row's own component ``[N]`` where there are as many; None otherwise."""
    return torch.arange(rows, device=device) if rows == components else None


def _float_dtype(data: Tensor) -> torch.dtype:
    return data.dtype if data.is_floating_point() else torch.get_default_dtype()


def _normalised(log_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of log-weights, float64 ``[N, k]``, normalised, in a dtype."""
    return (log_weights - log_weights.logsumexp(1, keepdim=True)).to(dtype)


def _check_index(index: Tensor, num_components: int) -> None:
    """Raise ValueError unless rows ``[N, k]`` are different components, from 0 to M - 1."""
    if index.dim() != 2 or not index.numel() or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [N, k], got {index.dtype} {list(index.shape)}")
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= num_components:
        raise ValueError(
            f"index goes from {low} to {high}, and there are {num_components} components"
        )
    ascending = index.sort(1).values
    twice = (ascending[:, 1:] == ascending[:, :-1]).any(1)
    if twice.any():
        raise ValueError(
            f"row {int(twice.nonzero()[0])} of index holds a component twice: add its weights "
            "up, by logsumexp"
        )


def _check_log_q(index: Tensor, log_q: Tensor) -> None:
    """Raise ValueError unless log q are of the index's shape, descending and normalised."""
    if log_q.shape != index.shape or not log_q.is_floating_point():
        raise ValueError(
            f"log_q must be floats of shape {list(index.shape)}, got {log_q.dtype} "
            f"{list(log_q.shape)}"
        )
    # "Not all are right", as comparisons with nan are false.
    if not (log_q[:, 1:] <= log_q[:, :-1]).all():
        raise ValueError("log_q must descend in each row; Table.from_neighbours sorts")
    tolerance = max(1e-6, 8 * index.shape[1] * torch.finfo(log_q.dtype).eps)
    if not (log_q.double().logsumexp(1).abs() <= tolerance).all():
        raise ValueError("log_q must be normalised in each row; Table.from_neighbours normalises")


def _check_weights(log_weights: Tensor) -> None:
    """Raise ValueError for rows of log-weights ``[N, k]`` that cannot be normalised."""
    best = log_weights.amax(1)  # nan where there is one
    wrong = ~best.isfinite()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row} of the log-weights has {float(best[row])} as its largest; it must be finite"
        )


def _check_rows(rows: Tensor, number: int) -> None:
    """Raise unless ``[B]`` are rows: negative indices would count from the end unnoticed."""
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"rows must be integers [B], got {rows.dtype} {list(rows.shape)}")
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < number):
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())}: the table has {number}")
