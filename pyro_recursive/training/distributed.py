"""One step of several processes, each on its share of the batch, so that all stay the same.

As in torch's DistributedDataParallel: parameters and buffers are the first process's, gradients are
summed. But parameters may be new at any time, and the sum is the whole batch's gradient for plates
of every kind and shares of unequal size.
"""

import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.training.minibatches import Batch, rows_of
from pyro_recursive.training.shares import Share

__all__ = ["DistributedStep"]

Tensors = Mapping[str, Tensor]


class DistributedStep:
    """What a learner does together with those of the other processes; nothing, where it is alone.

    Steps are `begin`, the loss and its gradient under `share`, and `combine`. ``rows`` is the
    number of rows of all processes in this step.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.plates: frozenset[str] | None = None  # those of the rows; None before they met
        self.own_rows = self.rows = 1
        self._parameters: dict[str, Any] = {}
        self._buffers: dict[str, Any] = {}

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.processes.count == 1

    @property
    def is_new(self) -> bool:
        """Whether there are others, and these have not met yet."""
        return self.plates is None and not self.is_alone

    @property
    def has_no_rows(self) -> bool:
        """Whether the others alone have rows."""
        return not self.is_alone and not self.own_rows

    @property
    def weight(self) -> float:
        """What this process's loss counts for."""
        return self.own_rows / self.rows

    def begin(self, batch: Batch, place: str) -> None:
        """Find out how many rows the whole batch has.

        :raises ValueError: there are too few, in the first step, for each process to have one
        """
        self.own_rows = rows_of(batch)
        counts = [rows for (rows,) in self.processes.barrier_at(place, self.own_rows)]
        self.rows = sum(counts)
        if self.is_new and not all(counts):
            raise ValueError(
                f"The first batch has {self.rows} rows, and each of the {self.processes.count} "
                "processes needs one. Use a larger batch_size, or fewer processes."
            )

    def share(self) -> AbstractContextManager:
        """Return the context in which the loss of this process's rows estimates the whole's."""
        if self.is_alone or not self.plates:
            return nullcontext()
        return Share(self.plates, self.own_rows, self.rows)

    def sync_initial(self, parameters: Tensors, buffers: Tensors, plates: frozenset[str]) -> None:
        """Start from the first process's parameters, buffers and plates of the rows.

        :raises ValueError: another process has other parameters or buffers
        """
        self._compare({**parameters, **{f"buffer {n}": b for n, b in buffers.items()}})
        self.plates = self.processes.from_first(plates, "the first step")
        self.processes.copy_first([*parameters.values(), *buffers.values()])

    def watch(self, parameters: Tensors, buffers: Tensors) -> None:
        """Note parameters and buffers, to see which of them the loss itself changes."""
        self._parameters, self._buffers = _versions(parameters), _versions(buffers)

    def combine(self, loss: Tensor, parameters: Tensors, buffers: Tensors) -> Tensor:
        """Return the loss of the whole batch, and leave its gradient; same parameters and buffers.

        Where the loss has created or changed parameters in this step, they become the first
        process's, and so do loss and gradient: those of the others were for other parameters.

        :raises ValueError: a parameter is new in some of the processes only
        """
        moved, changed = self._changes(parameters, buffers)
        graded = [number for number, p in enumerate(parameters.values()) if p.grad is not None]
        found = (len(parameters), _code(moved), _code(changed), _code(graded))
        weight = self.weight
        heard = self.processes.barrier_at("a step", *found)
        if len(set(heard)) > 1 or moved:
            graded, moved, changed = self._reconcile(parameters, graded, moved, changed)
        if moved:
            self.processes.copy_first([parameters[name] for name in moved])
            weight = float(self.processes.is_first)
        self.processes.copy_first([buffers[name] for name in changed])
        return self._add(loss, list(parameters.values()), graded, weight)

    def _add(
        self, loss: Tensor, parameters: list[Tensor], graded: Sequence[int], weight: float
    ) -> Tensor:
        moving = [parameters[number] for number in graded]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in moving]
        *sums, total = self.processes.add([*gradients, loss], weight)
        for parameter, gradient in zip(moving, sums, strict=True):
            parameter.grad = gradient
        return total

    def _changes(self, parameters: Tensors, buffers: Tensors) -> tuple[list[str], list[str]]:
        """Return the parameters and buffers that are new or changed since `watch`."""
        found = []
        for noted, live in ((self._parameters, parameters), (self._buffers, buffers)):
            now = _versions(live)
            found.append([name for name in live if now[name] != noted.get(name)])
        return found[0], found[1]

    def _reconcile(self, parameters: Tensors, *lists: Sequence[Any]) -> list[list[Any]]:
        """Return what is in the lists of any process, the same everywhere."""
        self._compare(parameters)
        heard = self.processes.gather(lists, "what a step has changed")
        return [sorted(set().union(*column)) for column in zip(*heard, strict=True)]

    def _compare(self, tensors: Tensors) -> None:
        """Raise where the tensors of the processes are not the same."""
        own = [f"'{name}' {t.dtype} {list(t.shape)}" for name, t in tensors.items()]
        heard = self.processes.gather(own, "the parameters")
        for rank, other in enumerate(heard):
            if other != heard[0]:
                excess = sorted(set(other) ^ set(heard[0])) or ["their order"]
                raise ValueError(
                    f"Process {rank} has other parameters or buffers than process 0, which differ "
                    f"in {'; '.join(excess)}. Create all of them in each process before fit, e.g. "
                    "by one call of guide and model."
                )


def _versions(tensors: Tensors) -> dict[str, Any]:
    return {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}


def _code(names: Sequence[Any]) -> int:
    return zlib.crc32(",".join(map(str, names)).encode())
