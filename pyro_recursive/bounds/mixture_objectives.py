"""Objectives for a new component of a mixture, its gain, and optimal weights; pure torch.

A component ``q`` is added to a mixture ``Q``: ``Q' = (1 - e) Q + e q``. Each objective for ``q`` is
``E_q[log p(x, z) - log R(z)]`` in nats, with a reference density ``R`` of its own. References are
functions of the table of all components' log-densities at the same draws, ``[*batch, J]``, and of
their log-weights; ``m`` is the column of ``q``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.bounds.bound import double


def log_mixture(table: Tensor, log_weights: Tensor) -> Tensor:
    """Return ``log Q`` over all components: ``[*batch, J]`` to ``[*batch]``."""
    return torch.logsumexp(table + log_weights, -1)


def log_others(table: Tensor, log_weights: Tensor, m: int) -> Tensor:
    """Return the log-density of the mixture without component ``m``, its weights summing to 1."""
    table, weights = (torch.cat([t[..., :m], t[..., m + 1 :]], -1) for t in (table, log_weights))
    return torch.logsumexp(table + weights, -1) - torch.logsumexp(weights, -1)


def stick_breaking(logits: Tensor) -> Tensor:
    """Return log-weights of ``Q_m = (1 - e_m) Q_{m-1} + e_m q_m``, ``[*batch, J - 1]`` to J.

    ``e_m`` is the sigmoid of its logit; the first component has the remaining weight.
    """
    log_share = torch.nn.functional.logsigmoid(logits)
    log_rest = torch.nn.functional.logsigmoid(-logits)
    after = log_rest.flip(-1).cumsum(-1).flip(-1) - log_rest  # left by the components after m
    return torch.cat([log_rest.sum(-1, keepdim=True), log_share + after], -1)


@dataclass(frozen=True)
class Objective:
    """The objective of a new component; with ``held`` the parameters inside R are constants."""

    held: ClassVar[bool] = False

    def __call__(self, table: Tensor, log_weights: Tensor, m: int, own: Sequence[int]) -> Tensor:
        """Return ``log R``, ``[*batch]``; ``own`` are the draws (first dim) that come from q."""
        raise NotImplementedError


@dataclass(frozen=True)
class Alone(Objective):
    """``R = q``: the component's own ELBO."""

    def __call__(self, table: Tensor, log_weights: Tensor, m: int, own: Sequence[int]) -> Tensor:
        return table[..., m]


@dataclass(frozen=True)
class Exact(Objective):
    """``R = Q'`` with its parameters held: the exact gradient of the mixture's ELBO, over e.

    The gradient through the parameters inside ``log Q'`` has mean zero: draws from q suffice.
    """

    held: ClassVar[bool] = True

    def __call__(self, table: Tensor, log_weights: Tensor, m: int, own: Sequence[int]) -> Tensor:
        return log_mixture(table, log_weights)


@dataclass(frozen=True)
class Skew(Objective):
    """``R = (1 - epsilon) Q + epsilon q``: ``ELBO(q) + KL(q || R)``, the divergence being bounded.

    It is at most ``log(1 / epsilon)``, a smooth clamp. The gradient is that of the formula, not of
    the mixture's ELBO.
    """

    epsilon: float = 0.1

    def __call__(self, table: Tensor, log_weights: Tensor, m: int, own: Sequence[int]) -> Tensor:
        others = log_others(table, log_weights, m) + math.log1p(-self.epsilon)
        return torch.logaddexp(others, table[..., m] + math.log(self.epsilon))


@dataclass(frozen=True)
class Clamped(Objective):
    """``ELBO(q) + strength * min(KL(q || Q), clamp)``, clamped for each row.

    The objective of `Recursive Inference for Variational Autoencoders`, reconstructed from its
    abstract and public reviews. With a small ``clamp`` (in nats) the component stays near Q, with a
    large one it moves into the tails.
    """

    clamp: float
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check that both constants are positive."""
        if not (self.clamp > 0 and self.strength > 0):
            raise ValueError(f"clamp and strength must be positive, got {self}.")

    def __call__(self, table: Tensor, log_weights: Tensor, m: int, own: Sequence[int]) -> Tensor:
        ratio = table[..., m] - log_others(table, log_weights, m)
        draws = ratio[list(own)].mean(0) if own else ratio
        free = (draws < self.clamp).detach()
        bonus = torch.where(free, ratio, self.clamp)
        return table[..., m] - self.strength * bonus


@dataclass(frozen=True)
class Relbo(Objective):
    """``E_q[log p] - E_q[log Q] + regularization * H(q)``, the residual ELBO of boosting.

    `Boosting Black Box Variational Inference` (Locatello et al., arXiv 1806.02185). It has no
    optimum where Q has thinner tails than p.
    """

    regularization: float = 1.0

    def __post_init__(self) -> None:
        """Check that the entropy is not penalised."""
        if not self.regularization > 0:
            raise ValueError(f"regularization must be positive, got {self.regularization}.")

    def __call__(self, table: Tensor, log_weights: Tensor, m: int, own: Sequence[int]) -> Tensor:
        return log_others(table, log_weights, m) + self.regularization * table[..., m]


OBJECTIVES = {"exact": Exact(), "skew": Skew(), "relbo": Relbo(), "elbo": Alone()}


class Gain(NamedTuple):
    """The gain in a mixture's bound by a component, in nats summed over the data.

    ``standard_error`` is over paired draws; ``ceiling`` is an upper bound on the gain at any weight
    of the component, ``b log(1 + exp((ELBO(q) - L(Q)) / b))`` under a weight b of the KL term.
    """

    mean: float
    standard_error: float
    ceiling: float

    def is_clear(self, confidence: float, least: float = 0.0) -> bool:
        """Whether the gain is more than ``confidence`` standard errors, and more than ``least``."""
        return self.mean > max(confidence * self.standard_error, least)


class Trial(NamedTuple):
    """The acceptance test of a component: its gain, and whether it was kept."""

    component: int
    gain: Gain
    is_kept: bool


def gain(
    log_p: Tensor,
    log_q: Tensor,
    others: Tensor,
    own: Tensor,
    log_weights: Tensor,
    scale: float = 1.0,
    rows_are_a_sample: bool = False,
    latent_weight: Tensor | float = 1.0,
) -> Gain:
    """Return the gain by the last of J components, from S draws of each.

    ``log_p``, the log-densities of the mixture, of the ``others`` and of the last component
    (``own``) at all draws are ``[S, J, *rows]``, ``log_weights`` ``[*rows, J]``. Both bounds use
    the same draws. Where the rows are a sample of the data, their spread is part of the standard
    error. ``latent_weight``, ``[S, J, *rows]``, is what densities of latents are multiplied by in
    all of these: a scale of the loss, or KL warm-up's weight. All is computed in float64: in
    float32 the weights sum to 1 only up to rounding, and that error times the evidence of much data
    may exceed the gain.
    """
    if log_weights.shape[-1] < 2:
        raise ValueError("A gain needs at least 2 components, got 1.")
    log_p, log_q, others, own = (double(each) for each in (log_p, log_q, others, own))
    log_weights = double(log_weights).log_softmax(-1)
    after = _stratified(log_p - log_q, log_weights)
    rest = log_weights[..., :-1].log_softmax(-1)
    before = _stratified((log_p - others)[:, :-1], rest)
    differences = scale * (after - before).reshape(len(log_p), -1).sum(1)
    lead = (log_p - own)[:, -1].mean(0) - before.mean(0)
    weight = torch.as_tensor(latent_weight).to(log_p).expand_as(log_p)[0, -1]
    ceiling = weight * torch.nn.functional.softplus(lead / weight)
    ceiling = scale * torch.where(weight > 0, ceiling, 0.0).sum()
    error = differences.std() / len(differences) ** 0.5
    by_row = scale * (after - before).mean(0).flatten()
    if rows_are_a_sample and len(by_row) > 1:  # one joint posterior is no sample of rows
        error = (error**2 + len(by_row) * by_row.var()).sqrt()
    return Gain(differences.mean().item(), error.item(), ceiling.item())


def _stratified(terms: Tensor, log_weights: Tensor) -> Tensor:
    """Weigh draws of each component: ``[S, J, *rows]`` and ``[*rows, J]`` to ``[S, *rows]``."""
    return (terms * log_weights.exp().movedim(-1, 0)).sum(1)


def corrective_weights(
    log_p: Tensor,
    table: Tensor,
    log_weights: Tensor,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 2000,
    latent_weight: Tensor | float = 1.0,
) -> Tensor:
    """Maximise the mixture's ELBO over the weights of fixed components, by mirror ascent.

    ``log_p`` is ``[S, J]`` for S draws of each component, ``table`` ``[S, J, J]`` the log-densities
    of all components there, and ``log_weights``, ``[J]``, where to start. Stops where no weights
    gain more than ``tolerance`` nats, which is ``max_m E_m[log p - log Q] - L(Q)``. The bound has
    ``latent_weight * log Q`` (a number, or ``[S, J]``) in place of log Q. Computes in float64.
    """
    log_p, table = double(log_p), double(table)
    weights = double(log_weights.detach()).log_softmax(-1)
    # A step size with which mirror ascent never lowers the bound.
    rate = 1 / torch.as_tensor(latent_weight).max()
    for step in range(max_steps):
        slopes = (log_p - latent_weight * log_mixture(table, weights)).mean(0)
        slopes = slopes.clamp(min=-1e30)  # a component outside of the support gets no weight
        bound = (weights.exp() * slopes).sum()
        if step % 10 == 0 and bool(slopes.max() - bound < tolerance):
            break
        weights = (weights + rate * (slopes - bound)).log_softmax(-1)
    return weights


def line_search(
    log_p: Tensor,
    table: Tensor,
    log_weights: Tensor,
    m: int,
    *,
    latent_weight: Tensor | float = 1.0,
) -> Tensor:
    """Return weights with the best share of component ``m``, the others keeping their proportions.

    Bisects the slope of the ELBO, which is concave in the share. Arguments are those of
    `corrective_weights`.
    """
    log_p, table, others = (double(each) for each in (log_p, table, log_weights.detach().clone()))
    others[m] = -torch.inf
    others = others.log_softmax(-1)
    low, high = log_p.new_zeros(()), log_p.new_ones(())
    weights, least = others, torch.finfo(log_p.dtype).eps
    for _ in range(40):
        share = ((low + high) / 2).clamp(least, 1 - least)
        weights = others + torch.log1p(-share)
        weights[m] = share.log()
        terms = (log_p - latent_weight * log_mixture(table, weights)).mean(0)
        slope = terms[m] - (others.exp() * terms).sum()
        low, high = torch.where(slope > 0, share, low), torch.where(slope > 0, high, share)
    return weights


def best_gain(
    log_p: tuple[Tensor, Tensor],
    log_mixture: tuple[Tensor, Tensor],
    log_candidate: tuple[Tensor, Tensor],
    shares: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7),
) -> tuple[Tensor, Tensor]:
    """Return the bound with the best of C candidates, at the best of some shares, and its index.

    Each argument is a pair: at T draws of the mixture, and at S draws of each candidate. The first
    two are ``[T, *rows]`` and ``[C, S, *rows]``, the candidates' densities ``[C, T, *rows]`` and
    ``[C, S, *rows]``. Returns ``[*rows]`` twice. Draws of the mixture with density 0 under p, which
    cost every candidate the same, are left out.
    """
    bounds, dead = [], log_p[0].isneginf()
    for share in shares:
        e = torch.tensor(share).to(log_p[0])
        parts = [
            p - torch.logaddexp(torch.log1p(-e) + q, e.log() + c)
            for p, q, c in zip(log_p, log_mixture, log_candidate, strict=True)
        ]
        of_mixture = torch.where(dead, 0.0, parts[0]).sum(1) / (~dead).sum(0).clamp(min=1)
        bounds.append((1 - e) * of_mixture + e * parts[1].mean(1))
    values, indices = torch.stack(bounds).nan_to_num(nan=-torch.inf).amax(0).max(0)
    return values, indices
