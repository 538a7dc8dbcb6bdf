"""Losses: drop-in replacements for `pyro.infer.Trace_ELBO`."""

from pyro_recursive.losses.ciwae import CIWAE_ELBO
from pyro_recursive.losses.mixture import MISELBO, SIWAE_ELBO, Stratified_ELBO
from pyro_recursive.losses.multi_sample import (
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    MultiSampleELBO,
)
from pyro_recursive.losses.recursive_mixture import RecursiveMixture_ELBO

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MISELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "SIWAE_ELBO",
    "MultiSampleELBO",
    "RecursiveMixture_ELBO",
    "Stratified_ELBO",
]
