"""How the MAPA benchmark judges what was learned: all by exact sums and quadrature."""

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.mapa_methods import Empirical, Learner
from benchmarks.mapa_training import bound
from pyro_recursive.datasets import Curve, curve_evidence

NODES = 4001
VALIDATION_NODES = 1001
WIDTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.41, 1.7, 2.0)  # of a KDE, in noise scales


def mixture_evidence(points: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return log p(x) under equal normals around points ``[M, D]``, float64 ``[rows]``."""
    distance = torch.cdist(x.double(), points.double()) / scale
    volume = x.shape[1] * math.log(scale * math.sqrt(2 * math.pi))
    return (-0.5 * distance.square()).logsumexp(1) - math.log(len(points)) - volume


def validation(learner: Learner, nodes: int = VALIDATION_NODES) -> float:
    """Return the mean log p(x) of the validation points; fewer nodes choose between restarts."""
    data = learner.data
    return _mean(curve_evidence(learner.generator(), data.validation, data.scale, nodes=nodes))


def score(learner: Learner, truth: Tensor, batch_size: int, repeats: int) -> dict[str, Any]:
    """Return what a trained method is worth: ``truth`` is log p*(x) of the test points.

    ``gap`` is from the training bound up to the log-likelihood of the same parameters, on the
    training points: the sum over all codes, or that of a VAE by quadrature.
    """
    data = learner.data
    found = curve_evidence(learner.generator(), data.test, data.scale, nodes=NODES)
    result = {"kl": _mean(truth - found), "kl_of_codes": None}
    if isinstance(learner, Empirical):
        points = learner.points()
        result["kl_of_codes"] = _mean(truth - mixture_evidence(points, data.test, data.scale))
        own = mixture_evidence(points, data.train, data.scale)
    else:
        own = curve_evidence(learner.generator(), data.train, data.scale, nodes=NODES)
    result["gap"] = _mean(own) - bound(learner, batch_size, repeats)
    return result


def density_estimate(data: Curve, truth: Tensor) -> dict[str, Any]:
    """Return the score of normals around the training points, as wide as validation wants."""
    found = {
        width: _mean(mixture_evidence(data.train, data.validation, width * data.scale))
        for width in WIDTHS
    }
    best = max(found, key=lambda width: found[width])
    scores = mixture_evidence(data.train, data.test, best * data.scale)
    result = {"kl": _mean(truth - scores), "kl_of_codes": None, "gap": None}
    costs = dict.fromkeys(("passes", "seconds", "processor_seconds"), 0.0)
    return {**result, **costs, "validation": found[best], "width": best}


def _mean(values: Tensor) -> float:
    return values.mean().item()
