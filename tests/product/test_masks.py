"""Masked latents: imputation, ragged sequences and flat priors, under every guide and loss."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation.search import Search
from pyro_recursive.guides.gaussian_families import LowRank
from tests.models.losses import BOUNDS, LOSSES
from tests.models.ragged import ragged, ragged_evidence, sequences, smoother
from tests.models.row import normal, observe, positive, real
from tests.oracles.recordings import Recorded

SMOOTH = ("pathwise", "stl", "dreg", "score", "vimco")
SEEN = torch.tensor([True, False, True, True, False])


def data() -> Tensor:
    return torch.tensor([0.4, -1.3, 0.9, 2.1, 1.6])


# Models with known evidence.


def impute(x: Tensor) -> None:
    """The data share a mean; those that are not seen are latent."""
    mu = normal("mu", 0.5, 1.2)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 0.8), obs=x, obs_mask=SEEN)


def impute_positive(x: Tensor) -> None:
    """The same of their logarithms."""
    mu = normal("mu", 0.5, 1.2)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.LogNormal(mu, 0.8), obs=x, obs_mask=SEEN)


def evidence_of_seen(x: Tensor) -> Tensor:
    size = int(SEEN.sum())
    covariance = 0.8**2 * torch.eye(size) + 1.2**2
    return dist.MultivariateNormal(torch.full((size,), 0.5), covariance).log_prob(x[SEEN])


def evidence_of_positive(x: Tensor) -> Tensor:
    return evidence_of_seen(x.log()) - x[SEEN].log().sum()


def flat_rows(x: Tensor) -> None:
    """Rows that are not seen have a flat prior: the integral of N(x; z, 1) over z is 1."""
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=SEEN):
            z = normal("z", 0.0, 1.0)
        observe(z, x)


def flat_evidence(x: Tensor) -> Tensor:
    return torch.where(SEEN, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0)


def encoder(model: Callable, *args: Any, family: Any = "diagonal") -> nn.Module:
    """Return a map of the rows of the first argument to their parameters."""
    probe = AmortizedGuide(model, nn.Identity(), family=family)
    probe.prepare(*args)
    width = probe.num_parameters(probe.groups[-1])
    features = args[0].flatten(1).shape[1] if args[0].dim() > 1 else 1
    flatten = nn.Flatten() if args[0].dim() > 1 else nn.Unflatten(0, (-1, 1))
    return nn.Sequential(flatten, nn.Linear(features, width))


def amortized(model: Callable, *args: Any, family: Any = "diagonal") -> AmortizedGuide:
    return AmortizedGuide(model, encoder(model, *args, family=family), family=family)


def by_hand(x: Tensor, *args: Any) -> None:
    normal("mu", real("m", 0.4), positive("s", 0.7))
    with pyro.plate("data", len(x)):
        normal("x_unobserved", real("u", 0.4).expand(len(x)), positive("t", 1.1))


GUIDES: dict[str, Callable[..., Any]] = {
    "diagonal": lambda model, *args: AmortizedGuide(model),
    "full": lambda model, *args: AmortizedGuide(model, family="full"),
    "low rank": lambda model, *args: AmortizedGuide(model, family=LowRank(1)),
    "table": lambda model, *args: AmortizedGuide(model, plate="data"),
    "encoder": amortized,
    "encoder full": partial(amortized, family="full"),
    "mixture": lambda model, *args: MixtureGuide(model, 2),
    "mixture of others": lambda model, *args: MixtureGuide(
        model, [AmortizedGuide(model), autoguide.AutoDiagonalNormal(model)]
    ),
    "mixture of sites": lambda model, *args: MixtureGuide(
        model, [autoguide.AutoNormal(model), amortized(model, *args)], weights="shared"
    ),
    "recursive": lambda model, *args: RecursiveMixtureGuide(
        model, 2, schedule=Schedule(first=60, propose=20, refine=20, joint=10)
    ),
    "refined": lambda model, *args: SemiAmortizedGuide(model, amortized(model, *args), steps=2),
    "sites": lambda model, *args: autoguide.AutoNormal(model),
    "messenger": lambda model, *args: autoguide.AutoNormalMessenger(model),
}
OWN = [name for name in GUIDES if name not in ("sites", "messenger")]
MODELS: dict[str, tuple[Callable, Callable, Callable]] = {  # model, arguments, evidence
    "ragged": (ragged, sequences, ragged_evidence),
    "imputed": (impute, lambda: (data(),), evidence_of_seen),
    "positive": (impute_positive, lambda: (data().exp(),), evidence_of_positive),
    "flat": (flat_rows, lambda: (data(),), flat_evidence),
}
QUICK = [("full", "imputed")]
SLOW = [
    *sorted(set(itertools.product(("full", "sites"), MODELS)) - set(QUICK)),
    *itertools.product(sorted(set(GUIDES) - {"full", "sites"}), ("ragged", "imputed")),
]
quiet = pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")


def trained(name: str, model: Callable, args: tuple, loss: Any, steps: int = 150) -> Any:
    guide = GUIDES[name](model, *args)
    svi = SVI(model, guide, Adam({"lr": 0.05}), loss)
    for _ in range(steps):
        svi.step(*args)
    return guide


def assert_evidence(model: Callable, guide: Any, args: tuple, exact: Tensor) -> None:
    """Estimates with many samples agree with log p(x), within their standard errors."""
    found = log_marginal(model, guide, *args, num_particles=20000, diagnostics=True)
    error = found.standard_error.square().sum().sqrt()
    assert error < 0.2
    assert abs(found.log_marginal.sum() - exact.sum()) < 4.5 * error + 1e-9


# Every guide.


@quiet
@pytest.mark.parametrize(
    ("name", "of"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
def test_evidence(name: str, of: str) -> None:
    """No bound lies above log p(x), and importance sampling finds it, after training."""
    model, make_args, evidence = MODELS[of]
    args = make_args()
    exact = evidence(*args)
    loss = Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    if name not in OWN:  # whose guides Pyro's losses take as they are
        loss = IWAE_ELBO(1, num_estimates=4)
    guide = trained(name, model, args, loss)
    with torch.no_grad():
        each = torch.tensor([IWAE_ELBO(20).loss(model, guide, *args) for _ in range(20)])
    assert -each.mean() < exact.sum() + 4 * each.std() / 20**0.5
    assert_evidence(model, guide, args, exact)


@quiet
@pytest.mark.parametrize("of", MODELS)
@pytest.mark.parametrize("name", OWN)
def test_trace_elbo_is_one_sample(name: str, of: str) -> None:
    """Pyro's own loss has the value and the gradient of this package's for one sample."""
    model, make_args, _ = MODELS[of]
    args = make_args()
    guide, found = GUIDES[name](model, *args), []
    guide(*args)
    for loss in (Trace_ELBO(), IWAE_ELBO(1)):
        pyro.set_rng_seed(3)
        if name == "refined":
            guide.seed = 5
        guide.zero_grad()
        if guide_is_mixture := name in ("recursive",) or "mixture" in name:
            value = loss.loss(model, guide, *args)
        else:
            value = loss.loss_and_grads(model, guide, *args)
        grads = [p.grad.flatten() for p in guide.parameters() if p.grad is not None]
        assert guide_is_mixture or grads
        found.append(torch.cat([torch.tensor([value]), *grads]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [True, False])
def test_exact_posterior(loss: str, masked: bool) -> None:
    """Every bound is log p(x) and no gradient has noise, with the guide's own mask or without."""
    args = sequences()
    exact, guide = ragged_evidence(*args).sum().item(), partial(smoother, masked=masked)
    for estimator in SMOOTH:
        each = LOSSES[loss](2, 3, estimator=estimator)
        value = each.differentiable_loss(ragged, guide, *args)
        assert value.item() == pytest.approx(-exact, rel=1e-10)
        leaves = [pyro.param(name).unconstrained() for name in ("a", "s")]
        if estimator in ("stl", "dreg"):
            for grad in torch.autograd.grad(value, leaves):
                assert grad.abs() < 1e-10


@pytest.mark.parametrize("vectorize", ["vmap", True, False])
def test_exact_posterior_in_every_mode(vectorize: Any) -> None:
    args = sequences()
    loss = IWAE_ELBO(3, vectorize_particles=vectorize)
    value = loss.loss(ragged, partial(smoother, masked=False), *args)
    assert value == pytest.approx(-ragged_evidence(*args).sum().item(), rel=1e-10)


@pytest.mark.slow
def test_estimators_agree_without_a_mask_in_the_guide() -> None:
    """The mean gradient is that of a guide with the model's mask."""
    args, means = sequences(), []
    for estimator in ("pathwise", "dreg", "score", "vimco"):
        for masked in (True, False):
            smoother(*args)
            pyro.get_param_store()["a"] = torch.tensor(0.7)
            loss = MIWAE_ELBO(4000, 3, estimator=estimator)
            loss.loss_and_grads(ragged, partial(smoother, masked=masked), *args)
            means.append(torch.stack([pyro.param(n).unconstrained().grad for n in ("a", "s")]))
            pyro.clear_param_store()
    assert (means[0].abs() > 0.5).any()
    for each in means[1:]:
        torch.testing.assert_close(each, means[0], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("loss", LOSSES)
def test_encoders_by_brute_force(loss: str) -> None:
    """A deep Markov model, annealed: weights are added up from the model's own trace."""
    x, lengths = sequences()
    guide, model = amortized(ragged, x, lengths), partial(ragged, annealing=0.3)
    with torch.no_grad():
        loc, log_scale = guide.encoder(x).chunk(2, -1)
        normals = dist.Normal(loc, log_scale.exp())
    inside = (torch.arange(3) < lengths[:, None]).repeat_interleave(2, -1)
    recorded = Recorded()
    with recorded:
        value = LOSSES[loss](2, 3).loss(model, guide, x, lengths)
    rows = []
    for particle in range(6):
        values = {f"z{t}": recorded.values[f"z{t}"][particle] for t in range(3)}
        trace = poutine.trace(poutine.condition(model, values)).get_trace(x, lengths)
        trace.compute_log_prob()
        log_p = sum(trace.nodes[f"{name}{t}"]["log_prob"] for name in "zx" for t in range(3))
        log_q = normals.log_prob(torch.cat(list(values.values()), -1)) * inside
        rows.append(log_p - log_q.sum(-1))
    by_hand = torch.stack(rows).unflatten(0, (2, 3))
    assert value == pytest.approx(-BOUNDS[loss](by_hand).sum().item())


# Masks that change, structure, evaluation.


@pytest.mark.slow
def test_masks_of_each_call() -> None:
    """An encoder is trained on minibatches, and evaluated on rows of other lengths."""
    x, lengths = sequences()
    guide = amortized(ragged, x, lengths)
    svi = SVI(ragged, guide, Adam({"lr": 0.03}), MIWAE_ELBO(2, 4))
    for step in range(100):
        svi.step(*((x[:2], lengths[:2]) if step % 2 else (x[2:], lengths[2:])))
    for other in (lengths, torch.tensor([1, 3, 3, 2]), torch.tensor([3, 3, 3, 3])):
        exact = ragged_evidence(x, other)
        found = log_marginal(ragged, guide, x, other, num_particles=20000)
        torch.testing.assert_close(found, exact, atol=0.2, rtol=0)


def test_masks_of_some_calls_only() -> None:
    """The guide is prepared without a mask, and Pyro's own loss is right with one later."""

    def model(x: Tensor, seen: Tensor | None = None) -> None:
        handler = nullcontext() if seen is None else poutine.mask(mask=seen)
        with pyro.plate("data", len(x)), handler:
            observe(normal("z", 0.0, 1.0), x)

    guide, x = AmortizedGuide(model, plate="data", init_scale=1.0), data()
    for mask in (None, SEEN):
        found = []
        for loss in (Trace_ELBO(), IWAE_ELBO(1)):
            pyro.set_rng_seed(1)
            found.append(loss.loss(model, guide, x, mask))
        assert found[0] == pytest.approx(found[1])
    assert_evidence(model, guide, (x, SEEN), flat_evidence(x))


def test_lengths_that_mask_nothing_at_first() -> None:
    x, lengths = sequences()
    guide = amortized(ragged, x, lengths)
    IWAE_ELBO(2).loss(ragged, guide, x, torch.full((4,), 3))
    assert_evidence(ragged, guide, (x, lengths), ragged_evidence(x, lengths))


@pytest.mark.slow
def test_gaps_of_masked_latents() -> None:
    """A full Gaussian with a search reaches the posterior of the steps that a row has."""
    args = sequences()
    guide = amortized(ragged, *args, family="full")
    found = gaps(ragged, guide, *args, search=Search(steps=600, lr=0.1), num_particles=2000)
    exact = ragged_evidence(*args)
    torch.testing.assert_close(found.log_marginal, exact, atol=0.05, rtol=0)
    torch.testing.assert_close(found.best, exact, atol=0.1, rtol=0)


@pytest.mark.slow
@quiet
def test_growth() -> None:
    x = data()
    guide = GUIDES["recursive"](impute)
    svi = SVI(impute, guide, Adam({"lr": 0.05}), RecursiveMixture_ELBO(4))
    for _ in range(guide.num_steps):
        svi.step(x)
    exact = evidence_of_seen(x)
    found = torch.tensor([RecursiveMixture_ELBO(50).loss(impute, guide, x) for _ in range(10)])
    assert exact - 2 < -found.mean() < exact + 3 * found.std() / 10**0.5
    assert_evidence(impute, guide, (x,), exact)


@pytest.mark.quick("dreg")
@quiet
@pytest.mark.parametrize("estimator", SMOOTH)
def test_guide_by_hand_without_a_mask(estimator: str) -> None:
    """Looped and in one pass: what is seen adds nothing, however wide its guide."""
    x = data()
    exact = evidence_of_seen(x).item()
    for vectorize in (True, False):
        options = {"estimator": estimator, "vectorize_particles": vectorize}
        pyro.set_rng_seed(2)
        loss = MIWAE_ELBO(30, 10, **options)
        value = -loss.loss_and_grads(impute, by_hand, x)
        assert exact - 1 < value < exact + 0.3


# What is refused, and what to do about it.


def partly_flat(x: Tensor, masked_too: bool = False) -> None:
    """Of the two rows whose latent is masked, one has an observation."""
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=SEEN):
            z = normal("z", 0.0, 1.0)
        with poutine.mask(mask=SEEN if masked_too else torch.arange(5) < 4):
            observe(z, x)


@pytest.mark.quick("table")
@pytest.mark.parametrize("name", ["table", "sites"])
def test_masked_entries_of_both_kinds(name: str) -> None:
    """Some have a flat prior, others no influence; masking what depends on them works."""
    x = data()
    with pytest.raises(ValueError, match="Some masked entries of latent site 'z' enter"):
        IWAE_ELBO(2).loss(partly_flat, GUIDES[name](partly_flat, x), x)
    pyro.clear_param_store()
    model = partial(partly_flat, masked_too=True)
    guide = trained(name, model, (x,), IWAE_ELBO(2))
    assert_evidence(model, guide, (x,), flat_evidence(x))


def threshold(x: Tensor) -> None:
    """The latents that are masked matter, without a derivative."""
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=SEEN):
            z = normal("z", 0.0, 1.0)
        observe((z > 0) * 1.0, x)


@pytest.mark.parametrize("name", ["table", "sites"])
def test_dependence_without_a_derivative(name: str) -> None:
    x = data()
    with pytest.raises(ValueError, match="Some masked entries of latent site 'z' enter"):
        IWAE_ELBO(2).loss(threshold, GUIDES[name](threshold, x), x)


@quiet
def test_joint_guides_of_pyro_are_refused() -> None:
    x = data()
    for make in (autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal):
        with pytest.raises(NotImplementedError, match=r"'x_unobserved' has masked.*Use AutoNormal"):
            IWAE_ELBO(2).loss(impute, make(impute), x)


@quiet
def test_flows_over_parts_of_a_row_are_refused() -> None:
    x = data()
    for guide in (FlowGuide(impute), MixtureGuide(impute, [FlowGuide(impute)] * 2)):
        for loss in (IWAE_ELBO(2), Trace_ELBO()):
            with pytest.raises(NotImplementedError, match=r"a row are masked.*AmortizedGuide"):
                loss.loss(impute, guide, x)
        pyro.clear_param_store()


def test_flows_over_whole_rows() -> None:
    """Rows are masked as a whole, and the encoder's flow has a density for each."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=SEEN):
            observe(normal("z", 0.0, 1.0), x[:, 0])

    guide, x = FlowGuide(model, encoder=nn.Linear(1, 2), init_scale=1.0), data()[:, None]
    assert_evidence(model, guide, (x,), flat_evidence(data()))


def test_a_mask_around_the_model_alone() -> None:
    """The guide cannot know of it; a guide of the masked model is right."""
    x = data()

    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(normal("z", 0.0, 1.0), x)

    masked = poutine.mask(plain, mask=SEEN)
    with pytest.raises(ValueError, match=r"'z' has another mask here.*of the masked"):
        IWAE_ELBO(2).loss(masked, AmortizedGuide(plain, plate="data"), x)
    pyro.clear_param_store()
    guide = AmortizedGuide(masked, plate="data", init_scale=1.0)
    assert_evidence(masked, guide, (x,), flat_evidence(x))


@pytest.mark.slow
def test_supports_of_each_call() -> None:
    """Bounds come from the data of the call, and only the entries that are kept have a Jacobian."""

    def model(x: Tensor) -> None:
        top = x.max() + 1.0
        with pyro.plate("data", len(x)), poutine.mask(mask=SEEN):
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    guide = amortized(model, data().abs())
    for x in (data().abs() + 0.4, 0.5 * data().abs() + 0.4):
        svi = SVI(model, guide, Adam({"lr": 0.1}), IWAE_ELBO(4))
        for _ in range(60):
            svi.step(x)
        top = x.max() + 1.0
        normal_of = dist.Normal(x, 0.1)
        exact = torch.where(
            SEEN, (normal_of.cdf(top) - normal_of.cdf(x * 0)).log() - top.log(), 0.0
        )
        assert_evidence(model, guide, (x,), exact)


@pytest.mark.quick("table")
@pytest.mark.parametrize("name", ["table", "sites", "encoder full"])
def test_events_masked_in_parts(name: str) -> None:
    """Elements of an event are left out one by one; bounded ones are refused."""
    seen = torch.tensor([[True, False, True], [True, True, True]])

    def model(x: Tensor, of: Any = dist.Normal) -> None:
        with pyro.plate("data", 2):
            prior = of(torch.zeros(2, 3), 1.0)
            z = pyro.sample("z", prior.mask(seen).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen).to_event(1), obs=x)

    x = torch.tensor([[0.3, 5.0, -1.0], [1.2, 0.1, 0.4]])
    exact = (dist.Normal(0.0, 2**0.5).log_prob(x) * seen).sum(-1)
    assert_evidence(model, trained(name, model, (x,), IWAE_ELBO(2)), (x,), exact)
    positive_model = partial(model, of=dist.LogNormal)
    for make in (partial(AmortizedGuide, plate="data"), autoguide.AutoNormal):
        pyro.clear_param_store()
        with pytest.raises(NotImplementedError, match="'z' is masked inside an event"):
            IWAE_ELBO(2).loss(positive_model, make(positive_model), x)
