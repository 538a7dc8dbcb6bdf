"""A model with the prior of one latent site replaced by another one."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.distributions import Distribution, biject_to
from torch.distributions.transforms import ReshapeTransform

from pyro_recursive.guides.packing import plain_support
from pyro_recursive.tracing.sites import is_delta


class ReplacedPrior:
    """The same model with the prior of one latent site replaced; `with_prior` is another name.

    A value of the site is ``biject_to(support)`` of a vector of the prior, with the Jacobian in its
    density; each entry of the site's plates has a vector of its own. Names, plates, scales and
    shapes stay, so that the result works like any Pyro model, and can be pickled if its parts can.
    Parameters of a module with gradients are registered as ``<site>_prior``.

    Args:
        model: any Pyro model.
        site: the name of a latent site, continuous, not a Delta.
        prior: from `pyro_recursive.mapa.recover_prior`; or a distribution over vectors, batch
            ``[]`` and event ``[D]``, with D the size of the site's event in unconstrained space; or
            a callable that returns one, such as a `pyro_recursive.VampPrior`.

    Raises:
        ValueError: when the model runs, the site is absent, observed, a Delta, or masked; or the
            prior is not over vectors of its size.

    >>> from pyro.infer import Predictive
    >>> from pyro_recursive.mapa import recover_prior
    >>> def model(size):
    ...     with pyro.plate("data", size):
    ...         scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...         return pyro.sample("x", dist.Normal(0.0, scale))
    >>> codes = torch.randn(500, 1) / 10 + 2  # of log(scale)
    >>> recovered = with_prior(model, "scale", recover_prior(codes))
    >>> draws = Predictive(recovered, num_samples=20)(1000)["scale"]
    >>> draws.shape, bool((draws.log() - 2).abs().mean() < 0.2)
    (torch.Size([20, 1000]), True)
    """

    def __init__(self, model: Callable, site: str, prior: Distribution | Callable[[], Any]) -> None:
        self.model, self.site, self.prior = model, site, prior

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the other prior."""
        prior = self.prior
        if isinstance(prior, nn.Module) and any(p.requires_grad for p in prior.parameters()):
            pyro.module(f"{self.site}_prior", prior)
        handler = _ReplacePrior(self.site, prior)
        with handler:
            result = self.model(*args, **kwargs)
        if self.site not in handler.seen:
            raise ValueError(f"The model has no sample site '{self.site}'; it has {handler.seen}.")
        return result


with_prior = ReplacedPrior


class _ReplacePrior(Messenger):
    """Replaces the distribution of one sample site."""

    def __init__(self, site: str, prior: Distribution | Callable[[], Any]) -> None:
        super().__init__()
        self.site, self.prior = site, prior
        self.seen: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.seen.append(msg["name"])
        if msg["name"] == self.site:
            if (
                msg["is_observed"]
                or is_delta(msg)
                or isinstance(msg["fn"], dist.MaskedDistribution)
            ):
                raise ValueError(f"Site '{self.site}' is observed, masked or a Delta.")
            prior = self.prior  # Pyro's distributions are callable too: a call would draw
            new = prior if isinstance(prior, Distribution) else prior()
            msg["fn"] = _replaced(msg["fn"], new, self.site)


class _Supported(dist.TransformedDistribution):
    """A transformed distribution with the support of the site, not of its transforms."""

    def __init__(self, base: Any, transforms: list, support: Any) -> None:
        self.base, self.given = base, support
        super().__init__(base, transforms, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the site."""
        return self.given

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Supported":
        """Expand the vectors' distribution."""
        return _Supported(self.base.expand(torch.Size(batch_shape)), self.transforms, self.given)


def _replaced(old: Any, new: Any, site: str) -> Any:
    """Return the new distribution with the batch, event and support of the old one."""
    support = plain_support(old.support)
    transform = biject_to(support)
    whole = transform.inverse_shape(old.batch_shape + old.event_shape)  # bounds may have rows
    shape = whole[len(old.batch_shape) :]
    if new.batch_shape or new.event_shape != (shape.numel(),):
        raise ValueError(f"Site '{site}' needs a prior over vectors of length {shape.numel()}.")
    new = new.expand(old.batch_shape)
    steps = [] if shape == new.event_shape else [ReshapeTransform(new.event_shape, shape)]
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support not in (constraints.real, constraints.real_vector):
        steps.append(transform)
    return _Supported(new, steps, plain_support(old.support)) if steps else new
