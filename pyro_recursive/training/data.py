"""Data in minibatches: tensors cut into shuffled rows, or the batches of a DataLoader."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.minibatch import MinibatchRows
from pyro_recursive.training.checkpoint import random_states, set_random_states

Data: TypeAlias = Tensor | Sequence[Tensor] | DataLoader

CHOICE_SEED = 0  # of the rows that `Minibatches.choose` returns
UNKNOWN = MinibatchRows(None, None)


class Batch(tuple):
    """The arguments of model and guide, and which rows of the data they are."""

    rows: MinibatchRows = UNKNOWN

    @classmethod
    def of(cls, values: Any, rows: MinibatchRows = UNKNOWN) -> "Batch":
        """Return a batch of one value, or of several."""
        batch = cls(values if isinstance(values, tuple | list) else (values,))
        batch.rows = rows
        return batch


class Table:
    """Minibatches of one size, as the numbers ``index`` ``[batches, rows]`` of their rows."""

    def __init__(self, columns: tuple[Tensor, ...], index: Tensor, numbered: bool) -> None:
        self.columns, self.index, self.numbered = columns, index, numbered

    def part(self, start: int, end: int | None = None) -> "Table":
        """Return some of the minibatches."""
        return Table(self.columns, self.index[start:end], self.numbered)

    def batch(self, number: int) -> Batch:
        """Return one of the minibatches."""
        rows = self.index[number]
        known = MinibatchRows(rows, len(self.columns[0])) if self.numbered else UNKNOWN
        return Batch.of([column[rows.to(column.device)] for column in self.columns], known)


class Minibatches:
    """The batches of an epoch, anew at each iteration: tuples of the arguments of model and guide.

    Tensors are cut into batches of ``batch_size`` rows (the last may have fewer, and is left out if
    ``even``), all rows in order if it is None; the batches of a DataLoader are used as they are.
    Several processes share the rows of each batch of tensors; a DataLoader is each process's own.
    Each `Batch` has the numbers of its rows, unless they are a DataLoader's or ``numbered`` is
    False, for data other than those that a guide is trained on. An empty tuple, of a model without
    arguments, is one batch.

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
        numbered: bool = True,
    ) -> None:
        """Check the data; draw the seed of their order from the global random state."""
        self.batch_size, self.transform, self.name = batch_size, transform, name
        self.even, self.processes = even, processes or ProcessGroup()
        self.numbered = numbered
        check_at_least(1, batch_size=batch_size)
        self.data = data if isinstance(data, DataLoader) else _columns(data, name)
        if isinstance(data, DataLoader):
            self._check_loader(data)
        elif not self.data and batch_size is not None:
            raise ValueError(f"batch_size={batch_size} has no effect without {name}.")
        self.order: Generator | None = None
        if shuffle and batch_size is not None:
            # The global random state decides the order by this one draw, and nothing else of it.
            seed = int(torch.randint(2**62, (), device="cpu"))
            seed = self.processes.from_first(seed, f"the order of {name}")
            self.order = Generator("cpu").manual_seed(seed)

    def _check_loader(self, loader: DataLoader) -> None:
        if self.batch_size is not None:
            raise ValueError(f"batch_size={self.batch_size} has no effect on a DataLoader.")
        ordinary = type(_samplers(loader)[-1]) in (RandomSampler, SequentialSampler)
        if ordinary and self.processes.count > 1:
            problem = f"DataLoader {self.name} gives the same rows to each process."
            raise ValueError(f"{problem} Give it a DistributedSampler, or pass tensors.")

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
            return len(self._starts(self.data)) if self.data else 1
        return _length(self.data)

    @property
    def rows(self) -> int | None:
        """The rows of the data; None without, or if a DataLoader's are batches or not known."""
        if not isinstance(self.data, DataLoader):
            return len(self.data[0]) if self.data else None
        sampler = self.data.sampler
        sized = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler
        return None if self.data.batch_sampler is None else _length(sized)

    @property
    def size(self) -> int | None:
        """The rows per batch, as given to `fit` or to a DataLoader."""
        return self.data.batch_size if isinstance(self.data, DataLoader) else self.batch_size

    @property
    def is_constant(self) -> bool:
        """Whether all batches of all epochs are the same."""
        is_table = not isinstance(self.data, DataLoader)
        return is_table and self.order is None and self.transform is None and self.count == 1

    def again(self) -> "Minibatches":
        """Return shuffled batches of one size, of the same data, with an order of their own.

        A DataLoader is iterated twice at the same time.
        """
        if not isinstance(self.data, DataLoader):
            return Minibatches(
                self.data, self.batch_size, True, self.transform, self.name, True, self.processes
            )
        if self.data.num_workers and self.data.persistent_workers:
            problem = f"DataLoader {self.name} is iterated twice at once."
            raise ValueError(f"{problem} Set persistent_workers=False.")
        return self

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch, transformed."""
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Batch]:
        """Yield the batches of one epoch from the first-th on, transformed."""
        return map(self.transformed, self.raw(first))

    def pieces(self, first: int = 0) -> Iterator[Batch | Table]:
        """Yield the same batches, those of tensors in tables where they are of one size."""
        return map(self.transformed, self.raw(first, in_tables=True))

    def raw(self, first: int = 0, *, in_tables: bool = False) -> Iterator[Any]:
        """Yield batches or tables of one epoch before they are transformed."""
        if in_tables and self.order and self.transform is None and self.processes.count == 1:
            yield from self._tables(self.order, first)
            return
        batch = None
        if isinstance(self.data, DataLoader):
            batches: Iterator[Batch] = islice(self._loaded(self.data), first, None)
        else:
            batches = self._batches(first)
        for batch in batches:
            yield batch
        if batch is None and not first:
            raise ValueError(f"DataLoader {self.name} gave no batches. Check its data set.")

    def _tables(self, generator: Generator, first: int) -> Iterator[Batch | Table]:
        assert not isinstance(self.data, DataLoader)
        columns, size = self.data, self.batch_size or len(self.data[0])
        order = torch.randperm(len(columns[0]), generator=generator, device="cpu")
        order = order.to(columns[0].device)
        whole = len(order) - len(order) % size
        if whole > first * size:
            yield Table(columns, order[first * size : whole].view(-1, size), self.numbered)
        if max(whole, first * size) < len(order) and not (self.even and whole):
            yield Table(columns, order[whole:].unsqueeze(0), self.numbered).batch(0)

    def transformed(self, batch: Any) -> Any:
        """Return a batch after the transform, if there is one and this process has rows of it."""
        if self.transform is None or not (self.processes.count == 1 or rows_of(batch)):
            return batch
        found = Batch.of(self.transform(*batch), batch.rows)
        if rows_of(found) != rows_of(batch):
            found.rows = UNKNOWN
        return found

    def _loaded(self, loader: DataLoader) -> Iterator[Batch]:
        in_order = type(_samplers(loader)[-1]) is SequentialSampler and self.processes.count == 1
        for values in loader:
            batch = Batch.of(values)
            if in_order and rows_of(batch) == self.rows:
                batch.rows = self._rows(None, self.rows)
            yield batch

    def _rows(self, index: Tensor | None, total: int | None) -> MinibatchRows:
        return MinibatchRows(index, total) if self.numbered else UNKNOWN

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of a DataLoader's sampler where there are several processes."""
        if self.processes.count > 1 and isinstance(self.data, DataLoader):
            for sampler in _samplers(self.data):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(epoch)

    def choose(self, count: int) -> Batch:
        """Return one batch of ``count`` rows, or of all rows if there are fewer.

        The rows of tensors are chosen at random, the same each time; a DataLoader's are its first.
        """
        if isinstance(self.data, DataLoader):
            found: list[Batch] = []
            for batch in self:
                found.append(batch)
                if sum(map(rows_of, found)) >= count:
                    break
            return Batch.of([torch.cat(column)[:count] for column in zip(*found, strict=True)])
        total = self.rows
        if total is None or count >= total:
            return Batch.of(self.data, self._rows(None, total))
        generator = Generator("cpu").manual_seed(CHOICE_SEED)
        order = torch.randperm(total, generator=generator, device="cpu")[:count]
        chosen = [column[order.to(column.device)] for column in self.data]
        return Batch.of(chosen, self._rows(order.to(self.data[0].device), total))

    def _starts(self, columns: tuple[Tensor, ...]) -> range:
        """Return where each batch of all processes starts in the order."""
        rows = len(columns[0])
        size = self.batch_size or rows
        return range(0, rows - rows % size if self.even and rows > size else rows, size)

    def _shares(self, columns: tuple[Tensor, ...]) -> list[slice]:
        """Return the positions in the order that each batch has in this process."""
        starts, found = self._starts(columns), []
        for start in starts:
            own = self.processes.share(min(starts.step, starts.stop - start))
            found.append(slice(start + own.start, start + own.stop))
        return found

    def _batches(self, first: int) -> Iterator[Batch]:
        """Yield this process's rows of each batch, in order or in a new random order."""
        assert not isinstance(self.data, DataLoader)
        columns, total = self.data, self.rows
        if total is None or (self.batch_size is None and self.processes.count == 1):
            yield Batch.of(columns, self._rows(None, total))
        elif self.order is None:
            every = torch.arange(total, device=columns[0].device)
            for own in self._shares(columns)[first:]:
                yield Batch.of([x[own] for x in columns], self._rows(every[own], total))
        else:
            order = torch.randperm(total, generator=self.order, device="cpu")
            orders = [order.to(column.device) for column in columns]  # one transfer per epoch
            for own in self._shares(columns)[first:]:
                batch = [x[rows[own]] for x, rows in zip(columns, orders, strict=True)]
                yield Batch.of(batch, self._rows(orders[0][own], total))


class Passes:
    """Pass after pass over minibatches, of which each `take` goes on after the last."""

    def __init__(self, batches: Minibatches) -> None:
        self.batches = batches
        self.number = self.position = 0  # of this pass, and of its next batch
        self._start: dict[str, Any] | None = None  # all random states before this pass
        self._left: Iterator[Any] = iter(())  # of this pass
        self._rest: Batch | Table | None = None  # the next piece, where it is known

    def take(self, count: int, in_tables: bool) -> Iterator[tuple[Batch | Table, int]]:
        """Yield the next pieces and how many steps each is for, ``count`` in all."""
        while count:
            piece = next(self._left, None) if self._rest is None else self._rest
            if piece is None:
                self.number, self.position = self.number + 1, 0
                self._open(in_tables)
                continue
            piece, size = self._cut(piece, count)
            self.position += size
            count -= size
            yield self.batches.transformed(piece), size

    def _open(self, in_tables: bool) -> None:
        self.batches.set_epoch(self.number)
        if not self.batches.is_constant:
            self._start = random_states(self.batches.generators)
        self._left = self.batches.raw(in_tables=in_tables)

    def _cut(self, piece: Batch | Table, count: int) -> tuple[Batch | Table, int]:
        """Return at most ``count`` batches of a piece, and how many; keep the rest of a table."""
        self._rest = None
        if not isinstance(piece, Table):
            return piece, count if self.batches.is_constant else 1
        if count < len(piece.index):
            self._rest = piece.part(count)
        return piece.part(0, count), min(count, len(piece.index))

    def state(self) -> dict[str, Any]:
        """Return where the next batch is."""
        return {"number": self.number, "position": self.position, "start": self._start}

    def set_state(self, state: dict[str, Any], in_tables: bool) -> None:
        """Go on from there; random states are those of this pass until others are set."""
        self.number, self.position = state["number"], state["position"]
        self._start = state["start"]
        if self._start is None:
            return
        set_random_states(self._start, self.batches.generators)
        self._left = self.batches.raw(self.position, in_tables=in_tables)
        self._rest = next(self._left, None)  # draws the order of this pass


def rows_of(batch: tuple[Any, ...]) -> int:
    """Return the rows of a batch: the length of its first tensor, 1 without or if it is a scalar.

    Tensors in tuples, lists and dicts count, too.
    """
    first = next((each for each in tree_leaves(tuple(batch)) if isinstance(each, Tensor)), None)
    return len(first) if first is not None and first.dim() else 1


def _columns(data: Any, name: str) -> tuple[Tensor, ...]:
    """Return the data as a tuple of tensors with the same number of rows, at least one."""
    columns = tuple(data) if isinstance(data, tuple | list) else (data,)
    for column in columns:
        if not isinstance(column, Tensor):
            raise TypeError(f"{name} must be tensors or a DataLoader, got {type(column).__name__}.")
    lengths = [len(column) for column in columns]
    if lengths and (len(set(lengths)) != 1 or not lengths[0]):
        raise ValueError(f"The tensors of {name} need one number of rows, got lengths {lengths}.")
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
