"""A model with the prior of one latent site replaced by another one."""

import math
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


def with_prior(
    model: Callable, site: str, prior: Distribution | Callable[[], Any]
) -> "ReplacedPrior":
    """Return the same model with the prior of one latent site replaced.

    A value of the site is ``biject_to(support)`` of a vector of the prior, with the Jacobian in its
    density; each entry of the site's plates has a vector of its own. Names, plates, scales and
    shapes stay, so that the result works with `pyro.infer.Predictive`,
    `pyro_recursive.log_marginal`, guides and losses, and can be pickled if its parts can.
    Parameters of a module with gradients are registered as ``<site>_prior``.

    Args:
        model: any Pyro model.
        site: the name of a latent site, continuous, not a Delta.
        prior: from `pyro_recursive.mapa.recover_prior`; or a distribution over vectors, batch
            ``[]`` and event ``[D]``, with D the size of the site's event in unconstrained space; or
            a callable that returns one, such as a `pyro_recursive.VampPrior`.

    Raises:
        TypeError: the prior is none of these.
        NotImplementedError: when the model runs, the site is discrete.
        ValueError: when the model runs, the site is absent, observed, a Delta, or masked; its
            event has not the prior's size; the prior is no distribution over vectors.

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
    return ReplacedPrior(model, site, prior)


class ReplacedPrior:
    """A model with another prior: a callable with ``model``, ``site`` and ``prior``."""

    def __init__(self, model: Callable, site: str, prior: Distribution | Callable[[], Any]) -> None:
        if not isinstance(prior, Distribution) and not callable(prior):
            raise TypeError(
                f"The prior must be a distribution or return one when called, got "
                f"{type(prior).__name__}."
            )
        self.model, self.site, self.prior = model, site, prior

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the other prior."""
        prior = self.prior
        if isinstance(prior, nn.Module) and any(p.requires_grad for p in prior.parameters()):
            pyro.module(f"{self.site}_prior", prior)
        with _ReplacePrior(self.site, prior):
            return self.model(*args, **kwargs)


class _ReplacePrior(Messenger):
    """Replaces the distribution of one sample site."""

    def __init__(self, site: str, prior: Distribution | Callable[[], Any]) -> None:
        super().__init__()
        self.site, self.prior = site, prior
        self.seen: list[str] = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is None and self.site not in self.seen:
            raise ValueError(f"The model has no sample site '{self.site}'; it has {self.seen}.")

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.seen.append(msg["name"])
        if msg["name"] != self.site:
            return
        _check_site(msg)
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
    _check_prior(new, math.prod(shape), site)
    new = new.expand(old.batch_shape)
    steps = []
    if shape != new.event_shape:
        steps.append(ReshapeTransform(new.event_shape, shape))
    if not _is_real(support):
        steps.append(transform)
    return _Supported(new, steps, support) if steps else new


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def _check_site(msg: Any) -> None:
    name, fn = msg["name"], msg["fn"]
    if msg["is_observed"]:
        raise ValueError(f"Site '{name}' is observed; only latents have a prior.")
    if is_delta(msg):
        raise ValueError(f"Site '{name}' is a Delta, which has no prior.")
    if getattr(fn.support, "is_discrete", False):
        raise NotImplementedError(
            f"Site '{name}' is discrete ({type(fn).__name__}); recovered priors are continuous."
        )
    if isinstance(fn, dist.MaskedDistribution):
        raise ValueError(
            f"The distribution of site '{name}' has a mask: use `with poutine.mask(mask=...)`."
        )


def _check_prior(new: Any, size: int, site: str) -> None:
    batch, event = tuple(new.batch_shape), tuple(new.event_shape)
    if batch or len(event) != 1:
        raise ValueError(
            f"The prior for site '{site}' has batch {batch} and event {event}; it must be over "
            "vectors, without a batch."
        )
    if event[0] != size:
        raise ValueError(
            f"The prior is over vectors of length {event[0]}; site '{site}' has {size} "
            "unconstrained numbers."
        )
