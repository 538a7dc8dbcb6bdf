"""Data in minibatches: tensors cut into shuffled rows, or the batches of a DataLoader."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.tracing.arguments import check_at_least

Batch: TypeAlias = tuple[Any, ...]
Data: TypeAlias = Tensor | Sequence[Tensor] | DataLoader

CHOICE_SEED = 0  # of the rows that `Minibatches.choose` returns


class Minibatches:
    """The batches of an epoch, anew at each iteration: tuples of the arguments of model and guide.

    Args:
        data: a tensor, a tuple of tensors with the same number of rows, or a DataLoader, whose
            batches are used as they are.
        batch_size: rows per batch (the last may have fewer); None gives all rows in order.
        shuffle: whether to draw another order of the rows each time.
        transform: maps the tensors of a batch to a tensor or a tuple of tensors.
        name: what messages call the data.
        even: whether to leave out a last batch of fewer rows than the others.
        processes: share the rows of each batch of tensors; some may have no row of the last batch,
            which is then not transformed. A DataLoader is each process's own.

    Raises:
        TypeError: the data are of another kind.
        ValueError: the data are empty, their lengths differ, or a DataLoader gives the same rows
            to several processes.

    Example:
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
        check_at_least(1, batch_size=batch_size)
        if isinstance(data, DataLoader):
            _check_loader(data, batch_size, name, shared=self.processes.count > 1)
        self.order: Generator | None = None
        if shuffle and batch_size is not None:
            # The global random state decides the order by this one draw, and nothing else of it.
            drawn = int(torch.randint(2**62, (), device="cpu"))
            self.order = Generator("cpu").manual_seed(
                self.processes.from_first(drawn, f"the order of {name}")
            )

    @property
    def generators(self) -> list[Generator]:
        """The generators that decide the order of the data, other than the global one."""
        if not isinstance(self.data, DataLoader):
            return [self.order] if self.order is not None else []
        owners = (self.data, self.data.sampler, *_samplers(self.data))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, Generator)}.values())

    @property
    def count(self) -> int | None:
        """The number of batches; None where a DataLoader has no length."""
        if not isinstance(self.data, DataLoader):
            return len(self._slices(self.data))
        return _length(self.data)

    @property
    def rows(self) -> int | None:
        """The rows of an epoch, of all processes; None where a DataLoader has no length."""
        if not isinstance(self.data, DataLoader):
            return len(self.data[0])
        sampler = self.data.sampler
        sized = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler
        # Without a batch sampler the entries of the data set are batches.
        return None if self.data.batch_sampler is None else _length(sized)

    @property
    def size(self) -> int | None:
        """The rows per batch, as given to `fit` or to a DataLoader."""
        return self.data.batch_size if isinstance(self.data, DataLoader) else self.batch_size

    def again(self) -> "Minibatches":
        """Return shuffled batches of the same data and of one size, independent of these.

        A DataLoader is iterated twice at the same time.

        Raises:
            ValueError: a DataLoader has workers that persist, and serve one iteration at a time.
        """
        if not isinstance(self.data, DataLoader):
            return Minibatches(
                self.data, self.batch_size, True, self.transform, self.name, True, self.processes
            )
        if self.data.num_workers and self.data.persistent_workers:
            raise ValueError(
                f"The workers of DataLoader {self.name} persist and serve one iteration at a time. "
                "Set persistent_workers=False."
            )
        return self

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch, transformed."""
        data = self.data
        for batch in data if isinstance(data, DataLoader) else self._shares(data):
            if self.transform is None or (self.processes.count > 1 and not rows_of(batch)):
                yield _as_tuple(batch)
            else:
                yield _as_tuple(self.transform(*_as_tuple(batch)))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of a DataLoader's sampler where there are several processes."""
        if self.processes.count > 1 and isinstance(self.data, DataLoader):
            for sampler in _samplers(self.data):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(epoch)

    def choose(self, count: int) -> Batch:
        """Return one batch of ``count`` rows, or of all rows if there are fewer.

        The rows of tensors are chosen at random, the same each time; a DataLoader's are its first.

        Raises:
            ValueError: the batches of a DataLoader are not tensors with rows.
        """
        if isinstance(self.data, DataLoader):
            return self._first(count)
        if count >= len(self.data[0]):
            return tuple(self.data)
        generator = Generator("cpu").manual_seed(CHOICE_SEED)
        order = torch.randperm(len(self.data[0]), generator=generator, device="cpu")
        return tuple(column[order[:count].to(column.device)] for column in self.data)

    def _first(self, count: int) -> Batch:
        found: list[Batch] = []
        for batch in self:
            found.append(batch)
            for column in batch:
                if not isinstance(column, Tensor) or column.dim() == 0:
                    raise ValueError(
                        f"The batches of {self.name} hold a {type(column).__name__} without rows. "
                        f"Give {self.name} as tensors."
                    )
            if sum(map(rows_of, found)) >= count:
                break
        return tuple(torch.cat(column)[:count] for column in zip(*found, strict=True))

    def _slices(self, columns: Batch) -> list[slice]:
        """Return the positions in the order that each batch has in this process."""
        rows = len(columns[0])
        size = self.batch_size or rows
        end = rows - rows % size if self.even and rows > size else rows
        return [self._share(start, min(start + size, end)) for start in range(0, end, size)]

    def _share(self, start: int, stop: int) -> slice:
        own = self.processes.share(stop - start)
        return slice(start + own.start, start + own.stop)

    def _shares(self, columns: Batch) -> Iterator[Batch]:
        """Yield this process's rows of each batch, in order or in a new random order."""
        if self.batch_size is None and self.processes.count == 1:
            yield columns
            return
        slices = self._slices(columns)
        if self.order is None:
            yield from (tuple(column[part] for column in columns) for part in slices)
            return
        order = torch.randperm(len(columns[0]), generator=self.order, device="cpu")
        orders = [order.to(column.device) for column in columns]  # one transfer per epoch
        for part in slices:
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
                f"{name} must be tensors or a torch DataLoader, got {type(column).__name__}. "
                "Convert arrays with torch.as_tensor."
            )
        if column.dim() == 0:
            raise ValueError(f"{name} has a scalar tensor, which has no rows. Give it a dimension.")
    lengths = [len(column) for column in columns]
    if not lengths or 0 in lengths:
        raise ValueError(f"{name} is empty: lengths {lengths}. Pass at least one row.")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The tensors of {name} have lengths {lengths}. Give each the same number of rows."
        )
    return columns


def _samplers(loader: DataLoader) -> list[Any]:
    """Return what decides the order of a DataLoader of a map-style data set."""
    batches = loader.batch_sampler
    return [loader.sampler] if batches is None else [batches, getattr(batches, "sampler", None)]


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


def _check_loader(loader: DataLoader, batch_size: int | None, name: str, shared: bool) -> None:
    if batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size} has no effect on a DataLoader. Give it to the DataLoader."
        )
    if shared and type(_samplers(loader)[-1]) in (RandomSampler, SequentialSampler):
        raise ValueError(
            f"DataLoader {name} gives the same rows to each process. Give it a DistributedSampler, "
            "or pass tensors."
        )
    if _length(loader) == 0:
        raise ValueError(f"{name} is a DataLoader without batches. Check its data set.")
