"""The loss of MAPA: a bound of the evidence under an empirical prior."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO

from pyro_recursive.mapa.empirical_model import index_site
from pyro_recursive.mapa.log_sums import merge_factors
from pyro_recursive.tracing.program import Program, structure_of

__all__ = ["MAPA_ELBO"]


class MAPA_ELBO(TraceEnum_ELBO):
    """The bound that trains a `pyro_recursive.MAPAGuide`: sums over codes, row by row.

    Minus the sum over rows of ``log sum_j exp(log_weights[n, j]) w_j p(x_n | c_j)`` over the codes
    that the guide chose for this step, and the ELBO in the latents beside them, in nats. Everything
    else is Pyro's `TraceEnum_ELBO`: other discrete sites of the model that are marked for
    enumeration are summed, too; subsample scales and masks stand where they belong;
    ``num_particles`` draws the other latents (all on the same codes when vectorised). Unlike
    Pyro's, an instance keeps nothing of the models that it meets.

    ``compute_marginals`` returns the posterior of the index among the codes of the step.

    Arguments: those of `pyro.infer.TraceEnum_ELBO`.

    Raises:
        TypeError: the guide is no `MAPAGuide`.
        ValueError: sites that depend on the code have different scales (Pyro's own check).

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby, Pan & Doshi-Velez, arXiv 2403.08941).

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

    max_plate_nesting: float

    def __repr__(self) -> str:
        """Return the loss with its number of particles."""
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def loss(self, model: Callable, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus the bound, without a graph: no step of training."""
        with torch.no_grad():
            return super().loss(model, guide, *args, **kwargs)

    def _get_traces(
        self, model: Callable, guide: Any, args: Any, kwargs: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Run the guide of the other latents, and the model on codes."""
        empiricalized = getattr(guide, "empiricalized", None)
        if empiricalized is None:
            raise TypeError(
                f"MAPA_ELBO trains a MAPAGuide, which says what the codes are; got a "
                f"{type(guide).__name__}. Other guides have other losses: Trace_ELBO, IWAE_ELBO."
            )
        guessed = math.isinf(self.max_plate_nesting)
        if guessed:
            found = structure_of(Program(model, guide.others, args, kwargs)).max_plate_nesting
            self.max_plate_nesting = found + (self.vectorize_particles and self.num_particles > 1)
        try:
            for traces in super()._get_traces(empiricalized(model), guide.others, args, kwargs):
                merge_factors(traces[0], index_site(guide.site))
                yield traces
            if torch.is_grad_enabled():
                guide.end_step()
        finally:
            if guessed:
                self.max_plate_nesting = math.inf
