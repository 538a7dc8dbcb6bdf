"""Priors made of encoders: densities against `MixtureSameFamily`, quadrature, and whole models."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.gaussian_families import LowRank, family_of
from pyro_recursive.priors.vamp import ExemplarPrior, VampPrior

K, D, INPUTS = 4, 2, 3


def linear(outputs: int) -> nn.Linear:
    """Return an encoder whose components are neither wide nor narrow."""
    layer = nn.Linear(INPUTS, outputs)
    for parameter in layer.parameters():
        parameter.data *= 0.5
    return layer


class PairEncoder(nn.Module):
    """An encoder that is a mixture of two diagonal normals."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.layer = linear(2), linear(2 * 2 * D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(x), self.layer(x).unflatten(-1, (2, 2 * D))


def normals(parameters: Tensor) -> Any:
    loc, log_scale = parameters.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def of_distributions() -> Callable:
    layer = linear(2 * D)
    return lambda u: normals(layer(u))


def of_mixtures() -> Callable:
    pair = PairEncoder()

    def encoder(u: Tensor) -> Any:
        logits, parameters = pair(u)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), normals(parameters))

    return encoder


# How an encoder may be written: its family, and how many components it has.
ENCODERS: dict[str, tuple[Callable[[], Callable], Any, int]] = {
    "diagonal": (lambda: linear(2 * D), "diagonal", 1),
    "full": (lambda: linear(5), "full", 1),
    "low rank": (lambda: linear(3 * D), LowRank(1), 1),
    "pair": (PairEncoder, "diagonal", 2),
    "distribution": (of_distributions, "diagonal", 1),
    "mixture": (of_mixtures, "diagonal", 2),
}


def build(kind: str, **options: Any) -> VampPrior:
    make, family, _ = ENCODERS[kind]
    return VampPrior(make(), torch.randn(K, INPUTS), family=family, **options)


def by_torch(prior: VampPrior) -> Any:
    """Build the same mixture with `MixtureSameFamily`, one encoder pass for each pseudo-input."""
    logits, components = [], []
    for weight, u in zip(prior.logits.softmax(0), prior.pseudo_inputs, strict=True):
        found = prior.encoder(u[None])
        own = torch.zeros(1)
        if isinstance(found, tuple):
            own, found = found[0].log_softmax(-1)[0], found[1][0]
        elif hasattr(found, "mixture_distribution"):
            own = found.mixture_distribution.logits.log_softmax(-1)[0]
            found = found.component_distribution.expand([1, 2])
            base = found.base_dist
            found = torch.cat([base.loc[0], base.scale[0].log()], -1)
        elif hasattr(found, "base_dist"):
            found = torch.cat([found.base_dist.loc, found.base_dist.scale.log()], -1)
        logits.append(weight.log() + own)
        components.append(found)
    family = family_of(prior.family)
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=torch.cat(logits)),
        family(torch.cat(components), D),
        validate_args=False,
    )


def grid(size: int, width: float = 20.0, points: int = 801) -> tuple[Tensor, float]:
    axis = torch.linspace(-width, width, points)
    nodes = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    return nodes, float(axis[1] - axis[0]) ** size


# The density and its draws.


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("learn_weights", [False, True])
def test_equals_mixture_same_family(kind: str, learn_weights: bool) -> None:
    prior = build(kind, learn_weights=learn_weights)
    if learn_weights:
        nn.init.normal_(prior.logits)
    mixture, expected = prior(), by_torch(prior)
    assert mixture.num_components == K * ENCODERS[kind][2]
    assert (mixture.batch_shape, mixture.event_shape) == ((), (D,))
    for shape in [(), (5,), (3, 5)]:
        z = torch.randn(*shape, D)
        torch.testing.assert_close(mixture.log_prob(z), expected.log_prob(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixture.mean, expected.mean)
    torch.testing.assert_close(mixture.variance, expected.variance)


@pytest.mark.parametrize("kind", ENCODERS)
def test_integrates_to_one(kind: str) -> None:
    nodes, cell = grid(D)
    total = build(kind)().log_prob(nodes).exp().sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-8)


def test_integrates_to_one_in_one_dim() -> None:
    nodes, cell = grid(1, points=4801)
    prior = VampPrior(linear(2), torch.randn(7, INPUTS))
    total = prior().log_prob(nodes).exp().sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("kind", ENCODERS)
def test_samples_have_the_mixtures_moments(kind: str) -> None:
    prior = build(kind, learn_weights=True)
    nn.init.normal_(prior.logits)
    mixture, number = prior(), 20_000
    z = mixture.sample((number,))
    assert not z.requires_grad and not mixture.has_rsample
    for value, expected in [(z, mixture.mean), ((z - mixture.mean) ** 2, mixture.variance)]:
        error = (value.mean(0) - expected).abs() / (value.std(0) / math.sqrt(number))
        assert (error < 4).all()
    # In each half-plane too: the right components, not only the right average.
    right = z[:, 0] > mixture.mean[0]
    nodes, cell = grid(D)
    density = mixture.log_prob(nodes).detach().exp() * cell
    probability = float(density[nodes[:, 0] > mixture.mean[0]].sum())
    # The cut runs through a cell of the grid.
    slack = 4 * math.sqrt(0.25 / number) + float(density.reshape(801, 801).sum(1).max())
    assert abs(right.double().mean() - probability) < slack


def test_draws_of_components_that_cannot_be_indexed() -> None:
    prior = build("full")
    mixture = prior()
    index = torch.arange(K).repeat(3000)[torch.randperm(3000 * K)].reshape(100, -1)
    z = mixture.draw(index)
    for k in range(K):
        own, mean = z[index == k], mixture.components.mean[k]
        error = (own.mean(0) - mean).abs() / (own.std(0) / math.sqrt(len(own)))
        assert (error < 4).all() and len(own.unique(dim=0)) == len(own)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
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
    parameters = prior.encoder(prior.pseudo_inputs).double()
    loc, scale = parameters[:, :size], parameters[:, size:].exp()
    differences = dist.Normal(loc, scale).to_event(1).log_prob(z.double()[:, None])
    expected = differences.logsumexp(-1) - math.log(20)
    found = prior().log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


# Gradients.


@pytest.mark.parametrize("kind", ["diagonal", "full", "pair"])
def test_gradients_reach_everything(kind: str) -> None:
    prior, z = build(kind, learn_weights=True), torch.randn(5, D, requires_grad=True)
    inputs = [z, *prior.parameters()]
    found = torch.autograd.grad(prior().log_prob(z).sum(), inputs)
    expected = torch.autograd.grad(by_torch(prior).log_prob(z).sum(), inputs)
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


@pytest.mark.parametrize("bounds", [None, (-4.0, 4.0)])
def test_gradients_are_finite_differences(bounds: tuple[float, float] | None) -> None:
    prior = build("diagonal", bounds=bounds)
    z, step = torch.randn(5, D), 1e-6
    for parameter in prior.parameters():
        gradient = torch.autograd.grad(prior().log_prob(z).sum(), parameter)[0]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.flatten()[0] += sign * step
                values.append(prior().log_prob(z).sum())
                parameter.flatten()[0] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradient.flatten()[0], difference, rtol=1e-6, atol=1e-7)


def test_second_derivatives() -> None:
    prior, z = build("diagonal"), torch.randn(3, D, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: prior().log_prob(z), (z,))


# Pseudo-inputs.


def test_pseudo_inputs_stay_within_bounds() -> None:
    images = torch.randint(2, (K, INPUTS)).double()
    prior = VampPrior(nn.Linear(INPUTS, 2 * D), images, bounds=(0, 1))
    torch.testing.assert_close(prior.pseudo_inputs, images.clamp(0.01, 0.99))
    assert torch.autograd.grad(prior().log_prob(torch.ones(D)), prior.raw_inputs)[0].all()
    prior.raw_inputs.data *= 100
    assert prior.pseudo_inputs.min() >= 0 and prior.pseudo_inputs.max() <= 1


def test_pseudo_inputs_start_at_rows_of_the_data() -> None:
    x = torch.randn(30, INPUTS)
    prior = VampPrior(nn.Linear(INPUTS, 2 * D), x, num_components=7)
    rows = (prior.pseudo_inputs[:, None] == x).all(-1).nonzero()[:, 1]
    assert len(rows.unique()) == 7
    everything = VampPrior(nn.Linear(INPUTS, 2 * D), x)
    torch.testing.assert_close(everything.pseudo_inputs.data, x)
    everything.raw_inputs.data.zero_()
    assert x.abs().min() > 0  # a copy


# Exemplars.

N = 6


def exemplar_prior(**options: Any) -> ExemplarPrior:
    encoder = nn.Linear(INPUTS, 2 * D)
    return ExemplarPrior(encoder, torch.randn(N, INPUTS), init_scale=0.7, **options)


def parzen(prior: ExemplarPrior, z: Tensor, rows: list[int]) -> Tensor:
    """Return the log-density of a mixture at some exemplars, from the formula."""
    means = prior.encoder(prior.exemplars)[rows, :D]
    squares = ((z[..., None, :] - means) ** 2).sum(-1)
    density = torch.exp(-0.5 * squares / 0.7**2) / (2 * math.pi * 0.7**2) ** (D / 2)
    return density.mean(-1).log()


def test_exemplars_by_formula() -> None:
    prior, z = exemplar_prior(), torch.randn(5, D)
    torch.testing.assert_close(prior().log_prob(z), parzen(prior, z, list(range(N))))
    nodes, cell = grid(D)
    total = prior().log_prob(nodes).exp().sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-8)


def test_leave_one_out_excludes_the_datum_alone() -> None:
    prior, z = exemplar_prior(), torch.randn(5, D)
    leave_out = torch.tensor([3, 0, 5, 3, 1])
    mixture = prior(leave_out=leave_out)
    assert mixture.batch_shape == (5,) and mixture.mean.shape == (5, D)
    others = [[m for m in range(N) if m != n] for n in leave_out]
    expected = torch.stack([parzen(prior, *pair) for pair in zip(z, others, strict=True)])
    torch.testing.assert_close(mixture.log_prob(z), expected)
    torch.testing.assert_close(mixture.expand([4, 5]).log_prob(z), expected.expand(4, 5))
    gradient = torch.autograd.grad(mixture.log_prob(z).sum(), prior.encoder.weight)[0]
    by_hand = torch.autograd.grad(expected.sum(), prior.encoder.weight)[0]
    torch.testing.assert_close(gradient, by_hand)
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
    """Also the claim that larger subsets come closer."""
    prior, z = exemplar_prior(num_exemplars=2), torch.randn(D)
    index = None if leave_out is None else torch.tensor(leave_out)
    others = [m for m in range(N) if m != leave_out]
    exact = parzen(prior, z, others)

    means = []
    for size in (2, 3, 5, N):
        subsets = list(itertools.combinations(range(N), size))
        used = [[m for m in subset if m != leave_out] for subset in subsets]
        logs = torch.stack([parzen(prior, z, rows) for rows in used])
        # Every subset is as likely as every other, and its number left may vary.
        torch.testing.assert_close(logs.exp().mean(), exact.exp())
        means.append(logs.mean())
        if size == 2:
            found = torch.stack([prior(leave_out=index).log_prob(z) for _ in range(800)])
            distance = (found[:, None] - logs).abs()
            assert distance.min(1).values.max() < 1e-10
            share = torch.stack([(found - log).abs() < 1e-10 for log in logs.unique()])
            assert share.sum() == 800
            for statistic in (found, found.exp()):
                expected = logs.mean() if statistic is found else exact.exp()
                error = (statistic.mean() - expected).abs()
                assert error < 4 * statistic.std() / math.sqrt(800)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(means))
    assert means[0] < means[-1] - 1e-3
    torch.testing.assert_close(means[-1], exact)


def test_evaluation_uses_all_exemplars() -> None:
    prior, z = exemplar_prior(num_exemplars=2), torch.randn(5, D)
    assert prior().num_components == 2
    torch.testing.assert_close(prior.eval()().log_prob(z), parzen(prior, z, list(range(N))))


def test_exemplars_of_a_mixture_encoder() -> None:
    prior = ExemplarPrior(PairEncoder(), torch.randn(N, INPUTS), init_scale=0.7)
    logits, parameters = prior.encoder(prior.exemplars)
    means, weights, z = parameters[..., :D], logits.softmax(-1), torch.randn(5, D)
    windows = dist.Normal(means, 0.7).to_event(1).log_prob(z[:, None, None]).exp()
    each = (weights * windows).sum(-1)
    torch.testing.assert_close(prior().log_prob(z), each.mean(-1).log())
    left = prior(leave_out=torch.full((5,), 4)).log_prob(z)
    torch.testing.assert_close(left, each[:, [0, 1, 2, 3, 5]].mean(-1).log())


# In models.

SIZE = 8


class Programs:
    """A small VAE on 8 data, in minibatches of 3."""

    def __init__(self, kind: str = "vamp", own: bool = False) -> None:
        self.encoder, self.decoder = nn.Linear(INPUTS, 2 * D), nn.Linear(D, INPUTS)
        self.x = torch.randn(SIZE, INPUTS)
        encoder = copy.deepcopy(self.encoder) if own else self.encoder
        make: Callable = VampPrior if kind == "vamp" else ExemplarPrior
        self.prior = make(encoder, self.x)
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
            own = indices[:, None] == torch.arange(SIZE)
            if not self.leave_out:
                own = torch.zeros_like(own)
            left = (~own).sum(-1)
            log_p = torch.where(own, -math.inf, windows).logsumexp(-1) - left.log()
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


LOSSES = {
    "elbo": lambda many: Trace_ELBO(8, vectorize_particles=many, max_plate_nesting=1),
    "iwae": lambda many: IWAE_ELBO(8, vectorize_particles=many, max_plate_nesting=1),
}


@pytest.mark.parametrize("many", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["vamp", "exemplars", "left out"])
def test_losses_by_hand(kind: str, loss: str, many: bool, noise: Tensor) -> None:
    """One step's value and gradients, under a subsampled plate."""
    programs, indices = Programs(kind), torch.tensor([6, 1, 4])
    elbo = LOSSES[loss](many)
    found = elbo.differentiable_loss(programs.model, programs.guide, indices)
    log_weights = programs.by_hand(indices, noise)
    per_row = log_weights.mean(0)
    if loss == "iwae":
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
        assert moved.max() < 1.001 * rate  # Adam's first step is the rate
        assert moved.max() > 0.9 * rate


@pytest.mark.parametrize("loss", [PIWAE_ELBO(2, 4), IWAE_ELBO(4, estimator="rws")])
def test_two_objectives_need_an_encoder_of_its_own(loss: Any) -> None:
    indices = torch.tensor([0, 5, 2])
    shared, own = Programs(), Programs(own=True)
    with pytest.raises(ValueError, match="belongs to model and guide"):
        loss.loss_and_grads(shared.model, shared.guide, indices)
    pyro.clear_param_store()
    loss.loss_and_grads(own.model, own.guide, indices)
    assert all(p.grad is not None for p in own.parameters())


def test_store_keeps_an_encoder_shared_under_one_name(tmp_path: Any) -> None:
    programs, indices = Programs(), torch.tensor([0, 5, 2])

    def guide(indices: Tensor) -> None:
        pyro.module("prior", programs.prior)
        with pyro.plate("data", SIZE, subsample=indices):
            pyro.sample("z", normals(programs.prior.encoder(programs.x[indices])))

    SVI(programs.model, guide, pyro.optim.Adam({"lr": 0.1}), IWAE_ELBO(2)).step(indices)
    kept = copy.deepcopy(programs.prior.state_dict())
    pyro.get_param_store().save(tmp_path / "store")
    for parameter in programs.prior.parameters():
        parameter.data.zero_()
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    pyro.module("prior", programs.prior, update_module_params=True)
    torch.testing.assert_close(programs.prior.state_dict(), kept)
    names = [name for name in pyro.get_param_store() if "encoder" in name]
    assert names == ["prior$$$encoder.weight", "prior$$$encoder.bias"]


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


# As modules.


@pytest.mark.parametrize("kind", ["diagonal", "full", "pair"])
def test_state_copies_and_pickles(kind: str) -> None:
    prior, other = (build(kind, learn_weights=True, bounds=(-9.0, 9.0)) for _ in range(2))
    z = torch.randn(5, D)
    other.load_state_dict(prior.state_dict())
    copies = [other, copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))]
    expected = prior().log_prob(z)
    prior.raw_inputs.data += 1
    for each in copies:
        torch.testing.assert_close(each().log_prob(z), expected, rtol=0, atol=0)


def test_state_of_exemplars_has_no_data() -> None:
    prior = exemplar_prior()
    assert set(prior.state_dict()) == {"log_scale", "encoder.weight", "encoder.bias"}
    assert copy.deepcopy(prior)().num_components == N


@pytest.mark.parametrize("kind", ["diagonal", "full", "pair"])
def test_moves_between_dtypes(kind: str) -> None:
    prior, z = build(kind), torch.randn(5, D)
    exact = prior().log_prob(z)
    narrow = prior.float()().log_prob(z.float())
    assert narrow.dtype == torch.float32 and prior().sample((3,)).dtype == torch.float32
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=1e-5)


def test_exemplars_of_bytes() -> None:
    images = torch.randint(255, (N, INPUTS), dtype=torch.uint8)
    layer = nn.Linear(INPUTS, 2 * D)
    prior = ExemplarPrior(lambda x: layer(x / 255), images).to(torch.float64)
    assert prior.exemplars.dtype == torch.uint8
    assert prior(leave_out=torch.tensor([1])).log_prob(torch.zeros(1, D)).dtype == torch.float64


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    prior, z = build("diagonal"), torch.randn(5, D)
    expected = prior().log_prob(z)
    torch.testing.assert_close(prior.cuda()().log_prob(z.cuda()).cpu(), expected)
    exemplars = exemplar_prior(num_exemplars=3).cuda()
    mixture = exemplars(leave_out=torch.tensor([1, 2], device="cuda"))
    assert mixture.log_prob(mixture.sample()).device.type == "cuda"


# Errors.

GOOD = nn.Linear(INPUTS, 2 * D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VampPrior(GOOD, torch.ones(K, INPUTS).long()), TypeError, "int64"),
        (lambda: VampPrior(GOOD, torch.ones(0, INPUTS)), ValueError, r"got \(0, 3\)"),
        (lambda: VampPrior(GOOD, torch.tensor(1.0)), ValueError, r"got \(\)"),
        (lambda: VampPrior(GOOD, torch.ones(K, INPUTS), 0), ValueError, "from 1 to the 4"),
        (lambda: VampPrior(GOOD, torch.ones(K, INPUTS), 5), ValueError, "got 5"),
        (lambda: VampPrior(GOOD, torch.ones(K, 3), bounds=(1, 0)), ValueError, "low < high"),
        (lambda: VampPrior(GOOD, 2 * torch.ones(K, 3), bounds=(0, 1)), ValueError, "from 2 to 2"),
        (lambda: VampPrior(GOOD, torch.ones(K, 3), family="odd"), ValueError, "family must be"),
        (lambda: ExemplarPrior(GOOD, torch.ones(0, 3)), ValueError, "exemplars must be rows"),
        (lambda: ExemplarPrior(GOOD, torch.ones(4, 3), num_exemplars=5), ValueError, "got 5"),
        (lambda: ExemplarPrior(GOOD, torch.ones(4, 3), num_exemplars=0), ValueError, "got 0"),
        (lambda: ExemplarPrior(GOOD, torch.ones(4, 3), init_scale=0.0), ValueError, "positive"),
    ],
)
def test_wrong_arguments(make: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            nn.Linear(INPUTS, 5, dtype=torch.float64),
            "5 parameters a row.* 4 for vectors of length 2, 6 for 3",
        ),
        (nn.Linear(INPUTS, 1, dtype=torch.float64), "0 for vectors of length 0, 2 for 1"),
        (nn.Flatten(0), r"returned a tensor of shape \(12,\)"),
        (lambda u: (u, u), r"shape \(4, 3\) and a tensor of shape \(4, 3\)\..*lambda u"),
        (lambda u: (u, GOOD(u)[:, None]), r"\(4, 3\) and a tensor of shape \(4, 1, 4\)"),
        (lambda u: (u, u, u), "tensor .* and a tensor .* and a tensor"),
        (lambda u: dist.Normal(u, 1.0), r"Normal with batch \(4, 3\) and event \(\)"),
        (lambda u: dist.Normal(u.mean(0), 1.0).to_event(1), r"Independent with batch \(\)"),
        (lambda u: GOOD(u[:2]), r"For 4 inputs .* \(2, 4\)"),
        (lambda u: GOOD(u).sum(), r"tensor of shape \(\)"),
        (lambda u: (u, normals(GOOD(u))), "tensor .* and a Independent with batch"),
        (lambda u: (u,), "returned a tensor"),
        (lambda u: None, "returned a NoneType"),
    ],
)
def test_wrong_encoders(encoder: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VampPrior(encoder, torch.ones(K, INPUTS))()
    with pytest.raises(ValueError, match=message):
        ExemplarPrior(encoder, torch.ones(K, INPUTS))()


def test_wrong_values() -> None:
    prior = exemplar_prior()
    with pytest.raises(ValueError, match=r"length 2, got a value of shape \(5, 1\)"):
        prior().log_prob(torch.ones(5, 1))
    with pytest.raises(IndexError, match="from -1 to 6, and there are 6"):
        prior(leave_out=torch.tensor([-1, 6]))
    with pytest.raises(TypeError, match="float64"):
        prior(leave_out=torch.ones(3))
    with pytest.raises(TypeError, match="bool"):
        prior(leave_out=torch.ones(N).bool())
    with pytest.raises(ValueError, match="at least 2"):
        exemplar_prior(num_exemplars=1)(leave_out=torch.tensor([0]))


# What it is for.


def four_clusters(number: int) -> Tensor:
    """Data with a mode in each quadrant."""
    return 2.0 * (2 * torch.randint(2, (number, 2)) - 1) + 0.3 * torch.randn(number, 2)


class Toy:
    """A VAE with a linear decoder: under a standard normal its evidence is that of a normal."""

    def __init__(self, x: Tensor, kind: str) -> None:
        self.encoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 4))
        self.decoder = nn.Linear(2, 2)
        self.prior: Any = None
        if kind == "vamp":
            self.prior = VampPrior(self.encoder, x, num_components=8)
        elif kind == "exemplar":
            self.prior = ExemplarPrior(self.encoder, x, num_exemplars=100)

    def model(self, x: Tensor, indices: Tensor | None = None) -> None:
        pyro.module("decoder", self.decoder)
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        if isinstance(self.prior, ExemplarPrior):
            prior = pyro.module("prior", self.prior)(leave_out=indices)
        elif self.prior is not None:
            prior = pyro.module("prior", self.prior)()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(self.decoder(z), 0.2).to_event(1), obs=x)

    def guide(self, x: Tensor, indices: Tensor | None = None) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normals(self.encoder(x)))


@pytest.mark.slow
def test_elbo_beats_that_of_a_normal_prior() -> None:
    """Nats per datum, for 1000 held out; the margins are several times the spread over seeds."""
    x, held_out = four_clusters(500), four_clusters(1000)
    # No linear decoder with a normal prior has more evidence than the best normal.
    normal = torch.distributions.MultivariateNormal(held_out.mean(0), held_out.T.cov())
    best_normal = float(normal.log_prob(held_out).mean())
    clusters = dist.Normal(torch.cartesian_prod(*[torch.tensor([-2.0, 2.0])] * 2), 0.3).to_event(1)
    truth = float((clusters.log_prob(held_out[:, None]).logsumexp(-1) - math.log(4)).mean())
    elbos = {kind: elbo_of(Toy(x, kind), x, held_out) for kind in ("normal", "vamp", "exemplar")}
    assert best_normal - 0.3 < elbos["normal"] < best_normal + 0.02
    assert best_normal + 1.5 < elbos["vamp"] < truth + 0.02
    assert best_normal + 1.5 < elbos["exemplar"] < truth + 0.02


def elbo_of(toy: Toy, x: Tensor, held_out: Tensor) -> float:
    pyro.clear_param_store()
    svi = SVI(toy.model, toy.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(1500):
        indices = torch.randint(len(x), (100,))
        svi.step(x[indices], indices)
    if toy.prior is not None:
        toy.prior.eval()
    many = Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return -many.loss(toy.model, toy.guide, held_out) / len(held_out)
