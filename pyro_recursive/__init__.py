"""Tighter bounds and richer posteriors for any Pyro model, by swapping one loss or one guide."""

from pyro_recursive.elbo import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, MultiSampleELBO
from pyro_recursive.evaluation.evidence import log_marginal
from pyro_recursive.evaluation.gaps import gaps
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.flow import FlowGuide
from pyro_recursive.guides.mapa import MAPAGuide
from pyro_recursive.guides.mixture import MixtureGuide
from pyro_recursive.guides.recursive_mixture import RecursiveMixtureGuide
from pyro_recursive.guides.schedules import Schedule
from pyro_recursive.guides.semi_amortized import SemiAmortizedGuide
from pyro_recursive.mapa_elbo import MAPA_ELBO
from pyro_recursive.priors import ExemplarPrior, VampPrior
from pyro_recursive.recursive_elbo import RecursiveMixture_ELBO
from pyro_recursive.stratified import MISELBO, SIWAE_ELBO, Stratified_ELBO
from pyro_recursive.training import fit

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MAPA_ELBO",
    "MISELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "SIWAE_ELBO",
    "AmortizedGuide",
    "ExemplarPrior",
    "FlowGuide",
    "MAPAGuide",
    "MixtureGuide",
    "MultiSampleELBO",
    "RecursiveMixtureGuide",
    "RecursiveMixture_ELBO",
    "Schedule",
    "SemiAmortizedGuide",
    "Stratified_ELBO",
    "VampPrior",
    "fit",
    "gaps",
    "log_marginal",
]

__version__ = "0.1.0"
