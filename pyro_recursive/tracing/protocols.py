"""What losses and evaluation need from a guide, as types.

A loss knows no guide class; a guide that has the members of one of these protocols can be given to
it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from pyro import poutine
from torch import Tensor, nn

from pyro_recursive.bounds.mixture_objectives import Gain


@runtime_checkable
class MixtureLike(Protocol):
    """A mixture guide: it runs under `tracing.handlers.ComponentAssignment`."""

    @property
    def members(self) -> tuple[int, ...]:
        """The numbers of the components that make up the mixture."""

    @property
    def holds_densities(self) -> bool:
        """Whether it can stop the gradient of parameters in densities, not in draws."""


class TrainingStage(Protocol):
    """A stage of a `GrowingMixture`."""

    @property
    def kind(self) -> str:
        """One of "first", "propose", "refine", "cycle" and "joint"."""

    @property
    def component(self) -> int | None:
        """The component in training, None where all are trained together."""


class FreeComponent(Protocol):
    """A Gaussian component with parameters of its own, one for each row."""

    @property
    def rows(self) -> tuple[Any, ...]:
        """The frames of the row plates."""

    @property
    def size(self) -> int:
        """D, the length of a row's unconstrained vector."""

    def pack(self, trace: poutine.Trace) -> Tensor:
        """Return the latents of a trace, ``[particles, *rows, D]``."""

    def place(self, loc: Tensor, scale: Tensor) -> None:
        """Set locations and scales, ``[*rows, D]`` both."""

    def scatter(self, widening: float) -> None:
        """Draw locations around the first component's, some of its scales away."""


@runtime_checkable
class GrowingMixture(MixtureLike, Protocol):
    """A mixture guide whose components are added one by one, with the schedule as its state."""

    epsilon: float

    @property
    def stage(self) -> TrainingStage:
        """The stage of training."""

    @property
    def steps_taken(self) -> int:
        """The training steps taken in this stage."""

    @property
    def starts_component(self) -> bool:
        """Whether the next step is the first one for a component other than the first."""

    @property
    def is_trial(self) -> bool:
        """Whether the next step is the acceptance test of a component."""

    @property
    def num_draws(self) -> int:
        """The draws of each component and row in an acceptance test."""

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Create all parameters."""

    def rollback_first_call(self) -> AbstractContextManager[None]:
        """Undo the guide's first call where it raises."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the guide's parameters."""

    def free_component(self) -> FreeComponent | None:
        """Return the component that this step adds, if it is a `FreeComponent`."""

    def check_shared_weights(self) -> None:
        """Raise ValueError where rows have weights of their own."""

    def set_log_weights(self, log_weights: Tensor) -> None:
        """Set the members' weights, ``[J]``, which all rows share."""

    def count_step(self) -> None:
        """Count a training step."""

    def end_trial(self, gain: Gain) -> bool:
        """Keep or drop the component on trial; return whether it is kept."""


@runtime_checkable
class CodeGuide(Protocol):
    """A guide that chooses, for each training step, the codes of a model's empirical prior."""

    site: str | None

    def others(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latents that have no codes."""

    def empiricalized(self, model: Callable) -> Callable:
        """Return the model with the codes of a step in place of the prior of ``site``."""

    def end_step(self) -> None:
        """Count a training step."""
