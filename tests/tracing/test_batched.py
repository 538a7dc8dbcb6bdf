"""How samples run: the mode that is chosen for a model, and the equality of all modes."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import AffineTransform, ExpTransform

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
from pyro_recursive.tracing.choice import _moved, choose
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import SiteTable, sites, subsample_sites
from tests.oracles.recordings import K, M, Pinned, record

N, D = 6, 3
X = torch.tensor(
    [
        0.3,
        -1.2,
        0.5,
        1.1,
        0.4,
        -0.7,
        -0.8,
        0.9,
        1.3,
        0.2,
        0.1,
        -0.4,
        1.7,
        -0.6,
        0.8,
        -1.4,
        0.7,
        0.6,
    ],
    dtype=torch.float64,
).reshape(N, D)
Y = torch.tensor([0.4, 1.9, -1.1, 0.3, 2.2, -0.9], dtype=torch.float64)
GROUP = torch.tensor([0, 2, 1, 2, 0, 1])


def weights(size: int = D, name: str = "b") -> Tensor:
    return pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))


def observe(loc: Any, y: Tensor = Y, scale: Any = 1.0) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def matmul() -> None:
    observe(X @ weights())


def groups() -> Tensor:
    with pyro.plate("groups", 3):
        return pyro.sample("b", dist.Normal(0.0, 1.0))


class Network(PyroModule):
    """A Bayesian network of `torch.nn.Linear` layers whose weights are latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = PyroModule[nn.Linear](D, 4)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, D]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        self.out = PyroModule[nn.Linear](4, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))

    def forward(self) -> None:
        observe(self.out(self.hidden(X).tanh()).squeeze(-1))


def process() -> None:
    """A Gaussian process with a latent length scale."""
    length = pyro.sample("b", dist.LogNormal(torch.zeros(()), 0.5))
    kernel = torch.exp(-0.5 * ((X[:, :1] - X[:, 0]) / length) ** 2) + 0.1 * torch.eye(N)
    chol = torch.linalg.cholesky(kernel)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N), scale_tril=chol), obs=Y)


def correlated() -> None:
    chol = pyro.sample("b", dist.LKJCholesky(2, 1.5))
    with pyro.plate("data", 3):
        fn = dist.MultivariateNormal(torch.zeros(2), scale_tril=chol)
        pyro.sample("y", fn, obs=Y.reshape(3, 2))


def mixture() -> None:
    """Weights on the simplex, a scale, a mask, a factor and a deterministic site."""
    w = pyro.sample("w", dist.Dirichlet(torch.full((D,), 2.0)))
    b = weights()
    pyro.deterministic("sum", b.sum())
    pyro.deterministic("rows", X @ b, event_dim=0)  # dims that no plate has
    pyro.factor("factor", -(b[0] ** 2))
    fn = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(b, 1.0))
    with pyro.plate("data", N), poutine.scale(scale=1 + w[0]), poutine.mask(mask=Y > -1):
        pyro.sample("y", fn.expand([N]), obs=Y)


def discrete() -> None:
    locs = weights()
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=Y)


def discrete_guide() -> None:
    weights_guide()
    logits = pyro.param("logits", lambda: torch.linspace(-1, 1, D).expand(N, D).clone())
    with pyro.plate("data", N):
        pyro.sample("z", dist.Categorical(logits=logits))


def weights_guide() -> None:
    loc = pyro.param("loc", lambda: torch.tensor([0.3, -0.2, 0.4]))
    pyro.sample("b", dist.Normal(loc, 0.5).to_event(1))


def walk() -> None:
    observe(weights(N).cumsum(0))


def one_entry() -> None:
    """A batch dim of size 1, in no plate."""
    observe(X @ pyro.sample("b", dist.Normal(torch.zeros(1), 1.0)).expand(D))


def subsampled() -> None:
    """A minibatch of a plate of the model's own."""
    b = weights()
    with pyro.plate("data", N, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(X[index] @ b, 1.0), obs=Y[index])


def local(x: Tensor) -> None:
    """A minibatch that the guide draws, of rows with latents of their own."""
    with pyro.plate("data", N, subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]))
        b = torch.stack([z, z * z])
        pyro.sample("y", dist.Normal((x[:2, 0] @ b).exp(), 1.0), obs=Y[index])


def local_guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.linspace(-1, 1, N))
    with pyro.plate("data", N, subsample_size=4) as index:
        pyro.sample("z", dist.Normal(loc[index], 0.7))


def branching() -> None:
    b = weights()
    observe(X @ b if b[0] > 0 else X[:, 0])


def recurrent() -> Callable:
    lstm = nn.LSTM(D, 2)
    return lambda: observe(lstm(X * weights())[0].sum(-1))


class Counting(nn.Module):
    """A module that exchanges a buffer in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self) -> None:
        b = weights()
        self.mean = 0.9 * self.mean + 0.1 * b.detach()
        observe(X @ b)


class Normalized(nn.Module):
    """Rows that are normalised together, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self) -> None:
        observe(self.norm((X @ weights()).reshape(-1, 1)).reshape(-1))


def careless_guide() -> None:
    loc = pyro.param("loc", lambda: torch.tensor([0.3, -0.2, 0.4]))
    if pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}) > 0:
        loc = loc + 1
    pyro.sample("b", dist.Normal(loc, 0.5).to_event(1))


def dropout(left: bool) -> Callable:
    net = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    if left:
        return lambda: observe(net(X).squeeze(-1) + weights().sum())
    return lambda: observe(net(X).squeeze(-1) + weights(1)[..., 0])


@dataclass(frozen=True)
class Case:
    name: str
    mode: str
    make: Callable[[], Callable]
    guide: Callable | None = None
    args: tuple = ()
    cause: str = ""
    is_noisy: bool = False

    def programs(self) -> tuple[Callable, Callable]:
        model = self.make()
        guide = partial(self.guide) if self.guide else AutoNormal(model, init_scale=0.5)
        guide(*self.args)
        return model, guide


def case(name: str, mode: str, model: Callable, **options: Any) -> Case:
    return Case(name, mode, lambda: partial(model), **options)


CASES = [
    case("right", "plate", lambda: observe((X * weights()).sum(-1))),
    case("rows", "plate", lambda: observe(groups()[..., GROUP])),
    case("none", "plate", lambda: observe(0.0), guide=lambda: None),
    Case("dropout", "plate", lambda: dropout(left=False), is_noisy=True),
    case("first", "vmap", lambda: observe(weights(1)[0] * X[:, 0])),
    case("matmul", "vmap", matmul),
    case("square", "vmap", lambda: observe(X[:D] @ weights(), Y[:D])),
    case("whole sum", "vmap", lambda: observe(weights().sum())),
    case("mean", "vmap", lambda: observe(weights().mean(0))),
    case("scaled", "vmap", lambda: observe(0.0, scale=weights().exp().sum(0))),
    case("group", "vmap", lambda: observe(groups()[GROUP])),
    case("softmax", "vmap", lambda: observe((X * weights().softmax(0)).sum(-1))),
    case("detached", "vmap", lambda: observe(weights().detach()[0] * X[:, 0])),
    case("one entry", "vmap", one_entry),
    Case("network", "vmap", Network),
    case("process", "vmap", process),
    case("correlated", "plate", correlated),
    case("mixture", "vmap", mixture),
    case("discrete", "vmap", discrete, guide=discrete_guide),
    case("walk", "vmap", walk),
    case("subsampled", "vmap", subsampled, guide=weights_guide),
    case("local", "vmap", local, guide=local_guide, args=(X,)),
    Case("noisy", "vmap", lambda: dropout(left=True), is_noisy=True),
    case("branching", "loop", branching, cause="model raises RuntimeError"),
    Case("recurrent", "loop", recurrent, cause="model raises"),
    Case("buffer", "loop", Counting, cause=r"buffer Counting\.mean"),
    Case("normalized", "loop", Normalized, cause="model raises"),
    case(
        "guide", "loop", lambda: observe(X @ weights()), guide=careless_guide, cause="guide raises"
    ),
]
CASE = {each.name: each for each in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
vmapped = pytest.mark.parametrize(
    "case", [each for each in CASES if each.mode == "vmap"], ids=lambda case: case.name
)


@contextmanager
def looping(case: Case) -> Iterator[None]:
    """Expect the one warning of a loop."""
    if case.mode != "loop":
        yield
    else:
        with pytest.warns(UserWarning, match=f"one by one .*{case.cause}"):
            yield


@each_case
def test_the_mode_that_is_chosen(case: Case) -> None:
    program = Program(*case.programs(), case.args)
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == case.mode, structure.cause
    assert bool(structure.cause) == (case.mode != "plate")


def differentiate(loss: Tensor) -> Tensor:
    """Return the value and its gradient in all parameters, flattened."""
    store = pyro.get_param_store()
    leaves = [store[name].unconstrained() for name in sorted(store.keys())]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(leaves, grads, strict=True)
    found = [torch.zeros_like(p) if grad is None else grad for p, grad in pairs]
    return torch.cat([loss.reshape(1), *map(torch.flatten, found)]).detach()


@pytest.mark.parametrize("init_scale", [0.5, 1e-3, 1e-8])
@pytest.mark.parametrize(
    "loc",
    [
        lambda b: b.flatten()[1],
        lambda b: b.detach().max(),
        lambda b: b[..., 0] / len(b),
        lambda b: b.sum(-1) / b.numel(),
        lambda b: b.sort(0).values.sum(),
        lambda b: X[:, b.argmax() % D],
    ],
)
def test_narrow_guides_hide_nothing(loc: Callable, init_scale: float) -> None:
    """The particles of the comparison differ, however near the guide's draws are."""
    model = partial(lambda: observe(loc(weights())))
    program = Program(model, AutoNormal(model, init_scale=init_scale))
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == "vmap"


@pytest.mark.parametrize("of", [lambda z: z.max(), lambda z: z.prod(), lambda z: z[..., :1].sum(0)])
def test_discrete_latents_with_one_likely_value(of: Callable) -> None:
    """Draws that are all the same do not hide that a model mixes them."""

    def guide() -> Tensor:
        return pyro.sample("z", dist.Bernoulli(torch.tensor([1 - 1e-9])).to_event(1))

    model = partial(lambda: observe(of(guide()) * X[:, 0]))
    program = Program(model, partial(guide))
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == "vmap"


@each_case
@pytest.mark.parametrize("estimator", ["pathwise", "dreg+vimco", "rws-dreg"])
def test_every_mode_equals_the_loop(case: Case, estimator: str) -> None:
    """Values and gradients agree to rounding, on the same draws of the guide."""
    if case.is_noisy or case.mode == "loop" or case.name == "none":
        pytest.skip("nothing to compare")
    if estimator != "dreg+vimco" and case.name == "discrete":
        pytest.skip("the guide is not reparameterised")
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


def test_the_first_entry_is_no_particle() -> None:
    """`b[0]` of one entry: IWAE with many samples is the exact evidence."""
    torch.manual_seed(3)
    x = torch.randn(30)
    y = 0.7 * x + torch.randn(30)

    def model() -> None:
        observe(weights(1)[0] * x, y)

    guide = AutoNormal(model, init_scale=0.5)
    covariance = torch.eye(30) + x[:, None] * x
    exact = dist.MultivariateNormal(torch.zeros(30), covariance).log_prob(y).item()
    found = log_marginal(model, guide, num_particles=20_000, diagnostics=True)
    assert abs(found.log_marginal.item() - exact) < 4 * found.standard_error.item() < 0.1


@pytest.mark.parametrize("name", ["branching", "recurrent", "buffer", "normalized", "guide"])
def test_loops_warn_once_and_are_right(name: str) -> None:
    case = CASE[name]
    programs = case.programs()
    with looping(case):
        IWAE_ELBO(4).loss(*programs)
    values = []
    for vectorize in (True, False):
        pyro.set_rng_seed(5)
        values.append(IWAE_ELBO(4, vectorize_particles=vectorize).loss(*programs))
    assert values[0] == values[1]


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


# Errors


def test_errors_of_the_user_pass_unchanged() -> None:
    """In a run of one sample, in one pass, and under `torch.vmap`."""

    def program(text: str, when: Callable[[Tensor], bool]) -> Callable:
        def model() -> None:
            b = weights()
            if when(b):
                raise RuntimeError(text)
            observe(X @ b if "vmap" in text else (X * b).sum(-1))

        return model

    cases = {"boom": lambda b: True, "boom of many": lambda b: b.dim() > 2 and len(b) == 4}
    for text, when in cases.items():
        model = program(text, when)
        with pytest.raises(RuntimeError, match=f"^{text}\\b") as caught:
            IWAE_ELBO(4).loss(model, partial(weights_guide))
        assert not getattr(caught.value, "__notes__", [])


def test_errors_of_shapes_have_a_note() -> None:
    def model() -> None:
        b = weights()
        observe((X * b).sum(-1) + (torch.zeros(7) if len(b) == 4 else 0.0))

    with pytest.raises(RuntimeError) as caught:
        IWAE_ELBO(4).loss(model, partial(weights_guide))
    (note,) = caught.value.__notes__
    assert note.startswith("All 4 samples run in one pass")


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


@pytest.mark.parametrize("what", ["data", "latent", "parameter"])
def test_invalid_values_raise_as_in_a_run_of_one_sample(what: str) -> None:
    """The density would be a finite number: nothing else could tell."""
    data, shift = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), torch.zeros(())

    def model() -> None:
        b = weights()
        rate = pyro.sample("rate", dist.Exponential(1.0))
        with pyro.plate("data", N):
            probs = (X @ b).sigmoid() + shift
            pyro.sample("y", dist.Bernoulli(probs * rate.clamp(1, 1)), obs=data)

    def guide() -> None:
        weights_guide()
        fn = dist.Normal(torch.tensor(5.0), 0.1)
        pyro.sample(
            "rate", fn.expand_by([]) if what != "latent" else dist.Normal(5 + 9 * shift, 0.1)
        )

    guide = partial(guide)
    assert math.isfinite(IWAE_ELBO(4).loss(model, guide))
    assert structure_of(Program(model, guide)).mode == "vmap"
    if what == "data":
        data[0] = 0.5
    else:
        shift.fill_(2.0 if what == "parameter" else -1.0)
    with pytest.raises(ValueError, match=r"Expected|At site"):
        IWAE_ELBO(4).loss(model, guide)


def test_a_model_that_branches_later_is_looped() -> None:
    """Also where the choice was made before; the warning names the cause."""
    branches = []

    def model() -> None:
        b = weights()
        observe(X @ b if not branches or b[0] > 0 else 0.0)

    guide = partial(weights_guide)
    IWAE_ELBO(4).loss(model, guide)
    branches.append(True)
    pyro.set_rng_seed(2)
    looped = IWAE_ELBO(4, vectorize_particles=False).loss(model, guide)
    pyro.set_rng_seed(2)
    with pytest.warns(UserWarning, match="one by one .4 runs"):
        found = IWAE_ELBO(4).loss(model, guide)
    assert math.isfinite(found) and math.isfinite(looped)


def test_misfits_are_told_before_errors_of_shapes() -> None:
    """Enumerated sites, latents without a guide, a batch dim without a plate."""

    def enumerated() -> None:
        locs = weights()
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(torch.ones(D)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(locs[z], 1.0), obs=Y)

    def unguided() -> None:
        observe(X @ (weights() + weights(name="c")))

    def unplated() -> None:
        pyro.sample("y", dist.Normal(X @ weights(), 1.0), obs=Y)

    for model, error, message in (
        (enumerated, NotImplementedError, "'z' is to be enumerated"),
        (unguided, ValueError, "'c' is latent and the guide does not"),
        (unplated, ValueError, r"'y' has batch shape \(6,\), and dim -1 belongs to no plate"),
    ):
        for call in (IWAE_ELBO(4).loss, MIWAE_ELBO(2, 3).loss_and_grads, log_marginal):
            with pytest.raises(error, match=message):
                call(model, partial(weights_guide))


@pytest.mark.parametrize("rows", [3, 5, 7, 11])
def test_sizes_that_coincide(rows: int) -> None:
    """Rows as many as coefficients, particles, or the particles of the comparison."""
    x = 0.2 * torch.randn(rows, rows, generator=torch.Generator().manual_seed(rows))

    def model() -> None:
        observe(x @ weights(rows), torch.linspace(-1, 1, rows))

    guide = AutoNormal(model, init_scale=0.9)
    exact = dist.MultivariateNormal(torch.zeros(rows), torch.eye(rows) + x @ x.T)
    expected = exact.log_prob(torch.linspace(-1, 1, rows)).item()
    found = log_marginal(model, guide, num_particles=rows, diagnostics=True)
    assert structure_of(Program(model, guide)).mode == "vmap"
    many = log_marginal(model, guide, num_particles=50_000, diagnostics=True)
    assert abs(many.log_marginal.item() - expected) < 4 * many.standard_error.item() + 1e-3
    assert found.log_marginal < expected + 4


# Draws of the posterior


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


# Other losses and evaluation


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


def test_indices_are_checked_where_values_are_on_another_device() -> None:
    """Five groups, and samples where ``b[group]`` takes the groups."""
    group = torch.tensor([0, 4, 1, 2, 3, 4])

    def model() -> None:
        observe(weights(5)[group])

    guide = AutoNormal(model)
    guide()
    causes = []
    for devices in ({"cpu"}, {"cpu", "cuda"}):
        program = Program(model, guide)
        structure = replace(structure_of(program), devices=frozenset(devices))
        choose(program, structure)
        assert structure.mode == "vmap"
        causes.append(structure.cause)
    assert "out of bounds for a dimension of size 3" not in causes[0]
    assert "IndexError (index 4 is out of bounds for a dimension of size 3)" in causes[1]


@pytest.mark.parametrize(("where", "failing"), [("guide", 2), ("model", 3)])
def test_no_mode_is_chosen_where_memory_runs_out(where: str, failing: int) -> None:
    """In the runs under the plate."""
    calls = {"guide": 0, "model": 0}

    def count(name: str) -> None:
        calls[name] += 1
        if name == where and calls[name] == failing:
            raise torch.OutOfMemoryError("out of memory")

    def model() -> None:
        count("model")
        observe((X * weights()).sum(-1))

    def guide() -> None:
        count("guide")
        weights_guide()

    program = Program(model, guide)
    structure = structure_of(program)
    with pytest.raises(torch.OutOfMemoryError):
        choose(program, structure)
    assert structure.mode is None
    choose(program, structure)
    assert structure.mode == "plate"


@pytest.mark.parametrize("transform", [[], [AffineTransform(0.0, 1.0)]])
def test_values_are_moved_within_the_support(transform: list[Any]) -> None:
    """Torch takes the support of an affine map for the real line."""
    fn = dist.TransformedDistribution(
        dist.Normal(torch.zeros(40), 1.0), [ExpTransform(), *transform]
    )
    value = 1e-3 * fn.sample()
    moved = _moved(value, fn)
    assert (moved > 0).all() and (moved != value).all()
    assert ((moved / value).log().abs() < 0.6).all()


@pytest.mark.parametrize("name", ["branching", "recurrent", "guide"])
def test_the_remedy_of_shapes_is_for_shapes(name: str) -> None:
    with pytest.warns(UserWarning, match="one by one") as caught:
        IWAE_ELBO(4).loss(*CASE[name].programs())
    text = str(caught[0].message)
    assert "Count dims" not in text and "vectorize_particles=False" in text


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
