"""What several processes of torch.distributed do together; one process alone does none of it.

Whoever wants something of the others first says where it is (`ProcessGroup.agree`), by a message of
one size. So one that fails, or is elsewhere, is heard by all, and nobody waits for it for ever.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ProcessError", "ProcessGroup"]

WIDTH = 4  # how many numbers a message has beside whether all is well, and the place


class ProcessError(RuntimeError):
    """Another process has failed, or is somewhere else; ``kind`` is the class of its error."""

    def __init__(self, message: str, kind: str = "RuntimeError") -> None:
        super().__init__(message)
        self.kind = kind


class ProcessGroup:
    """The processes of torch's default group, or this one alone where there is no such group.

    A context manager: an error that ends the block in one process ends it in all of them.

    :param rank: the number of this process, from 0
    :param count: how many there are
    :param control: a group for messages between CPUs, so that no accelerator is waited for

    >>> alone = ProcessGroup()
    >>> alone.share(5), alone.agree("here", 7), alone.gather("a", place="here")
    (slice(0, 5, None), [(7,)], ['a'])
    """

    def __init__(self, rank: int = 0, count: int = 1, control: Any = None) -> None:
        self.rank, self.count, self.control = rank, count, control
        self.is_over = False  # nobody listens any more

    @classmethod
    def joined(cls) -> "ProcessGroup":
        """Return all processes; each of them must be here."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        own = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), own)

    def __enter__(self) -> "ProcessGroup":
        """Begin."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Tell the others of an error, and leave the group of the messages."""
        if isinstance(error, Exception) and not self.is_over and self.count > 1:
            self._give_up(error)
        if self.control is not None:
            dist.destroy_process_group(self.control)

    @property
    def is_first(self) -> bool:
        """Whether this is the process whose parameters count, and that writes files."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return which of so many rows are this process's: no two differ by more than one row."""
        size, more = divmod(rows, self.count)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def seed(self, seed: int | None) -> None:
        """Give each process random draws of its own: from ``seed + rank``.

        None is a number that the first draws; a process alone stays as it is.
        """
        if seed is None and self.count > 1:
            seed = self.from_first(int(torch.randint(2**31, (), device="cpu")), "the seed")
        if seed is not None:
            pyro.set_rng_seed(seed + self.rank)

    def agree(self, place: str, *numbers: int) -> list[tuple[int, ...]]:
        """Return the numbers of all processes, at most `WIDTH`, once all are at one place.

        :raises ProcessError: one has failed, or is elsewhere
        """
        if self.count == 1:
            return [numbers]
        heard = self._tell(0, zlib.crc32(place.encode()), *numbers)
        failed = [rank for rank, (status, *_) in enumerate(heard) if status]
        if not failed and len({where for _, where, *_ in heard}) == 1:
            return [tuple(row[2 : 2 + len(numbers)]) for row in heard]
        self.is_over = True
        told = self._exchange(("", place))
        if failed:
            kind, message = told[failed[0]]
            raise ProcessError(f"Process {failed[0]} failed: {kind}: {message}", kind)
        places = ", ".join(f"{rank} at {where}" for rank, (_, where) in enumerate(told))
        raise ProcessError(
            f"The processes are not at the same place: {places}. Each must have as many batches as "
            "the others: give a DataLoader a torch DistributedSampler, or pass tensors. All other "
            "arguments must be the same everywhere."
        )

    def from_first(self, value: Any, place: str) -> Any:
        """Return the first process's value, of any kind that can be pickled."""
        if self.count == 1:
            return value
        self.agree(place)
        found = [value]
        dist.broadcast_object_list(found, 0, self.control, torch.device("cpu"))
        return found[0]

    def gather(self, value: Any, place: str) -> list[Any]:
        """Return the values of all processes, in their order."""
        if self.count == 1:
            return [value]
        self.agree(place)
        return self._exchange(value)

    def mean(self, value: float, place: str) -> float:
        """Return the mean of a number over the processes."""
        return sum(self.gather(value, place)) / self.count

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors, in place, what they are in the first process; `agree` before it."""
        for places in self._kinds(tensors):
            flat = torch.cat([tensors[place].flatten() for place in places])
            dist.broadcast(flat, 0, self._group(flat))
            for place, part in _parts(flat, tensors, places):
                tensors[place].copy_(part)

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
        """Return weighted sums of dense tensors over the processes; `agree` before it."""
        found = list(tensors)
        for places in self._kinds(tensors):
            flat = torch.cat([tensors[place].flatten() for place in places]) * weight
            dist.all_reduce(flat, group=self._group(flat))
            for place, part in _parts(flat, tensors, places):
                found[place] = part
        return found

    def _kinds(self, tensors: Sequence[Tensor]) -> Iterable[list[int]]:
        """Return the places of tensors of one device and dtype, which travel together."""
        kinds: dict[Any, list[int]] = {}
        for place, tensor in enumerate(tensors if self.count > 1 else ()):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
        return kinds.values()

    def _group(self, tensor: Tensor) -> Any:
        # NCCL knows no tensors of the CPU.
        return self.control if tensor.device.type == "cpu" else None

    def _tell(self, *numbers: int) -> list[list[int]]:
        mine = torch.zeros(2 + WIDTH, dtype=torch.long, device="cpu")
        mine[: len(numbers)] = torch.tensor(numbers, device="cpu")
        heard = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(heard, mine, group=self.control)
        return [row.tolist() for row in heard]

    def _exchange(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def _give_up(self, error: Exception) -> None:
        """Say so where the others wait to agree on something; note what has befallen them."""
        self.is_over = True
        with suppress(Exception):  # they may be gone
            self._tell(1)
            told = self._exchange((type(error).__name__, str(error)))
            for rank, (kind, message) in enumerate(told):
                if kind and rank != self.rank:
                    error.add_note(f"Process {rank} failed, too: {kind}: {message}")


def _parts(
    flat: Tensor, tensors: Sequence[Tensor], places: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield what belongs to each of the tensors that were put together."""
    parts = flat.split([tensors[place].numel() for place in places])
    for place, part in zip(places, parts, strict=True):
        yield place, part.view_as(tensors[place])
