"""Binary images for MAPA: their networks, and log p(x) by sums, quadrature and sampling."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.methods.mapa import Empirical, Learner
from benchmarks.tasks.images import VAE, tanh_network
from pyro_recursive import MAPAGuide, log_marginal
from pyro_recursive.evaluation import Evidence
from pyro_recursive.mapa import EncodedCodes, Table, recover_prior
from pyro_recursive.priors.pairwise import bernoulli_pairs

GRID_LATENTS = 2  # as many as can be integrated over on a grid
REACH = 5.0  # standard deviations of a normal that a grid covers
CHUNK_POINTS = 2000  # of a grid
PAIRS = 5_000_000  # draws times codes whose densities are in memory at once
BATCH = 100  # images that importance sampling takes at once


@dataclass
class ImageData:
    """Binary images ``[rows, pixels]`` as the data of a `Learner`; all guides share one table."""

    train: Tensor
    test: Tensor
    labels: Tensor
    hidden: int = 0
    latents: int = 0
    table: Table | None = None
    table_seconds: float | None = None
    shares_table = True

    def vae(self, empirical: bool) -> VAE:
        """Return new networks."""
        vae = VAE(self.train.mean(0), self.hidden, self.latents)
        if empirical:
            vae.encoder = tanh_network(self.train.shape[1], self.hidden, self.latents)
        return vae


@torch.no_grad()
def score(learner: Learner, nodes: int, samples: int, recovered_samples: int) -> dict[str, Any]:
    """Return log p(x) of each test image, and the mean over as many training images."""
    test, some = learner.data.test, learner.data.train[: len(learner.data.test)]
    found: dict[str, Any] = {}
    recovered = isinstance(learner, Empirical)
    on_grid = learner.data.latents == GRID_LATENTS
    if isinstance(learner, Empirical):
        found["codes"] = code_evidence(learner, test).tolist()
        found["train_codes"] = code_evidence(learner, some).mean().item()
    if on_grid:
        fine, coarse = grid_evidence(learner, torch.cat([test, some]), nodes)
        found["continuous"] = fine[: len(test)].tolist()
        found["train_continuous"] = fine[len(test) :].mean().item()
        found["grid_error"] = (fine - coarse).abs().max().item()
    if not (recovered and on_grid):
        draws = recovered_samples if recovered else samples
        evidence = sampled(learner, test, draws)
        found["sampled"] = evidence.log_marginal.tolist()
        found |= {"ess": evidence.ess.median().item(), "samples": draws}
    if not (recovered or on_grid):
        evidence = sampled(learner, some, samples)
        found["train_sampled"] = evidence.log_marginal.mean().item()
    return found


@torch.no_grad()
def code_evidence(learner: Empirical, x: Tensor) -> Tensor:
    """Return log (1 / N) sum_i p(x | c_i) over the codes of all training images, ``[rows]``."""
    logits = learner.points()
    return bernoulli_pairs(x, logits).double().logsumexp(1) - math.log(len(logits))


@torch.no_grad()
def grid_evidence(learner: Learner, x: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return log p(x) under the continuous prior on a grid, and on one with half the nodes.

    The trapezoidal rule: integrands are zero at the bounds.
    """
    axes, log_prior = _frame(learner, nodes)
    grid, cell = torch.cartesian_prod(*axes), math.log(math.prod(a[1] - a[0] for a in axes))
    even = torch.arange(nodes) % 2 == 0
    also_coarse = torch.cartesian_prod(even, even).all(1)
    fine = coarse = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    for points, chosen in zip(
        grid.split(CHUNK_POINTS), also_coarse.split(CHUNK_POINTS), strict=True
    ):
        table = bernoulli_pairs(x, learner.decoder(points)) + log_prior(points)
        table = table.double()
        fine = torch.logaddexp(fine, table.logsumexp(1))
        coarse = torch.logaddexp(coarse, table[:, chosen].logsumexp(1))
    return fine + cell, coarse + cell + len(axes) * math.log(2)


def _frame(learner: Learner, nodes: int) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Return the axes of a grid that covers the prior and the codes, and the prior's density."""
    codes = learner.codes()
    if isinstance(learner, Empirical):
        prior: Any = recover_prior(codes, "kde", held_out=0)
        reach = REACH * prior.width * codes.std(0)
        low, high = codes.amin(0) - reach, codes.amax(0) + reach
        density = prior()
    else:
        low, high = codes.amin(0).clamp(max=-REACH), codes.amax(0).clamp(min=REACH)
        density = pyro.distributions.Normal(torch.zeros_like(low), 1.0).to_event(1)
    bounds = zip(low.tolist(), high.tolist(), strict=True)
    return [torch.linspace(a, b, nodes) for a, b in bounds], density.log_prob


def sampled(learner: Learner, x: Tensor, samples: int) -> Evidence:
    """Return log p(x) under the continuous prior by importance sampling, ``[rows]`` each."""
    model, guide, size = learner.model, learner.guide, None
    if isinstance(learner, Empirical):
        model, guide = _recovered(learner)
        size = max(1, min(samples, PAIRS // (BATCH * len(learner.data.train))))
    pyro.clear_param_store()  # of the guide that was trained
    parts = [
        log_marginal(model, guide, batch, num_particles=samples, chunk_size=size, diagnostics=True)
        for batch in x.split(BATCH)
    ]
    return Evidence(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _recovered(learner: Empirical) -> tuple[Any, MAPAGuide]:
    """Return the model with a continuous prior, and a proposal whose codes have its width."""
    model: Any = learner.guide.recovered("kde", held_out=0)
    codes = learner.codes()
    scale = float(model.prior.width) * codes.var(0).mean().sqrt().item()
    wide = EncodedCodes(learner.encoder, learner.data.train, scale=scale)
    table = learner.data.table
    return model, MAPAGuide(learner.model, wide, learner.data.train, table=table, name="proposal")
