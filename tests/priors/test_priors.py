"""Priors made of encoders: densities against `MixtureSameFamily`, quadrature, and whole models."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, CompiledSVI
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.gaussian_families import LowRank, family_of
from pyro_recursive.priors.vamp import ExemplarPrior, VampPrior
from pyro_recursive.tracing.isolation import isolated

K, D, INPUTS, N, SIZE = 4, 2, 3, 6, 8


def normals(parameters: Tensor) -> Any:
    loc, log_scale = parameters.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def mixtures(logits: Tensor, parameters: Tensor) -> Any:
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), normals(parameters))


# How an encoder may be written: its numbers, its components, their family, and what it returns.
ENCODERS: dict[str, tuple[int, int, Any, Callable[[Tensor, Tensor], Any]]] = {
    "diagonal": (2 * D, 1, "diagonal", lambda logits, parameters: parameters[:, 0]),
    "full": (5, 1, "full", lambda logits, parameters: parameters[:, 0]),
    "low rank": (3 * D, 1, LowRank(1), lambda logits, parameters: parameters[:, 0]),
    "pair": (2 * D, 2, "diagonal", lambda logits, parameters: (logits, parameters)),
    "distribution": (2 * D, 1, "diagonal", lambda logits, parameters: normals(parameters[:, 0])),
    "mixture": (2 * D, 2, "diagonal", mixtures),
}
THREE = pytest.mark.parametrize("kind", ["diagonal", "full", "pair"])


class Encoder(nn.Module):
    """Linear, with components that are neither wide nor narrow."""

    def __init__(self, kind: str = "diagonal") -> None:
        super().__init__()
        self.kind, (numbers, count, *_) = kind, ENCODERS[kind]
        self.logits = nn.Linear(INPUTS, count) if count > 1 else None
        self.layer = nn.Linear(INPUTS, count * numbers)
        for parameter in self.parameters():
            parameter.data *= 0.5

    def raw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        logits = u.new_zeros(len(u), 1) if self.logits is None else self.logits(u)
        return logits, self.layer(u).unflatten(-1, (logits.shape[-1], -1))

    def forward(self, u: Tensor) -> Any:
        return ENCODERS[self.kind][3](*self.raw(u))


def build(kind: str, **options: Any) -> VampPrior:
    family = ENCODERS[kind][2]
    prior = VampPrior(Encoder(kind), torch.randn(K, INPUTS), family=family, **options)
    if options.get("learn_weights"):
        nn.init.normal_(prior.logits)
    return prior


def by_torch(prior: VampPrior) -> Any:
    """Build the same mixture with `MixtureSameFamily`, one encoder pass for each pseudo-input."""
    raw = [prior.encoder.raw(u[None]) for u in prior.pseudo_inputs]
    weights = prior.logits.softmax(0).log()
    logits = [w + own.log_softmax(-1)[0] for w, (own, _) in zip(weights, raw, strict=True)]
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=torch.cat(logits)),
        family_of(prior.family)(torch.cat([parameters[0] for _, parameters in raw]), D),
        validate_args=False,
    )


def grid() -> tuple[Tensor, float]:
    axis = torch.linspace(-20.0, 20.0, 801)
    return torch.cartesian_prod(*[axis] * D), float(axis[1] - axis[0]) ** D


# --- The density and its draws


@pytest.mark.quick(3)
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("learn_weights", [False, True])
def test_equals_mixture_same_family_and_integrates_to_one(kind: str, learn_weights: bool) -> None:
    prior = build(kind, learn_weights=learn_weights)
    mixture, expected = prior(), by_torch(prior)
    assert mixture.num_components == K * ENCODERS[kind][1]
    assert (mixture.batch_shape, mixture.event_shape) == ((), (D,))
    for shape in [(), (5,), (3, 5)]:
        z = torch.randn(*shape, D)
        torch.testing.assert_close(mixture.log_prob(z), expected.log_prob(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixture.mean, expected.mean)
    torch.testing.assert_close(mixture.variance, expected.variance)
    nodes, cell = grid()
    assert (mixture.log_prob(nodes).exp().sum() * cell).item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.quick(3)
@pytest.mark.parametrize("kind", ENCODERS)
def test_samples_have_the_mixtures_moments(kind: str) -> None:
    mixture, number = build(kind, learn_weights=True)(), 20_000
    z = mixture.sample((number,))
    assert not z.requires_grad and not mixture.has_rsample
    assert len(z.unique(dim=0)) == number
    for value, expected in [(z, mixture.mean), ((z - mixture.mean) ** 2, mixture.variance)]:
        error = (value.mean(0) - expected).abs() / (value.std(0) / math.sqrt(number))
        assert (error < 4).all()
    # In each half-plane too: the right components, not only the right average.
    right = z[:, 0] > mixture.mean[0]
    nodes, cell = grid()
    density = mixture.log_prob(nodes).detach().exp() * cell
    probability = float(density[nodes[:, 0] > mixture.mean[0]].sum())
    # The cut runs through a cell of the grid.
    slack = 4 * math.sqrt(0.25 / number) + float(density.reshape(801, 801).sum(1).max())
    assert abs(right.double().mean() - probability) < slack


@THREE
def test_expands_over_plates(kind: str) -> None:
    mixture = build(kind)()
    wide = mixture.expand([6, 5])
    assert wide.batch_shape == (6, 5) and wide.sample().shape == (6, 5, D)
    assert wide.sample((2,)).shape == (2, 6, 5, D) and wide.mean.shape == (6, 5, D)
    z = torch.randn(6, 5, D)
    torch.testing.assert_close(wide.log_prob(z), mixture.log_prob(z))
    torch.testing.assert_close(wide.log_prob(z[:, :1]), mixture.log_prob(z[:, :1]).expand(6, 5))
    assert torch.distributions.biject_to(wide.support)(z).shape == z.shape


@pytest.mark.parametrize("ratio", [1, 10, 100, 1000])
def test_float32_keeps_its_digits(ratio: float) -> None:
    """Products of float32 lose 0.2 nats at 100 and 16 at 1000; squares of differences do not."""
    size = 50
    encoder = nn.Linear(INPUTS, 2 * size)
    nn.init.normal_(encoder.weight)
    encoder.weight.data[size:] = 0
    encoder.bias.data[size:] = -math.log(ratio)
    prior = VampPrior(encoder, torch.randn(20, INPUTS)).float()
    z = prior().sample((30,))
    components = normals(prior.encoder(prior.pseudo_inputs).double())
    expected = components.log_prob(z.double()[:, None]).logsumexp(-1) - math.log(20)
    found = prior().log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@THREE
def test_gradients_reach_everything(kind: str) -> None:
    prior, z = build(kind, learn_weights=True), torch.randn(5, D, requires_grad=True)
    inputs = [z, *prior.parameters()]
    found = torch.autograd.grad(prior().log_prob(z).sum(), inputs)
    expected = torch.autograd.grad(by_torch(prior).log_prob(z).sum(), inputs)
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


def test_pseudo_inputs_stay_within_bounds() -> None:
    images = torch.randint(2, (K, INPUTS)).double()
    prior = VampPrior(Encoder(), images, bounds=(0, 1))
    torch.testing.assert_close(prior.pseudo_inputs, images.clamp(0.01, 0.99))
    assert torch.autograd.grad(prior().log_prob(torch.ones(D)), prior.raw_inputs)[0].all()
    prior.raw_inputs.data *= 100
    assert prior.pseudo_inputs.min() >= 0 and prior.pseudo_inputs.max() <= 1


def test_pseudo_inputs_start_at_rows_of_the_data() -> None:
    x = torch.randn(30, INPUTS)
    prior = VampPrior(Encoder(), x, num_components=7)
    rows = (prior.pseudo_inputs[:, None] == x).all(-1).nonzero()[:, 1]
    assert len(rows.unique()) == 7
    everything = VampPrior(Encoder(), x)
    torch.testing.assert_close(everything.pseudo_inputs.data, x)
    everything.raw_inputs.data.zero_()
    assert x.abs().min() > 0  # a copy


# --- Exemplars


def exemplar_prior(kind: str = "diagonal", **options: Any) -> ExemplarPrior:
    return ExemplarPrior(Encoder(kind), torch.randn(N, INPUTS), init_scale=0.7, **options)


def parzen(prior: ExemplarPrior, z: Tensor, rows: list[int]) -> Tensor:
    """Return the log-density of a mixture at some exemplars, from the formula."""
    logits, parameters = prior.encoder.raw(prior.exemplars[rows])
    squares = ((z[..., None, None, :] - parameters[..., :D]) ** 2).sum(-1)
    density = torch.exp(-0.5 * squares / 0.7**2) / (2 * math.pi * 0.7**2) ** (D / 2)
    return (logits.softmax(-1) * density).sum(-1).mean(-1).log()


@pytest.mark.parametrize("kind", ["diagonal", "pair"])
def test_leave_one_out_excludes_the_datum_alone(kind: str) -> None:
    prior, z = exemplar_prior(kind), torch.randn(5, D)
    torch.testing.assert_close(prior().log_prob(z), parzen(prior, z, list(range(N))))
    leave_out = torch.tensor([3, 0, 5, 3, 1])
    mixture = prior(leave_out=leave_out)
    assert mixture.batch_shape == (5,) and mixture.mean.shape == (5, D)
    others = [[m for m in range(N) if m != n] for n in leave_out]
    expected = torch.stack([parzen(prior, *pair) for pair in zip(z, others, strict=True)])
    torch.testing.assert_close(mixture.log_prob(z), expected)
    torch.testing.assert_close(mixture.expand([4, 5]).log_prob(z), expected.expand(4, 5))
    weight = prior.encoder.layer.weight
    values = mixture.log_prob(z), expected
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), weight)[0] for v in values))
    # The whole prior is never less than (N-1)/N of it.
    assert (prior().log_prob(z) >= expected + math.log((N - 1) / N)).all()


def test_left_out_exemplars_are_never_drawn() -> None:
    encoder = nn.Linear(1, 2, bias=False)
    encoder.weight.data = torch.tensor([[1.0], [0.0]])
    prior = ExemplarPrior(encoder, 100 * torch.arange(3.0)[:, None], init_scale=0.1)
    drawn = prior(leave_out=torch.tensor([0, 1, 2])).sample((200,))[..., 0].div(100).round()
    assert [sorted(row.unique().tolist()) for row in drawn.T] == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("leave_out", [None, 2])
@pytest.mark.slow
def test_subsets_have_the_priors_mean_and_a_lower_logarithm(leave_out: int | None) -> None:
    """Also the claim that larger subsets come closer, and that evaluation uses all."""
    prior, z = exemplar_prior(num_exemplars=2), torch.randn(D)
    index = None if leave_out is None else torch.tensor(leave_out)
    exact = parzen(prior, z, [m for m in range(N) if m != leave_out])
    means = []
    for size in (2, 3, 5, N):
        used = [
            [m for m in subset if m != leave_out]
            for subset in itertools.combinations(range(N), size)
        ]
        logs = torch.stack([parzen(prior, z, rows) for rows in used])
        # Every subset is as likely as every other, and its number left may vary.
        torch.testing.assert_close(logs.exp().mean(), exact.exp())
        means.append(logs.mean())
        if size == 2:
            found = torch.stack([prior(leave_out=index).log_prob(z) for _ in range(800)])
            assert (found[:, None] - logs).abs().min(1).values.max() < 1e-10
            for statistic, expected in ((found, logs.mean()), (found.exp(), exact.exp())):
                error = (statistic.mean() - expected).abs()
                assert error < 4 * statistic.std() / math.sqrt(800)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(means))
    assert means[0] < means[-1] - 1e-3
    torch.testing.assert_close(means[-1], exact)
    torch.testing.assert_close(prior.eval()(leave_out=index).log_prob(z), exact)


# --- In models


class Programs:
    """A small VAE on 8 data, in minibatches of 3."""

    def __init__(self, kind: str = "vamp") -> None:
        self.encoder, self.decoder = Encoder(), nn.Linear(D, INPUTS)
        self.x = torch.randn(SIZE, INPUTS)
        make: Callable = VampPrior if kind == "vamp" else ExemplarPrior
        self.prior = make(self.encoder, self.x)
        self.leave_out = kind == "left out"

    def model(self, indices: Tensor) -> None:
        pyro.module("prior", self.prior)
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", SIZE, subsample=indices):
            prior = self.prior(leave_out=indices) if self.leave_out else self.prior()
            z = pyro.sample("z", prior)
            x = self.x[indices]
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, indices: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", SIZE, subsample=indices):
            pyro.sample("z", normals(self.encoder(self.x[indices])))

    def parameters(self) -> list[Tensor]:
        found = [*self.prior.parameters(), *self.encoder.parameters(), *self.decoder.parameters()]
        return list(dict.fromkeys(found))

    def by_hand(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Return log-weights ``[K, n]`` for noise ``[K, n, D]``, with torch's distributions."""
        q = normals(self.encoder(self.x[indices]))
        z = q.base_dist.loc + q.base_dist.scale * noise
        if isinstance(self.prior, VampPrior):
            log_p = by_torch(self.prior).log_prob(z)
        else:
            means = self.encoder(self.x)[:, :D]
            scale = self.prior.log_scale.exp()
            windows = dist.Normal(means, scale).to_event(1).log_prob(z[..., None, :])
            own = (indices[:, None] == torch.arange(SIZE)) & self.leave_out
            log_p = torch.where(own, -math.inf, windows).logsumexp(-1) - (~own).sum(-1).log()
        log_x = dist.Normal(self.decoder(z), 0.5).to_event(1).log_prob(self.x[indices])
        return log_p + log_x - q.log_prob(z)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Let normals draw from one recorded tensor: in one pass, or particle by particle."""
    recorded = torch.randn(8, 3, D)
    taken = [0]

    def standard(shape: Any, dtype: Any, device: Any) -> Tensor:
        number = math.prod(shape) // recorded[0].numel()
        which = (taken[0] + torch.arange(number)) % 8  # from where it stops, in a circle
        taken[0] += number
        return recorded[which].reshape(shape)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", standard)
    return recorded


@pytest.mark.parametrize("many", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("loss", [Trace_ELBO, IWAE_ELBO])
@pytest.mark.parametrize("kind", ["vamp", "exemplars", "left out"])
def test_losses_by_hand(kind: str, loss: Any, many: bool, noise: Tensor) -> None:
    """One step's value and gradients, under a subsampled plate."""
    programs, indices = Programs(kind), torch.tensor([6, 1, 4])
    elbo = loss(8, vectorize_particles=many, max_plate_nesting=1)
    found = elbo.differentiable_loss(programs.model, programs.guide, indices)
    log_weights = programs.by_hand(indices, noise)
    per_row = log_weights.mean(0)
    if loss is IWAE_ELBO:
        per_row = log_weights.logsumexp(0) - math.log(8)
    expected = -per_row.sum() * SIZE / 3
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(v, programs.parameters()) for v in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", [IWAE_ELBO(4), MIWAE_ELBO(2, 4), CIWAE_ELBO(4)])
@pytest.mark.parametrize("kind", ["vamp", "left out"])
def test_training_moves_every_parameter_once(kind: str, loss: Any) -> None:
    """An encoder with a name from the guide and one from the prior takes one step, not two."""
    programs, rate = Programs(kind), 0.01
    before = [parameter.detach().clone() for parameter in programs.parameters()]
    svi = SVI(programs.model, programs.guide, pyro.optim.Adam({"lr": rate}), loss)
    svi.step(torch.tensor([0, 5, 2]))
    for old, new in zip(before, programs.parameters(), strict=True):
        moved = (new - old).abs()
        assert 0.9 * rate < moved.max() < 1.001 * rate  # Adam's first step is the rate


def test_with_an_autoguide_and_predictive() -> None:
    programs = Programs()

    def model(x: Tensor, observed: bool = True) -> None:
        pyro.module("prior", programs.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", programs.prior())
            noise = dist.Normal(programs.decoder(z), 0.5).to_event(1)
            pyro.sample("x", noise, obs=x if observed else None)

    guide = AmortizedGuide(model, programs.prior.encoder)
    assert math.isfinite(IWAE_ELBO(8).loss(model, guide, programs.x))
    assert guide(programs.x)["z"].shape == (SIZE, D)
    drawn = Predictive(model, num_samples=20, parallel=True)(programs.x, observed=False)
    assert drawn["z"].shape == (20, SIZE, D) and drawn["x"].shape == (20, SIZE, INPUTS)


# --- As modules


@THREE
def test_state_copies_pickles_and_dtypes(kind: str) -> None:
    prior, other = (build(kind, learn_weights=True, bounds=(-9.0, 9.0)) for _ in range(2))
    z = torch.randn(5, D)
    other.load_state_dict(prior.state_dict())
    copies = [other, copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))]
    expected = prior().log_prob(z)
    prior.raw_inputs.data += 1
    for each in copies:
        torch.testing.assert_close(each().log_prob(z), expected, rtol=0, atol=0)
    narrow = other.float()().log_prob(z.float())
    assert narrow.dtype == torch.float32 and other().sample((3,)).dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-5, atol=1e-5)


def test_exemplars_are_bytes_and_not_in_the_state() -> None:
    images, layer = torch.randint(255, (N, INPUTS), dtype=torch.uint8), nn.Linear(INPUTS, 2 * D)
    prior = ExemplarPrior(lambda x: layer(x / 255), images).to(torch.float64)
    assert prior.exemplars.dtype == torch.uint8 and set(prior.state_dict()) == {"log_scale"}
    assert prior(leave_out=torch.tensor([1])).log_prob(torch.zeros(1, D)).dtype == torch.float64


def test_exemplars_move_with_the_prior_and_are_not_copied_in_isolated_runs() -> None:
    prior = exemplar_prior()
    data = prior.exemplars
    with isolated():
        prior()
        assert prior.exemplars is data
    assert prior.to(torch.float32).exemplars.dtype == torch.float32


def test_compiled_steps_leave_out_minibatches() -> None:
    def steps(make: Callable[..., Any]) -> Tensor:
        torch.manual_seed(0)
        pyro.clear_param_store()
        encoder, x = Encoder(), torch.randn(SIZE, INPUTS)
        prior = ExemplarPrior(encoder, x)

        def model() -> None:
            pyro.module("prior", prior)
            with pyro.plate("data", SIZE, subsample_size=3) as index:
                pyro.sample("z", prior(leave_out=index))

        def guide() -> None:
            with pyro.plate("data", SIZE, subsample_size=3) as index:
                pyro.sample("z", normals(encoder(x[index])))

        svi = make(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        return torch.tensor([svi.step() for _ in range(4)])

    traced = partial(CompiledSVI, engine="graph", strict=True)
    torch.testing.assert_close(steps(traced), steps(SVI), rtol=1e-10, atol=1e-12)


def test_rows_that_are_no_exemplars_have_no_density() -> None:
    prior, z = exemplar_prior(), torch.randn(3, D)
    expected = prior(leave_out=torch.tensor([0, 1, 2])).log_prob(z)
    with pyro.validation_enabled(False):
        found = prior(leave_out=torch.tensor([0, -1, N])).log_prob(z)
    assert found.isnan().tolist() == [False, True, True]
    torch.testing.assert_close(found[0], expected[0])


# --- Errors

GOOD = nn.Linear(INPUTS, 2 * D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VampPrior(GOOD, torch.ones(0, INPUTS)), "from 1 to the 0 rows"),
        (lambda: VampPrior(GOOD, torch.ones(K, INPUTS), 5), "from 1 to the 4 rows, got 5"),
        (lambda: VampPrior(GOOD, 2 * torch.ones(K, 3), bounds=(0, 1)), "from 2 to 2"),
        (lambda: VampPrior(GOOD, torch.ones(K, 3), family="odd"), "family must be"),
        (lambda: ExemplarPrior(GOOD, torch.ones(4, 3), num_exemplars=0), "got 0"),
        (lambda: exemplar_prior()().log_prob(torch.ones(5, 1)), r"length 2, got .* \(5, 1\)"),
        (lambda: exemplar_prior()(leave_out=torch.tensor([-1, 6])), "from -1 to 6, .* 6"),
    ],
)
def test_wrong_arguments(make: Callable, message: str) -> None:
    with pytest.raises((IndexError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.Linear(INPUTS, 5, dtype=torch.float64), "5 parameters a row.* 6 for .* length 3"),
        (nn.Flatten(0), r"returned Tensor for 4 inputs. Return parameters \[4, n\]"),
        (lambda u: (u, GOOD(u)[:, None]), "returned tuple"),
        (lambda u: (u, normals(GOOD(u))), "returned tuple"),
        (lambda u: dist.Normal(u, 1.0), "returned Normal"),
        (lambda u: dist.Normal(u.mean(0), 1.0).to_event(1), "returned Independent"),
        (lambda u: GOOD(u[:2]), "for 4 inputs"),
        (lambda u: None, "returned NoneType"),
    ],
)
def test_wrong_encoders(encoder: Callable, message: str) -> None:
    for prior in (VampPrior, ExemplarPrior):
        with pytest.raises(ValueError, match=message):
            prior(encoder, torch.ones(K, INPUTS))()
