"""Aggressive training of the guide, against posterior collapse.

Early in the training of a model that could do without its latents the guide lags behind: its
posteriors are not yet those of the model, so that the model learns to ignore them. Here the guide
takes many steps alone before each step of the model, until that no longer helps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.utils.data import DataLoader

from pyro_recursive.evaluation.information import mutual_information
from pyro_recursive.evaluation.posterior_tables import PosteriorTable, alone
from pyro_recursive.tracing.arguments import check_integers
from pyro_recursive.training.held_out import HeldOut
from pyro_recursive.training.learner import Learner
from pyro_recursive.training.minibatches import Batch, Minibatches

__all__ = ["Aggressive", "Blocks", "Phase"]


@dataclass(frozen=True)
class Aggressive:
    """How `fit` trains the guide before each step of the model, and when it stops doing so.

    Before each step the guide's parameters alone take up to ``max_steps`` steps, on fresh random
    minibatches of the training data. After each block of ``check_every`` the mean loss per row of
    the block is compared with that of the block before, and they end where it is no lower. Then the
    model's parameters alone take their step, on the minibatch of the epoch.

    After each epoch the mutual information ``I_q`` of rows and latents is measured on validation
    data (`evaluation.information.mutual_information`, in nats). When it has not grown for
    ``patience`` epochs, with 1 the first in which it does not, the phase is over for good, and all
    parameters take their steps together.

    A parameter that guide and model share is the guide's. What does not take part in a step is left
    alone by the optimiser: no momentum, no weight decay. ``clip_norm`` is of the gradients of what
    does. KL warm-up applies to all steps. Minibatches of the guide's steps have the same number of
    rows and an order of their own; a DataLoader is read by a second iterator, made anew in each
    epoch and whenever it has come to its end.

    Cost: each step becomes up to ``max_steps + 1``; `History` counts them.

    :param max_steps: the guide's steps before a step of the model; 0 is ordinary training
    :param check_every: steps in a block
    :param patience: epochs
    :param rows: B, how many rows of the validation data are compared: I_q is at most log B
    :param draws: from each of their posteriors
    :param plate: the name of the plate of the rows, where it is not clear from the guide
    :raises ValueError: a number is out of range

    Source: 'Lagging Inference Networks and Posterior Collapse in Variational Autoencoders' (He et
    al., arXiv 1901.05534).

    >>> schedule = Aggressive(patience=2)
    >>> schedule.goes_on([0.5, 0.8, 0.7]), schedule.goes_on([0.5, 0.8, 0.7, 0.75, None])
    (True, False)
    """

    max_steps: int = 100
    check_every: int = 15
    patience: int = 1
    rows: int = 1000
    draws: int = 1
    plate: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        counts = ("max_steps", "check_every", "patience", "rows", "draws")
        check_integers(**{name: getattr(self, name) for name in counts})
        if self.max_steps < 0:
            raise ValueError(f"max_steps must be at least 0, got {self.max_steps}.")
        for name in counts[1:]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def goes_on(self, measured: Sequence[float | None]) -> bool:
        """Whether the phase goes on after epochs of such mutual informations, None for unknown."""
        values = [-math.inf if math.isnan(v) else v for v in measured if v is not None]
        since_best = len(values) - 1 - values.index(max(values)) if values else 0
        return since_best < self.patience


class Blocks:
    """The mean loss per row of a block of steps, beside that of the block before.

    >>> import torch
    >>> blocks = Blocks(2)
    >>> [blocks.worsened_after(torch.tensor(loss), rows=1) for loss in (5.0, 3.0, 4.0, 4.0)]
    [False, False, False, True]
    """

    def __init__(self, size: int) -> None:
        """Start with no block before."""
        self.size, self.before = size, math.inf
        self._start()

    def _start(self) -> None:
        self.total: Tensor | float = 0.0  # on the device: to read it is to wait
        self.count = self.rows = 0

    def worsened_after(self, loss: Tensor, rows: int) -> bool:
        """Take in a step; return whether it ends a block that is no better than the one before."""
        self.total, self.rows, self.count = self.total + loss, self.rows + rows, self.count + 1
        if self.count < self.size:
            return False
        mean = float(self.total) / self.rows
        worsened = not mean < self.before
        self.before = mean
        self._start()
        return worsened


class Phase:
    """The aggressive phase of a run; its state is in the history, and in the random states."""

    def __init__(
        self, options: Aggressive, learner: Learner, batches: Minibatches, held_out: HeldOut
    ) -> None:
        """Take the data that the guide's steps and the mutual information are of."""
        self.options, self.learner, self.held_out = options, learner, held_out
        self.fresh = batches.again()

    @property
    def generators(self) -> list[Generator]:
        """The generators of the order of fresh minibatches, where they are not the data's own."""
        return [] if isinstance(self.fresh.data, DataLoader) else self.fresh.generators

    def stepper(self) -> Callable[[Batch, int], Tensor]:
        """Return what takes the steps of one epoch: the guide's, then one of the model."""
        fresh = _endless(self.fresh)

        def step(batch: Batch, epoch: int) -> Tensor:
            self._train_guide(fresh, epoch)
            loss = self.learner.step(batch, epoch, part="model")
            if self.learner.steps == 1:
                self._look()
            return loss

        return step

    def _look(self) -> None:
        """Raise where the mutual information has no meaning: now, not at the end of the epoch."""
        with self.held_out.evaluating(self.learner):
            batch = self.held_out.rows(self.options.rows)
            PosteriorTable(alone(self.learner.guide, batch, {}), self.options.plate)

    def measure(self) -> float:
        """Return the mutual information on validation data in nats; leave no trace."""
        with self.held_out.evaluating(self.learner):
            batch = self.held_out.rows(self.options.rows)
            found = mutual_information(
                self.learner.guide,
                *batch,
                num_draws=self.options.draws,
                plate=self.options.plate,
            )
        return found.item()

    def _train_guide(self, fresh: Iterator[Batch], epoch: int) -> None:
        blocks = Blocks(self.options.check_every)
        for _ in range(self.options.max_steps):
            batch = next(fresh)
            loss = self.learner.step(batch, epoch, part="guide")
            if blocks.worsened_after(loss, self.learner.team.rows):
                return


def _endless(batches: Minibatches) -> Iterator[Batch]:
    """Yield batches for ever, pass after pass."""
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise ValueError("The DataLoader gave no batches. Check its data set.")
