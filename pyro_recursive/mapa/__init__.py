"""Empirical priors: models whose latents come from codes of the data themselves.

What `pyro_recursive.MAPAGuide` is made of, to use with it or without:

- where the codes come from: `EncodedCodes`, `FreeCodes`, `GridCodes`, `PseudoInputCodes`; a model
  on all of them: `Empiricalized`;
- how near two data are: `kernels`; which codes may explain a datum: `neighbours`, `Table`; which of
  them are decoded: `Plan`;
- back to a continuous prior: `recover_prior`, `with_prior`.
"""

from pyro_recursive.mapa import kernels
from pyro_recursive.mapa.candidates import Plan
from pyro_recursive.mapa.codes import (
    Codes,
    EncodedCodes,
    FreeCodes,
    GridCodes,
    PseudoInputCodes,
)
from pyro_recursive.mapa.empirical_model import Empiricalized
from pyro_recursive.mapa.recover import recover_prior
from pyro_recursive.mapa.recovered_priors import RecoveredPrior
from pyro_recursive.mapa.replaced_prior import with_prior
from pyro_recursive.mapa.table import Table, neighbours

__all__ = [
    "Codes",
    "Empiricalized",
    "EncodedCodes",
    "FreeCodes",
    "GridCodes",
    "Plan",
    "PseudoInputCodes",
    "RecoveredPrior",
    "Table",
    "kernels",
    "neighbours",
    "recover_prior",
    "with_prior",
]
