"""Random programs under every bound and estimator, against sums over single entries.

Plates nested, crossed, sequential and subsampled, at any dims; masks, scales, factors; vector
events; discrete latents; one precision or the other; one pass or a loop. No number may be wrong:
a combination is right to rounding, or refused where it must be.
"""

import itertools
import math
import random
from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from pyro_recursive import MultiSampleELBO, bounds
from tests.oracles.random_models import Pair, RandomSite, Terms, brute_force, random_sites

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*share one joint weight"),
    pytest.mark.filterwarnings("ignore:.*one by one"),
]

MODELS = 240
CHUNK = 10
M, K = 2, 2


def iwae(lw: Tensor) -> Tensor:
    return (lw.logsumexp(1) - math.log(lw.shape[1])).mean(0)


def renyi(lw: Tensor) -> Tensor:
    return 2 * iwae(0.5 * lw)


def elbo(lw: Tensor) -> Tensor:
    return lw.mean((0, 1))


def ciwae(lw: Tensor) -> Tensor:
    return 0.3 * elbo(lw) + 0.7 * iwae(lw)


def pooled(lw: Tensor) -> Tensor:
    return iwae(lw.flatten(0, 1).unsqueeze(0))


# name: the package's bound, the value and the objective of the guide, written out
BOUNDS: dict[str, tuple[bounds.Bound, Callable, Callable]] = {
    "iwae": (bounds.iwae, iwae, iwae),
    "elbo": (bounds.elbo, elbo, elbo),
    "renyi": (bounds.renyi(0.5), renyi, renyi),
    "ciwae": (bounds.ciwae(0.3), ciwae, ciwae),
    "piwae": (bounds.piwae, pooled, iwae),
}


def derivatives(bound: Callable, lw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and second derivative of a bound in each log-weight, one by one."""
    leaf = lw.detach().requires_grad_()
    (first,) = torch.autograd.grad(bound(leaf).sum(), leaf, create_graph=True)
    second = torch.zeros_like(lw)
    if first.requires_grad:
        for index in itertools.product(*map(range, lw.shape)):
            (row,) = torch.autograd.grad(first[index], leaf, retain_graph=True)
            second[index] = row[index]
    return first.detach(), second


def expected_gradients(pair: Pair, terms: Terms, name: str, estimator: str) -> list[Tensor]:
    """Return the gradient of the loss that each draw must have, by the estimator's definition."""
    _, of_model, of_guide = BOUNDS[name]

    def split(each: Tensor) -> Tensor:
        return each.unflatten(0, (-1, K))

    lw = split(terms.full.detach())
    model = derivatives(of_model, lw)[0]
    first, second = derivatives(of_guide, lw)
    total = (model * split(terms.model)).sum()
    path, density, rest = {
        "pathwise": (first, -first, None),
        "stl": (first, None, None),
        "dreg": (first - second, None, first - 1 / first.shape[:2].numel()),
        "rws": (None, first, first),
        "rws-dreg": (second, None, None),
    }[estimator]
    for coefficient, term in ((path, terms.path), (density, terms.density), (rest, terms.rest)):
        if coefficient is not None:
            total = total + (coefficient * split(term)).sum()
    scale = math.prod(plate.size / plate.batch for plate in pair.shared_plates())
    return gradients(pair, -scale * total)


def leaves(pair: Pair) -> list[Tensor]:
    return [p for table in (pair.theta, pair.phi) for own in table.values() for p in own.leaves()]


def gradients(pair: Pair, total: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(total, leaves(pair), retain_graph=True, allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in found]


def run(pair: Pair, loss: MultiSampleELBO, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradients with the noise of the pair's table."""
    pair.noise.calls.clear()
    torch.manual_seed(seed)
    value = loss.differentiable_loss(pair.model, pair.guide)
    if not value.requires_grad:
        return value, gradients(pair, sum(each.sum() * 0 for each in leaves(pair)))
    return value.detach(), gradients(pair, value)


def is_refused(pair: Pair, is_linear: bool, weighted: list[RandomSite] | None = None) -> bool:
    """Whether a subsampled plate leaves a site out: no logarithm of a minibatch is unbiased."""
    shared = pair.shared_plates(weighted)
    every = {plate for site in pair.sites for plate in site.plates}
    return not is_linear and any(p.batch < p.size and p not in shared for p in every)


def random_pair(seed: int, particles: int = M * K) -> tuple[Pair, random.Random]:
    rng = random.Random(seed)
    dtype = torch.float32 if rng.random() < 0.2 else torch.float64
    return Pair(random_sites(rng), seed, dtype, particles), rng


def warm_up(pair: Pair, loss: MultiSampleELBO) -> None:
    """Run once, so that runs which find the structure take no noise from the table."""
    pair.noise.tables = {}
    loss.loss(pair.model, pair.guide)


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    size = max(1.0, *(float(each.abs()) for each in expected))
    tolerance = size * (1e-9 if dtype == torch.float64 else 2e-3)
    for one, other in zip(actual, expected, strict=True):
        assert abs(float(one) - float(other)) < tolerance, (actual, expected)


def check(seed: int) -> None:
    """Compare every estimator under one bound, in one pass or in a loop."""
    pair, rng = random_pair(seed)
    if pair.has_discrete():
        check_discrete(seed)
        return
    name = rng.choice(list(BOUNDS))
    vectorized = rng.random() < 0.7
    bound, value_of, _ = BOUNDS[name]
    pair.one_particle = rng.random() < 0.5
    scale = math.prod(plate.size / plate.batch for plate in pair.shared_plates())
    for estimator in ("pathwise", "stl", "dreg", "rws", "rws-dreg"):
        loss = MultiSampleELBO(
            bound,
            estimator=estimator,
            num_estimates=M,
            num_particles=K,
            vectorize_particles=vectorized,
        )
        if is_refused(pair, bound.is_linear(M, K)):
            with pytest.raises(ValueError, match="subsampled"):
                loss.loss(pair.model, pair.guide)
            return
        warm_up(pair, loss)
        pair.draw_noise(torch.Generator().manual_seed(seed))
        value, found = run(pair, loss)
        terms = brute_force(pair)
        right = -scale * value_of(terms.full.detach().unflatten(0, (M, K))).sum()
        assert_close([value], [right], pair.dtype)
        assert_close(found, expected_gradients(pair, terms, name, estimator), pair.dtype)


def check_global(seed: int) -> None:
    """Compare the bound with an ELBO for the sites outside the plates of the data."""
    pair, rng = random_pair(seed)
    if not pair.is_nested() or pair.has_discrete():
        return
    name = rng.choice(["iwae", "elbo", "renyi", "ciwae"])
    vectorized = rng.random() < 0.7
    bound, value_of, _ = BOUNDS[name]
    pair.one_particle = rng.random() < 0.5
    loss = MultiSampleELBO(
        bound,
        num_estimates=M,
        num_particles=K,
        vectorize_particles=vectorized,
        global_latents="elbo",
    )
    inside = pair.local_sites()
    outside = [site for site in pair.sites if site not in inside]
    if is_refused(pair, bound.is_linear(M, K), inside):
        with pytest.raises(ValueError, match="subsampled"):
            loss.loss(pair.model, pair.guide)
        return
    warm_up(pair, loss)
    pair.draw_noise(torch.Generator().manual_seed(seed))
    for site in outside:  # one value for the K samples of an estimate
        for each, _ in [] if site.is_observed else pair.iterations(site):
            table = pair.noise.tables[each]
            pair.noise.tables[each] = table[::K].repeat_interleave(K, 0)
    value, found = run(pair, loss)
    scale = math.prod(plate.size / plate.batch for plate in pair.shared_plates(inside))
    right = scale * value_of(brute_force(pair, inside).full.unflatten(0, (M, K))).sum()
    if outside:
        shared = pair.shared_plates(outside)
        scale = math.prod(plate.size / plate.batch for plate in shared)
        right = right + scale * brute_force(pair, outside).full.sum(-1).mean()
    assert_close([value], [-right.detach()], pair.dtype)
    assert_close(found, gradients(pair, -right), pair.dtype)


def check_discrete(seed: int) -> None:
    """Sum the estimator over all values of the discrete samples: its expectation is exact.

    The normal samples keep their noise, and the gradient passes through them.
    """
    pair, rng = random_pair(seed, particles=2)
    name = rng.choice(["iwae", "elbo", "renyi", "ciwae"])
    estimator = rng.choice(["score", "vimco"])
    vectorized = rng.random() < 0.7
    bound, value_of, _ = BOUNDS[name]
    pair.one_particle = rng.random() < 0.5
    loss = MultiSampleELBO(
        bound, estimator=estimator, num_particles=2, vectorize_particles=vectorized
    )
    if is_refused(pair, bound.is_linear(1, 2)):
        with pytest.raises(ValueError, match="subsampled"):
            loss.loss(pair.model, pair.guide)
        return
    with pytest.raises(NotImplementedError, match="not reparameterised"):
        pathwise = MultiSampleELBO(bound, num_particles=2, vectorize_particles=vectorized)
        pathwise.differentiable_loss(pair.model, pair.guide)
    warm_up(pair, loss)
    scale = math.prod(plate.size / plate.batch for plate in pair.shared_plates())
    pair.draw_noise(torch.Generator().manual_seed(seed))
    site = next(each for each in pair.sites if not each.is_observed and each.kind == "bernoulli")
    tables = [name for name, _ in pair.iterations(site)]
    shapes = [pair.noise.tables[each].shape for each in tables]
    mean = [torch.zeros(()) for _ in leaves(pair)]
    objective: Tensor = torch.zeros(())
    for bits in itertools.product([0.0, 1.0], repeat=sum(shape.numel() for shape in shapes)):
        parts = torch.tensor(bits, dtype=pair.dtype).split([shape.numel() for shape in shapes])
        for each, part, shape in zip(tables, parts, shapes, strict=True):
            pair.noise.tables[each] = part.reshape(shape)
        value, found = run(pair, loss)
        terms = brute_force(pair)
        right = scale * value_of(terms.full.unflatten(0, (1, 2))).sum()
        assert_close([value], [-right.detach()], pair.dtype)
        probability = terms.log_q_discrete.sum().exp()
        objective = objective - probability * right
        mean = [m + probability.detach() * g for m, g in zip(mean, found, strict=True)]
    assert_close(mean, gradients(pair, objective), pair.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, MODELS, CHUNK))
def test_no_number_is_wrong(start: int) -> None:
    for seed in range(start, start + CHUNK):
        pyro.clear_param_store()
        try:
            check(seed)
            check_global(seed)
        except Exception as error:
            error.add_note(f"in the program of seed {seed}")
            raise


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_some_programs(seed: int) -> None:
    check(seed)
    check_global(seed)
