"""When training stops: means over blocks of steps, the excess in nats, and falls of the loss.

Pure functions of block means; nothing here knows a model or a guide.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

Each = TypeVar("Each")
Values = dict[str, Tensor]  # unconstrained parameters by name
Divergence = Callable[[Values, Values], float]

BLOCK = 50  # steps
MAX_STEPS = 20_000
TOLERANCE = 0.01  # nats
MOST_MEANS = 32  # means of parameters that are kept; then pairs are merged
FEWEST_BLOCKS, FEWEST_OF_LOSS = 8, 32  # of a stage, judged by a divergence or by the loss alone
ERRORS = 2.0  # standard errors above which a fall of the loss counts


def last_halves(values: Sequence[Each]) -> tuple[Sequence[Each], Sequence[Each]]:
    """Return the two halves of the last half, of one length."""
    quarter = len(values) // 4
    return values[-2 * quarter : -quarter], values[-quarter:]


def mean_of(values: Sequence[Values]) -> Values:
    """Return the mean of sets of parameters with the same names."""
    return {name: torch.stack([each[name] for each in values]).mean(0) for name in values[0]}


def level(losses: Sequence[float]) -> tuple[float, float]:
    """Return the mean of block means of a loss and its standard error.

    The variance is half the mean square of successive differences, which a slow drift of the loss
    leaves as it is.
    """
    squares = fmean((after - before) ** 2 for before, after in pairwise(losses))
    return fmean(losses), math.sqrt(squares / 2 / len(losses))


def fall(losses: Sequence[float]) -> tuple[float, float]:
    """Return by how much the loss fell between the halves of the last half, and the error of that.

    Of at least 8 block means.
    """
    before, after = last_halves(losses)
    _, error = level([*before, *after])
    return fmean(before) - fmean(after), 2 * error


def is_fall(size: float, error: float, tolerance: float) -> bool:
    """Return whether a fall of the loss is more than the tolerance and more than noise."""
    return size > max(ERRORS * error, tolerance)


class BlockMeans:
    """Means of parameters over blocks; each of ``means`` is that of ``width`` blocks."""

    def __init__(self) -> None:
        self.means: list[Values] = []
        self.width = 1
        self.rest: list[Values] = []  # of the next one

    @property
    def names(self) -> set[str]:
        """The names of the parameters."""
        return {name for values in [*self.means, *self.rest] for name in values}

    def add(self, mean: Values) -> None:
        """Add the mean of a block; merge pairs where there are too many."""
        self.rest.append(mean)
        if len(self.rest) == self.width:
            self.means.append(mean_of(self.rest))
            self.rest = []
        if len(self.means) == MOST_MEANS:
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means, self.width = [mean_of(pair) for pair in pairs], 2 * self.width


class StopRule:
    """Ends stages of training, each with half the learning rate of the one before, and the last.

    A stage ends if both hold for the two halves of the last half of its blocks, of which a1 and a2
    are the means of the parameters. With a divergence, the excess ``SKL(q_a1, q_a2) / 8`` is below
    the tolerance, in nats: for stationary noise its mean is that of KL between the guides of the
    mean of both and of the optimum. And the loss no longer falls: by less than two standard errors,
    or by less than the tolerance. The next stage starts from the mean. Training ends if half the
    symmetrised KL between the means of two stages is below twice the tolerance, or, without a
    divergence, the loss did not fall between the two.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.steps, self.stages, self.is_done = 0, 1, False
        self.losses: list[float] = []  # of the blocks of this stage
        self.blocks = BlockMeans()
        self.average: Values = {}  # of the last stage; empty where parameters are not averaged
        self.last: tuple[float, float] | None = None  # the level of the loss in the last stage
        self.excess: float | None = None
        self.fallen: tuple[float, float] | None = None  # what `fall` said last

    def add(self, steps: int, loss: float, mean: Values, divergence: Divergence | None) -> bool:
        """Take a block with its mean loss and parameters; return whether its stage has ended."""
        if self.losses and self.blocks.names != mean.keys():  # some parameters are new
            self._begin()
        self.steps += steps
        self.losses.append(loss)
        self.blocks.add(mean)
        fewest = FEWEST_OF_LOSS if divergence is None else FEWEST_BLOCKS
        if len(self.losses) < fewest or len(self.losses) % (2 * self.blocks.width):
            return False
        self.fallen = fall(self.losses)
        one, other = map(mean_of, last_halves(self.blocks.means))
        self.excess = None if divergence is None else divergence(one, other) / 8
        is_near = self.excess is None or self.excess < self.tolerance  # False for NaN
        if not is_near or is_fall(*self.fallen, self.tolerance):
            return False
        self._end(mean_of([one, other]), divergence)
        return True

    def _end(self, average: Values, divergence: Divergence | None) -> None:
        before, after = last_halves(self.losses)
        now = level([*before, *after])
        if divergence is not None:
            moved = divergence(average, self.average) / 2 if self.average else math.inf
            self.is_done = moved < 2 * self.tolerance
        elif self.last is not None:
            size, error = self.last[0] - now[0], math.hypot(self.last[1], now[1])
            self.is_done = not is_fall(size, error, self.tolerance)
        self.average, self.last = average, now
        self.stages += not self.is_done
        self._begin()

    def _begin(self) -> None:
        self.losses, self.blocks = [], BlockMeans()

    def at_the_cap(self) -> Values:
        """Return what training that has not converged ends with; empty for the last iterate.

        That is the mean of this stage, or of the last one, unless the loss still falls.
        """
        if len(self.losses) < FEWEST_BLOCKS:
            return self.average
        if is_fall(*fall(self.losses), self.tolerance):
            return {}
        return mean_of([mean_of(each) for each in last_halves(self.blocks.means)])

    def reason(self, max_steps: int) -> str:
        """Return why training has stopped."""
        found = "too few steps to judge"
        if self.excess is not None:
            found = f"excess {self.excess:.2g} nats"
        elif self.fallen is not None:
            found = "the loss falls by {:.2g} ± {:.2g} nats".format(*self.fallen)
        if not self.is_done:
            return f"cap of {max_steps:,} steps: {found}"
        return f"{found} after {self.steps:,} steps in {self.stages} stages"

    def state(self) -> dict[str, Any]:
        """Return all that the next block depends on."""
        return {**vars(self), "blocks": dict(vars(self.blocks))}

    def set_state(self, state: dict[str, Any], like: Values) -> None:
        """Take over a state, with the parameters where those of ``like`` are."""

        def placed(values: Values) -> Values:
            return {name: value.to(like[name].device) for name, value in values.items()}

        vars(self).update({**state, "blocks": self.blocks, "tolerance": self.tolerance})
        vars(self.blocks).update(state["blocks"])
        self.average = placed(self.average)
        self.blocks.means = [*map(placed, self.blocks.means)]
        self.blocks.rest = [*map(placed, self.blocks.rest)]
