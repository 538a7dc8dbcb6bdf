"""Tighter bounds and richer posteriors for any Pyro model, by swapping one loss or one guide."""

import sys

from pyro_recursive import mapa
from pyro_recursive.bounds import estimators, mixture_objectives
from pyro_recursive.evaluation import information
from pyro_recursive.evaluation.evidence import log_marginal
from pyro_recursive.evaluation.gaps import gaps
from pyro_recursive.guides import base, gaussian_families
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.flow import FlowGuide
from pyro_recursive.guides.mixture import MixtureGuide, RecursiveMixtureGuide, Schedule
from pyro_recursive.guides.semi_amortized import SemiAmortizedGuide, updates
from pyro_recursive.losses import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    MultiSampleELBO,
    RecursiveMixture_ELBO,
    Stratified_ELBO,
)
from pyro_recursive.mapa import candidates
from pyro_recursive.mapa.guide import MAPAGuide
from pyro_recursive.mapa.loss import MAPA_ELBO
from pyro_recursive.priors import ExemplarPrior, VampPrior
from pyro_recursive.training import CompiledSVI, fit, fit_or_sample, nuts_start, pathfinder

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MAPA_ELBO",
    "MISELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "SIWAE_ELBO",
    "AmortizedGuide",
    "CompiledSVI",
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
    "fit_or_sample",
    "gaps",
    "log_marginal",
    "nuts_start",
    "pathfinder",
]

__version__ = "0.1.0"

# Former names of modules, kept importable.
for _name, _module in {
    "aggregate": information,
    "empirical": mapa,
    "empirical.candidates": candidates,
    "empirical.kernels": mapa.kernels,
    "estimators": estimators,
    "guides.families": gaussian_families,
    "guides.packed": base,
    "guides.updates": updates,
    "recursion": mixture_objectives,
}.items():
    _parent, _, _child = f"{__name__}.{_name}".rpartition(".")
    sys.modules[f"{_parent}.{_child}"] = _module
    setattr(sys.modules[_parent], _child, _module)
