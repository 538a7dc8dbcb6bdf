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

__all__ = ["ReplacedPrior", "with_prior"]


def with_prior(
    model: Callable, site: str, prior: Distribution | Callable[[], Any]
) -> "ReplacedPrior":
    """Return the same model, the prior of one of its latent sites replaced.

    All else stays: names, plates and minibatches, scales, the shapes and the supports of values. A
    value is ``biject_to(support)`` of a vector of the prior, with the Jacobian in its density;
    each entry of the site's plates has a vector of its own. The result is a model as any other, for
    `pyro.infer.Predictive`, for `pyro_recursive.log_marginal`, for guides and losses, and it can
    be pickled as far as its parts can.

    A module's parameters, if any of them has a gradient, are registered under the site's name with
    ``_prior``, so that an optimizer finds them.

    Arguments:
        model: any; run anew in each call.
        site: the name of a latent site, continuous, not a Delta.
        prior: from `pyro_recursive.mapa.recover_prior`; or any distribution over
            vectors, batch ``[]`` and event ``[D]`` with D numbers for an event of the site in
            unconstrained space; or a callable that returns one, such as a
            `pyro_recursive.priors.vamp.VampPrior`.

    Raises:
        TypeError: the prior is none of these.
        NotImplementedError: when the model runs, the site is discrete.
        ValueError: when the model runs, the site is absent, observed, a Delta, or masked; its
            event has not the prior's size; the prior is no distribution over vectors.

    >>> from pyro.infer import Predictive
    >>> from pyro_recursive.mapa.recover import recover_prior
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
    """What `with_prior` returns: a callable with ``model``, ``site`` and ``prior``."""

    def __init__(self, model: Callable, site: str, prior: Distribution | Callable[[], Any]) -> None:
        if not isinstance(prior, Distribution) and not callable(prior):
            raise TypeError(
                f"The prior of site '{site}' must be a distribution or return one when called, got "
                f"{type(prior).__name__}."
            )
        self.model, self.site, self.prior = model, site, prior

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the other prior."""
        prior = self.prior
        if isinstance(prior, nn.Module) and any(p.requires_grad for p in prior.parameters()):
            pyro.module(f"{self.site}_prior", prior)
        with _Replacing(self.site, prior):
            return self.model(*args, **kwargs)


class _Replacing(Messenger):
    """Gives one sample site another distribution."""

    def __init__(self, site: str, prior: Distribution | Callable[[], Any]) -> None:
        super().__init__()
        self.site, self.prior = site, prior
        self.met: list[str] = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is None and self.site not in self.met:
            raise ValueError(
                f"The model has no sample site '{self.site}' whose prior could be replaced; it has "
                f"{self.met}."
            )

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.met.append(msg["name"])
        if msg["name"] != self.site:
            return
        _check_site(msg)
        prior = self.prior  # Pyro's distributions are callable too: a call would draw
        new = prior if isinstance(prior, Distribution) else prior()
        msg["fn"] = _replaced(msg["fn"], new, self.site)


class _Supported(dist.TransformedDistribution):
    """A transformed distribution with a given support: transforms know theirs only roughly."""

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
    """Return the new distribution in the place of the old one: same batch, event and support."""
    support = plain_support(old.support)
    transform = biject_to(support)
    whole = transform.inverse_shape(old.batch_shape + old.event_shape)  # bounds may have rows
    shape = whole[len(old.batch_shape) :]
    _check_prior(new, math.prod(shape), old.event_shape, site)
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
        raise ValueError(f"Site '{name}' is observed in the model: only a latent has a prior.")
    if is_delta(msg):
        raise ValueError(f"Site '{name}' is a Delta: its value is computed and has no prior.")
    if getattr(fn.support, "is_discrete", False):
        raise NotImplementedError(
            f"Site '{name}' is discrete ({type(fn).__name__}), and recovered priors are continuous."
        )
    if isinstance(fn, dist.MaskedDistribution):
        raise ValueError(
            f"The distribution of site '{name}' has a mask, which another prior would lose: write "
            "`with poutine.mask(mask=...)` around the statement instead."
        )


def _check_prior(new: Any, numbers: int, event_shape: torch.Size, site: str) -> None:
    batch, event = tuple(new.batch_shape), tuple(new.event_shape)
    if batch or len(event) != 1:
        raise ValueError(
            f"The prior for site '{site}' has batch {batch} and event {event}; it must have no "
            "batch and vectors as events, as recover_prior makes it."
        )
    if event[0] != numbers:
        raise ValueError(
            f"The prior is over vectors of length {event[0]}, and an event {tuple(event_shape)} of "
            f"site '{site}' has {numbers} numbers in unconstrained space."
        )
