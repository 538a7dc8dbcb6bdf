"""Guides refined on the ELBO of each row."""

from pyro_recursive.guides.semi_amortized.guide import SemiAmortizedGuide

__all__ = ["SemiAmortizedGuide"]
