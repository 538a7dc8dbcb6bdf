"""Points around curves in the plane: networks for them, and scores by exact sums and quadrature."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.methods.mapa import Empirical, Learner
from pyro_recursive.datasets import Curve, curve_evidence
from pyro_recursive.mapa import Table, recover_prior

NODES = 4001
VALIDATION_NODES = 1001
WIDTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.41, 1.7, 2.0)  # of a KDE, in noise scales


class CurveVAE:
    """One latent, a normal around points of the plane, networks with three hidden layers."""

    def __init__(self, scale: float, outputs: int, hidden: int) -> None:
        self.scale = scale
        self.decoder = _network(1, 2, hidden)  # first: the same for all methods of one seed
        self.encoder = _network(2, outputs, hidden)

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z) for points ``[rows, 2]``."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), a normal."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, hidden, hidden, hidden]):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


@dataclass
class CurveData:
    """A curve as the data of a `Learner`."""

    curve: Curve
    hidden: int
    table: Table | None = None
    shares_table = False

    @property
    def train(self) -> Tensor:
        """The training points, ``[N, 2]``."""
        return self.curve.train

    def vae(self, empirical: bool) -> CurveVAE:
        """Return new networks."""
        return CurveVAE(self.curve.scale, 1 if empirical else 2, self.hidden)


def true_table(data: CurveData) -> Table:
    """Return the posterior of the index under the true decoder, at the true latents."""
    points = data.curve.decoder(data.curve.train_latents)
    distance = torch.cdist(data.train.double(), points.double()) / data.curve.scale
    return Table.from_log_weights((-0.5 * distance.square()).to(data.train.dtype))


def generator(learner: Learner) -> Any:
    """Return what maps standard normals ``[n, 1]`` to points of the curve ``[n, 2]``.

    For MAPA that is the decoder after the quantile map of the codes.
    """
    if not isinstance(learner, Empirical):
        return learner.decoder
    with torch.no_grad():
        prior = recover_prior(learner.codes(), "copula", held_out=0)
    return lambda noise: learner.decoder(prior.from_normal(noise))


def mixture_evidence(points: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return log p(x) under equal normals around points ``[M, D]``, float64 ``[rows]``."""
    distance = torch.cdist(x.double(), points.double()) / scale
    volume = x.shape[1] * math.log(scale * math.sqrt(2 * math.pi))
    return (-0.5 * distance.square()).logsumexp(1) - math.log(len(points)) - volume


def validation(learner: Learner, nodes: int = VALIDATION_NODES) -> float:
    """Return the mean log p(x) of the validation points; fewer nodes choose between restarts."""
    curve = learner.data.curve
    return _mean(curve_evidence(generator(learner), curve.validation, curve.scale, nodes=nodes))


def score(learner: Learner, truth: Tensor, batch_size: int, repeats: int) -> dict[str, Any]:
    """Return the scores of a trained method: ``truth`` is log p*(x) of the test points.

    ``gap`` is the log-likelihood of the training points, by the sum over all codes or for a VAE by
    quadrature, less the training bound.
    """
    curve, decoder = learner.data.curve, generator(learner)
    found = curve_evidence(decoder, curve.test, curve.scale, nodes=NODES)
    result = {"kl": _mean(truth - found), "kl_of_codes": None}
    if isinstance(learner, Empirical):
        points = learner.points()
        result["kl_of_codes"] = _mean(truth - mixture_evidence(points, curve.test, curve.scale))
        own = mixture_evidence(points, curve.train, curve.scale)
    else:
        own = curve_evidence(decoder, curve.train, curve.scale, nodes=NODES)
    result["gap"] = _mean(own) - _bound(learner, batch_size, repeats)
    return result


@torch.no_grad()
def _bound(learner: Learner, batch_size: int, repeats: int) -> float:
    """Return the bound of the training data, in nats per row: the mean over fresh draws."""
    pyro.clear_param_store()  # of another restart
    x, total = learner.data.train, 0.0
    for _ in range(repeats):
        for rows in torch.randperm(len(x)).split(batch_size):
            total -= learner.loss.loss(learner.model, learner.guide, x[rows], rows)
    return total / (repeats * len(x))


def density_estimate(data: Curve, truth: Tensor) -> dict[str, Any]:
    """Return the score of normals around the training points, of the width best on validation."""
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
