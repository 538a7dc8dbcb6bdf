"""KL warm-up: less weight for the latents while a model is young."""

from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from pyro.poutine.util import site_is_subsample

__all__ = ["KLWarmup", "latent_weight"]


class KLWarmup(Messenger):
    """Weights the densities of all latents, in model and guide, and leaves the observed sites.

    Around a call of an ELBO it turns the sum of ``log p(x | z) + log p(z) - log q(z)`` into
    ``log p(x | z) + weight * (log p(z) - log q(z))``, in nats. Auxiliary sites of a guide, and the
    Delta sites which hold the Jacobian of its transforms, are latent and weighted too. Observed
    means as Pyro sees it: `pyro.factor` and what is under `poutine.condition` stay as they are.

    :param weight: above 0; 1 changes nothing
    :raises ValueError: ``weight`` is not above 0

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> with pyro.poutine.trace() as trace, KLWarmup(0.25):
    ...     model()
    >>> trace.trace.nodes["z"]["scale"]
    0.25
    """

    def __init__(self, weight: float) -> None:
        """Take the weight."""
        if not weight > 0:
            raise ValueError(f"The weight of the latents must be above 0, got {weight}.")
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = self.weight * msg["scale"]

    def _pyro_latent_weight(self, msg: Any) -> None:
        msg["value"] = self.weight * (1.0 if msg["value"] is None else msg["value"])
        msg["done"] = True


@effectful(type="latent_weight")
def latent_weight() -> float:
    """Return what the densities of latents are weighted by around this call."""
    return 1.0
