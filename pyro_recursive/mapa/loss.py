"""The loss of MAPA: an ELBO whose model sums over codes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.bounds.bound import elbo
from pyro_recursive.bounds.estimators import EstimatorName
from pyro_recursive.losses.base import LogWeightELBO
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.protocols import CodeGuide


class MAPA_ELBO(LogWeightELBO):
    """The loss of a `pyro_recursive.MAPAGuide`: minus a lower bound of log p(x) over codes.

    For each row n the bound is ``log sum_j exp(log_weights[n, j]) w_j p(x_n | c_j)`` over the codes
    of the step, in nats, and beside it the ELBO of the other latents. The index of a code is one
    more enumerated latent of the model: others are summed together with it, as by any loss of this
    package, and subsample scales apply outside the logarithm.

    Args:
        num_particles: draws of the other latents (all on the same codes when vectorised).
        max_plate_nesting, vectorize_particles: as in `pyro_recursive.MultiSampleELBO`.
        estimator: the gradient of the other latents' guide, as there; by default the pathwise one,
            and the score function for sites that are not reparameterised.

    Raises:
        TypeError: the guide is no `pyro_recursive.tracing.protocols.CodeGuide`.
        ValueError: sites that depend on the code have different scales; the density of a row
            depends on the codes of others.

    Source: `Towards Model-Agnostic Posterior Approximation` (Yacoby et al., arXiv 2403.08941).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_recursive import MAPAGuide
    >>> from pyro_recursive.mapa import FreeCodes
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> x = torch.tensor([0.0, 1.0, 3.0])
    >>> exact = MAPAGuide(model, FreeCodes(x[:, None]))  # no table: the sum over all codes
    >>> loss = MAPA_ELBO().loss(model, exact, x)
    >>> mixture = dist.Normal(x, 1.0).log_prob(x[:, None]).logsumexp(1) - torch.tensor(3.0).log()
    >>> round(loss, 4) == round(-mixture.sum().item(), 4)
    True
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        *,
        vectorize_particles: bool = False,
        estimator: EstimatorName = "score",
    ) -> None:
        super().__init__(
            elbo,
            estimator=estimator,
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )

    def __repr__(self) -> str:
        """Return the loss with its number of particles and its estimator."""
        return (
            f"{type(self).__name__}(num_particles={self.num_particles}, "
            f"estimator={self.estimator.name!r})"
        )

    def differentiable_loss(self, model: Callable, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss with its graph, and count a training step if gradients are enabled."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if torch.is_grad_enabled():
            guide.end_step()
        return loss

    def _program(self, model: Callable, guide: Any, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Return the guide of the other latents, and the model on codes."""
        if not isinstance(guide, CodeGuide):
            raise TypeError(f"MAPA_ELBO trains a MAPAGuide, got a {type(guide).__name__}.")
        return Program(guide.empiricalized(model), guide.others, args, kwargs, remembered_by=model)
