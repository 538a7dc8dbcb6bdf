"""Guides that are written for one sample: under `torch.vmap`, and equal to a loop on its noise."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, autoguide
from pyro.nn import PyroModule
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, log_marginal
from pyro_recursive.bounds.estimators import ESTIMATORS
from pyro_recursive.evaluation import importance_weights, posterior_draws, predictive_draws
from pyro_recursive.tracing.batched import values_by_particle
from pyro_recursive.tracing.choice import choose
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import is_delta, layers, sites, subsample_sites
from tests.models.losses import that_differ
from tests.models.one_sample import D, N, X, Y, differentiate, observe, weights

M, K = 2, 3


def param(name: str, *values: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(values if len(values) > 1 else values[0]))


def scale(name: str, value: float) -> Tensor:
    positive = dist.constraints.positive
    return pyro.param(name, lambda: torch.tensor(value), constraint=positive)


def chain() -> None:
    b = weights()
    c = pyro.sample("c", dist.Normal(b[0], 1.0))
    observe(X @ b + c)


def chain_guide() -> None:
    b = pyro.sample("b", dist.Normal(param("loc", 0.3, -0.2, 0.4), scale("s", 0.6)).to_event(1))
    pyro.sample("c", dist.Normal(param("w", 0.7) * b[0] - b[2] ** 2, scale("t", 0.8)))


def rows() -> None:
    b = weights()
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(X @ b, 1.0))
        pyro.sample("y", dist.Normal(z, 0.7), obs=Y)


def rows_guide() -> None:
    b = pyro.sample("b", dist.Normal(param("loc", 0.3, -0.2, 0.4), scale("s", 0.6)).to_event(1))
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(param("w", 0.7) * (X @ b) + 0.1 * Y, scale("t", 0.8)))


def alone() -> None:
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.7), obs=Y)


def alone_guide() -> None:
    loc = param("loc", 0.3, -0.2, 0.4)
    with pyro.plate("data", N):
        a = pyro.sample("a", dist.Normal(0.1 * Y, scale("s", 0.6)), infer={"is_auxiliary": True})
        loc = torch.einsum("n,d->nd", a, loc)
        pyro.sample("z", dist.Normal(loc, scale("t", 0.8)).to_event(1))


def alone_model() -> None:
    with pyro.plate("data", N):
        pyro.sample("a", dist.Normal(0.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.7), obs=Y)


def minibatch(model: Callable) -> Callable:
    """The rows' programs on a minibatch that the guide draws."""

    def program() -> None:
        loc = param("loc", 0.3, -0.2, 0.4) if model is alone_guide else None
        with pyro.plate("data", N, subsample_size=4) as index:
            if loc is not None:
                a = pyro.sample("a", dist.Normal(0.1 * Y[index], scale("s", 0.6)))
                fn = dist.Normal(torch.einsum("n,d->nd", a, loc), scale("t", 0.8))
                pyro.sample("z", fn.to_event(1))
            else:
                pyro.sample("a", dist.Normal(0.0, 2.0))
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4, D]).to_event(1))
                pyro.sample("y", dist.Normal(z.sum(-1), 0.7), obs=Y[index])

    return program


def choices() -> None:
    b = weights()
    with pyro.plate("data", N):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(b[k], 1.0))
        pyro.sample("y", dist.Normal(z, 0.7), obs=Y)


def choices_guide() -> None:
    b = pyro.sample("b", dist.Normal(param("loc", 0.3, -0.2, 0.4), scale("s", 0.6)).to_event(1))
    with pyro.plate("data", N):
        k = pyro.sample("k", dist.Categorical(logits=X * b))
        pyro.sample("z", dist.Normal(param("w", 0.7) * b[k] + 0.1 * Y, scale("t", 0.8)))


def masked(mask: Any, factor: float) -> Callable:
    """Masks and scales of entries and of sites, in model and guide."""

    def program(is_guide: bool) -> None:
        loc = param("loc", 0.3, -0.2, 0.4) if is_guide else torch.zeros(D)
        fn = dist.Normal(loc, scale("s", 0.6) if is_guide else torch.ones(()))
        b = pyro.sample("b", fn.mask(torch.tensor([True, False, True])).to_event(1))
        w = param("w", 0.7) * b[0] if is_guide else b[0]
        with pyro.plate("data", N), poutine.scale(scale=factor), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(w + X[:, 0], scale("t", 0.8) if is_guide else 1.0))
            if not is_guide:
                pyro.sample("y", dist.Normal(z * b[2], 0.7), obs=Y)

    return program


def computed_guide() -> None:
    """A factor and a computed site."""
    b = pyro.sample("b", dist.Normal(param("loc", 0.3, -0.2, 0.4), scale("s", 0.6)).to_event(1))
    pyro.factor("f", 0.1 * (param("w", 0.7) * b[0]).exp(), has_rsample=True)
    pyro.sample("c", dist.Delta(param("v", 0.2) * b[1], log_density=b[2]))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], tuple[Callable, Callable]]
    bounds: tuple[str, ...] = ("MIWAE", "PIWAE")
    has_minibatch: bool = False

    def programs(self) -> tuple[Callable, Callable]:
        model, guide = self.make()
        poutine.trace(guide).get_trace()  # makes the parameters
        return model, guide


def pair(model: Callable, guide: Callable) -> Callable:
    return lambda: (partial(model), partial(guide))


def messenger(make: Callable, model: Callable = chain) -> Callable:
    def build() -> tuple[Callable, Callable]:
        own = partial(model)
        return own, make(own, init_scale=0.6)

    return build


EVERY = "MIWAE", "PIWAE", "elbo", "nested"
SEQUENCE = masked(Y > -1, 0.5)
CASES = [
    Case("chain", pair(chain, chain_guide)),
    Case("rows", pair(rows, rows_guide), EVERY),
    Case("alone", pair(alone_model, alone_guide)),
    Case("minibatch", pair(minibatch(alone), minibatch(alone_guide)), has_minibatch=True),
    Case("choices", pair(choices, choices_guide), EVERY),
    Case("masked", lambda: (partial(SEQUENCE, False), partial(SEQUENCE, True)), EVERY),
    Case("computed", pair(chain, computed_guide)),
    Case("normal", messenger(autoguide.AutoNormalMessenger)),
    Case("normal of rows", messenger(autoguide.AutoNormalMessenger, rows), EVERY),
    Case("hierarchical", messenger(autoguide.AutoHierarchicalNormalMessenger)),
    Case("regressive", messenger(autoguide.AutoRegressiveMessenger)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")


@each_case
def test_guides_of_one_sample_run_under_vmap(case: Case) -> None:
    program = Program(*case.programs())
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == "vmap guide", structure.cause
    assert "guide" in structure.cause


class SameNoise(Messenger):
    """Gives looped runs the noise of another pass, from its values ``[P, ...]`` by site."""

    def __init__(self, values: dict[str, Tensor], minibatch: dict[str, Tensor]) -> None:
        super().__init__()
        self.values, self.minibatch = values, minibatch
        self.visits: Counter[str] = Counter()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or name not in self.values | self.minibatch:
            return
        if name in self.minibatch:
            msg["value"] = self.minibatch[name]
        elif not is_delta(msg):
            value = self.values[name][self.visits[name] % (M * K)]
            self.visits[name] += 1
            msg["value"] = _drawn(layers(msg["fn"])[-1], value)
        msg["done"] = msg["value"] is not None


def _drawn(fn: Any, value: Tensor) -> Tensor:
    """Return the value as a draw: a normal distribution's with its history."""
    if isinstance(fn, dist.TransformedDistribution):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        value = _drawn(layers(fn.base_dist)[-1], value)
        for transform in fn.transforms:
            value = transform(value)
    elif isinstance(fn, dist.Normal):
        value = fn.loc + fn.scale * ((value - fn.loc) / fn.scale).detach()
    return value


def outcome(call: Callable[[], Tensor]) -> Any:
    """Return the value and gradient of a loss, or the error that it raises."""
    try:
        return differentiate(call())
    except (ValueError, NotImplementedError) as error:
        return type(error), str(error)


def make_loss(bound: str, estimator: str, vectorize: bool) -> Any:
    make = PIWAE_ELBO if bound == "PIWAE" else MIWAE_ELBO
    count, options = M, dict[str, Any]()
    if bound in ("elbo", "nested"):
        options["global_latents"] = "elbo"
    if bound == "nested":
        count, options["num_globals"] = 1, M
    return make(count, K, estimator=estimator, vectorize_particles=vectorize, **options)


# What each is for several global samples, which have no sites to score.
NESTED = {"vimco": "pathwise", "dreg+vimco": "dreg"}


@pytest.mark.quick(6)
@pytest.mark.parametrize(
    ("case", "estimator"),
    [
        pytest.param(case, estimator, id=f"{case.name}-{estimator}")
        for case in CASES
        for estimator in that_differ(ESTIMATORS, has_scores=case.name == "choices")
    ],
)
def test_values_and_gradients_equal_the_loop(case: Case, estimator: str) -> None:
    """On the same noise, for every estimator and bound; both refuse the same."""
    program = Program(*case.programs())
    structure = structure_of(program)
    for bound in case.bounds:
        if bound == "elbo" and estimator.startswith("rws"):
            continue
        if bound == "nested" and estimator not in NESTED:
            continue
        name = NESTED[estimator] if bound == "nested" else estimator
        loss = make_loss(bound, name, vectorize=True)
        outcome(lambda: loss.differentiable_loss(program.model, program.guide))  # noqa: B023
        is_shared = loss.global_latents == "elbo"
        shared = frozenset(structure.guide) - {"z", "k"} if is_shared else frozenset()
        pyro.set_rng_seed(7)
        particles, (run,) = run_particles(program, M, K, shared=shared)
        assert particles.vmap_guide
        values = values_by_particle(run.guide, particles, structure.ranks)
        minibatches = subsample_sites(run.guide).nodes if case.has_minibatch else {}
        pyro.set_rng_seed(7)
        found = outcome(lambda: loss.differentiable_loss(program.model, program.guide))  # noqa: B023
        looped = make_loss(bound, name, vectorize=False)
        with SameNoise(values, {name: site["value"] for name, site in minibatches.items()}):
            expected = outcome(lambda: looped.differentiable_loss(program.model, program.guide))  # noqa: B023
        if isinstance(expected, tuple):
            assert found == expected
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            assert found[1:].abs().max() > 0


# What is drawn, and what is left


def evidence() -> float:
    """Return log p(y) of `chain`."""
    x = X + torch.tensor([1.0, 0.0, 0.0])
    covariance = x @ x.T + torch.ones(N, N) + torch.eye(N)
    return dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(Y).item()


@pytest.mark.parametrize("name", ["chain", "normal"])
def test_the_evidence_is_exact(name: str) -> None:
    case = next(each for each in CASES if each.name == name)
    for chunk_size in (None, 15_000):
        found = log_marginal(
            *case.programs(), num_particles=40_000, chunk_size=chunk_size, diagnostics=True
        )
        error = found.standard_error.item()
        assert abs(found.log_marginal.item() - evidence()) < 4 * error < 0.4


def conjugate(x: Tensor, y: Tensor | None = None) -> None:
    """Data of a model that is written for one sample, and a Beta latent that they do not need."""
    b = weights()
    pyro.sample("p", dist.Beta(2.0, 3.0))
    c = pyro.sample("c", dist.Normal(b[0], 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b + c, 1.0), obs=y)


def conjugate_guide(x: Tensor, y: Tensor | None = None) -> None:
    """The posterior, factor by factor."""
    prior = torch.eye(D + 1)
    prior[:, 0] += torch.eye(D + 1)[:, D]  # of (b, c), c = b[0] + noise
    factor = torch.eye(D + 1)
    factor[D, 0] = 1.0
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    precision = torch.linalg.inv(factor @ factor.T) + design.T @ design
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (design.T @ y)
    fn = dist.MultivariateNormal(mean[:D], covariance[:D, :D])
    b = pyro.sample("b", fn)
    gain = torch.linalg.solve(covariance[:D, :D], covariance[:D, D])
    variance = covariance[D, D] - gain @ covariance[:D, D]
    pyro.sample("p", dist.Beta(2.0, 3.0))
    pyro.sample("c", dist.Normal(mean[D] + gain @ (b - mean[:D]), variance.sqrt()))


def test_draws_of_the_posterior_and_of_new_data() -> None:
    """Exact moments; the weights of an exact posterior are equal."""
    torch.manual_seed(1)
    program, guide = partial(conjugate), partial(conjugate_guide)
    weighed = importance_weights(program, guide, X, Y, num_particles=50).log_weights
    torch.testing.assert_close(weighed, torch.full_like(weighed, evidence()), rtol=0, atol=1e-9)
    draws = posterior_draws(program, guide, X, Y, num_draws=3000)
    assert structure_of(Program(program, guide, (X, Y))).mode == "vmap guide"
    new = predictive_draws(program, draws, X[:4] + 1)["y"]
    states = torch.cat([draws["b"], draws["c"].unsqueeze(-1)], -1)
    noise = new - states @ torch.cat([X[:4] + 1, torch.ones(4, 1)], 1).T
    assert new.shape == (3000, 4)
    assert (noise.mean(0).abs() < 4 / 3000**0.5).all()
    assert ((noise.T @ noise / 3000 - torch.eye(4)).abs() < 4 * (2 / 3000) ** 0.5).all()


def left_tensors(model: Any, guide: Any) -> list[Tensor]:
    found = [value for _, value in pyro.get_param_store().items()]
    for each in (model, guide):
        if isinstance(each, nn.Module):
            found += [*each.parameters(), *each.buffers()]
    return found


@each_case
def test_nothing_of_a_pass_is_left(case: Case) -> None:
    """No tensor of `torch.vmap` in traces, parameters and guides; the validation is as it was."""
    model, guide = case.programs()
    is_validated = pyro.infer.util.is_validation_enabled()
    MIWAE_ELBO(M, K, estimator="dreg+vimco").loss_and_grads(model, guide)
    _, (run,) = run_particles(Program(model, guide), M, K, replay="paths")
    assert pyro.infer.util.is_validation_enabled() == is_validated
    tensors = left_tensors(model, guide)
    for site in sites(run.model, run.guide):
        tensors += [site["value"], site["fn"].log_prob(site["value"])]
        assert not any(isinstance(each, dist.Distribution) for each in site["infer"].values())
    for tensor in tensors:
        assert math.isfinite(tensor.sum().item())  # raises for one that has escaped
    if isinstance(guide, autoguide.AutoNormalMessenger):
        assert not guide.trace.nodes
        copy.deepcopy(guide)


def test_a_messenger_is_trained() -> None:
    """By `SVI`, with parameters that are made in the first step."""
    guide = autoguide.AutoNormalMessenger(chain, init_scale=0.4)
    svi = SVI(chain, guide, Adam({"lr": 0.05}), IWAE_ELBO(8, estimator="dreg"))
    for _ in range(100):
        svi.step()
    with torch.no_grad():
        trained = IWAE_ELBO(2000).loss(chain, guide)
    assert -evidence() - 0.05 < trained < -evidence() + 0.15
    assert len(list(guide.parameters())) == 4


def test_parameters_of_an_empty_store_are_no_tensors_of_a_particle() -> None:
    model, guide = partial(chain), partial(chain_guide)
    loss = IWAE_ELBO(4, estimator="dreg")
    loss.loss(model, guide)
    pyro.clear_param_store()
    loss.loss_and_grads(model, guide)
    for name in ("loc", "s", "w", "t"):
        leaf = pyro.param(name).unconstrained()
        assert leaf.is_leaf and leaf.grad.abs().sum() > 0


class Counting(PyroModule):
    """A guide that exchanges a buffer in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self) -> None:
        b = pyro.sample("b", dist.Normal(self.mean, 1.0).to_event(1))
        self.mean = 0.9 * self.mean + 0.1 * b.detach()
        pyro.sample("c", dist.Normal(b[0], 1.0))


def branching() -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    pyro.sample("c", dist.Normal(b[0] if b[0] > 0 else 0.0, 1.0))


@pytest.mark.parametrize(
    ("make", "cause"),
    [(Counting, r"buffer Counting\.mean"), (lambda: partial(branching), "guide raises Runtime")],
)
def test_guides_that_vmap_cannot_serve_are_looped(make: Callable, cause: str) -> None:
    """With one warning, and the value of a loop."""
    guide = make()
    with pytest.warns(UserWarning, match=rf"one by one \(4 runs.*{cause}"):
        IWAE_ELBO(4).loss(chain, guide)
    found = []
    for vectorize in (True, False):
        if isinstance(guide, Counting):
            guide.mean = torch.zeros(D)
        pyro.set_rng_seed(5)
        found.append(IWAE_ELBO(4, vectorize_particles=vectorize).loss(chain, guide))
    assert found[0] == found[1]


def test_two_runs_of_a_guide_have_one_noise() -> None:
    """That of dropout before and after a minibatch which the guide draws, of any size."""
    dropout = nn.Dropout(0.5)

    def model(size: int) -> None:
        b = weights()
        with pyro.plate("data", N, subsample_size=size) as index:
            pyro.sample("y", dist.Normal(X[index] @ b, 1.0), obs=Y[index])

    def guide(size: int) -> None:
        loc = dropout(param("loc", 0.3, -0.2, 0.4))
        with pyro.plate("data", N, subsample_size=size) as index:
            pass
        fn = dist.Normal(loc, 1e-6).to_event(1)
        a = pyro.sample("a", fn, infer={"is_auxiliary": True})
        pyro.sample("b", dist.Normal(dropout(a + Y[index].sum()) + a[0], 1e-6).to_event(1))

    programs = partial(model), partial(guide)
    for size in (4, 5, 5):
        particles, (run,) = run_particles(Program(*programs, (size,)), 1, 5, replay="paths")
        assert particles.vmap_guide
        for site in sites(run.guide):
            assert (site["fn"].log_prob(site["value"]) > 0).all()
