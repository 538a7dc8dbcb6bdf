"""The table of losses, each made with M estimates of K samples, and the bounds that they are."""

from collections.abc import Callable, Iterable
from typing import Any

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    MultiSampleELBO,
    RecursiveMixture_ELBO,
    Stratified_ELBO,
    bounds,
)

LOSSES: dict[str, Callable[..., MultiSampleELBO]] = {
    "IWAE_ELBO": lambda M, K, **options: IWAE_ELBO(K, num_estimates=M, **options),
    "MIWAE_ELBO": MIWAE_ELBO,
    "PIWAE_ELBO": PIWAE_ELBO,
    "CIWAE_ELBO": lambda M, K, **options: CIWAE_ELBO(K, num_estimates=M, beta=0.3, **options),
    "MultiSampleELBO": lambda M, K, **options: MultiSampleELBO(
        bounds.renyi(0.5), num_estimates=M, num_particles=K, **options
    ),
}
BOUNDS = {
    "IWAE_ELBO": bounds.iwae,
    "MIWAE_ELBO": bounds.miwae,
    "PIWAE_ELBO": bounds.piwae,
    "CIWAE_ELBO": bounds.ciwae(0.3),
    "MultiSampleELBO": bounds.renyi(0.5),
}
# Losses of guides that are mixtures.
OF_MIXTURES: dict[str, Callable[..., Any]] = {
    loss.__name__: lambda M, K, loss=loss, **options: loss(K, num_estimates=M, **options)
    for loss in (Stratified_ELBO, SIWAE_ELBO, MISELBO, RecursiveMixture_ELBO)
}
# Estimators that treat reparameterised sites alike: without other sites each three are the same.
ALIKE = ("pathwise", "score", "vimco"), ("dreg", "dreg+score", "dreg+vimco")


def that_differ(of: Iterable[str], has_scores: bool) -> list[str]:
    """Leave out estimators that are the same as another one, for guides with sites to score or not.

    The last of each of `ALIKE` speaks for all: its code for other sites runs as well.
    """
    same = set() if has_scores else {name for alike in ALIKE for name in alike[:-1]}
    return [name for name in of if name not in same]
