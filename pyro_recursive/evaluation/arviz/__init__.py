"""Everything about a fitted guide, or a Markov chain, as one ArviZ object; and its LOO.

Importing this imports ArviZ, which takes seconds: the rest of the package does not.
"""

from pyro_recursive.evaluation.arviz.export import mcmc_to_arviz, to_arviz
from pyro_recursive.evaluation.arviz.loo import loo

__all__ = ["loo", "mcmc_to_arviz", "to_arviz"]
