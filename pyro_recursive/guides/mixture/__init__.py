"""Mixtures of guides, fixed in size or grown component by component."""

from pyro_recursive.guides.mixture.guide import MixtureGuide
from pyro_recursive.guides.mixture.recursive import RecursiveMixtureGuide
from pyro_recursive.guides.mixture.schedule import Schedule

__all__ = ["MixtureGuide", "RecursiveMixtureGuide", "Schedule"]
