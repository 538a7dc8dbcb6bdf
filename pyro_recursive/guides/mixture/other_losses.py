"""A growing guide that another loss trains: it would stay what it is without a word."""

import warnings
from typing import Any

from torch import Tensor

from pyro_recursive.guides.packing import Values

__all__ = ["OtherLosses"]

MANY = 100  # a look at gradients is no training


class OtherLosses:
    """Counts the runs of a growing guide whose gradients belong to no step of its schedule.

    A step of the loss that grows it moves the schedule on, after gradients that the step takes for
    itself and before the backward pass; no other does. Then the count starts anew.
    """

    def __init__(self) -> None:
        self.count, self.has_warned = 0, False

    def watch(self, guide: Any, values: Values) -> None:
        """Note where gradients reach the draws of this run; warn once where that was often."""
        drawn = next((value for value in values.values() if value.requires_grad), None)
        if self.has_warned or drawn is None:
            return
        if self.count >= MANY:
            self._warn(guide)
            return
        then = guide.stage, guide.steps_taken
        seen: list[bool] = []  # an estimator may go through a draw more than once

        def note(gradient: Tensor) -> None:
            if not seen and (guide.stage, guide.steps_taken) == then:
                self.count += 1
            seen.append(True)

        drawn.register_hook(note)

    def _warn(self, guide: Any) -> None:
        self.count, self.has_warned = 0, True
        warnings.warn(
            f"Another loss than RecursiveMixture_ELBO takes gradients of guide '{guide.name}', "
            f"with {len(guide.members)} of {len(guide.components)} components and "
            f"{guide.steps_left} steps of its schedule left: it does not grow. Use "
            "RecursiveMixture_ELBO, or a MixtureGuide, whose components all losses train.",
            stacklevel=2,
        )
