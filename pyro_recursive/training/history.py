"""What `fit` records, epoch by epoch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["History"]


@dataclass(repr=False)
class History:
    """What `fit` recorded: lists with one entry per epoch, ``json.dumps(asdict(history))`` works.

    ``loss`` is the mean over the epoch's batches of what the loss returned before each step, in
    nats: of the full data where the model's plate knows their size (``pyro.plate("data", size,
    subsample=batch)``), of the batch where it does not. During KL warm-up it is the weighted loss.
    ``validation`` is the same mean over the validation batches, never weighted, None in an epoch
    without validation. ``rows`` and ``validation_rows`` are the mean rows of a batch: where the
    plate is the batch, ``loss / rows`` is per datum. ``learning_rate`` is the first parameter
    group's in that epoch; ``seconds`` the epoch's duration; ``steps`` the steps since the start,
    one for each batch.

    ``aggressive`` says whether the epoch was, see `Aggressive`: its steps were the model's alone,
    each after some of the guide alone. ``guide_steps`` counts these since the start: what the phase
    costs. ``mutual_information`` was measured after the epoch, in nats; None elsewhere.

    >>> history = History(epoch=[1, 2], loss=[3.0, 2.0], validation=[4.0, 5.0])
    >>> history.best_epoch
    1
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

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the lowest validation loss; None without validation."""
        values = [math.inf if v is None or math.isnan(v) else v for v in self.validation]
        best = min(values, default=math.inf)
        return self.epoch[values.index(best)] if best < math.inf else None

    def out_of_patience(self, patience: float | None) -> bool:
        """Whether ``patience`` epochs, up to a validation just done, brought no better one."""
        if patience is None or not self.validation or self.validation[-1] is None:
            return False
        return len(self.epoch) - (self.best_epoch or 0) >= patience

    def __repr__(self) -> str:
        """Say in a line how it went; the fields have the rest."""
        if not self.epoch:
            return "History(no epochs)"
        parts = [
            f"{len(self.epoch)} epochs{', stopped early' * self.stopped_early}",
            f"{sum(self.seconds):.1f} s",
            f"loss {self.loss[-1]:.2f}{_batches_of(self.rows[-1:])}",
        ]
        validated = [value for value in self.validation if value is not None]
        if validated:
            rows = [] if self.validation_rows is None else [self.validation_rows]
            parts.append(f"validation {validated[-1]:.2f}{_batches_of(rows)}")
        if self.best_epoch is not None:
            best = self.validation[self.epoch.index(self.best_epoch)]
            parts.append(f"best {best:.2f} in epoch {self.best_epoch}")
        return f"History({'; '.join(parts)})"

    @classmethod
    def restored(cls, recorded: Mapping[str, Any]) -> "History":
        """Return a history from its ``asdict``, which may be older than aggressive training."""
        epochs = len(recorded["epoch"])
        none = {
            "aggressive": [False] * epochs,
            "guide_steps": [0] * epochs,
            "mutual_information": [None] * epochs,
        }
        return cls(**{**none, **recorded})


def _batches_of(rows: list[float]) -> str:
    """Say how many rows a loss is of, where its plate is the batch."""
    return f" (batches of {rows[0]:.4g} rows)" if rows else ""
