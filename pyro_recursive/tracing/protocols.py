"""What losses and evaluation need from a guide, as types.

A loss knows no guide class; a guide that has the members of one of these protocols can be given to
it. Attributes are only read.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from pyro import poutine
from torch import Tensor, nn

from pyro_recursive.bounds.mixture_objectives import Gain


@runtime_checkable
class MixtureLike(Protocol):
    """A mixture guide, which runs under `tracing.handlers.ComponentAssignment`.

    ``members`` are the numbers of the components that make up the mixture. With
    ``holds_densities`` it can stop the gradient of parameters in densities, not in draws.
    """

    members: tuple[int, ...]
    holds_densities: bool


class FreeComponent(Protocol):
    """A Gaussian component with parameters of its own, ``size`` latents for each of the ``rows``.

    ``rows`` are the frames of the row plates. Packed latents are unconstrained; locations and
    scales are ``[*rows, D]``. To scatter it draws locations around the first component's, some of
    its scales away. One without rows may start by the importance weights of draws
    (``starts_by_weights``), at a Gaussian with a Cholesky factor.
    """

    rows: tuple[Any, ...]
    size: int
    starts_by_weights: bool

    def pack(self, trace: poutine.Trace) -> Tensor: ...
    def place(self, loc: Tensor, scale: Tensor) -> None: ...
    def place_gaussian(self, loc: Tensor, scale_tril: Tensor) -> None: ...
    def scatter(self, widening: float) -> None: ...


@runtime_checkable
class GrowingMixture(MixtureLike, Protocol):
    """A mixture guide whose components are added one by one; the schedule is its state.

    Its ``stage`` has a ``kind`` ("first", "propose", "refine", "cycle", "joint") and a
    ``component``, None for all. The next step may be the first of all, before which components
    start from paths (``starts_from_paths``), the first for a component
    (``starts_component``) or its acceptance test (``is_trial``), with ``num_draws`` of each
    component and row of a call, after which ``end_trial`` returns whether it is kept. A stage
    without end has 0 ``stage_steps_left``. A proposed component has the weight ``epsilon``.
    Log-weights can be set, ``[J]``, where all rows share one vector.
    Growth can end by importance weights of draws that leave nothing to gain.
    It can ``watch`` for members that have lost their weight, once it is no longer growing, and
    drop them in joint stages.
    """

    epsilon: float
    stage: Any
    steps_taken: int
    stage_steps_left: int
    starts_component: bool
    starts_from_paths: bool
    is_trial: bool
    is_growing: bool

    def num_draws(self, args: tuple, kwargs: dict[str, Any]) -> int: ...
    def prepare(self, *args: Any, **kwargs: Any) -> None: ...
    def rollback_first_call(self) -> AbstractContextManager[None]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def start_from_paths(self, args: tuple, kwargs: dict[str, Any]) -> None: ...
    def end_if_complete(self, log_ratios: Tensor) -> None: ...
    def free_component(self) -> FreeComponent | None: ...
    def check_shared_weights(self) -> None: ...
    def set_log_weights(self, log_weights: Tensor) -> None: ...
    def count_step(self, count: int = 1) -> None: ...
    def end_trial(self, gain: Gain) -> bool: ...
    def watch(self, *args: Any, **kwargs: Any) -> None: ...


@runtime_checkable
class StagedLoss(Protocol):
    """A loss whose steps depend on a state of the guide that advances with them.

    ``stage_of`` returns what decides a step, and for how many steps from now it stays so: 0 where
    a step does more than train. ``stage_loss`` is the loss of a step that is not counted;
    ``count_steps`` counts such steps, and has the arguments of the first.
    """

    def stage_of(self, guide: Callable) -> tuple[Any, int]: ...
    def stage_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor: ...
    def count_steps(self, guide: Callable, count: int, /, *args: Any, **kwargs: Any) -> None: ...


@runtime_checkable
class CodeGuide(Protocol):
    """A guide that chooses, for each training step, the codes of a model's empirical prior.

    ``others`` samples the latents that have no codes; ``empiricalized`` returns the model with the
    codes of a step in place of the prior of a latent; ``end_step`` counts a training step.
    """

    def others(self, *args: Any, **kwargs: Any) -> Any: ...
    def empiricalized(self, model: Callable) -> Callable: ...
    def end_step(self) -> None: ...
