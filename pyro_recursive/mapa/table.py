"""Tables q(i | n): for each datum the few components that are likely to explain it."""

import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel import Kernel, LogKernel
from pyro_recursive.mapa.nearest import BUDGET, Finder, backend_for
from pyro_recursive.mapa.products import best_of_all
from pyro_recursive.mapa.selection import ordered
from pyro_recursive.mapa.table_checks import (
    check_index,
    check_numbers,
    check_rows,
    check_weights,
    normalised,
    own_components,
)
from pyro_recursive.mapa.table_files import TableError, digest, read, write

__all__ = ["Rows", "Table", "TableError", "neighbours"]

_NEIGHBOURS = 64


class Rows(NamedTuple):
    """Some rows of a table: component indices ``[B, k]`` and their log q in nats ``[B, k]``."""

    index: Tensor  # type: ignore[assignment]
    log_q: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """The proposal q(i | n) of N data over M components, kept for k of them in each row.

    `neighbours` makes it from data and a kernel; `Table.uniform`, `Table.from_log_weights` and
    `Table.from_neighbours` from what they say. Components that a row does not keep have q = 0.

    Arguments:
        index: component indices, int64 ``[N, k]``, all different within a row.
        log_q: ``[N, k]`` in nats: descending, and normalised over a row. Rows may end in -inf.
        num_components: M.
        kernel, reference: what `for_data` needs, the reference ``[M, *x]``.
        backend: how `for_data` searches; see `pyro_recursive.mapa.nearest.nearest`.

    Raises ValueError for numbers that are not such a table.

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
        """Check that the tensors are a table."""
        check_index(self.index, self.num_components)
        check_rows(self.index, self.log_q)
        if self.reference is not None and len(self.reference) != self.num_components:
            raise ValueError(
                f"the reference has {len(self.reference)} rows, one for each component, and there "
                f"are {self.num_components} components"
            )

    @classmethod
    def uniform(cls, num_rows: int, num_components: int) -> "Table":
        """Return the table in which all components are equally likely; k = M.

        A row's own component is first where N = M, then they are in order. Its tensors are made
        when they are asked for: ``index`` and ``log_q`` hold N M numbers, `rows` B M.

        >>> Table.uniform(3, 3).index
        tensor([[0, 1, 2],
                [1, 0, 2],
                [2, 0, 1]])
        """
        if num_rows < 1 or num_components < 1:
            raise ValueError(
                f"a table needs rows and components, got {num_rows} and {num_components}"
            )
        return _Uniform(num_rows, num_components)

    @classmethod
    def from_log_weights(cls, log_weights: Tensor, k: int | None = None) -> "Table":
        """Return the table of the k largest of dense log-weights ``[N, M]``, normalised.

        Of equal weights a row's own is first where N = M, then the lower index. The default k = M
        keeps all. Raises ValueError for nan, +inf, and rows that are -inf all over.

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
        check_weights(weights)
        index, scores = best_of_all(weights, own_components(number, components, weights.device), k)
        return cls(index, normalised(scores, log_weights.dtype), components)

    @classmethod
    def from_neighbours(cls, index: Tensor, log_kernel: Tensor, num_components: int) -> "Table":
        """Return the table of given neighbours ``[N, k]`` with their log k, in any order.

        Say those of a library for nearest neighbours, with minus half the squared distances in
        units of a bandwidth. Raises ValueError for indices that are out of range or twice in a
        row, for nan, +inf, and rows that are -inf all over.

        >>> table = Table.from_neighbours(torch.tensor([[4, 2]]), torch.tensor([[-3.0, -1.0]]), 9)
        >>> table.index, table.log_q
        (tensor([[2, 4]]), tensor([[-0.1269, -2.1269]]))
        """
        check_index(index, num_components)
        if log_kernel.shape != index.shape:
            raise ValueError(
                f"index and log_kernel must be of one shape [N, k], got {list(index.shape)} and "
                f"{list(log_kernel.shape)}"
            )
        weights = log_kernel.detach().double()
        check_weights(weights)
        own = own_components(len(index), num_components, index.device)
        index, scores = ordered(weights, index, own, index.shape[1])
        dtype = log_kernel.dtype if log_kernel.is_floating_point() else torch.get_default_dtype()
        return cls(index, normalised(scores, dtype), num_components)

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self.index)

    @property
    def width(self) -> int:
        """The number k of components in a row."""
        return self.index.shape[1]

    def rows(self, index: Tensor) -> Rows:
        """Return the rows with given numbers ``[B]``; raise IndexError where there are none."""
        check_numbers(index, len(self))
        index = index.to(self.index.device)
        return Rows(self.index[index], self.log_q[index])

    def for_data(self, x: Tensor) -> Rows:
        """Return rows for data ``[B, *x]`` of any kind of origin, by the table's kernel.

        Cost: that of B rows of the table; the first call prepares the reference for searches.

        Raises ValueError where the table has no kernel.
        """
        found = self._finder(x, self.width, progress=False)
        rows = Rows(found.index, normalised(found.log_k, self.log_q.dtype))
        return Rows(rows.index.to(self.index.device), rows.log_q.to(self.index.device))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Table":
        """Return the table on a device, reference included; ``dtype`` is that of log q."""
        reference = None if self.reference is None else self.reference.to(device)
        log_q = normalised(self.log_q.to(device).double(), dtype or self.log_q.dtype)
        return replace(self, index=self.index.to(device), log_q=log_q, reference=reference)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file, in one piece; kernel and reference are not in it."""
        components = torch.tensor(self.num_components)
        write(Path(path), {"index": self.index, "log_q": self.log_q, "components": components})

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
        found = read(Path(path))
        try:
            if "index" not in found:
                return Table.uniform(int(found["rows"]), int(found["components"]))
            return Table(found["index"], found["log_q"], int(found["components"]))
        except (KeyError, ValueError) as error:
            raise TableError(
                f"'{path}' does not hold a table: {error}. Delete it, and compute it again."
            ) from error

    @cached_property
    def _finder(self) -> Finder:
        if self.kernel is None or self.reference is None:
            raise ValueError(
                "this table has no kernel and reference, so that new data have no rows: build it "
                "by neighbours(data, kernel), or give it both by dataclasses.replace(table, "
                "kernel=..., reference=...)"
            )
        return Finder(self.kernel, self.reference, self.backend)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is prepared anew when needed, and may not be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_finder"}

    def __repr__(self) -> str:
        """Show the sizes instead of the numbers."""
        kernel = "" if self.kernel is None else f", kernel={self.kernel!r}"
        sizes = f"rows={len(self)}, width={self.width}, components={self.num_components}"
        return f"Table({sizes}{kernel})"


class _Uniform(Table):
    """The table with all components in each row, none of which is held in memory."""

    def __init__(
        self,
        num_rows: int,
        num_components: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one = torch.zeros((), device=device, dtype=dtype or torch.get_default_dtype())
        # The fields are frozen; `index` and `log_q` are properties here.
        self.__dict__.update(num_rows=num_rows, num_components=num_components, one=one)

    @property
    def index(self) -> Tensor:
        return self.rows(torch.arange(len(self))).index

    @property
    def log_q(self) -> Tensor:
        return self._log_q(len(self))

    @property
    def width(self) -> int:
        return self.num_components

    def __len__(self) -> int:
        return int(self.__dict__["num_rows"])

    def rows(self, index: Tensor) -> Rows:
        check_numbers(index, len(self))
        order = torch.arange(self.num_components, device=self._one.device)
        if len(self) != self.num_components:
            return Rows(order.expand(len(index), -1), self._log_q(len(index)))
        own = index.to(order.device)[:, None]
        order = torch.where(order <= own, order - 1, order)  # all but the own, one place later
        return Rows(torch.where(order < 0, own, order), self._log_q(len(index)))

    def for_data(self, x: Tensor) -> Rows:
        order = torch.arange(self.num_components, device=self._one.device)
        return Rows(order.expand(len(x), -1), self._log_q(len(x)))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Table:
        one = self._one.to(device=device, dtype=dtype)
        return _Uniform(len(self), self.num_components, one.device, one.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        sizes = {"rows": len(self), "components": self.num_components}
        write(Path(path), {name: torch.tensor(size) for name, size in sizes.items()})

    @property
    def _one(self) -> Tensor:
        found: Tensor = self.__dict__["one"]
        return found

    def _log_q(self, rows: int) -> Tensor:
        return (self._one - math.log(self.num_components)).expand(rows, self.num_components)


def neighbours(
    data: Tensor,
    kernel: LogKernel,
    k: int = _NEIGHBOURS,
    *,
    reference: Tensor | None = None,
    backend: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    cache_key: str | None = None,
    budget: int = BUDGET,
    progress: bool = True,
) -> Table:
    """Return the table of each datum's k nearest under a kernel: q(i | n) in proportion to it.

    ``q(i | n) = k(x_n, x_i) / sum_j k(x_n, x_j)`` over the k largest; the components are the data
    themselves, or the rows of ``reference``: prototypes, say. Log q have the data's dtype where it
    is floating-point, and PyTorch's default otherwise. Ties go to a row's own component, then to
    the lower index, so that duplicates in the data are of no harm.

    Arguments:
        data: ``[N, *x]``.
        kernel: one of `pyro_recursive.mapa.kernels`, or any function
            ``(query [Q, *x], reference [R, *x]) -> [Q, R]`` of log weights in nats.
        k: how many components a row keeps; all, where there are fewer.
        reference: ``[M, *x]``.
        backend, budget, progress: see `pyro_recursive.mapa.nearest.nearest`.
        cache: a folder. The file in it is named by a SHA-256 of the data, the kernel and the other
            arguments; one that is damaged gives a warning, and is made anew.
        cache_key: names a kernel whose ``repr`` does not: a function. Change it with the function.

    Raises ValueError for data that do not suit the kernel, for a cache without a name of the
    kernel, and as `nearest` does.

    >>> from pyro_recursive.mapa.kernels import Gaussian
    >>> table = neighbours(torch.tensor([[0.0], [1.0], [5.0]]), Gaussian(1.0), k=2)
    >>> table
    Table(rows=3, width=2, components=3, kernel=Gaussian(scale=1.0))
    >>> table.for_data(torch.tensor([[4.0]])).index
    tensor([[2, 1]])
    """
    targets = data if reference is None else reference
    k = min(k, len(targets))
    backend = backend_for(kernel, targets, backend)
    path = None
    if cache is not None:
        options = (_key(kernel, cache_key), str(k), backend)
        path = Path(cache) / f"neighbours-{digest(data, reference, *options)}.pt"
    table = _cached(path, (len(data), k)) if path is not None else None
    if table is None:
        finder = Finder(kernel, targets, backend, budget)
        found = finder(data, k, own=reference is None, progress=progress)
        dtype = data.dtype if data.is_floating_point() else torch.get_default_dtype()
        table = Table(found.index, normalised(found.log_k, dtype), len(targets))
        if path is not None:
            table.save(path)
    return replace(
        table.to(targets.device), kernel=kernel, reference=targets.detach(), backend=backend
    )


def _key(kernel: LogKernel, given: str | None) -> str:
    """Return what names a kernel in a cache; without one, wrong neighbours could be loaded."""
    key = kernel.cache_key if given is None and isinstance(kernel, Kernel) else given
    if key is None or " at 0x" in key:  # the address of an object without a repr of its own
        raise ValueError(
            f"a cache needs a name for the kernel {kernel!r}, which does not tell its own: give "
            "cache_key=, and change it whenever the kernel changes"
        )
    return key


def _cached(path: Path, shape: tuple[int, int]) -> Table | None:
    """Return the table of a file; None, with a warning where it is damaged, if there is none."""
    if not path.exists():
        return None
    try:
        table = Table.load(path)
    except TableError as error:
        warnings.warn(f"The cache is made anew: {error}", stacklevel=3)
        return None
    if table.index.shape == shape:
        return table
    warnings.warn(f"The cache '{path}' is made anew: its table has another shape", stacklevel=3)
    return None
