"""Data in minibatches: tensors cut into shuffled rows, or the batches of a DataLoader."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.tracing.arguments import check_integers

__all__ = ["Batch", "Data", "Minibatches"]

Batch: TypeAlias = tuple[Any, ...]
Data: TypeAlias = Tensor | Sequence[Tensor] | DataLoader


class Minibatches:
    """The batches of an epoch, anew at each iteration: tuples of the arguments of model and guide.

    :param data: a tensor, a tuple of tensors with the same number of rows, or a DataLoader, whose
        batches are used as they come
    :param batch_size: rows per batch (the last may have fewer); None gives all rows in one, as they
        stand
    :param shuffle: whether to draw another order of the rows each time
    :param transform: maps the tensors of a batch to a tensor or a tuple of tensors
    :param name: what messages call the data
    :param even: whether to leave out a last batch of fewer rows than the others
    :param processes: share the rows of each batch of tensors, in the same order of the data; the
        last batch may have no row for some, and is not transformed there. A DataLoader is each
        process's own
    :raises TypeError: data are of another kind
    :raises ValueError: no data, tensors of different lengths, a batch size below 1, a DataLoader
        with the same data in each of several processes

    >>> batches = Minibatches((torch.arange(3), torch.ones(3)), batch_size=2, shuffle=False)
    >>> [len(rows) for rows, _ in batches]
    [2, 1]
    """

    def __init__(
        self,
        data: Data,
        batch_size: int | None = None,
        shuffle: bool = True,
        transform: Callable | None = None,
        name: str = "data",
        even: bool = False,
        processes: ProcessGroup | None = None,
    ) -> None:
        """Check the data; draw the seed of their order from the global random state."""
        self.data = data if isinstance(data, DataLoader) else _columns(data, name)
        self.batch_size, self.transform, self.name = batch_size, transform, name
        self.even, self.processes = even, processes or ProcessGroup()
        _check_batch_size(batch_size, self.data)
        if self.processes.count > 1:
            _check_sampler(self.data, name)
        if self.count == 0:
            raise ValueError(f"{name} is a DataLoader without batches. Check its data set.")
        self.order: Generator | None = None
        if shuffle and batch_size is not None:
            # One draw, so that pyro.set_rng_seed decides the order and the order nothing else.
            drawn = int(torch.randint(2**62, (), device="cpu"))
            self.order = Generator("cpu").manual_seed(
                self.processes.from_first(drawn, f"the order of {name}")
            )

    @property
    def generators(self) -> list[Generator]:
        """The generators that decide the order of the data, other than the global one."""
        if not isinstance(self.data, DataLoader):
            return [self.order] if self.order is not None else []
        sampler, batch_sampler = self.data.sampler, self.data.batch_sampler
        owners = (self.data, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, Generator)}.values())

    @property
    def count(self) -> int | None:
        """The number of batches; None where a DataLoader does not know it."""
        if not isinstance(self.data, DataLoader):
            return len(self._parts(self.data))
        try:
            return len(self.data)
        except TypeError:
            return None

    @property
    def rows(self) -> int | None:
        """The rows of an epoch, of all processes; None where a DataLoader does not know them."""
        if not isinstance(self.data, DataLoader):
            return len(self.data[0])
        sampler = self.data.sampler
        sized = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler
        try:  # a data set without a batch sampler holds batches, not rows
            return None if self.data.batch_sampler is None else len(sized)  # type: ignore[arg-type]
        except TypeError:
            return None

    @property
    def size(self) -> int | None:
        """The rows per batch, as given to `fit` or to a DataLoader."""
        return self.data.batch_size if isinstance(self.data, DataLoader) else self.batch_size

    def again(self) -> "Minibatches":
        """Return random batches of the same data and of one size, to be drawn beside these.

        A DataLoader stays as it is, and is iterated twice at the same time.

        :raises ValueError: a DataLoader whose workers persist, and serve one iteration at a time
        """
        if not isinstance(self.data, DataLoader):
            return Minibatches(
                self.data, self.batch_size, True, self.transform, self.name, True, self.processes
            )
        if self.data.num_workers and self.data.persistent_workers:
            raise ValueError(
                f"The workers of DataLoader {self.name} persist, and it can be iterated only once "
                "at a time. Set persistent_workers=False, or give the data as tensors."
            )
        return self

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch, transformed."""
        data = self.data
        for batch in data if isinstance(data, DataLoader) else self._rows(data):
            if self.transform is None or (self.processes.count > 1 and not rows_of(batch)):
                yield _as_tuple(batch)
            else:
                yield _as_tuple(self.transform(*_as_tuple(batch)))

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler of several processes which order it is to draw."""
        if self.processes.count > 1 and isinstance(self.data, DataLoader):
            for sampler in _samplers(self.data):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(epoch)

    def _parts(self, columns: Batch) -> list[slice]:
        """Return which places of the order each batch of the columns has, in this process."""
        rows = len(columns[0])
        size = self.batch_size or rows
        end = rows - rows % size if self.even and rows > size else rows
        return [self._share(start, min(start + size, end)) for start in range(0, end, size)]

    def _share(self, start: int, stop: int) -> slice:
        own = self.processes.share(stop - start)
        return slice(start + own.start, start + own.stop)

    def _rows(self, columns: Batch) -> Iterator[Batch]:
        """Yield slices of the columns, in order or in a new random order."""
        if self.batch_size is None and self.processes.count == 1:
            yield columns
            return
        if self.order is None:
            yield from (tuple(column[part] for column in columns) for part in self._parts(columns))
            return
        order = torch.randperm(len(columns[0]), generator=self.order, device="cpu")
        orders = [order.to(column.device) for column in columns]  # one transfer per epoch
        for part in self._parts(columns):
            yield tuple(column[own[part]] for column, own in zip(columns, orders, strict=True))


def rows_of(batch: Batch) -> int:
    """Return the rows of a batch: the length of its first tensor, 1 if that is a scalar."""
    first = batch[0] if batch else None
    return len(first) if isinstance(first, Tensor) and first.dim() else 1


def _as_tuple(batch: Any) -> Batch:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _columns(data: Any, name: str) -> Batch:
    """Return the data as a tuple of tensors with the same number of rows, at least one."""
    columns = _as_tuple(data)
    for column in columns:
        if not isinstance(column, Tensor):
            raise TypeError(
                f"{name} must be a tensor, a tuple of tensors or a torch DataLoader, got "
                f"{type(column).__name__}. Convert arrays with torch.as_tensor; bind other "
                "arguments of model and guide with functools.partial."
            )
        if column.dim() == 0:
            raise ValueError(f"{name} has a scalar tensor, which has no rows. Give it a dimension.")
    lengths = [column.shape[0] for column in columns]
    if not lengths or 0 in lengths:
        raise ValueError(f"{name} is empty: lengths {lengths}. Pass at least one row.")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The tensors of {name} have different lengths {lengths}. Give each the same number of "
            "rows; bind what is no data with functools.partial."
        )
    return columns


def _samplers(loader: DataLoader) -> list[Any]:
    """Return what decides the order of a DataLoader of a map-style data set."""
    batches = loader.batch_sampler
    return [loader.sampler] if batches is None else [batches, getattr(batches, "sampler", None)]


def _check_sampler(data: Any, name: str) -> None:
    """Raise where a DataLoader's sampler is known to give each process all data."""
    whole = (RandomSampler, SequentialSampler)
    if isinstance(data, DataLoader) and type(_samplers(data)[-1]) in whole:
        raise ValueError(
            f"DataLoader {name} gives the same rows to each of several processes. Give it sampler="
            "torch.utils.data.DistributedSampler(dataset) and its share of the batch as "
            "batch_size, or pass tensors."
        )


def _check_batch_size(batch_size: int | None, data: Any) -> None:
    check_integers(batch_size=batch_size)
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1, or None for the full batch, got {batch_size}."
        )
    if batch_size is not None and isinstance(data, DataLoader):
        raise ValueError(
            f"batch_size={batch_size} has no effect on a DataLoader. Give it to the DataLoader."
        )
