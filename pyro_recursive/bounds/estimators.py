"""Gradient estimators: tables of coefficients, pure functions of log-weights.

For one datum, in ascent form, an estimator moves the guide's parameters phi along

    sum_k path_k * <d log w_k / d z_k, d z_k / d phi>  +  sum_k density_k * d log q(z_k; phi)/d phi

and those of the model along ``sum_k c_k * d log p(x, z_k; theta)/d theta`` with ``c`` the first
derivative of the bound. The rows below are right for every bound, by its two derivatives. A new
estimator is one function and one row of `ESTIMATORS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.bounds.bound import Bound, Derivatives, sum_of_others

EstimatorName = Literal[
    "pathwise",
    "stl",
    "dreg",
    "score",
    "vimco",
    "dreg+score",
    "dreg+vimco",
    "rws",
    "rws-dreg",
]

__all__ = ["ESTIMATORS", "Coefficients", "Estimator", "EstimatorName", "Share"]


class Coefficients(NamedTuple):
    """What multiplies each sample's gradients; ``[M, K, *plates]`` or None for zero.

    ``path`` and ``density`` belong to reparameterised sites, ``score`` is the density coefficient
    of the others. They multiply the densities in the weights; where a site is scaled or masked
    there, ``density_rest`` and ``score_rest`` multiply the whole density that its samples come
    from, minus the part in the weights.
    """

    path: Tensor | None
    density: Tensor | None
    score: Tensor | None = None
    density_rest: Tensor | None = None
    score_rest: Tensor | None = None


class Share(NamedTuple):
    """The log-weights ``[M, K, *plates]``, and the part ``cost`` of each that a site decides.

    ``cost`` is downstream of the site in each entry of its plates, which may be more than those of
    the log-weights (there of size 1); ``rest`` is the log-weight without it.
    """

    log_weights: Tensor
    cost: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Estimator:
    """A row of the table: the treatment of reparameterised sites, and of all the others.

    ``signal`` is None where the row has nothing to offer to a site that is not reparameterised.
    ``replay`` says what a second run of the guide sees: nothing where path and density have the
    same coefficient, stand-ins of the samples where they differ, or detached samples. ``wake``
    marks the rows that descend KL(p || q) and not the bound.
    """

    name: str
    coefficients: Callable[[Derivatives], Coefficients]
    signal: Callable[[Bound, Share], Tensor] | None = None
    replay: Literal["none", "paths", "values"] = "paths"
    min_particles: int = 1
    wake: bool = False

    def __call__(
        self, bound: Bound, log_weights: Tensor, derivatives: Derivatives | None = None
    ) -> Coefficients:
        """Return the coefficients for ``[M, K, *plates]`` log-weights, without a graph.

        ``derivatives`` are those of the bound there, where they are known already.
        """
        with torch.no_grad():
            derivatives = derivatives or bound.derivatives(log_weights)
            table = self.coefficients(derivatives)
            if self.signal is None:
                return table
            signal = self.signal(bound, Share(log_weights, log_weights, log_weights.new_zeros(())))
            signal = signal + constant_of(log_weights)
            return table._replace(score=signal - derivatives.first, score_rest=signal)


def pathwise(derivatives: Derivatives) -> Coefficients:
    """Plain reparameterisation: the derivative of the bound through sample and density alike."""
    return Coefficients(path=derivatives.first, density=-derivatives.first)


def sticking_the_landing(derivatives: Derivatives) -> Coefficients:
    """Drop the density's own gradient; biased for K > 1 (`Sticking the Landing`, 1703.09194)."""
    return Coefficients(path=derivatives.first, density=None)


def doubly_reparameterized(derivatives: Derivatives) -> Coefficients:
    """Reparameterise the density's gradient once more, without bias (DReG, arXiv 1810.04152)."""
    first, second = derivatives
    # A constant times the score has mean zero. Less 1 / (M K), equal weights give no noise.
    rest = first - constant_of(first)
    return Coefficients(path=first - second, density=None, density_rest=rest)


def wake(derivatives: Derivatives) -> Coefficients:
    """Wake-phase update of the guide (`Reweighted Wake-Sleep`, arXiv 1406.2751); biased."""
    first = derivatives.first
    return Coefficients(None, density=first, score=first, density_rest=first, score_rest=first)


def doubly_reparameterized_wake(derivatives: Derivatives) -> Coefficients:
    """The wake-phase update with the expectation of `wake` and less variance (1810.04152)."""
    return Coefficients(path=derivatives.second, density=None)


def plain_signal(bound: Bound, share: Share) -> Tensor:
    """Return the value of each estimate less its value without the sample's own cost."""
    return _difference(bound, share.log_weights, share.rest)


def vimco_signal(bound: Bound, share: Share) -> Tensor:
    """Return the value less that with the mean cost of the others (VIMCO, arXiv 1602.06725)."""
    return _difference(bound, share.log_weights, share.rest + _mean_of_others(share.cost))


def constant_of(log_weights: Tensor) -> float:
    """Return 1 / (M K): a constant times the score has mean zero.

    Beside minus the first derivative, it leaves no noise where all weights are equal.
    """
    return 1 / log_weights.shape[:2].numel()


def _difference(bound: Bound, log_weights: Tensor, substitute: Tensor) -> Tensor:
    """Return what each estimate has from a log-weight beside a substitute; 0 where all are dead."""
    values = bound.estimate(log_weights).unsqueeze(1)
    others = bound.replaced(log_weights, substitute.expand_as(log_weights + substitute))
    difference = (values - others.masked_fill(others.isneginf(), 0.0)) / len(values)
    return difference.masked_fill(values.isneginf(), 0.0)


def _mean_of_others(cost: Tensor) -> Tensor:
    """Return the mean over the other samples that are alive, 0 without any: ``[M, K, *plates]``."""
    dead = cost.isneginf()
    alive = sum_of_others((~dead).to(cost), (1,))
    return sum_of_others(cost.masked_fill(dead, 0.0), (1,)) / alive.clamp_min(1.0)


ESTIMATORS = {
    row.name: row
    for row in (
        Estimator("pathwise", pathwise, replay="none"),
        Estimator("stl", sticking_the_landing),
        Estimator("dreg", doubly_reparameterized),
        Estimator("score", pathwise, plain_signal, replay="none"),
        Estimator("vimco", pathwise, vimco_signal, replay="none", min_particles=2),
        Estimator("dreg+score", doubly_reparameterized, plain_signal),
        Estimator("dreg+vimco", doubly_reparameterized, vimco_signal, min_particles=2),
        Estimator("rws", wake, replay="values", wake=True),
        Estimator("rws-dreg", doubly_reparameterized_wake, wake=True),
    )
}
"""Every estimator by name; those with ``+`` or a score treat mixed guides site by site."""
