"""Tables q(i | n): for each datum the few components that are likely to explain it."""

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.mapa.empirical_model import Plate
from pyro_recursive.mapa.kernel_base import Kernel, LogKernel
from pyro_recursive.mapa.kernels import same_numbers
from pyro_recursive.mapa.nearest import Search, best_of_all, in_order
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

    >>> table = Table.from_log_weights(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.2, 0.8]]).log())
    >>> rows = table.rows(torch.tensor([1]))
    >>> rows.index, rows.log_q.exp()
    (tensor([[2, 1, 0]]), tensor([[0.8000, 0.2000, 0.0000]]))
    """

    index: Tensor
    log_q: Tensor
    num_components: int
    kernel: LogKernel | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        """Check indices, log q and the reference: others would give wrong sums in silence."""
        index, log_q, number = self.index, self.log_q, self.num_components
        if index.dim() != 2 or index.shape != log_q.shape:
            raise ValueError("index and log_q must be of one shape [N, k].")
        ascending = index.sort(1).values
        is_inside = ascending[:, 0].min() >= 0 and ascending[:, -1].max() < number
        if not is_inside or (ascending[:, 1:] == ascending[:, :-1]).any():
            raise ValueError(f"index must hold different components below {number} in each row.")
        tolerance = max(1e-6, 8 * self.width * torch.finfo(log_q.dtype).eps)
        normalised = (log_q.double().logsumexp(1).abs() <= tolerance).all()
        if not normalised or not (log_q[:, 1:] <= log_q[:, :-1]).all():
            raise ValueError("log_q must be normalised and descending in each row.")
        if self.reference is not None and len(self.reference) != number:
            raise ValueError(f"The reference must have {number} rows, one a component.")

    @classmethod
    def uniform(cls, num_rows: int, num_components: int) -> "Table":
        """Return the table of equally likely components, a row's own one first where N = M."""
        return cls.from_log_weights(torch.zeros(1, num_components).expand(num_rows, -1))

    @classmethod
    def from_log_weights(cls, log_weights: Tensor, k: int | None = None) -> "Table":
        """Return the table of the k largest of dense log-weights ``[N, M]``, normalised.

        Ties go to a row's own component where N = M, then to the lower index. The default k = M
        keeps all.
        """
        weights, number = log_weights.detach().double(), log_weights.shape[1]
        index, scores = best_of_all(weights, _own(weights, number), number if k is None else k)
        return cls(index, _normalised(scores, log_weights.dtype), number)

    @classmethod
    def from_neighbours(cls, index: Tensor, log_kernel: Tensor, num_components: int) -> "Table":
        """Return the table of given neighbours ``[N, k]`` with their log k, in any order.

        For example those of a library of nearest neighbours, with minus half the squared
        distances in units of a bandwidth.

        >>> table = Table.from_neighbours(torch.tensor([[4, 2]]), torch.tensor([[-3.0, -1.0]]), 9)
        >>> table.index, table.log_q
        (tensor([[2, 4]]), tensor([[-0.1269, -2.1269]]))
        """
        if log_kernel.shape != index.shape:
            raise ValueError("index and log_kernel must be of one shape [N, k].")
        own = _own(index, num_components)
        index, scores = in_order(log_kernel.detach().double(), index, own)
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
        if index.numel() and index.min() < 0:  # it would count from the end in silence
            raise IndexError(f"Row {int(index.min())} is negative.")
        index = index.to(self.index.device)
        return Rows(self.index[index], self.log_q[index])

    def for_data(self, x: Tensor) -> Rows:
        """Return rows for any data ``[B, *x]``, by the table's kernel and reference."""
        index, log_k = self._search(x, self.width)
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
        numbers = {"format": FORMAT, "components": self.num_components}
        tensors = {name: torch.tensor(number) for name, number in numbers.items()}
        write_whole(Path(path), {"index": self.index, "log_q": self.log_q, **tensors})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Table":
        """Read a table that `save` wrote, on the CPU; raise `TableError` for any other file."""
        message = f"'{path}' cannot be read as a table: {{}}. Delete it, and compute it again."
        tensors = read_whole(Path(path), TableError, message)
        try:
            if tensors["format"] != FORMAT:
                raise ValueError(f"its format is {int(tensors['format'])}, not {FORMAT}")
            return Table(tensors["index"], tensors["log_q"], int(tensors["components"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TableError(message.replace("{}", str(error))) from error

    @cached_property
    def _search(self) -> Search:
        if self.kernel is None or self.reference is None:
            raise ValueError("The table has no kernel for new data: make it by neighbours().")
        return Search(self.kernel, self.reference)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the search, which is prepared again on use."""
        return {name: value for name, value in self.__dict__.items() if name != "_search"}

    def __repr__(self) -> str:
        """Show the sizes."""
        kernel = "" if self.kernel is None else f", kernel={self.kernel!r}"
        sizes = f"rows={len(self)}, width={self.width}, components={self.num_components}"
        return f"Table({sizes}{kernel})"


class NeighbourRows:
    """Finds the rows of a table for the rows of a plate.

    By the indices that ``indices_of`` returns, if any; else by the plate's indices, where the
    inputs are the ``data`` of the table (or the model takes none); else by the table's kernel.
    """

    def __init__(
        self, table: Table, data: Tensor | None, indices_of: Callable[..., Tensor] | None
    ) -> None:
        self.table, self.indices_of = table, indices_of
        self.data = table.reference if data is None else data
        if self.data is None and indices_of is None:
            raise ValueError("A table does not identify rows: give its data, or rows=.")

    def __call__(self, raw: Any, plate: Plate, args: tuple, kwargs: dict[str, Any]) -> Rows:
        """Return the rows for inputs ``raw``, those of the minibatch or of all data."""
        if self.indices_of is not None:
            indices = self.indices_of(*args, **kwargs)
            if indices is not None:
                return self.table.rows(_of_minibatch(torch.as_tensor(indices), plate, "rows="))
        if self._is_data(raw, plate):
            return self.table.rows(_indices(plate))
        return self.table.for_data(_of_minibatch(raw, plate, "inputs="))

    def _is_data(self, raw: Any, plate: Plate) -> bool:
        """Whether the inputs are the rows of the data at the plate's indices."""
        data = self.data
        if plate.full_size != len(self.table):
            return False
        if raw is None or raw is data:  # a model without arguments has its own data
            return True
        if not isinstance(raw, Tensor) or data is None or len(data) != len(self.table):
            return False
        indices = _indices(plate)
        rows = raw[indices.to(raw.device)] if raw.shape == data.shape else raw
        return same_numbers(rows, data[indices.to(data.device)])


def _indices(plate: Plate) -> Tensor:
    return torch.arange(plate.size) if plate.indices is None else plate.indices


def _of_minibatch(rows: Any, plate: Plate, what: str) -> Tensor:
    length = len(rows) if isinstance(rows, Tensor) and rows.dim() else None
    if length == plate.size:
        return rows
    if length == plate.full_size:
        return rows[_indices(plate).to(rows.device)]
    got = type(rows).__name__ if length is None else f"{length} rows"
    raise ValueError(f"{what} gives {got}; the plate has {plate.size} of {plate.full_size}.")


def neighbours(
    data: Tensor,
    kernel: LogKernel,
    k: int = 64,
    *,
    reference: Tensor | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_key: str | None = None,
) -> Table:
    """Return the table of each datum's k nearest under a kernel, by an exact search.

    ``q(i | n) = k(x_n, x_i) / sum_j k(x_n, x_j)`` over the k largest. The components are the data
    themselves, or the rows of ``reference``, such as prototypes. Ties go to a row's own component,
    then to the lower index.

    Args:
        data: ``[N, *x]``.
        kernel: one of `pyro_recursive.mapa.kernels`, or any function
            ``(query [Q, *x], reference [R, *x]) -> [Q, R]`` of log-weights in nats, which treats
            each pair independently.
        k: how many components a row keeps; all, where there are fewer.
        reference: ``[M, *x]``.
        cache: a folder. Its file is named by a SHA-256 of the data, the kernel and the other
            arguments; a damaged one gives a warning and is computed again.
        cache_key: a name for a kernel that is a function. Change it with the function.

    >>> from pyro_recursive.mapa.kernels import Gaussian
    >>> table = neighbours(torch.tensor([[0.0], [1.0], [5.0]]), Gaussian(1.0), k=2)
    >>> table
    Table(rows=3, width=2, components=3, kernel=Gaussian(scale=1.0))
    >>> table.for_data(torch.tensor([[4.0]])).index
    tensor([[2, 1]])
    """
    targets = data if reference is None else reference
    k = min(k, len(targets))
    path = table = None
    if cache is not None:
        name = _digest(data, reference, _cache_key(kernel, cache_key), str(k))
        path = Path(cache) / f"neighbours-{name}.pt"
        table = _cached(path)
    if table is None:
        index, log_k = Search(kernel, targets)(data, k, own=reference is None)
        table = Table(index, _normalised(log_k, _float_dtype(data)), len(targets))
        if path is not None:
            table.save(path)
    return replace(table.to(targets.device), kernel=kernel, reference=targets.detach())


def _cache_key(kernel: LogKernel, given: str | None) -> str:
    """Return the kernel's name in a cache; without one, wrong neighbours could be loaded."""
    key = kernel.cache_key if given is None and isinstance(kernel, Kernel) else given
    if key is None or " at 0x" in key:  # the address of an object without a repr of its own
        raise ValueError(f"The cache needs a name for the kernel {kernel!r}: give cache_key=.")
    return key


def _cached(path: Path) -> Table | None:
    try:
        return Table.load(path)
    except FileNotFoundError:
        return None
    except TableError as error:
        warnings.warn(f"The cache is computed again: {error}", stacklevel=3)
        return None


def _digest(*parts: Tensor | str | None) -> str:
    sha = hashlib.sha256(f"format {FORMAT}".encode())
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"|{part.dtype}{list(part.shape)}".encode())
            numbers = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            sha.update(numbers.numpy().data)
        else:
            sha.update(f"|{part}".encode())
    return sha.hexdigest()


def _own(rows: Tensor, components: int) -> Tensor | None:
    """Return each row's own component ``[N]`` where there are as many; None otherwise."""
    return torch.arange(components, device=rows.device) if len(rows) == components else None


def _float_dtype(data: Tensor) -> torch.dtype:
    return data.dtype if data.is_floating_point() else torch.get_default_dtype()


def _normalised(log_weights: Tensor, dtype: torch.dtype) -> Tensor:
    return (log_weights - log_weights.logsumexp(1, keepdim=True)).to(dtype)
