"""Tighter bounds for any Pyro model, by swapping one loss."""

from pyro_recursive.elbo import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, MultiSampleELBO
from pyro_recursive.evaluation.evidence import log_marginal
from pyro_recursive.training import fit

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "MultiSampleELBO",
    "fit",
    "log_marginal",
]

__version__ = "0.1.0"
