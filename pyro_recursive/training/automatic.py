"""Draws of a posterior by the cheapest of Pathfinder, importance weights and NUTS to be trusted."""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, KeysView
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.util import diagnostics
from torch import Tensor

from pyro_recursive.evaluation.calls import sampling, shown_as_html
from pyro_recursive.evaluation.chains import chain_draws
from pyro_recursive.evaluation.draws import Draws
from pyro_recursive.evaluation.importance import (
    effective_sample_size,
    pareto_k_threshold,
    psis,
)
from pyro_recursive.evaluation.predictions import resampled_index
from pyro_recursive.guides.gaussian_families import Full
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.pathfinder.gaussians import Gaussians
from pyro_recursive.guides.pathfinder.mixture import PathReport, mixture_of_paths, paths_for
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.terminal import stderr_is_watched
from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training.nuts import (
    draws_where_possible,
    start_from,
    weighted_covariance,
    weighted_vectors,
)
from pyro_recursive.training.pathfinder import PathfinderGuide, guide_of_paths

PROPOSALS = 10_000  # draws of a guide for its importance weights, at least
PROPOSALS_PER_DRAW = 2.5
LEAST_SHARE = 0.6  # of the proposals that the weights have to be worth
MORE_PATHS = (1, 2, 4)  # times as many, while modes may be missing
ROUNDS = 6  # of moments that are matched
LEAST_DRAWS = 1  # for each latent that the weights are worth, for moments
LEAST_WEIGHT = 1e-3  # of a component
LARGEST_R_HAT = 1.05  # of chains without a warning
LEAST_ESS, LEAST_ESS_SHARE = 100, 0.1
NUMBERS = itertools.count(1)  # of the guides, for names of their own

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageReport:
    """One stage of `fit_or_sample` and its cost.

    ``elbo`` in nats, ``pareto_k`` and ``ess`` are of draws of the guide. NUTS has the least
    ``ess`` of all numbers that it draws, the largest ``r_hat`` and its ``divergences``.
    ``num_gradients`` counts a matrix of second derivatives as D gradients.
    """

    name: str
    ess: float
    num_gradients: int
    num_values: int
    seconds: float
    elbo: float = math.nan
    pareto_k: float = math.nan
    r_hat: float = math.nan
    divergences: int = 0

    HEADER = ("stage", "ELBO", "k-hat", "ESS", "gradients", "densities", "s")

    @property
    def cells(self) -> tuple[str, ...]:
        """The stage as a row of the table."""
        elbo, k = (
            "-" if math.isnan(value) else f"{value:.2f}" for value in (self.elbo, self.pareto_k)
        )
        counts = f"{self.ess:.0f}", f"{self.num_gradients:,}", f"{self.num_values:,}"
        return (self.name, elbo, k, *counts, f"{self.seconds:.1f}")


@dataclass(frozen=True)
class PosteriorApproximation:
    """What `fit_or_sample` found; ``found["beta"]`` are draws ``[S, *plates, *event]``.

    ``draws`` are those of all latent and deterministic sites, of ``stages[-1]``. ``guide`` is the
    best of the mixtures of Gaussians, with k-hat ``pareto_k``. ``mcmc`` is the run of NUTS, if
    there was one. ``print`` shows the stages.
    """

    draws: Draws
    guide: PathfinderGuide
    pareto_k: float
    stages: tuple[StageReport, ...]
    mcmc: MCMC | None = None

    @property
    def num_gradients(self) -> int:
        """Gradients of the log-density at single points, in all stages."""
        return sum(stage.num_gradients for stage in self.stages)

    def __getitem__(self, name: str) -> Tensor:
        return self.draws[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.draws)

    def keys(self) -> KeysView[str]:
        """Return the names of the sites, so that ``dict(found)`` has their tensors."""
        return self.draws.keys()

    _repr_html_ = shown_as_html

    def __str__(self) -> str:
        rows = [StageReport.HEADER, *(stage.cells for stage in self.stages)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        last = self.stages[-1]
        if self.mcmc is None:
            lines.append(f"{len(self.draws)} draws, weighted: the guide can be trusted.")
        else:
            lines.append(
                f"{len(self.draws)} draws of NUTS: r-hat at most {last.r_hat:.2f}, "
                f"{last.divergences} divergences."
            )
        return "\n".join(lines)


@sampling()
def fit_or_sample(
    model: Callable,
    *args: Any,
    num_draws: int = 4000,
    paths: int = 8,
    num_chains: int = 1,
    compile: bool = False,
    **kwargs: Any,
) -> PosteriorApproximation:
    """Draw from the posterior: by a guide if its importance weights are good, else by NUTS.

    1. `pathfinder` gives a mixture of Gaussians, of twice as many paths, up to four times
       ``paths``, while modes may be missing: one path alone has found a component, or paths are
       fewer than M (log M + 2) for M components. 10,000 draws have importance weights: with a k-hat
       below 0.7 and an effective sample size of 6,000 the result is draws by these weights.
    2. Else the mixture gets the weighted moments of the draws, up to six times, until it is so.
       This takes values of the density, and no gradients. It needs an effective sample size of
       at least D.
    3. Else NUTS starts from the best of these mixtures, as by `nuts_start`. It warns of an r-hat
       above 1.05, of divergences, and of an effective sample size below 100 (and a tenth of the
       draws).

    Args:
        model: with continuous latents; flat priors and enumerated latents are allowed.
        args, kwargs: the model's arguments: all data, not a minibatch.
        num_draws: of the result; above 4,000 each takes 2.5 draws of a guide.
        paths: as in `pathfinder`, at first.
        num_chains: of NUTS, each with ``num_draws / num_chains`` draws.
        compile: as in `nuts_start`.

    Raises:
        ValueError, NotImplementedError: as `pathfinder` does.

    Sources: `Pathfinder` (Zhang et al., arXiv 2108.03782), `Pareto Smoothed Importance Sampling`
    (Vehtari et al., arXiv 1507.02646).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
    >>> found = fit_or_sample(model, torch.tensor([0.3, -1.2, 0.8, 0.1]))
    >>> found["scale"].shape, found.mcmc, found.pareto_k < 0.7
    (torch.Size([4000]), None, True)
    """
    check_at_least(1, paths=paths, num_chains=num_chains)
    check_at_least(4 * num_chains, num_draws=num_draws)  # for r-hat
    store, clock = pyro.get_param_store(), time.perf_counter()
    with store.scope(store.get_state()):  # the guide leaves nothing there
        density = LogDensity(model, args, kwargs, StartSearch(model, args, kwargs).trace)
        with pyro.validation_enabled(False):  # points outside of a domain have a density of 0
            return _approximate(density, num_draws, paths, num_chains, compile, clock)


def _approximate(
    density: LogDensity,
    num_draws: int,
    paths: int,
    num_chains: int,
    compile: bool,
    clock: float,
) -> PosteriorApproximation:
    model, args, kwargs = density.program.model, density.program.args, density.program.kwargs
    family, name = Full(), f"fit_or_sample_{next(NUMBERS)}"
    cost = num_values = 0
    for factor in MORE_PATHS:
        found = mixture_of_paths(copy.copy(density), factor * paths, family)  # counts from 0
        guide, report = guide_of_paths(density, found, family, name), found.report
        cost += report.num_gradients + density.size * report.num_hessians
        num_values += report.num_values
        if not _may_miss_modes(report):
            break
    proposals = max(PROPOSALS, math.ceil(PROPOSALS_PER_DRAW * num_draws))
    stages, best = list[StageReport](), None
    for number in range(ROUNDS + 1):
        draws, are_all = draws_where_possible(density, guide, proposals)
        log_weights = draws.log_weights.reshape(len(draws), -1).sum(-1)
        stage = StageReport(
            f"moments {number}" if number else "Pathfinder",
            ess=effective_sample_size(log_weights).item(),
            num_gradients=0 if number else cost,
            num_values=proposals + (0 if number else num_values),
            seconds=time.perf_counter() - clock,
            elbo=log_weights.mean().item() if are_all else -math.inf,
            pareto_k=psis(log_weights).pareto_k.item(),
        )
        stages.append(stage)
        mixture = guide.gaussians, guide.component_weights(*args, **kwargs).detach().log()
        if best is None or stage.ess > best[0].ess:
            best = stage, draws, mixture
        is_good = stage.pareto_k < pareto_k_threshold(proposals)
        if is_good and stage.ess >= LEAST_SHARE * proposals:
            index = resampled_index(draws.log_weights, num_draws, draws.plates)
            return PosteriorApproximation(draws.take(index), guide, stage.pareto_k, tuple(stages))
        clock = time.perf_counter()
        if stage.ess < LEAST_DRAWS * density.size:
            break
        if number < ROUNDS:
            _match_moments(guide, *mixture, *weighted_vectors(density, draws))
    assert best is not None
    stage, draws, mixture = best
    guide.set_gaussians(*mixture)
    start = start_from(density, draws, num_chains, compile=compile)
    logger.info("NUTS follows: k-hat is %.2f, ESS %.0f.", stage.pareto_k, stage.ess)
    length = math.ceil(num_draws / num_chains)
    mcmc = MCMC(**start, num_samples=length, disable_progbar=not stderr_is_watched())
    mcmc.run(*args, **kwargs)
    draws, _ = chain_draws(mcmc, model, args, kwargs, {})
    stages.append(_of_chains(mcmc, time.perf_counter() - clock))
    _warn_of_chains(stages[-1], length * num_chains)
    return PosteriorApproximation(draws, guide, stage.pareto_k, tuple(stages), mcmc)


def _warn_of_chains(stage: StageReport, num_draws: int) -> None:
    least = min(LEAST_ESS, LEAST_ESS_SHARE * num_draws)
    if stage.r_hat <= LARGEST_R_HAT and stage.ess >= least and not stage.divergences:
        return
    warn_user(
        f"NUTS has r-hat {stage.r_hat:.2f}, {stage.divergences} divergences in {num_draws} draws "
        f"and an effective sample size of {stage.ess:.0f}: its draws may be wrong. Reparametrise "
        "the model, or take more draws."
    )


def _may_miss_modes(report: PathReport) -> bool:
    count = len(report.num_paths)
    is_rare = count > 1 and min(report.num_paths) == 1
    return is_rare or report.paths < paths_for(count)


def _of_chains(mcmc: MCMC, seconds: float) -> StageReport:
    """Return what NUTS found and took.

    Constant numbers, as the first of a Cholesky factor of correlations, have no r-hat.
    """
    found, samples = mcmc.diagnostics(), mcmc.get_samples(group_by_chain=True)
    moves = {name: (x != x[:1, :1]).flatten(0, 1).any(0) for name, x in samples.items()}
    if any(bool(each.any()) for each in moves.values()):  # else all chains are stuck
        samples = {n: x[:, :, moves[n]] for n, x in samples.items() if bool(moves[n].any())}
    sites = [diagnostics({name: x})[name] for name, x in samples.items()]
    return StageReport(
        "NUTS",
        ess=torch.stack([site["n_eff"].min() for site in sites]).min().item(),
        num_gradients=sum(found["gradients"].values()),
        num_values=0,
        seconds=seconds,
        r_hat=torch.stack([site["r_hat"].max() for site in sites]).max().item(),
        divergences=sum(map(len, found["divergences"].values())),
    )


@torch.no_grad()
def _match_moments(
    guide: PathfinderGuide,
    mixture: Gaussians,
    log_of_each: Tensor,
    u: Tensor,
    log_weights: Tensor,
) -> None:
    """Give a mixture the weighted moments of its draws ``[S, D]``, by one step of EM.

    It lowers KL(p || q), as far as the weights are right.
    """
    weights = psis(log_weights).log_weights.exp().to(u)
    shares = (mixture.log_prob(u) + log_of_each).softmax(-1) * weights[:, None]  # [S, M]
    total = shares.sum(0)
    moved = [m for m, weight in enumerate(total.tolist()) if weight > LEAST_WEIGHT]
    loc, scale_tril = mixture.loc.clone(), mixture.scale_tril.clone()
    for m in moved:
        own = shares[:, m] / total[m]
        loc[m] = own @ u
        scale_tril[m] = torch.linalg.cholesky(weighted_covariance(u, own))
    guide.set_gaussians(
        Gaussians(loc, scale_tril), total.clamp(min=LEAST_WEIGHT).log().log_softmax(0)
    )
