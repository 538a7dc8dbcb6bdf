"""Processes of torch.distributed: messages that cannot deadlock, and evaluation shared by rows.

Before any collective operation all processes exchange their place in the program: an error in one,
or another place, raises in all instead of blocking the others (`ProcessGroup.barrier_at`).
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_recursive.evaluation.calls import checked
from pyro_recursive.tracing.arguments import check_at_least

WIDTH = 4  # the most integers that a message carries beside its status and its place
FAILED, INTERRUPTED = 1, 2  # statuses of a process that sends no more messages

Found = TypeVar("Found")


class ProcessError(RuntimeError):
    """Another process failed, or is at another place."""


class ProcessGroup:
    """The processes of torch's default group, or this one alone where there is no such group.

    A context manager: an error that ends the block in one process ends it in all of them. ``rank``
    is the number of this process, ``count`` that of all, ``control`` a gloo group for messages
    between CPUs, which do not wait for an accelerator.
    """

    def __init__(self, rank: int = 0, count: int = 1, control: Any = None) -> None:
        self.rank, self.count, self.control = rank, count, control
        self.is_over = False  # an error was exchanged: no process receives messages any more

    @classmethod
    def joined(cls) -> "ProcessGroup":
        """Return the group of all processes; each of them must call this."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        own = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), own)

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception | KeyboardInterrupt):
            self.send_error(error)
        if self.control is not None:
            dist.destroy_process_group(self.control)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, whose parameters all start from and which writes files."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return this process's part of the rows; parts differ in size by one row at most."""
        size, more = divmod(rows, self.count)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def seed(self, seed: int | None) -> None:
        """Seed each process with ``seed + rank``; None draws the seed in the first of several."""
        if seed is None and self.count > 1:
            seed = self.from_first(int(torch.randint(2**31, (), device="cpu")), "the seed")
        if seed is not None:
            pyro.set_rng_seed(seed + self.rank)

    def barrier_at(self, place: str, *values: int) -> list[tuple[int, ...]]:
        """Wait until all processes are at one place; return the integers that each of them sent.

        Raises ProcessError where a process failed or is elsewhere, and KeyboardInterrupt where one
        was interrupted. ``values`` are at most `WIDTH`.
        """
        if self.count == 1:
            return [values]
        received = self._send(0, zlib.crc32(place.encode()), *values)
        statuses = [status for status, *_ in received]
        if not any(statuses) and len({where for _, where, *_ in received}) == 1:
            return [tuple(row[2 : 2 + len(values)]) for row in received]
        self.is_over = True
        reports = self._exchange(("", place))
        if FAILED in statuses:
            kind, message = reports[statuses.index(FAILED)]
            raise ProcessError(f"Process {statuses.index(FAILED)} failed: {kind}: {message}")
        if INTERRUPTED in statuses:
            raise KeyboardInterrupt(f"Process {statuses.index(INTERRUPTED)} was interrupted.")
        places = ", ".join(f"{rank} at {where}" for rank, (_, where) in enumerate(reports))
        raise ProcessError(
            f"The processes are at different places: {places}. Pass the same arguments and as many "
            "batches to each (a DataLoader needs a DistributedSampler)."
        )

    def from_first(self, value: Any, place: str) -> Any:
        """Return the first process's value, anything that can be pickled."""
        if self.count == 1:
            return value
        self.barrier_at(place)
        found = [value]
        dist.broadcast_object_list(found, 0, self.control, torch.device("cpu"))
        return found[0]

    def gather(self, value: Any, place: str) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        self.barrier_at(place)
        return self._exchange(value)

    def mean(self, value: float, place: str) -> float:
        """Return the mean of a number over the processes."""
        return sum(self.gather(value, place)) / self.count

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Copy the first process's tensors into these, in place; call `barrier_at` before."""
        for i, part in self._collective(tensors, partial(dist.broadcast, src=0)):
            tensors[i].copy_(part)

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
        """Return weighted sums of dense tensors over the processes; call `barrier_at` before."""
        found = list(tensors)
        for i, part in self._collective(tensors, dist.all_reduce, weight):
            found[i] = part
        return found

    def _collective(
        self, tensors: Sequence[Tensor], operation: Callable, weight: float = 1.0
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each tensor's index and value after an operation on all of its device and dtype."""
        groups: dict[Any, list[int]] = {}
        for i, tensor in enumerate(tensors if self.count > 1 else ()):
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
        for (device, _), indices in groups.items():
            flat = torch.cat([tensors[i].flatten() for i in indices])
            flat = flat if weight == 1 else flat * weight
            operation(flat, group=self.control if device.type == "cpu" else None)  # no CPU in NCCL
            parts = flat.split([tensors[i].numel() for i in indices])
            yield from ((i, p.view_as(tensors[i])) for i, p in zip(indices, parts, strict=True))

    def _send(self, *values: int) -> list[list[int]]:
        message = torch.zeros(2 + WIDTH, dtype=torch.long, device="cpu")
        message[: len(values)] = torch.tensor(values, device="cpu")
        received = [torch.empty_like(message) for _ in range(self.count)]
        dist.all_gather(received, message, group=self.control)
        return [row.tolist() for row in received]

    def _exchange(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def send_error(self, error: BaseException) -> None:
        """Send an error where the others wait in `barrier_at`; add their errors as notes.

        Nothing is sent if another error was exchanged before.
        """
        if self.is_over or self.count == 1:
            return
        self.is_over = True
        with suppress(Exception):  # the other processes may have ended
            self._send(FAILED if isinstance(error, Exception) else INTERRUPTED)
            reports = self._exchange((type(error).__name__, str(error)))
            for rank, (kind, message) in enumerate(reports):
                if kind and rank != self.rank:
                    error.add_note(f"Process {rank} failed, too: {kind}: {message}")


@checked
def evaluate_in_parallel(
    function: Callable[..., Found], *rows: Tensor, batch_size: int | None = None
) -> Found:
    """Return ``function(*rows)`` in every process, each of which computes its share of the rows.

    For quantities with a value for each row: `pyro_recursive.log_marginal`, `gaps`,
    log-likelihoods. Where `torch.distributed` is initialised all its processes must call this with
    the same rows. A random function needs different seeds: ``pyro.set_rng_seed(seed + rank)``.

    Args:
        function: called with some of the rows; returns a tensor whose first dim is these rows, or a
            tuple, a NamedTuple (`Evidence`, `Gaps`) or a dict of such tensors and of values that
            are the same for all rows. Bind other arguments with `functools.partial`.
        *rows: tensors of one length, complete in each process.
        batch_size: the most rows in one call of the function; None takes the whole share.

    Returns:
        The rows of all processes in order, on the device of the first of ``rows``.

    >>> evaluate_in_parallel(lambda x: x.sum(-1), torch.eye(3), batch_size=2)
    tensor([1., 1., 1.])
    """
    check_at_least(1, batch_size=batch_size)
    if not rows:
        raise TypeError("evaluate_in_parallel got no rows.")
    count = len(rows[0])
    if not count or any(len(column) != count for column in rows):
        raise ValueError(f"rows must have one length, got {[len(column) for column in rows]}.")
    with ProcessGroup.joined() as processes:
        own, size = processes.share(count), batch_size or count
        parts = [slice(i, min(i + size, own.stop)) for i in range(own.start, own.stop, size)]
        found = []
        for part in parts:
            check = partial(_checked, rows=part.stop - part.start)
            found.append(tree_map(check, function(*(column[part] for column in rows))))
        by_process = processes.gather(found, "an evaluation")

    def join(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor):
            if any(leaf != leaves[0] for leaf in leaves):
                raise ValueError(f"Values other than tensors differ between the rows: {leaves}.")
            return leaves[0]
        return torch.cat(leaves).to(rows[0].device)

    return tree_map(join, *(part for parts in by_process for part in parts))


def _checked(leaf: Any, rows: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.shape[:1] != (rows,):
        raise ValueError(
            f"The function returned shape {tuple(leaf.shape)} for {rows} rows. Return a value for "
            "each row, in the first dim."
        )
    return leaf.detach().cpu()
