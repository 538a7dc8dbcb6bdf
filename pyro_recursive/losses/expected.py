"""Bounds of guides that enumerate latents: the expectation over their values is exact.

With q(y_c) the probability of value c, the same for all samples that share a logarithm,

    B = sum_c q(y_c) (L_c - log q(y_c)),    L_c = bound(log p(x, y_c, z) - log q(z | y_c))

For IWAE it lies below the bound with the sum inside the logarithm by the divergence of q(y) from
softmax_c(L_c), so that q(y) has a gradient: a classifier in the guide learns from it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_recursive.bounds.bound import Bound, Split, Weighted, times
from pyro_recursive.bounds.estimators import Estimator
from pyro_recursive.losses.surrogate import finite
from pyro_recursive.tracing.densities import Densities
from pyro_recursive.tracing.program import Program, structure_of


@dataclass(frozen=True)
class ExpectedBound:
    """A bound of ``[M, K, *plates, C]`` log-weights, and its expectation over the C values."""

    bound: Bound
    local: Densities

    @cached_property
    def log_q(self) -> Tensor:
        """The log-probability of each value, with its graph, ``[M, K, *plates, C]`` in nats."""
        assert self.local.values is not None
        rest = self.local.values_rest
        log_q = self.local.values if rest is None else self.local.values + rest
        return log_q.expand(self.local.layout.whole_shape)

    @cached_property
    def own(self) -> Tensor:
        """The part of `log_q` in the bound, scaled and masked, ``[M, *plates, C]``, no graph."""
        assert self.local.values is not None
        return finite(self.local.values.detach().expand_as(self.log_q)[:, 0])

    @cached_property
    def estimates(self) -> Tensor:
        """The bound of each estimate and value, ``[M, *plates, C]``, ``[1, ...]`` if pooled."""
        return self.bound.estimate(self.local.log_weights)

    @cached_property
    def guide_estimates(self) -> Tensor:
        """The same of the guide's bound."""
        if not self.bound.is_split:
            return self.estimates
        return self.bound.guide.estimate(self.local.log_weights)

    def value(self) -> Tensor:
        """Return B for each entry of the plates, ``[*plates]``."""
        gains = self.estimates - _like(self.own, self.estimates)
        return times(self._weights(self.estimates).detach(), gains).mean(0).sum(-1)

    def weighted(self, estimator: Estimator) -> Bound:
        """Return the bound whose gradient is B's where the probabilities are constant.

        In a wake phase the guide's samples count by the posterior of their values, not by q.
        """
        model = Weighted(self.bound, self._weights(self.estimates).detach())
        if not self.bound.is_split and not estimator.wake:
            return model
        return Split(model, Weighted(self.bound.guide, self._of_guide(estimator).detach()))

    def signal(self, estimator: Estimator) -> Tensor | None:
        """Return the part of `own` in the signals of score-handled sites, ``[M, 1, *plates, C]``.

        With one sample q(y) may depend on them; else it is a constant.
        """
        if estimator.wake or self.local.log_weights.shape[1] > 1:
            return None
        weights = self._weights(self.own).detach()
        return -(weights * self.own).unsqueeze(1) / len(self.own)

    def of_probabilities(self, estimator: Estimator) -> Tensor:
        """Return a scalar with the gradient of the probabilities, for ascent."""
        if estimator.wake:
            return (self._of_guide(estimator) * finite(self.log_q.mean(1))).mean(0).sum()
        estimates = finite(self.guide_estimates)
        gains = estimates - _like(self.own, estimates)
        # Those of -q log q are q times minus (log q + 1), and the probabilities sum to 1.
        return (self._weights(estimates) * gains).mean(0).sum()

    def _of_guide(self, estimator: Estimator) -> Tensor:
        """Return what the values count for the guide, ``[M, *plates, C]``.

        In a wake phase that is their posterior, in which masked values have the guide's density.
        """
        estimates, rest = self.guide_estimates, self.local.values_rest
        if not estimator.wake:
            return self._weights(estimates)
        if rest is not None:
            rest = rest.detach().expand(self.local.layout.whole_shape)[:, 0]
            estimates = estimates + _like(rest, estimates)
        return estimates.softmax(-1).nan_to_num(0.0)

    def _weights(self, estimates: Tensor) -> Tensor:
        return _like(self.log_q.exp().mean(1), estimates)

    def check(self, program: Program) -> None:
        """Raise where samples that share a logarithm have other probabilities of the values.

        Under validation at each step, which waits for the device; else at the first.
        """
        key = "the guide's values have one probability"
        if key in program.memory and not is_validation_enabled():
            return
        pooled = len(self.estimates) < len(self.log_q)
        log_q = finite(self.log_q.detach())
        first = log_q[:1, :1] if pooled else log_q[:, :1]
        slack = torch.finfo(log_q.dtype).eps ** (2 / 3)
        if bool(((log_q - first).abs() > slack * (1 + first.abs())).any()):
            names = ", ".join(f"'{name}'" for name in structure_of(program).guide_values)
            raise NotImplementedError(
                f"Guide site {names} is enumerated given a sampled site, so that each of the "
                f"{log_q.shape[:2].numel() if pooled else log_q.shape[1]} samples has a q({names}) "
                "of its own: C**K terms. Leave it out of the guide: enumerated in the model it is "
                f"summed exactly; or use {'num_estimates=1, ' * pooled}num_particles=1."
            )
        program.memory[key] = True


def _like(weights: Tensor, estimates: Tensor) -> Tensor:
    """Return ``[M, *plates, C]``, or its mean over m for a bound that pools the estimates."""
    return weights if len(estimates) == len(weights) else weights.mean(0, keepdim=True)
