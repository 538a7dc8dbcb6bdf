"""Multi-sample bounds: pure functions of log-weights of shape ``[M, K, *plates]``."""

from pyro_recursive.bounds.bound import (
    Bound,
    Derivatives,
    Jackknife,
    Pooled,
    PowerMeans,
    Split,
    Weighted,
    ciwae,
    elbo,
    iwae,
    jackknife,
    miwae,
    piwae,
    renyi,
)

__all__ = [
    "Bound",
    "Derivatives",
    "Jackknife",
    "Pooled",
    "PowerMeans",
    "Split",
    "Weighted",
    "ciwae",
    "elbo",
    "iwae",
    "jackknife",
    "miwae",
    "piwae",
    "renyi",
]
