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
    log_sum_exp_of_others,
    mean_of_others,
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
    "log_sum_exp_of_others",
    "mean_of_others",
    "miwae",
    "piwae",
    "renyi",
]
