"""Which of the parameters are the guide's, and which the model's."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.training.checkpoint import forked_rng
from pyro_recursive.training.minibatches import Batch

__all__ = ["ParameterOwners", "Part", "unconstrained"]

Part = Literal["guide", "model"]


class ParameterOwners:
    """The guide's parameters are those that Pyro sees while it runs, all others are the model's.

    So that each is in one of them: what guide and model share (the encoder of a `VampPrior`, say)
    is the guide's, what is the loss's own the model's. A guide's own runs of the model do not
    count where it hides them from Pyro, as this package's guides do.
    """

    def __init__(self, guide: Callable) -> None:
        """Start with no parameter seen."""
        self.guide = guide
        self.of_guide: set[str] = set()  # by the name in the learner's list
        self.num_sorted = 0  # how many of that list have been looked at

    def sort(self, parameters: Mapping[str, Tensor], batch: Batch) -> None:
        """Look at the parameters anew; runs the guide, without a trace but on modules' buffers.

        :raises ValueError: all parameters are the guide's, or all the model's
        """
        with forked_rng(), torch.no_grad(), poutine.trace(param_only=True) as captured:
            self.guide(*batch)
        seen = {id(unconstrained(site["value"])) for site in captured.trace.nodes.values()}
        self.of_guide |= {name for name, tensor in parameters.items() if id(tensor) in seen}
        self.num_sorted = len(parameters)
        if not self.of_guide or len(self.of_guide) == len(parameters):
            part, other = ("model", "guide") if self.of_guide else ("guide", "model")
            raise ValueError(
                f"Aggressive training takes steps of the guide and of the model in turn, and the "
                f"{part} has no parameters of its own: all that Pyro sees are the {other}'s "
                f"({', '.join(parameters)}). Leave out aggressive=."
            )

    def others(self, parameters: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        """Return the parameters that are known to be in the other part."""
        is_other = part == "model"
        names = list(parameters)[: self.num_sorted]
        return {name: parameters[name] for name in names if (name in self.of_guide) == is_other}

    def state(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {"of_guide": sorted(self.of_guide), "num_sorted": self.num_sorted}

    def set_state(self, state: Mapping[str, Any] | None) -> None:
        """Go back to what was found; None is nothing."""
        found = state or {"of_guide": (), "num_sorted": 0}
        self.of_guide, self.num_sorted = set(found["of_guide"]), found["num_sorted"]


def unconstrained(value: Any) -> Tensor:
    """Return the leaf tensor behind a parameter's value, as its site has it.

    With Pyro's ``module_local_params`` a module's plain parameters are themselves.
    """
    return value.unconstrained() if hasattr(value, "unconstrained") else value
