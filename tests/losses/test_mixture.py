"""Stratified losses of mixture guides: values and gradients by quadrature.

Where draws are pinned to nodes, equality is to rounding; statistical checks allow 4.5 standard
errors.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from pyro_recursive import (
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    SIWAE_ELBO,
    MixtureGuide,
    MultiSampleELBO,
    Stratified_ELBO,
    bounds,
)
from pyro_recursive.tracing.handlers import KLWarmup
from tests.models.small import normal_rows
from tests.oracles.mixtures import (
    ALIKE,
    LOGITS,
    PLACES,
    THETA,
    UNLIKE,
    assert_same,
    bimodal,
    derivatives,
    grid,
    log_joint,
    log_q,
    mixture_elbo,
    pinned,
    put,
    setting,
)
from tests.oracles.quadrature import log_normal

LOG_WEIGHTS = LOGITS.log_softmax(-1)


def softmax_elbo(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
    return mixture_elbo(theta, places, logits.log_softmax(-1))


def selbo(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    return (log_weights.exp()[:, None] * log_ratio.mean(0)).sum(0)


def siwae(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    return (log_ratio + log_weights[:, None]).logsumexp((0, 1)) - math.log(len(log_ratio))


def miselbo(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    means = log_ratio.logsumexp(0) - math.log(len(log_ratio))
    return (log_weights.exp()[:, None] * means).sum(0)


def at_nodes(bound: Callable, eps: Tensor, *inputs: Tensor) -> Tensor:
    """Return a bound at each node for noise ``eps``, ``[T, M, nodes]``."""
    theta, places, logits = inputs
    log_weights = logits.log_softmax(-1)
    z = places[:, :1] + places[:, 1:].exp() * eps
    return bound(log_joint(z, theta) - log_q(z, places, log_weights), log_weights)


# The loss; its bound; [T, M] numbers of independent noises; the order of the draws in the loss.
BOUNDS = {
    "SELBO": (lambda e: Stratified_ELBO(1, estimator=e), selbo, [[0, 0]], [0, 0]),
    "SELBO-2": (lambda e: Stratified_ELBO(2, estimator=e), selbo, [[0, 1], [1, 0]], [0, 1, 1, 0]),
    "SIWAE": (lambda e: SIWAE_ELBO(1, estimator=e), siwae, [[0, 1]], [0, 1]),
    "SIWAE-2": (lambda e: SIWAE_ELBO(2, estimator=e), siwae, [[0, 1], [1, 0]], [0, 1, 1, 0]),
    "MISELBO": (lambda e: MISELBO(1, estimator=e), miselbo, [[0, 0]], [0, 0]),
    "MISELBO-2": (lambda e: MISELBO(2, estimator=e), miselbo, [[0, 0], [1, 1]], [0, 1, 0, 1]),
}
ROWS = [(name, "pathwise") for name in BOUNDS] + [("SELBO", "stl"), ("MISELBO", "stl")]


@pytest.mark.parametrize("families", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize(("name", "estimator"), ROWS)
def test_value_and_gradients(name: str, estimator: str, families: tuple[str, str]) -> None:
    """Gaussians of one family are evaluated at once, others one by one: the numbers are the same.

    The estimator "stl" leaves out what is zero on average only.
    """
    loss, bound, columns, order = BOUNDS[name]
    eps, weight = grid(1 + max(order))
    noises = eps[torch.tensor(columns)]
    expected = derivatives(lambda *inputs: (weight * at_nodes(bound, noises, *inputs)).sum())
    s = setting(len(weight), families=families)
    assert_same(s.gradients(loss(estimator), eps[order], weight), expected)
    with pinned(eps[order]):
        value = loss(estimator).loss(s.model, s.guide)
    at_each = at_nodes(bound, noises, THETA, PLACES, LOGITS)
    assert -value == pytest.approx(at_each.sum().item(), rel=1e-10)


def test_stl_has_no_noise_where_the_mixture_is_exact() -> None:
    x = torch.ones(5)
    guide = MixtureGuide(normal_rows, 2, plate="data")
    guide.prepare(x)
    put(guide, [[0.5, -0.5 * math.log(2)]] * 2)
    sizes = []
    for estimator in ("stl", "pathwise"):
        loss = Stratified_ELBO(1, estimator=estimator)
        value = loss.differentiable_loss(normal_rows, guide, x)
        places = [guide.component(m).free_local for m in range(2)]
        sizes.append(max(g.abs().max() for g in torch.autograd.grad(value, places)))
    assert sizes[0] < 1e-14 < 0.1 < sizes[1]


@pytest.mark.parametrize("estimator", ["vimco", "dreg+vimco"])
def test_weights_have_no_noise_where_each_component_is_exact(estimator: str) -> None:
    x = torch.tensor([1.0, 1.0, 1.0])
    guide = MixtureGuide(normal_rows, 2, plate="data")
    guide.prepare(x)
    put(guide, [[0.5, -0.5 * math.log(2)]] * 2)
    loss = MIWAE_ELBO(2, 4, estimator=estimator)
    value = loss.differentiable_loss(normal_rows, guide, x)
    logits = [p for name, p in guide.named_parameters() if name.startswith("weights")]
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.numel() == 6 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize(
    ("loss", "estimator", "count"),
    [
        (Stratified_ELBO, "pathwise", 3),
        (Stratified_ELBO, "stl", 3),
        (SIWAE_ELBO, "pathwise", 3),
        (MISELBO, "pathwise", 3),
        (MISELBO, "stl", 1),
    ],
)
def test_looped_equals_vectorised(loss: type, estimator: str, count: int) -> None:
    noise, s, results = torch.randn(2 * count, 5), setting(5), []
    for vectorize in (True, False):
        chosen = loss(count, estimator=estimator, vectorize_particles=vectorize)
        with pinned(noise):
            value = chosen.differentiable_loss(s.model, s.guide)
        results.append((value.detach(), *torch.autograd.grad(value, s.parameters())))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


def test_kl_warm_up_weighs_the_mixture_inside_a_logarithm() -> None:
    """And not the components' weights, by which their draws are there."""
    noise = torch.randn(2, 5)
    s = setting(5)
    with KLWarmup(0.2), pinned(noise), torch.no_grad():
        value = SIWAE_ELBO(1).differentiable_loss(s.model, s.guide)
    z, log_weights = PLACES[:, :1] + PLACES[:, 1:].exp() * noise, LOGITS.log_softmax(-1)
    kl = log_normal(z, THETA, 1.3) - log_q(z, PLACES, log_weights)
    terms = log_weights[:, None] + log_normal(1.7, z**2, 0.8) + 0.2 * kl
    torch.testing.assert_close(value, -terms.logsumexp(0).sum())


# --- What the bounds are worth


@pytest.mark.parametrize(
    ("apart", "expected"), [(0.0, 0.0), (1.0, None), (40.0, math.log(2))], ids=["0", "1", "40"]
)
def test_diversity_of_two_components(apart: float, expected: float | None) -> None:
    """MISELBO(1) less the components' ELBOs: nothing for copies, log 2 for strangers."""
    eps, weight = grid(1)
    s = setting(len(weight))
    put(s.guide, [[-apart / 2, 0.0], [apart / 2, 0.0]])
    s.logits().data.zero_()
    # A scale for each row on model and guide weighs the rows.
    model, guide = (poutine.scale(program, scale=weight) for program in (s.model, s.guide))
    with pinned(eps[0]):
        whole = -MISELBO(1).loss(model, guide)
        components = [poutine.scale(s.guide.component(m), scale=weight) for m in range(2)]
        singles = [-MultiSampleELBO(bounds.elbo).loss(model, each) for each in components]
    found = whole - sum(singles) / 2
    if expected is None:
        assert 0.05 < found < math.log(2) - 0.05
    else:
        assert found == pytest.approx(expected, abs=1e-9)


# --- Gradients of ordinary losses


def iwae_2(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
    """IWAE-2 of the mixture: a sum over the components of both samples."""
    eps, weight = grid(2)
    log_weights = logits.log_softmax(-1)
    total = torch.zeros(())
    for i in range(2):
        for j in range(2):
            pair = places[[i, j]]
            z = pair[:, :1] + pair[:, 1:].exp() * eps
            ratio = log_joint(z, theta) - log_q(z, places, log_weights)
            share = (log_weights[i] + log_weights[j]).exp()
            total = total + share * (weight * (ratio.logsumexp(0) - math.log(2))).sum()
    return total


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (IWAE_ELBO(2, estimator="vimco"), iwae_2),
        (IWAE_ELBO(2, estimator="dreg+vimco"), iwae_2),
        (Trace_ELBO(), softmax_elbo),
        (TraceGraph_ELBO(), softmax_elbo),
        (MultiSampleELBO(bounds.elbo, estimator="score"), softmax_elbo),
        (MultiSampleELBO(bounds.elbo, estimator="vimco", num_particles=2), softmax_elbo),
        (Stratified_ELBO(1), softmax_elbo),
    ],
)
def test_gradients_by_many_draws(loss: Any, expected: Callable) -> None:
    s, exact = setting(40_000), derivatives(expected)
    loss.loss_and_grads(s.model, s.guide)
    # In a row the softmax makes the gradients of the two logits opposite.
    second, logits = -s.guide.component(1).free_local.grad, -s.logits().grad[:, :1]
    for rows, mean in ((second, exact.second), (logits, exact.logits[:1])):
        z = (rows.mean(0) - mean) / (rows.std(0) / len(rows) ** 0.5)
        assert (z.abs() < 4.5).all(), f"z = {z.tolist()}"


# --- Copies


@pytest.mark.parametrize(("copies", "steps"), [(True, 20), (False, 150)])
def test_copies_never_separate_and_different_components_do(copies: bool, steps: int) -> None:
    guide = MixtureGuide(bimodal, 2)
    guide.prepare()
    places = [guide.component(m).free_global for m in range(2)]
    if copies:
        places[1].data.copy_(places[0].data)
    svi = SVI(bimodal, guide, pyro.optim.Adam({"lr": 0.1}), Stratified_ELBO(4))
    for _ in range(steps):
        with pinned(torch.randn(4, 1).repeat_interleave(2, 0)):  # the strata share their noise
            svi.step()
    distance = (places[0] - places[1]).detach().abs().max()
    assert distance == 0 if copies else distance > 3


def test_the_relative_direction_of_a_copied_pair_has_no_gradient() -> None:
    """For any weights: the pair's gradients are in the ratio of the weights, on average."""
    eps, weight = grid(1)
    s = setting(len(weight))
    put(s.guide, PLACES[[0, 0]])
    found = s.gradients(Stratified_ELBO(1), eps[0], weight)
    shares = LOG_WEIGHTS.exp()
    torch.testing.assert_close(found.first / shares[0], found.second / shares[1])
    torch.testing.assert_close(found.logits, torch.zeros(2), atol=1e-8, rtol=0)


# --- Refusals and options


def test_what_stratified_losses_refuse() -> None:
    for wrong in (lambda: MISELBO(2, estimator="stl"), lambda: SIWAE_ELBO(1, estimator="stl")):
        with pytest.raises(ValueError, match=r"in \('pathwise',\), got 'stl'"):
            wrong()


@pytest.mark.parametrize("loss", [Stratified_ELBO, SIWAE_ELBO, MISELBO])
def test_estimates_are_independent_and_samples_share_a_logarithm(loss: type) -> None:
    """M estimates of K samples are those of M calls; for a linear bound M K samples do the same."""
    chosen, s = loss(2, num_estimates=3), setting(4)
    assert (chosen.num_particles, chosen.num_estimates) == (2, 3)
    noise = torch.randn(12, 4)  # estimate by estimate
    with pinned(noise):
        whole = chosen.loss(s.model, s.guide)
    each = []
    for part in noise.split(4):
        with pinned(part):
            each.append(loss(2).loss(s.model, s.guide))
    assert whole == pytest.approx(sum(each) / 3, rel=1e-12)


def test_evaluation_in_inference_mode_leaves_training_alone() -> None:
    guide = MixtureGuide(bimodal, 2)
    with torch.inference_mode():
        Stratified_ELBO(2).loss(bimodal, guide)
    assert Stratified_ELBO(2).loss_and_grads(bimodal, guide) > -1e9
