"""One step of several processes, each on its share of the rows of a batch.

As in torch's DistributedDataParallel all parameters and buffers are process 0's and gradients are
summed; here parameters may also appear in any step, and shares may be of unequal size.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.training.data import Batch, rows_of

Tensors = Mapping[str, Tensor]


class DistributedStep:
    """What a learner's step exchanges with the other processes; nothing, if there are none.

    A step is `begin`, the loss and its gradient, and `combine`; ``rows`` is that of all processes.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.is_alone = processes.count == 1
        self.is_new = not self.is_alone  # whether `sync_initial` is still to be called
        self.own_rows = self.rows = 1
        self._before: list[dict[str, Any]] = [{}, {}]  # versions of parameters and buffers

    @property
    def has_no_rows(self) -> bool:
        """Whether this process, one of several, has no row of the batch."""
        return not self.is_alone and not self.own_rows

    @property
    def weight(self) -> float:
        """This process's part of the rows."""
        return self.own_rows / self.rows

    def begin(self, batch: Batch, place: str) -> None:
        """Exchange the numbers of rows; ``place`` names this point of the program."""
        self.own_rows = rows_of(batch)
        counts = [rows for (rows,) in self.processes.barrier_at(place, self.own_rows)]
        self.rows = sum(counts)
        if self.is_new and not all(counts):
            raise ValueError(f"The first batch has {self.rows} rows for {len(counts)} processes.")

    def sync_initial(self, parameters: Tensors, buffers: Tensors) -> None:
        """Copy the first process's parameters and buffers."""
        self._check_same({**parameters, **{f"buffer {n}": b for n, b in buffers.items()}})
        self.processes.copy_first([*parameters.values(), *buffers.values()])
        self.is_new = False

    def watch(self, *tensors: Tensors) -> None:
        """Record the versions of parameters and buffers, to find those that the loss changes."""
        self._before = [_versions(each) for each in tensors]

    def combine(self, loss: Tensor, parameters: Tensors, buffers: Tensors) -> Tensor:
        """Return the loss of the whole batch, with its gradient in the parameters.

        Parameters that this step has created or changed, and then also loss and gradient, become
        the first process's: those of the others belong to other parameters.
        """
        names = [
            [name for name, version in _versions(live).items() if version != before.get(name)]
            for live, before in zip((parameters, buffers), self._before, strict=True)
        ]
        names.append([name for name, p in parameters.items() if p.grad is not None])
        codes = [zlib.crc32(",".join(each).encode()) for each in names]
        if len(set(self.processes.barrier_at("a step", len(parameters), *codes))) > 1 or names[0]:
            self._check_same(parameters)
            gathered = self.processes.gather(names, "what a step has changed")
            for i, live in enumerate((parameters, buffers, parameters)):
                names[i] = [n for n in live if any(n in each[i] for each in gathered)]
        new, moved, with_grad = names
        self.processes.copy_first([parameters[name] for name in new])
        self.processes.copy_first([buffers[name] for name in moved])
        gradients = [
            torch.zeros_like(p) if (p := parameters[name]).grad is None else p.grad
            for name in with_grad
        ]
        weight = float(self.processes.is_first) if new else self.weight
        *sums, total = self.processes.add([*gradients, loss], weight)
        for name, gradient in zip(with_grad, sums, strict=True):
            parameters[name].grad = gradient
        return total

    def _check_same(self, tensors: Tensors) -> None:
        """Raise where names, dtypes or shapes differ between the processes."""
        own = [f"'{name}' {t.dtype} {list(t.shape)}" for name, t in tensors.items()]
        gathered = self.processes.gather(own, "the parameters")
        for rank, other in enumerate(gathered):
            if other != gathered[0]:
                differing = sorted(set(other) ^ set(gathered[0])) or ["their order"]
                raise ValueError(
                    f"Process {rank} has other parameters or buffers than process 0: "
                    f"{'; '.join(differing)}. Create all of them before fit."
                )


def _versions(tensors: Tensors) -> dict[str, Any]:
    return {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}
