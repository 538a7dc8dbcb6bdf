"""Priors that are mixtures of an encoder's posteriors."""

from pyro_recursive.priors.vamp import ExemplarPrior, VampPrior

__all__ = ["ExemplarPrior", "VampPrior"]
