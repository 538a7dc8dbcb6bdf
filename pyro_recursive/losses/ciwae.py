"""CIWAE, with a fixed beta or one that is learned from the quality of the guide's gradient.

With g_E and g_I the guide's gradients of the ELBO and of IWAE on the same samples, and
``D = g_E - g_I``, the mean squared error of ``g_I + beta * D`` as an estimate of E[g_I] has its
minimum at ``beta = clip(-tr Cov(g_I, D) / E|D|**2, 0, 1)``. It is measured on the gradients at the
samples, datum by datum, between the M estimates or, for M = 1, the two halves of the K samples,
whose covariance is taken to fall as 1/K.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_recursive import bounds
from pyro_recursive.bounds.bound import Bound
from pyro_recursive.bounds.estimators import Estimator
from pyro_recursive.losses.base import Evaluation, SampleOptions
from pyro_recursive.losses.multi_sample import MultiSampleELBO
from pyro_recursive.tracing.densities import Densities
from pyro_recursive.tracing.param_store import evict_stale
from pyro_recursive.tracing.runs import ParticleRun


class CIWAE_ELBO(MultiSampleELBO):
    """``beta * ELBO + (1 - beta) * IWAE`` on the same K samples, with a fixed or a learned beta.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    With ``learn_beta=True`` beta descends the mean squared error of the guide's gradient as an
    estimate of IWAE's (`pyro_recursive.losses.ciwae`). `SVI`, `fit` and
    ``loss(model, guide).parameters()`` find the parameter ``<name>.beta``; its current value is
    ``loss.beta``, and `state_dict` is what to save of it.

    Raises ValueError for beta outside [0, 1], and for ``learn_beta`` where nothing can be learned:
    beta on a boundary, K = 1, or M = 1 with a K that does not split in two halves of at least 2.

    >>> float(CIWAE_ELBO(64, beta=0.05, learn_beta=True).beta)  # doctest: +ELLIPSIS
    0.05...
    """

    def __init__(
        self,
        num_particles: int,
        *,
        beta: float = 0.5,
        learn_beta: bool = False,
        name: str = "ciwae",
        **options: Unpack[SampleOptions],
    ) -> None:
        self._beta = beta
        self._learned = LearnedBeta(beta, name) if learn_beta else None
        super().__init__(bounds.ciwae(beta), num_particles=num_particles, **options)
        if learn_beta:
            check_replicates(self.num_estimates, self.num_particles, self.estimator)

    @property
    def beta(self) -> Tensor:
        """The current weight of the ELBO, detached."""
        if self._learned is None:
            return torch.as_tensor(self._beta)
        return self._learned().detach()

    def _options(self) -> dict[str, Any]:
        learned = {} if self._learned is None else {"learn_beta": True}
        return {**super()._options(), "beta": round(self.beta.item(), 4), **learned}

    @property
    def bound(self) -> Bound:
        """CIWAE at the current beta; no gradient of the bound reaches beta."""
        return self._bound if self._learned is None else bounds.ciwae(self.beta)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the loss has learned: beta, unconstrained; nothing where it is fixed."""
        return {} if self._learned is None else dict(self._learned.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the beta of another such loss, whatever Pyro's store has under its name.

        Raises RuntimeError where one of the two learns beta and the other does not.
        """
        if self._learned is not None:
            self._learned.load_state_dict(state)
        elif state:
            raise RuntimeError(
                f"This CIWAE_ELBO has a fixed beta of {self._beta}: make it with learn_beta=True."
            )

    def __call__(self, model: torch.nn.Module, guide: torch.nn.Module) -> ELBOModule:
        """Return the loss as a module; a learned beta is among its parameters."""
        module = super().__call__(model, guide)
        if self._learned is not None:
            module.add_module("learned_beta", self._learned)
        return module

    def _surrogate(self, evaluation: Evaluation) -> Tensor:
        total = super()._surrogate(evaluation)
        if self._learned is None:
            return total
        if evaluation.local.values is not None:
            raise NotImplementedError(
                "learn_beta=True needs a guide that samples all its latents, and this one "
                "enumerates some. Use a fixed beta, or drop infer={'enumerate'}."
            )
        target = optimal_beta(evaluation.runs, evaluation.local, self.estimator)
        return total - 0.5 * (self._learned() - target) ** 2


class LearnedBeta(PyroModule):
    """A parameter in the unit interval; calling it goes through `pyro.param`, as `SVI` needs."""

    def __init__(self, beta: float, name: str) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"a learned beta must start inside (0, 1), got {beta}")
        super().__init__(name)
        self.name = name
        self.register_load_state_dict_post_hook(_prefer_loaded)
        self.beta = PyroParam(torch.tensor(beta), constraint=constraints.unit_interval)
        store, key = pyro.get_param_store(), f"{name}.beta"
        if key in store and abs(store[key].item() - beta) > 1e-6:
            warnings.warn(
                f"Pyro's parameter store already holds '{key}' = {store[key].item():.3g}, which is "
                f"used instead of beta={beta}. Give each loss its own name=, or clear the store.",
                stacklevel=3,
            )

    def forward(self) -> Tensor:
        return self.beta


def _prefer_loaded(module: Any, keys: Any) -> None:
    evict_stale(module, module.name)


def check_replicates(num_estimates: int, num_particles: int, estimator: Estimator) -> None:
    """Raise ValueError where the moments of the gradient cannot be measured."""
    if estimator.name not in ("pathwise", "stl", "dreg"):
        raise ValueError(
            "learn_beta needs path derivatives: estimator 'pathwise', 'stl' or 'dreg', got "
            f"'{estimator.name}'"
        )
    can_halve = num_particles >= 4 and num_particles % 2 == 0
    if num_particles < 2 or (num_estimates == 1 and not can_halve):
        raise ValueError(
            "learn_beta needs num_estimates and num_particles >= 2, or an even num_particles >= 4; "
            f"got {num_estimates} and {num_particles}"
        )


def optimal_beta(runs: Sequence[ParticleRun], local: Densities, estimator: Estimator) -> Tensor:
    """Return this batch's estimate of the best beta, a scalar in [0, 1] without a graph."""
    log_weights = replicates = local.log_weights
    if len(log_weights) == 1:
        replicates = log_weights.squeeze(0).unflatten(0, (2, -1))
    count = len(replicates)
    covariance = square = log_weights.new_zeros(())
    for samples in _path_derivatives(runs, local, estimator):
        iwae, difference = _gradients(samples, replicates, local, estimator)
        moved = (iwae - iwae.mean(0)) * (difference - difference.mean(0))
        covariance = covariance + moved.sum() / (count * (count - 1))
        _, whole = _gradients(samples, log_weights, local, estimator)
        square = square + whole.mean(0).square().sum()
    return torch.where(square > 0, -covariance / square, square).clamp(0.0, 1.0)


Samples = list[tuple[dict, int, Tensor]]  # for one site: where each run sampled it, and d/dz there


def _path_derivatives(
    runs: Sequence[ParticleRun], local: Densities, estimator: Estimator
) -> Iterable[Samples]:
    """Return each reparameterised site's derivative, as the estimator sends it along the path.

    Pathwise, the density moves with its location, and only log p has a derivative there.
    """
    if estimator.replay == "paths":
        cut = [(path.site, path.particle, path.stand_in) for run in runs for path in run.guide_cuts]
    else:
        cut = [
            (record.site, number, record.site["value"])
            for number, run in enumerate(runs)
            for record in run.table.guide
            if record.group == "density" and record.site["value"].requires_grad
        ]
        local = replace(local, density=None)
    cut = [entry for entry in cut if local.names is None or entry[0]["name"] in local.names]
    objective, by_site = local.reparameterized.sum(), dict[str, Samples]()
    if cut and objective.requires_grad:
        values = [value for _, _, value in cut]
        derivatives = torch.autograd.grad(
            objective, values, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for (site, particle, _), derivative in zip(cut, derivatives, strict=True):
            by_site.setdefault(site["name"], []).append((site, particle, derivative))
    return by_site.values()


def _gradients(
    samples: Samples, log_weights: Tensor, local: Densities, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    """Return g_I and D of one site for each replicate, ``[replicates, *value shape]``."""
    shape = log_weights.shape[:2]
    vectorized = local.layout.particles.dim is not None
    sums = []
    for bound in (bounds.iwae, bounds.elbo):
        path = estimator(bound, log_weights).path
        assert path is not None  # check_replicates has made sure
        rows = [local.layout.at_site(path, site, number) * d for site, number, d in samples]
        every = rows[0] if vectorized else torch.stack(rows)
        # Coefficients of R replicates hold 1 / R each.
        sums.append(every.unflatten(0, shape).sum(1) * shape[0])
    return sums[0], sums[1] - sums[0]
