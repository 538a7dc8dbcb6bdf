"""What `fit` records epoch by epoch, and a learning-rate schedule in epochs."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(repr=False)
class History:
    """The record of `fit`: lists with one entry per epoch; ``json.dumps(asdict(history))`` works.

    With ``steps=`` an epoch is a block of 50 steps.

    Attributes:
        epoch: 1, 2, ...
        loss: mean over the epoch's batches of what the loss returned before each step, in nats;
            weighted during KL warm-up. ``loss / N`` is per datum where the model's plate states the
            size N of the data, ``loss / rows`` where it has the size of a batch.
        validation: the same mean over the validation batches, never weighted; None without.
        rows, validation_rows: mean rows of a batch.
        learning_rate: that of the first parameter group in the epoch.
        seconds: duration of the epoch.
        steps: steps since the start, one for each batch.
        aggressive: whether the epoch was aggressive, see `Aggressive`.
        guide_steps: steps of the guide alone since the start.
        mutual_information: measured after an aggressive epoch, in nats; None elsewhere.
        stopped_early: whether ``patience`` ended the training.
        interrupted: whether Ctrl-C ended it; the epoch that it came in is not in the lists.
        stopped: why training has ended, with the excess or the fall of the loss that a rule has
            found, in nats; None where all epochs or steps were taken.

    Example:
        >>> history = History(epoch=[1, 2], loss=[3.0, 2.0], validation=[4.0, 5.0])
        >>> history
        History(2 epochs; 0.0 s; loss 2.00; validation 5.00; best 4.00 in epoch 1)
    """

    epoch: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[float | None] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    validation_rows: float | None = None
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    aggressive: list[bool] = field(default_factory=list)
    guide_steps: list[int] = field(default_factory=list)
    mutual_information: list[float | None] = field(default_factory=list)
    stopped_early: bool = False
    interrupted: bool = False
    stopped: str | None = None

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the lowest validation loss; None without validation."""
        values = [math.inf if v is None or math.isnan(v) else v for v in self.validation]
        best = min(values, default=math.inf)
        return self.epoch[values.index(best)] if best < math.inf else None

    def out_of_patience(self, patience: float | None) -> bool:
        """Return whether the last validation was the ``patience``-th epoch without a better one."""
        if patience is None or not self.validation or self.validation[-1] is None:
            return False
        return len(self.epoch) - (self.best_epoch or 0) >= patience

    def __repr__(self) -> str:
        """Return a summary in one line."""
        if not self.epoch:
            return "History(no epochs)"
        rows = f" (batches of {self.rows[-1]:.4g} rows)" if self.rows else ""
        parts = [
            f"{len(self.epoch)} epochs{', stopped early' * self.stopped_early}"
            f"{', interrupted' * self.interrupted}",
            f"{sum(self.seconds):.1f} s",
            f"loss {self.loss[-1]:.2f}{rows}",
        ]
        if validated := [value for value in self.validation if value is not None]:
            of = self.validation_rows
            rows = "" if of is None else f" (batches of {of:.4g} rows)"
            parts.append(f"validation {validated[-1]:.2f}{rows}")
        if self.best_epoch is not None:
            best = self.validation[self.epoch.index(self.best_epoch)]
            parts.append(f"best {best:.2f} in epoch {self.best_epoch}")
        if self.stopped is not None and not (self.stopped_early or self.interrupted):
            parts.append(self.stopped)
        return f"History({'; '.join(parts)})"


def burda_schedule(
    optimizer: Optimizer, num_stages: int = 8, *, num_epochs: int | None = None
) -> LambdaLR:
    r"""Return a schedule that multiplies the learning rate by :math:`10^{-i/7}` in stage i.

    Stage i = 0, 1, ... lasts :math:`3^i` epochs: the rate changes after epochs 1, 4, 13, 40, 121,
    364 and 1093, and stays at its last value. Step it once per epoch, as `fit` does.

    Args:
        optimizer: any torch optimiser; the paper uses Adam(lr=1e-3, eps=1e-4).
        num_stages: eight take ``(3**8 - 1) / 2 = 3280`` epochs.
        num_epochs: all stages, in proportion, take so many; a stage that begins and ends within one
            epoch is left out.

    Reference: 'Importance Weighted Autoencoders' (Burda et al., arXiv 1509.00519).

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
        >>> scheduler = burda_schedule(optimizer, num_stages=2)
        >>> for epoch in range(2):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> [round(rate, 6) for rate in scheduler.get_last_lr()]
        [0.00072]
    """
    ends = list(accumulate(3**stage for stage in range(num_stages)))
    stretch = 1.0 if num_epochs is None else num_epochs / ends[-1]
    starts = [end * stretch for end in ends[:-1]]
    return LambdaLR(optimizer, lambda epoch: 10 ** -(bisect_right(starts, epoch) / 7))
