"""Samples under `torch.vmap`: the equality of all modes, and what a pass leaves behind."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Stratified_ELBO,
    log_marginal,
)
from pyro_recursive.evaluation import importance_weights, log_likelihoods, posterior_draws
from pyro_recursive.tracing.batched import values_by_particle
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import SiteTable, sites, subsample_sites
from tests.models.one_sample import (
    CASES,
    Case,
    N,
    X,
    Y,
    differentiate,
    observe,
    vmapped,
    weights,
    weights_guide,
)
from tests.oracles.recordings import K, M, Pinned, record

COMPARED = [
    pytest.param(case, estimator, id=f"{case.name}-{estimator}")
    for case in CASES
    if not case.is_noisy and case.mode != "loop" and case.name != "none"
    for estimator in ("pathwise", "dreg+vimco", "rws-dreg")
    if case.name != "discrete" or estimator == "dreg+vimco"  # the others need reparameterised sites
]


@pytest.mark.quick(10)
@pytest.mark.parametrize(("case", "estimator"), COMPARED)
def test_every_mode_equals_the_loop(case: Case, estimator: str) -> None:
    """Values and gradients agree to rounding, on the same draws of the guide."""
    warnings.filterwarnings("ignore", "Plate 'data' encloses latent site")
    programs = case.programs()
    recording = record(programs, case.args)
    fixed = recording[1]
    for make in (MIWAE_ELBO, PIWAE_ELBO):
        found = []
        options: dict[str, Any] = {"estimator": estimator}
        if case.name == "subsampled":  # a bound that is linear in the minibatch
            if make is PIWAE_ELBO or estimator == "rws-dreg":
                continue
            options["global_latents"] = "elbo"
        for vectorize, total in ((True, 0), ("vmap", 0), (False, M * K)):
            loss = make(M, K, vectorize_particles=vectorize, **options)
            with Pinned(recording[0], fixed, total):
                found.append(differentiate(loss.differentiable_loss(*programs, *case.args)))
        torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], found[2], rtol=1e-10, atol=1e-10)
        assert found[0][1:].abs().max() > 0


@vmapped
def test_densities_of_each_particle(case: Case) -> None:
    """Every site's density, value, scale and mask are those of a run on the particle's values."""
    program = Program(*case.programs(), case.args)
    particles, (run,) = run_particles(program, 2, 4)
    assert particles.vmap
    values = values_by_particle(run.guide, particles, structure_of(program).ranks)
    table = SiteTable(run.model, run.guide)
    assert table.nesting == structure_of(program).max_plate_nesting
    for particle in (0, 5):
        source = run.guide.copy()
        for name, value in values.items():
            source.nodes[name] = {**source.nodes[name], "value": value[particle]}
        for name, site in subsample_sites(run.model).nodes.items():
            if name not in source.nodes:
                source.add_node(name, **site)
        alone = SiteTable(program.run_model(source), source)
        for own, other in zip(table.model, alone.model, strict=True):
            one, two = own.site, other.site
            assert own.name == other.name and own.plates == other.plates
            assert one["fn"].event_shape == two["fn"].event_shape
            if not case.is_noisy:
                for key in ("log_prob", "value", "scale", "mask"):
                    pair = [_entry(site, key) for site in (one, two)]
                    if isinstance(pair[0], Tensor):
                        at = particle if pair[0].dim() else ()
                        same = pair[0][at].reshape(pair[1].shape)
                        torch.testing.assert_close(same, pair[1], rtol=1e-12, atol=1e-12)
                    else:
                        assert pair[0] == pair[1]


def _entry(site: Any, key: str) -> Any:
    return site["fn"].log_prob(site["value"]) if key == "log_prob" else site[key]


@vmapped
def test_nothing_of_a_pass_is_left(case: Case) -> None:
    """No tensor of `torch.vmap` in buffers, traces or caches; the validation is as it was."""
    model, guide = case.programs()
    loss = IWAE_ELBO(3, estimator="dreg+vimco")
    warnings.filterwarnings("ignore", "Plate 'data' encloses latent site")
    is_validated = pyro.infer.util.is_validation_enabled()
    if case.name != "subsampled":
        loss.loss_and_grads(model, guide, *case.args)
    assert pyro.infer.util.is_validation_enabled() == is_validated
    _, (run,) = run_particles(Program(model, guide, case.args), 1, 3)
    tensors = [site["value"] for site in sites(run.model, run.guide)]
    tensors += [site["fn"].log_prob(site["value"]) for site in sites(run.model)]
    if isinstance(model, nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    tensors += [value for _, value in pyro.get_param_store().items()]
    for tensor in tensors:
        assert math.isfinite(tensor.sum().item())  # raises for one that has escaped


def test_parameters_of_an_empty_store_are_no_tensors_of_a_particle() -> None:
    """The store may be cleared after the mode was chosen."""

    def model() -> None:
        offset = pyro.param("offset", lambda: torch.randn(()))
        observe(X @ weights() + offset)

    guide = partial(weights_guide)
    IWAE_ELBO(4).loss(model, guide)
    pyro.clear_param_store()
    loss = IWAE_ELBO(4).differentiable_loss(model, guide)
    offset = pyro.param("offset").unconstrained()
    assert offset.is_leaf and math.isfinite(offset.item())
    loss.backward()
    assert offset.grad.abs() > 0


def test_computed_sites_and_likelihoods_of_draws() -> None:
    """As in a loop, for values of any shape, also with dims that no plate has."""

    def model() -> None:
        b = weights()
        pyro.deterministic("mean", X @ b)
        pyro.deterministic("sum", b.sum())
        with pyro.plate("data", N):
            pyro.deterministic("square", (X @ b) ** 2, event_dim=0)
            with poutine.mask(mask=Y > -1):
                pyro.sample("y", dist.Normal(X @ b, 1.0), obs=Y)

    draws = posterior_draws(model, AutoNormal(model, init_scale=0.5), num_draws=7)
    b = draws["b"]
    for name, expected in (
        ("mean", b @ X.T),
        ("sum", b.sum(-1)),
        ("square", (b @ X.T) ** 2),
    ):
        torch.testing.assert_close(draws[name].reshape(expected.shape), expected)
    for chunk in (3, None):
        found = log_likelihoods(model, draws, chunk_size=chunk)["y"]
        expected = dist.Normal(b @ X.T, 1.0).log_prob(Y)
        torch.testing.assert_close(found, expected.masked_fill(Y <= -1, math.nan), equal_nan=True)


def conjugate() -> None:
    """A model that is right in every mode."""
    with pyro.plate("data", N):
        b = pyro.sample("b", dist.Normal(torch.zeros(N), 1.0))
        pyro.sample("y", dist.Normal(b, 0.7), obs=Y)


@pytest.mark.parametrize(
    "make",
    [
        partial(Stratified_ELBO, 3, estimator="stl"),
        partial(SIWAE_ELBO, 3),
        partial(MISELBO, 3, num_estimates=2),
        partial(RecursiveMixture_ELBO, 3, objective="exact"),
        partial(CIWAE_ELBO, 4, learn_beta=True),
        partial(IWAE_ELBO, 4, estimator="vimco"),
    ],
)
def test_one_seed_gives_one_value_in_a_plate_and_under_vmap(make: Callable) -> None:
    """Values and gradients are the same, of guides of the package too."""
    model, found = partial(conjugate), []
    is_mixture = make.func not in (CIWAE_ELBO, IWAE_ELBO)
    for vectorize in (True, "vmap"):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        if make.func is RecursiveMixture_ELBO:
            guide = RecursiveMixtureGuide(model, 2, plate="data")
        elif is_mixture:
            parts = [AmortizedGuide(model, plate="data") for _ in range(2)]
            guide = MixtureGuide(model, parts, plate="data")
        else:
            guide = AmortizedGuide(model, plate="data")
        loss = make(vectorize_particles=vectorize)
        loss.loss(model, guide)
        pyro.set_rng_seed(5)
        found.append(differentiate(loss.differentiable_loss(model, guide)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)
    assert found[0][1:].abs().max() > 0


def test_evaluation_is_the_same_in_all_modes() -> None:
    model = partial(conjugate)
    guide = AutoNormal(model, init_scale=0.5)
    for call in (log_marginal, lambda *a, **o: importance_weights(*a, **o).log_weights):
        found = []
        for vectorize in (True, "vmap"):
            pyro.set_rng_seed(5)
            options = {"num_particles": 50, "chunk_size": 20, "vectorize_particles": vectorize}
            found.append(call(model, guide, **options))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)
        assert found[0].shape[-1] == N


def test_a_minibatch_of_the_models_own_takes_one_run() -> None:
    """From the second call on, also where the plate has another size then."""
    runs = []

    def model(x: Tensor, y: Tensor) -> None:
        runs.append(1)
        b = weights()
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(x[index] @ b, 1.0), obs=y[index])

    def guide(x: Tensor, y: Tensor) -> None:
        weights_guide()

    counts = []
    for rows in (N, N, 4, 4):
        runs.clear()
        run_particles(Program(model, guide, (X[:rows], Y[:rows])), 1, 4)
        counts.append(len(runs))
    assert counts[1:] == [1, 2, 1]
