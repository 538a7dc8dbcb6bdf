"""Every loss, with every estimator, on every model of the table.

Two ways of computing the same thing play recorded samples back and must agree to rounding,
gradients included. Expectations are compared with those of another unbiased estimator.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD
from pyro.poutine.messenger import Messenger
from torch import Tensor

import pyro_recursive
from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, MultiSampleELBO, bounds, log_marginal
from pyro_recursive.bounds.estimators import ESTIMATORS
from tests import models
from tests.models import REFUSALS, ROWS, Programs, Refusal, Row
from tests.models.data_plate import ANNEALED
from tests.models.losses import ALIKE, BOUNDS, LOSSES, OF_MIXTURES, that_differ
from tests.models.row import pair
from tests.oracles.recordings import K, M, Pinned, Recording, record, scale_of, weights_by_hand

UNBIASED = ("pathwise", "dreg", "score", "vimco", "dreg+score", "dreg+vimco")
ROW = {row.name: row for row in ROWS}

slow = partial(pytest.param, marks=pytest.mark.slow)
all_losses = pytest.mark.parametrize("loss", LOSSES)


def over(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def pairs(of: Iterable[tuple[Any, str]], name: str = "row") -> pytest.MarkDecorator:
    cells = [pytest.param(each, loss, id=f"{each.name}-{loss}") for each, loss in of]
    return pytest.mark.parametrize((name, "loss"), cells)


def each_estimator(*quick: str, of: Iterable[str] = ESTIMATORS) -> pytest.MarkDecorator:
    """On each row some estimators in the quick loop, and all that differ with the slow tests."""
    cells = [
        pytest.param(
            *(row, name),
            marks=() if name in quick else pytest.mark.slow,
            id=f"{row.name}-{name}",
        )
        for row in ROWS
        for name in that_differ(of, row.sites == "discrete")
    ]
    return pytest.mark.parametrize(("row", "estimator"), cells)


@contextmanager
def expected_warnings(row: Row) -> Iterator[None]:
    """Silence the one warning that a row announces; every other one is an error."""
    with warnings.catch_warnings():
        if row.joint:
            warnings.filterwarnings("ignore", "Plate '.*' encloses latent site")
        yield


def made(row: Row) -> tuple[Programs, tuple]:
    """Build a row's programs and make all their parameters, so that no later call draws any."""
    programs, args = row.build(), row.args()
    Trace_ELBO().loss(*programs, *args)
    return programs, args


def parameters() -> dict[str, Tensor]:
    return dict(pyro.get_param_store().named_parameters())


def gradients(loss: Tensor) -> Tensor:
    """Return the gradient in all parameters as one vector, zeros where nothing depends on one."""
    leaves = list(parameters().values())
    if not leaves or not loss.requires_grad:
        return torch.zeros(sum(leaf.numel() for leaf in leaves))
    found = torch.autograd.grad(
        loss, leaves, allow_unused=True, retain_graph=True, materialize_grads=True
    )
    return torch.cat([each.flatten() for each in found])


def value_and_gradient(loss: Tensor) -> Tensor:
    return torch.cat([loss.detach().reshape(1), gradients(loss)])


def test_every_public_loss_is_in_a_table() -> None:
    public = {name for name in pyro_recursive.__all__ if name.endswith("ELBO")}
    assert public == {*LOSSES, *OF_MIXTURES, "MAPA_ELBO"} and LOSSES.keys() == BOUNDS.keys()


# Values, from Pyro's own loss and traces.


@pairs((row, loss) for row in ROWS for loss in LOSSES if not row.refusal(loss, "pathwise"))
def test_one_sample_equals_trace_elbo(row: Row, loss: str) -> None:
    """The same seed gives the same value and gradient for M = K = 1."""
    programs, args = made(row)
    results = []
    for each in (Trace_ELBO(), LOSSES[loss](1, 1)):
        pyro.set_rng_seed(3)
        results.append(value_and_gradient(each.differentiable_loss(*programs, *args)))
    torch.testing.assert_close(results[1], results[0])


def check_value(row: Row, loss: str, programs: Programs, args: tuple) -> None:
    """The loss is the bound of the log-weights that Pyro's own densities add up to."""
    recording = record(programs, args)
    by_hand = weights_by_hand(row, programs, args, recording).unflatten(0, (M, K))
    value = BOUNDS[loss](by_hand).sum() * scale_of(row, programs, args)
    with Pinned(*recording), expected_warnings(row):
        assert LOSSES[loss](M, K).loss(*programs, *args) == pytest.approx(-value.item(), rel=1e-5)


@pytest.mark.quick(16)
@over(ROWS)
def test_value(row: Row) -> None:
    programs, args = made(row)
    for loss in ("IWAE_ELBO", "CIWAE_ELBO" if row.shared_parameter else "PIWAE_ELBO"):
        check_value(row, loss, programs, args)


@over([row for row in ROWS if row.other_args])
def test_value_on_other_data(row: Row) -> None:
    """A second call may bring data of another size or another plate nesting."""
    programs, args = made(row)
    loss = IWAE_ELBO(K)
    loss.loss(*programs, *args)
    shared = ("copy", "data") if row.name == "deeper" else row.shared
    check_value(replace(row, shared=shared), "MIWAE_ELBO", programs, row.other_args())  # type: ignore[misc]
    loss.loss(*programs, *args)


def check_type(row: Row, dtype: torch.dtype, device: str) -> None:
    """Neither another dtype nor another device is met by accident, and the value is right."""
    programs, args = made(row)
    check_value(row, "MIWAE_ELBO", programs, args)
    with expected_warnings(row):
        loss = MIWAE_ELBO(M, K, estimator="dreg+vimco").differentiable_loss(*programs, *args)
    found = gradients(loss)
    assert loss.dtype == found.dtype == dtype and loss.device.type == device
    assert found.isfinite().all()


@pytest.mark.quick(16)
@over(ROWS)
def test_float32(row: Row) -> None:
    torch.set_default_dtype(torch.float32)
    check_type(row, torch.float32, "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@over(ROWS)
def test_cuda(row: Row) -> None:
    with torch.device("cuda"):
        check_type(row, torch.float64, "cuda")


@all_losses
@over([row for row in ROWS if row.evidence])
def test_exact_posterior(row: Row, loss: str) -> None:
    """The value is log p(x), and the gradients of DReG and STL vanish draw by draw."""
    programs, args = made(row)
    expected = -row.evidence(*args).sum().item() * scale_of(row, programs, args)  # type: ignore[misc]
    for estimator in ("pathwise", "stl", "dreg"):
        value = LOSSES[loss](M, K, estimator=estimator).differentiable_loss(*programs, *args)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        if estimator != "pathwise":
            torch.testing.assert_close(gradients(value), torch.zeros(2), atol=1e-10, rtol=0)


@pytest.mark.quick(16)
@over(ROWS)
def test_log_marginal(row: Row) -> None:
    """One number per entry of the shared plates, in chunks or at once, without subsample scale."""
    programs, args = made(row)
    recording = record(programs, args)
    by_hand = weights_by_hand(row, programs, args, recording)
    expected = by_hand.logsumexp(0) - math.log(M * K)
    assert expected.shape == row.plates
    with Pinned(*recording):
        at_once = log_marginal(*programs, *args, num_particles=M * K, chunk_size=M * K)
    with Pinned(*recording, total=M * K):
        options = {"num_particles": M * K, "chunk_size": 4, "vectorize_particles": False}
        in_chunks = log_marginal(*programs, *args, **options)
    torch.testing.assert_close(at_once, expected)
    torch.testing.assert_close(in_chunks, expected)
    if row.evidence:
        torch.testing.assert_close(log_marginal(*programs, *args), row.evidence(*args))


# One pass over all particles, or a loop.


@pytest.mark.quick(16)
@each_estimator("dreg+vimco", "rws")
def test_loop_equals_one_pass(row: Row, estimator: str) -> None:
    """With the same samples both give the same value and gradient, or the same refusal.

    One is evaluated by `differentiable_loss`, the other by `loss_and_grads`.
    """
    for name in ("MIWAE_ELBO", "PIWAE_ELBO"):
        pyro.clear_param_store()
        programs, args = made(row)
        refusal = row.refusal(name, estimator)
        loss = LOSSES[name](M, K, estimator=estimator)
        with expected_warnings(row):
            if refusal:
                with pytest.raises(refusal[0], match=refusal[1]):
                    loss.loss_and_grads(*programs, *args)
                continue
            recording = record(programs, args)
            with Pinned(*recording):
                one_pass = value_and_gradient(loss.differentiable_loss(*programs, *args))
            loop = LOSSES[name](M, K, estimator=estimator, vectorize_particles=False)
            with Pinned(*recording, total=M * K):
                value = torch.tensor([loop.loss_and_grads(*programs, *args)])
        leaves = parameters().values()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
        torch.testing.assert_close(torch.cat([value, *map(torch.flatten, grads)]), one_pass)


NESTED_LOSSES = [name for name in LOSSES if name != "PIWAE_ELBO"]  # with global_latents=


@pairs(
    (
        (refusal, loss)
        for refusal in REFUSALS
        for loss in (NESTED_LOSSES if "global_latents" in refusal.options else LOSSES)
    ),
    name="refusal",
)
def test_refusals(refusal: Refusal, loss: str) -> None:
    """K = 4 data and K = 4 samples: a batch dim must not pass for the particle plate."""
    for vectorize in (True, False):
        each = LOSSES[loss](1, 4, vectorize_particles=vectorize, **refusal.options)
        with pytest.raises((ValueError, NotImplementedError), match=refusal.message):
            each.loss_and_grads(refusal.model, refusal.guide, models.data())


# Gradients.


@pytest.mark.parametrize("name", ["hierarchy", "unequal_scales", "sequential", "subsample_size"])
def test_estimators_without_sites_to_score_are_alike(name: str) -> None:
    """Those that `that_differ` leaves out have the same gradient, bit by bit."""
    programs, args = made(ROW[name])
    recording = record(programs, args)
    for loss, alike in itertools.product(("MIWAE_ELBO", "PIWAE_ELBO"), ALIKE):
        found = []
        for estimator in alike:
            with Pinned(*recording), expected_warnings(ROW[name]):
                value = LOSSES[loss](M, K, estimator=estimator).differentiable_loss(
                    *programs, *args
                )
            found.append(value_and_gradient(value))
        assert all(torch.equal(each, found[0]) for each in found[1:])


@pytest.mark.quick(16)
@each_estimator("dreg+vimco", of=("stl", "score", "vimco", "dreg+vimco"))
def test_gradients_of_composed_bounds(row: Row, estimator: str) -> None:
    """PIWAE's gradient is IWAE's for the model and MIWAE's for the guide; CIWAE's is linear."""
    if row.refusal("PIWAE_ELBO", estimator):
        pytest.skip("the row refuses this estimator")
    programs, args = made(row)
    recording = record(programs, args)

    def gradient_of(bound: bounds.Bound) -> Tensor:
        loss = MultiSampleELBO(bound, estimator=estimator, num_estimates=M, num_particles=K)
        with Pinned(*recording), expected_warnings(row):
            return gradients(loss.differentiable_loss(*programs, *args))

    elbo, iwae = gradient_of(bounds.elbo), gradient_of(bounds.iwae)
    torch.testing.assert_close(gradient_of(bounds.ciwae(0.3)), 0.3 * elbo + 0.7 * iwae)
    pooled, piwae = gradient_of(bounds.Pooled(bounds.iwae)), gradient_of(bounds.piwae)
    names = set(poutine.trace(programs[0]).get_trace(*args).param_nodes)
    of_model = [torch.full((p.numel(),), name in names) for name, p in parameters().items()]
    if of_model:
        torch.testing.assert_close(piwae, torch.where(torch.cat(of_model), pooled, iwae))


def mean_gradient(
    loss: MultiSampleELBO, programs: Programs, args: tuple, calls: int = 40
) -> tuple[Tensor, Tensor]:
    """Return mean and standard error of the gradient; all parameters exist already."""
    draws = torch.stack(
        [gradients(loss.differentiable_loss(*programs, *args)) for _ in range(calls)]
    )
    return draws.mean(0), draws.std(0) / calls**0.5


def assert_same_mean(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], errors: float = 4.5
) -> None:
    error = (one[1].square() + other[1].square()).sqrt()
    assert ((one[0] - other[0]).abs() <= errors * error + 1e-9).all(), (one, other)


def check_unbiased(row: Row, bound: bounds.Bound, **options: Any) -> None:
    """The mean gradient of every unbiased estimator is that of the first that the row allows."""
    programs, args = made(row)
    _, fixed = record(programs, args)  # one minibatch for all: it would be most of the noise
    options |= {"num_estimates": 200, "num_particles": K}
    reference = None
    for number, estimator in enumerate(that_differ(UNBIASED, row.sites == "discrete")):
        if row.refusal("MIWAE_ELBO", estimator):
            continue
        loss = MultiSampleELBO(bound, estimator=estimator, **options)
        pyro.set_rng_seed(100 + number)  # noise of its own
        with expected_warnings(row), Pinned({}, fixed):
            mean = mean_gradient(loss, programs, args, calls=20)
        reference = reference or mean
        assert (mean[0] != 0).any()
        assert_same_mean(mean, reference, errors=5)  # of Student's t with 38 degrees of freedom


TIGHT = itertools.cycle([bounds.iwae, bounds.renyi(0.5)])


@pytest.mark.quick("mixed_above", "unequal_scales")
@pytest.mark.parametrize(
    ("row", "bound"), [pytest.param(row, next(TIGHT), id=row.name) for row in ROWS]
)
def test_estimators_agree(row: Row, bound: bounds.Bound) -> None:
    """All unbiased estimators have one mean, on every model; under one or another bound."""
    check_unbiased(row, bound)


def noisy_guide(x: Tensor) -> None:
    """Dropout before and between the sites, as encoders have it."""
    keep = torch.dropout(torch.ones(len(x)), 0.5, train=True)
    w = models.normal("w", models.real("a", 0.3) * keep[0], 0.5)
    keep = torch.dropout(torch.ones(len(x)), 0.5, train=True)
    with pyro.plate("data", len(x)):
        models.normal("z", models.real("b", 0.4) * x * keep + 0.2 * w, 0.4)


@pytest.mark.filterwarnings("ignore:Plate 'data' encloses")
@pytest.mark.parametrize("vectorize", [True, False])
def test_guides_with_noise_of_their_own(vectorize: bool) -> None:
    """Where a guide runs twice, both runs drop the same units: the value is the first run's."""
    programs, args = (models.hierarchy, noisy_guide), (models.data(),)
    Trace_ELBO().loss(*programs, *args)
    values = []
    for estimator in ESTIMATORS:
        loss = MIWAE_ELBO(M, K, estimator=estimator, vectorize_particles=vectorize)
        pyro.set_rng_seed(3)
        values.append(loss.loss_and_grads(*programs, *args))
    assert values == pytest.approx(values[:1] * len(values), rel=1e-12)


# Minibatches: with the samples of the full data pinned, every average over them is exact.

HIERARCHY = (models.hierarchy, models.hierarchy_guide)
MIXED_GLOBAL = (models.mixed_global, models.mixed_global_guide)
MINIBATCHED = {
    "vectorized": (models.local, models.local_guide),
    "annealed": pair(models.local, models.local_guide, around=ANNEALED)(),
    "sequential": (models.sequential, models.sequential_guide),
}


def check_minibatches(programs: Programs, size: int, loss: MultiSampleELBO) -> None:
    """Value and gradient, averaged over all minibatches of one size, are those of all data."""
    x = models.data()
    everything = pair(*programs, subsample=torch.arange(len(x)))()
    Trace_ELBO().loss(*everything, x)
    values, _ = record(everything, (x,))

    def on(index: Tensor) -> Tensor:
        # Sites of loops have a name for each datum.
        chosen = {n: v[:, index] if v.shape[1:] == (4,) else v for n, v in values.items()}
        with Pinned(chosen, {}):
            batch = pair(*programs, subsample=index)()
            return value_and_gradient(loss.differentiable_loss(*batch, x))

    full = on(torch.arange(len(x)))
    batches = [on(torch.tensor(each)) for each in itertools.combinations(range(len(x)), size)]
    assert (full != 0).all()
    torch.testing.assert_close(torch.stack(batches).mean(0), full)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("size", "loss"),
    [*((2, loss) for loss in LOSSES), slow(1, "PIWAE_ELBO"), slow(3, "PIWAE_ELBO")],
)
@pytest.mark.parametrize("name", MINIBATCHED)
def test_minibatches_are_unbiased(name: str, size: int, loss: str) -> None:
    """The scale, which depends on the size, multiplies after any bound."""
    for estimator in ("dreg", "vimco", "rws"):
        check_minibatches(MINIBATCHED[name], size, LOSSES[loss](M, K, estimator=estimator))


class Minibatches(Messenger):
    """Notes every minibatch of the data plate that passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "data":
            self.seen.add(tuple(msg["value"].tolist()))


@pytest.mark.parametrize(
    "name", ["subsample_size", "sequential_subsample", "auto_normal_subsample"]
)
def test_all_samples_share_one_minibatch(name: str) -> None:
    """Weights of different data could not be compared; nor could chunks of one estimate."""
    programs, args = made(ROW[name])
    for evaluate in (
        IWAE_ELBO(12, estimator="dreg", vectorize_particles=False).loss_and_grads,
        IWAE_ELBO(12, estimator="dreg").loss_and_grads,
        partial(log_marginal, num_particles=12, chunk_size=1),
        partial(log_marginal, num_particles=12, chunk_size=3),
    ):
        with Minibatches() as minibatches:
            evaluate(*programs, *args)
        assert len(minibatches.seen) == 1


@pytest.mark.slow
def test_score_of_subsampled_discrete_sites() -> None:
    """At K = 1 a plate's scale is in the weights, and must not be in the score as well."""
    Trace_ELBO().loss(*MIXED_GLOBAL, models.data())
    means = [
        mean_gradient(MIWAE_ELBO(600, 1, estimator=estimator), programs, (models.data(),))
        for estimator in ("score", "dreg+score")
        for programs in (MIXED_GLOBAL, pair(*MIXED_GLOBAL, subsample_size=2)())
    ]
    for mean in means[1:]:
        assert_same_mean(mean, means[0])


# Global latents under the ELBO, local ones under the bound.


def nested_by_hand(recording: Recording, x: Tensor, index: Tensor, bound: bounds.Bound) -> Tensor:
    """Return the nested bound in plain torch, from ``[M * K]`` global and ``[M * K, B]`` locals."""
    mu, c, t, a, b, s = (pyro.param(name) for name in ("mu", "c", "t", "a", "b", "s"))
    log_normal = lambda value, loc, scale: dist.Normal(loc, scale).log_prob(value)  # noqa: E731
    values = recording[0]
    w = values["w"].reshape(M, K)[:, :1]  # one global sample for each estimate
    z = values["z"].reshape(M, K, -1)
    w_local = w[..., None]
    log_weights = (
        log_normal(z, w_local, 0.8)
        + log_normal(x[index], z, 1.0)
        - log_normal(z, a * x[index] + b * w_local, s)
    )
    shared = (log_normal(w, mu, 1.0) - log_normal(w, c, t)).mean()
    return shared + len(x) / len(index) * bound(log_weights).sum()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("loss", NESTED_LOSSES)
def test_global_elbo_by_hand(loss: str, vectorize: bool) -> None:
    """Value and pathwise gradient equal those of the formula, draw by draw."""
    x, index = models.data(), torch.tensor([0, 2])
    programs = pair(*HIERARCHY, subsample=index)()
    Trace_ELBO().loss(*programs, x)
    recording = record(programs, (x,))
    each = LOSSES[loss](M, K, global_latents="elbo", vectorize_particles=vectorize)
    with Pinned(*recording, total=0 if vectorize else M * K):
        ours = value_and_gradient(each.differentiable_loss(*programs, x))
    by_hand = value_and_gradient(-nested_by_hand(recording, x, index, BOUNDS[loss]))
    torch.testing.assert_close(ours, by_hand)


@pytest.mark.quick(3)
@pytest.mark.parametrize("estimator", ["stl", "vimco", "dreg+vimco"])
@pytest.mark.parametrize("loss", NESTED_LOSSES)
def test_global_elbo_on_minibatches(loss: str, estimator: str) -> None:
    """Unbiased for the full data where the joint bound has no unbiased estimate."""
    loss_of = LOSSES[loss](M, K, estimator=estimator, global_latents="elbo")
    check_minibatches(HIERARCHY, 2, loss_of)


@pytest.mark.quick("mixed")
@over(
    [
        Row("hierarchy", pair(*HIERARCHY, subsample_size=2)),
        Row("mixed", pair(*MIXED_GLOBAL, subsample_size=2), sites="discrete"),
    ]
)
def test_global_elbo_estimators_agree(row: Row) -> None:
    """A global site above local ones, reparameterised or not, under every unbiased estimator."""
    check_unbiased(row, bounds.iwae, global_latents="elbo")


def test_global_elbo_without_local_latents() -> None:
    """With the exact posterior of a global latent the ELBO is log p(x)."""
    row = ROW["exact_global"]
    programs, args = made(row)
    loss = MIWAE_ELBO(M, K, estimator="dreg", global_latents="elbo")
    value = loss.differentiable_loss(*programs, *args)
    assert value.item() == pytest.approx(-row.evidence(*args).item())  # type: ignore[misc]
    torch.testing.assert_close(gradients(value), torch.zeros(2), atol=1e-10, rtol=0)


def test_global_elbo_needs_one_objective() -> None:
    for make in (partial(IWAE_ELBO, estimator="rws"), partial(PIWAE_ELBO, 2)):
        with pytest.raises(ValueError, match="needs one bound for model and guide"):
            make(3, global_latents="elbo")


# Modules, several models, SVI, handlers.


def test_a_shared_parameter_that_pyro_does_not_know() -> None:
    """Where two objectives would meet in one parameter, being unregistered is no excuse."""
    net = models.Net()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            models.observe(net(models.normal("z", 0.0, 1.0)), x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            models.normal("z", net(x), 0.8)

    for estimator in ("pathwise", "dreg"):
        with pytest.raises(ValueError, match=r"Parameter of shape \(\) belongs to model and guide"):
            PIWAE_ELBO(M, K, estimator=estimator).loss_and_grads(model, guide, models.data())


@all_losses
def test_loss_as_a_module(loss: str) -> None:
    """``loss(model, guide)(*args)`` is the differentiable loss of two modules."""
    model, guide = models.Decoder(), models.Encoder()
    each = LOSSES[loss](M, K, estimator="dreg")
    module = each(model, guide)
    pyro.set_rng_seed(3)
    value = module(models.data())
    value.backward()
    pyro.set_rng_seed(3)
    assert value.item() == pytest.approx(each.loss(model, guide, models.data()))
    gradient = {name: p.grad for name, p in module.named_parameters()}
    assert len(gradient) == 5 and all(g is not None and g.ne(0).any() for g in gradient.values())


@all_losses
def test_one_instance_serves_many_models(loss: str) -> None:
    """Nothing of a call stays in the loss: deeper and flatter models may follow each other."""
    each = LOSSES[loss](M, K)
    before = dict(each.__dict__)
    for name in ("no_plate", "grid_reversed", "data_plate", "sequential", "nested"):
        pyro.clear_param_store()
        programs, args = made(ROW[name])
        with Pinned(*record(programs, args)):
            fresh = LOSSES[loss](M, K).loss(*programs, *args)
            assert each.loss(*programs, *args) == pytest.approx(fresh)
        each.loss_and_grads(*programs, *args)
    assert each.__dict__ == before


@all_losses
@pytest.mark.parametrize("name", ["auto_normal", "modules", "pyro_modules", "markov"])
def test_svi_steps_every_parameter(name: str, loss: str) -> None:
    """The first step makes all parameters, the second moves each of them."""
    row = ROW[name]
    svi = SVI(*row.build(), SGD({"lr": 0.01}), LOSSES[loss](M, K, estimator="dreg"))
    svi.step(*row.args())
    before = {name: value.detach().clone() for name, value in parameters().items()}
    svi.step(*row.args())
    assert before and all((value != before[name]).any() for name, value in parameters().items())


def test_outer_handlers() -> None:
    """A handler around the call of a loss acts as it does around model and guide."""
    x = models.data()

    def prior(x: Tensor) -> None:
        with pyro.plate("data", 4):
            models.normal("x", models.normal("z", models.real("mu", 0.3), 1.0), 1.0)

    def evaluate(model: Callable, guide: Callable) -> Tensor:
        pyro.set_rng_seed(3)
        return value_and_gradient(MIWAE_ELBO(M, K).differentiable_loss(model, guide, x))

    expected = evaluate(models.local, models.local_guide)
    with poutine.condition(data={"x": x}):
        torch.testing.assert_close(evaluate(prior, models.local_guide), expected)
    scaled = [poutine.scale(f, scale=0.4) for f in (models.local, models.local_guide)]
    expected = evaluate(*scaled)
    with poutine.scale(scale=0.4):
        torch.testing.assert_close(evaluate(models.local, models.local_guide), expected)
