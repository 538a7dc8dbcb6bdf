"""From coefficients to one scalar whose gradient is the estimator; its value means nothing.

With ``z`` a sample of the guide and ``s`` its stand-in, the surrogate of one datum is

    sum_k  c_k log p(x, s_k) + density_k log q(s_k) + score_k log q_score(s_k) + <v_k, z_k>

where the score has a coefficient for each entry of a site's own plates.
The gradient that reaches a stand-in through log p arrives as ``c`` times the derivative and leaves
towards ``z`` multiplied by ``path / c``. ``v`` adds what log q contributes along the path and takes
away what leaked through the stand-ins. So theta, the densities and the paths each get their own
coefficient from one backward pass through the model.
"""

import itertools
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_recursive.bounds.bound import Bound, Nested, Pooled, Weighted, elbo, iwae
from pyro_recursive.bounds.estimators import (
    ESTIMATORS,
    Coefficients,
    Estimator,
    Share,
    constant_of,
)
from pyro_recursive.tracing.densities import Densities
from pyro_recursive.tracing.downstream import ScoreGroup, score_groups
from pyro_recursive.tracing.graph_leaves import graph_leaves
from pyro_recursive.tracing.runs import GradientCut, ParticleRun
from pyro_recursive.tracing.sites import is_delta, layers, sites
from pyro_recursive.tracing.supports import has_moving_bounds

HUGE = 1e30  # nats; a log-density beyond is infinite


class Scored(NamedTuple):
    """Score-handled sites in the same plates, and what multiplies their density and its rest.

    Coefficients are ``[M, K, *plates]`` without a graph; None for zero.
    """

    group: ScoreGroup
    coefficient: Tensor | None
    rest: Tensor | None


def surrogate(
    runs: Sequence[ParticleRun],
    local: Densities,
    bound: Bound,
    estimator: Estimator,
    *,
    independent: Container[str] = (),
    signal: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """Return a scalar with the gradient of ``sum over plates of bound(log_weights)``.

    ``independent`` names plates whose entries are independent given all else. A ``signal`` of
    shape ``[M, K, *plates]`` replaces the estimator's; what is ``beside`` the bound in an objective
    is added to that of sites in the plates of the log-weights.
    """
    log_weights, is_split = local.log_weights, bound.is_split
    is_scored = local.score is not None and local.score.requires_grad
    if is_scored and signal is None and estimator.signal is None and estimator.replay != "values":
        raise _no_gradient(runs, local, estimator)
    if estimator.wake:
        _refuse_moving_deltas(runs)
    if is_split or estimator.wake:
        _refuse_shared_parameters(runs, local)
    guide_bound = bound.guide
    with torch.no_grad():
        derivatives = guide_bound.derivatives(log_weights)
        table = estimator.coefficients(derivatives)
    guide = model = derivatives.first
    scored = []
    for group in score_groups(local, independent if estimator.signal else ()):
        found = signal
        if found is None and estimator.signal is not None:
            found = group.signal(estimator, guide_bound, log_weights)
            if beside is not None and group.terms is None:
                found = found + beside
        if found is None:
            scored.append(Scored(group, table.score, table.score_rest))
            continue
        if not group.is_choice or table.density is None:
            constant: Tensor | float = constant_of(log_weights)
            if isinstance(guide_bound, Weighted):
                constant = constant * group.spread(guide_bound.weights.unsqueeze(1))
            found = found + constant
        scored.append(Scored(group, found - group.spread(guide), found))
    if is_split:
        model, ratio = _ratio(guide, bound.derivatives(log_weights).first)
        _scale(local, (path for run in runs for path in run.model_cuts), ratio)
    core: list[tuple[Tensor | None, Tensor | None]]
    if estimator.replay == "none" and not is_split:
        core = [(model, local.reparameterized)]  # one coefficient for all of it
    else:
        core = [(model, local.model), (-guide, local.jacobian), (table.density, local.density)]
    for each in scored:
        core += [(each.coefficient, each.group.score), (each.rest, each.group.rest)]
    total = _weighted_sum(*core, (table.density_rest, local.density_rest))
    return torch.as_tensor(total + _along_paths(local, _cuts_in(runs, local), table, guide, scored))


def global_surrogate(
    runs: Sequence[ParticleRun], shared: Densities, values: Tensor | None, estimator: Estimator
) -> Tensor:
    """Return a scalar with the gradient of the ELBO terms of the global latents.

    Where the local sites are replayed, the score of the global density is dropped as well: its
    expectation is zero. All data are downstream of a site that is not reparameterised, so that its
    signal is the value of the whole estimate, of ``values`` ``[M]``; None without such sites.
    """
    signal = None
    if shared.score is not None and shared.score.requires_grad:
        if estimator.signal is None:
            raise _no_gradient(runs, shared, estimator)
        assert values is not None
        M, K = shared.log_weights.shape[:2]
        row = values.unsqueeze(0) / shared.layout.scale
        with torch.no_grad():
            found = estimator.signal(elbo, Share(row, row, torch.zeros_like(row)))
        found = (found.squeeze(0) / K).to(shared.score).expand(M)
        signal = found.reshape(M, *[1] * len(shared.layout.shape), 1)
    own = ESTIMATORS["stl" if _cuts_in(runs, shared) else "pathwise"]
    return surrogate(runs, shared, Pooled(elbo), own, signal=signal)


def nested_surrogate(
    runs: Sequence[ParticleRun],
    local: Densities,
    shared: Densities,
    values: Tensor,
    num_globals: int,
    estimator: Estimator,
) -> Tensor:
    """Return a scalar with the gradient of ``mean_m log mean_s exp(values)``, of IWAEs inside.

    ``values`` ``[M S]`` are those of the estimates, each with one global sample g and K local ones.
    Under DReG the shares of the estimates in the logarithm move with the global sample, too; see
    `_along_globals`.
    """
    with torch.no_grad():
        share = iwae.derivatives(values.unflatten(0, (-1, num_globals))).first
        weights = (len(values) * share).flatten().to(local.log_weights)
        inside, outside = (
            weights.reshape(-1, *[1] * len(each.layout.shape)) for each in (local, shared)
        )
    moved = _along_globals(runs, local, shared, weights, num_globals)
    own = ESTIMATORS["dreg" if _cuts_in(runs, shared) else "pathwise"]
    total = surrogate(runs, local, Nested(iwae, inside, num_globals), estimator)
    return total + surrogate(runs, shared, Weighted(elbo, outside), own) + moved


def _along_globals(
    runs: Sequence[ParticleRun],
    local: Densities,
    shared: Densities,
    weights: Tensor,
    num_globals: int,
) -> Tensor | float:
    """Return what the score of the global samples becomes by DReG: ``-(u - M u^2) <dt/dg, g>``.

    With t the value of an estimate and u its share in the logarithm, over M. The derivative is a
    total one: local samples move with g. Other global samples do not, as all are one vector.
    """
    if not (cuts := runs[0].shared_cuts):
        return 0.0
    one = weights.new_ones(())
    for cut in itertools.chain.from_iterable(run.guide_cuts for run in runs):
        cut.scale_gradient(one)
    for cut in cuts:
        cut.scale_gradient(0 * one)
    with torch.no_grad():
        factor = weights / len(weights) * (1 - weights / num_globals)
        inside, outside = (
            factor.reshape(-1, *[1] * (1 + len(each.layout.shape))) for each in (local, shared)
        )
        inside = inside * len(weights) * iwae.derivatives(local.log_weights).first
        outside = outside / shared.log_weights.shape[1]
    moved = _weighted_sum((inside, local.reparameterized), (outside, shared.reparameterized))
    found = torch.autograd.grad(
        torch.as_tensor(moved), [cut.stand_in for cut in cuts], retain_graph=True, allow_unused=True
    )
    for cut in cuts:
        cut.scale_gradient(one)
    pairs = zip(cuts, found, strict=True)
    return -sum((each * cut.value).sum() for cut, each in pairs if each is not None)


def _along_paths(
    dens: Densities,
    paths: list[GradientCut],
    table: Coefficients,
    guide: Tensor,
    scored: list[Scored],
) -> Tensor | float:
    """Set how gradients pass each cut, and return ``<v, z>`` summed over the cut samples."""
    if not paths:
        return 0.0
    for path in paths:
        if has_moving_bounds(path.site["fn"]):
            raise ValueError(
                f"Guide site '{path.site['name']}' has a support whose bounds depend on "
                "parameters: this estimator would be biased. Use estimator='pathwise'."
            )
    along = torch.zeros_like(guide) if table.path is None else table.path
    guide, ratio = _ratio(along, guide)
    _scale(dens, paths, ratio)
    # What multiplies each part of log q, and what its derivative sends up the path.
    zero = torch.zeros_like(ratio)
    parts = [
        (dens.density, ratio, table.density, -along),
        (dens.density_rest, ratio, table.density_rest, zero),
    ]
    for group, coefficient, rest in scored:
        score = group.spread(zero) if coefficient is None else coefficient
        spread = group.spread(ratio)
        parts.append((group.score, spread, coefficient, score - group.spread(along)))
        parts.append((group.rest, spread, rest, score))
    outputs, weights = [], []
    for log_q, factor, own, upstream in parts:
        if log_q is not None and log_q.requires_grad:
            weight = upstream if own is None else upstream - factor * own
            outputs.append(log_q)
            weights.append(weight.expand_as(log_q))
    if not outputs:
        return 0.0
    derivatives = torch.autograd.grad(
        outputs, [path.stand_in for path in paths], weights, retain_graph=True, allow_unused=True
    )
    total: Tensor | float = 0.0
    for path, derivative in zip(paths, derivatives, strict=True):
        if derivative is None:
            if path.site["mask"] is False:  # no density at all
                continue
            raise ValueError(
                f"Guide site '{path.site['name']}': its log-density does not depend smoothly on "
                "its value: use estimator='pathwise'."
            )
        total = total + (derivative * path.value).sum()
    return total


def _ratio(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Return the denominator, raised where it has all but vanished, and the ratio.

    A denominator far below the numerator's rounding error may be replaced by a number that is
    still far below it: the ratio then stays finite, and their product is the numerator.
    """
    # Not smaller than need be: a backward pass through denormal numbers is slow.
    eps = torch.finfo(numerator.dtype).eps
    floor = (eps**2 * numerator.abs()).clamp_min(torch.finfo(numerator.dtype).tiny)
    denominator = torch.where(denominator.abs() < floor, floor, denominator)
    return denominator, torch.where(numerator == 0, numerator, numerator / denominator)


def _scale(dens: Densities, paths: Iterable[GradientCut], factor: Tensor) -> None:
    for path in paths:
        path.scale_gradient(dens.layout.at_site(factor, path.site, path.particle))


def _weighted_sum(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | float:
    """Sum coefficients times log-densities; no gradient reaches the density of a dead sample.

    Its coefficient is zero, and zero times infinity would be NaN.
    """
    total: Tensor | float = 0.0
    for coefficients, log_density in pairs:
        if coefficients is not None and log_density is not None:
            total = total + (coefficients * finite(log_density)).sum()
    return total


def finite(log_density: Tensor) -> Tensor:
    """Return log-densities that are not infinite, in their own dtype."""
    limit = min(HUGE, torch.finfo(log_density.dtype).max)
    return log_density.clamp(-limit, limit)


def _cuts_in(runs: Sequence[ParticleRun], dens: Densities) -> list[GradientCut]:
    cuts = [cut for run in runs for cut in run.guide_cuts]
    if dens.names is None:
        return cuts
    return [cut for cut in cuts if cut.site["name"] in dens.names]


def _no_gradient(
    runs: Sequence[ParticleRun], dens: Densities, estimator: Estimator
) -> NotImplementedError:
    site = next(
        record.site
        for record in runs[0].table.guide
        if record.group == "score" and (dens.names is None or record.name in dens.names)
    )
    cause, remedy = f"site '{site['name']}' is not reparameterised", ""
    if isinstance(layers(site["fn"])[-1], dist.Unit):
        cause = f"factor '{site['name']}' has has_rsample=False"
        remedy = ", or has_rsample=True for a Jacobian"
    return NotImplementedError(
        f"Guide {cause}, so estimator='{estimator.name}' has no gradient for it: use 'vimco' or "
        f"'dreg+vimco'{remedy}."
    )


def _refuse_moving_deltas(runs: Sequence[ParticleRun]) -> None:
    for site in sites(runs[0].guide):
        if is_delta(site) and _parameters([site["value"]], runs):
            raise NotImplementedError(
                f"Guide site '{site['name']}' is computed from parameters: use estimator='dreg'."
            )


def _refuse_shared_parameters(runs: Sequence[ParticleRun], local: Densities) -> None:
    """Raise where model and guide share a parameter: its two gradients have different targets."""
    paths = [path.value for run in runs for path in run.guide_cuts]
    values = [site["value"] for run in runs for site in sites(run.guide)]
    densities = local.density, local.score, local.jacobian, local.values
    guide = _parameters([*densities, *paths, *values], runs)
    for parameter in guide & _parameters([local.model], runs):
        name = pyro.get_param_store().param_name(parameter)
        known = f"'{name}'" if name else f"of shape {tuple(parameter.shape)}"
        raise ValueError(
            f"Parameter {known} belongs to model and guide, which climb different objectives: "
            "give each its own."
        )


def _parameters(outputs: Iterable[Tensor | None], runs: Sequence[ParticleRun]) -> set[Tensor]:
    """Return the leaves that tensors depend on, other than through a cut."""
    cuts = (path.stand_in for run in runs for path in (*run.guide_cuts, *run.model_cuts))
    return set(graph_leaves(outputs, cuts))
