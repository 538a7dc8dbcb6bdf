"""Losses as they are traced: those of Pyro by equal ones, those with stages one stage at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

from pyro_recursive import bounds
from pyro_recursive.losses.multi_sample import MultiSampleELBO
from pyro_recursive.mapa.loss import MAPA_ELBO
from pyro_recursive.tracing.protocols import StagedLoss
from pyro_recursive.training.compiled.flat import Unsupported

ENDLESS = 2**31  # steps


class TracedLoss(NamedTuple):
    """A loss of a model and a guide: with its graph, and what a step depends on beside arguments.

    ``stage`` returns that, and for how many steps it stays the same: 0 where a step runs eagerly.
    ``advance`` notes compiled steps.
    """

    differentiable: Callable[..., Tensor]
    stage: Callable[[], tuple[Any, int]]
    advance: Callable[[int], None]


def traced_loss(model: Callable, guide: Callable, loss: ELBO) -> TracedLoss:
    """Return a loss in the form that is traced."""
    if isinstance(loss, StagedLoss):
        staged = loss
        return TracedLoss(
            lambda *args, **kwargs: staged.stage_loss(model, guide, *args, **kwargs),
            lambda: staged.stage_of(guide),
            lambda count: staged.count_steps(guide, count),
        )
    traced = equal_loss(loss)

    def differentiable(*args: Any, **kwargs: Any) -> Tensor:
        if isinstance(loss, MAPA_ELBO):
            raise Unsupported("MAPA_ELBO chooses its codes in Python")
        return traced.differentiable_loss(model, guide, *args, **kwargs)

    return TracedLoss(differentiable, lambda: (None, ENDLESS), lambda count: None)


def equal_loss(loss: Any) -> Any:
    """Return the loss of this package that equals one of Pyro's; any other as it is."""
    order = {Trace_ELBO: 1.0, RenyiELBO: getattr(loss, "alpha", 0.0)}.get(type(loss))
    if order is None:
        return loss
    return MultiSampleELBO(
        bounds.renyi(order),
        estimator="score",
        num_particles=loss.num_particles,
        # Pyro's constructor counts the plate of the particles.
        max_plate_nesting=loss.max_plate_nesting
        - (loss.vectorize_particles and loss.num_particles > 1),
        vectorize_particles=loss.vectorize_particles,
    )
