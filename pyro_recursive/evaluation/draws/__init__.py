"""Draws of every site of a model: from a guide, from the model, or from a Markov chain."""

from pyro_recursive.evaluation.draws.posterior import Draws, posterior_draws
from pyro_recursive.evaluation.draws.predictive import (
    log_likelihoods,
    observed_data,
    predictive_draws,
    prior_draws,
)

__all__ = [
    "Draws",
    "log_likelihoods",
    "observed_data",
    "posterior_draws",
    "predictive_draws",
    "prior_draws",
]
