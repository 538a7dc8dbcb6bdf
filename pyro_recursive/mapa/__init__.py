"""MAPA: models whose latents are codes of the data, guessed from distances between data.

- guide and loss: `MAPAGuide`, `MAPA_ELBO`;
- codes: `EncodedCodes`, `FreeCodes`, `GridCodes`, `PseudoInputCodes`; a model on all of them:
  `Empiricalized`;
- neighbours: `kernels`, `neighbours`, `Table`; which of them a step decodes: `Plan`;
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
from pyro_recursive.mapa.guide import MAPAGuide
from pyro_recursive.mapa.loss import MAPA_ELBO
from pyro_recursive.mapa.recover import recover_prior, with_prior
from pyro_recursive.mapa.recovered_priors import RecoveredPrior
from pyro_recursive.mapa.table import Table, neighbours

__all__ = [
    "MAPA_ELBO",
    "Codes",
    "Empiricalized",
    "EncodedCodes",
    "FreeCodes",
    "GridCodes",
    "MAPAGuide",
    "Plan",
    "PseudoInputCodes",
    "RecoveredPrior",
    "Table",
    "kernels",
    "neighbours",
    "recover_prior",
    "with_prior",
]
