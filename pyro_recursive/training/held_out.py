"""Validation data: the mean loss over their batches, and many of their rows at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.infer import ELBO
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.training.checkpoint import forked_rng
from pyro_recursive.training.learner import Learner
from pyro_recursive.training.minibatches import Batch, Data, Minibatches, rows_of

__all__ = ["HeldOut"]

SEED = 0  # the same draws in each validation, so that differences are the guide's


class HeldOut:
    """Held-out data, neither shuffled nor transformed; to evaluate on them leaves no trace.

    :param data: in any form that `Minibatches` takes
    :param batch_size: rows per batch of tensors; a DataLoader has its own
    :param processes: share the rows of each batch, as in `Minibatches`, each with its own draws
    """

    def __init__(
        self, data: Data, batch_size: int | None, processes: ProcessGroup | None = None
    ) -> None:
        """Check the data."""
        size = None if isinstance(data, DataLoader) else batch_size
        self.processes = processes or ProcessGroup()
        self.batches = Minibatches(
            data, size, shuffle=False, name="validation", processes=self.processes
        )

    @contextmanager
    def evaluating(self, learner: Learner) -> Iterator[None]:
        """Hold modules in eval mode, without gradients; the same random draws each time."""
        seed = SEED + self.processes.rank
        with learner.evaluating(), forked_rng(seed, self.batches.generators):
            yield

    def loss(self, learner: Learner, loss: ELBO) -> tuple[float, float]:
        """Return mean loss in nats and mean rows of the batches."""
        with self.evaluating(learner):
            pairs = [learner.evaluate(loss, batch) for batch in self.batches]
        value, rows = torch.as_tensor(pairs, dtype=torch.float64).mean(0).tolist()
        return sum(self.processes.gather(value, "the end of validation")), rows

    def rows(self, count: int) -> Batch:
        """Return one batch of so many rows, or of all, where there are fewer.

        The same random choice of the rows of tensors each time, the first rows of a DataLoader.

        :raises ValueError: batches of a DataLoader cannot be put together
        """
        columns = self.batches.data
        if isinstance(columns, DataLoader):
            return self._first(count)
        if count >= len(columns[0]):
            return tuple(columns)
        generator = Generator("cpu").manual_seed(SEED)
        order = torch.randperm(len(columns[0]), generator=generator, device="cpu")
        return tuple(column[order[:count].to(column.device)] for column in columns)

    def _first(self, count: int) -> Batch:
        found: list[Batch] = []
        for batch in self.batches:
            found.append(batch)
            for column in batch:
                if not isinstance(column, Tensor) or column.dim() == 0:
                    raise ValueError(
                        "The mutual information needs many rows of validation at once, and its "
                        f"batches hold a {type(column).__name__} without rows. Give validation as "
                        "tensors."
                    )
            if sum(map(rows_of, found)) >= count:
                break
        return tuple(torch.cat(column)[:count] for column in zip(*found, strict=True))
