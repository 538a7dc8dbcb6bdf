"""Aggressive training of the guide, against posterior collapse.

Early in training the guide's posteriors lag behind the model's, so that the model learns to ignore
its latents. Here the guide takes many steps alone before each step of the model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.utils.data import DataLoader

from pyro_recursive.evaluation.information import mutual_information
from pyro_recursive.evaluation.posterior_tables import table_of
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.training.data import Batch, Minibatches
from pyro_recursive.training.learner import Learner


@dataclass(frozen=True)
class Aggressive:
    """How `fit` trains the guide before each step of the model, and when it stops doing so.

    Before each step up to ``max_steps`` steps on fresh random minibatches move the guide's
    parameters alone; they end after a block of ``check_every`` whose mean loss per row is no lower
    than that of the block before. Then the model's parameters alone take their step. After each
    epoch the mutual information I_q of rows and latents is measured on the validation data, in
    nats; after ``patience`` epochs without growth the phase is over, and all parameters move
    together. Shared parameters are the guide's. An optimiser leaves parameters that do not take
    part in a step alone: no momentum, no weight decay.

    Args:
        max_steps: the guide's steps before a step of the model; 0 is ordinary training.
        check_every: steps in a block.
        patience: epochs.
        rows: B, the number of validation rows that I_q compares; it is at most log B.
        draws: from the posterior of each of these rows.
        plate: the name of the plate of the rows, where it is not clear from the guide.

    Reference: 'Lagging Inference Networks and Posterior Collapse in Variational Autoencoders' (He
    et al., arXiv 1901.05534).

    Example:
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
        """Check the ranges."""
        check_at_least(0, max_steps=self.max_steps)
        check_at_least(1, check_every=self.check_every, patience=self.patience)
        check_at_least(1, rows=self.rows, draws=self.draws)

    def goes_on(self, measured: Sequence[float | None]) -> bool:
        """Return whether the phase goes on after these mutual informations, None if unknown."""
        values = [-math.inf if math.isnan(v) else v for v in measured if v is not None]
        since_best = len(values) - 1 - values.index(max(values)) if values else 0
        return since_best < self.patience


class Phase:
    """The aggressive phase of a run; all its state is the history's and the generators'."""

    def __init__(
        self, options: Aggressive, learner: Learner, batches: Minibatches, held_out: Minibatches
    ) -> None:
        self.options, self.learner, self.held_out = options, learner, held_out
        self.fresh = batches.again()

    @property
    def generators(self) -> list[Generator]:
        """The generators of the order of fresh minibatches, where they are not the data's own."""
        return [] if isinstance(self.fresh.data, DataLoader) else self.fresh.generators

    def stepper(self) -> Callable[[Batch, int], Tensor]:
        """Return a function that takes the guide's steps, and then one step of the model."""
        fresh = self._fresh_batches()

        def step(batch: Batch, epoch: int) -> Tensor:
            self._train_guide(fresh, epoch)
            loss = self.learner.step(batch, epoch, owner="model")
            if self.learner.steps == 1:  # raise now, not after an epoch, where I_q has no value
                rows = self.held_out.choose(self.options.rows)
                with self.learner.evaluating(self.held_out), rows.rows:
                    table_of(self.learner.guide, rows, {}, self.options.plate)
            return loss

        return step

    def measure(self) -> float:
        """Return the mutual information on validation data in nats."""
        guide, options = self.learner.guide, self.options
        rows = self.held_out.choose(options.rows)
        with self.learner.evaluating(self.held_out), rows.rows:
            found = mutual_information(guide, *rows, num_draws=options.draws, plate=options.plate)
        return found.item()

    def _fresh_batches(self) -> Iterator[Batch]:
        while True:
            yield from self.fresh

    def _train_guide(self, fresh: Iterator[Batch], epoch: int) -> None:
        """Take steps of the guide until a block's mean loss per row is no lower than the last's."""
        last, rows, losses = math.inf, 0, list[Tensor]()  # on the device, which is not waited for
        for step in range(1, self.options.max_steps + 1):
            losses.append(self.learner.step(next(fresh), epoch, owner="guide"))
            rows += self.learner.group.rows
            if step % self.options.check_every == 0:
                mean = float(sum(losses)) / rows
                if not mean < last:
                    return
                last, rows, losses = mean, 0, []
