"""MAPA: the bound against brute force over all codes, on every kind of model; the guide's draws."""

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, autoguide, config_enumerate
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MAPA_ELBO, MAPAGuide, fit, log_marginal
from pyro_recursive.mapa.codes import EncodedCodes, FreeCodes, GridCodes
from pyro_recursive.mapa.kernels import Gaussian
from pyro_recursive.mapa.table import Table
from pyro_recursive.tracing.sites import PARTICLE_PLATE, sites
from tests import models
from tests.models import Row

N, D = 9, 2
SHARES = ["pair", "shared", "pooled"]


class Toy:
    """A small autoencoder with data on a curve."""

    def __init__(self, scale: float = 0.4, rows: int = N) -> None:
        self.scale = scale
        t = torch.linspace(-1.5, 1.5, rows)[:, None]
        self.x = torch.cat([t, t**2], -1) + 0.2 * torch.randn(rows, 2)
        self.encoder, self.decoder = nn.Linear(2, D), nn.Sequential(nn.Linear(D, 2), nn.Tanh())

    def model(self, x: Tensor | None, rows: int = N) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", rows if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def minibatches(self, x: Tensor, size: int = 3) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x[index])

    def table(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return log p(x_n | c_i), ``[n, i]``."""
        return dist.Normal(self.decoder(codes), self.scale).to_event(1).log_prob(x[:, None])

    def exact(self) -> Tensor:
        """Return the evidence of each row under the empirical prior."""
        return self.table(self.x, self.encoder(self.x)).logsumexp(-1) - math.log(len(self.x))

    def guide(self, **options: Any) -> MAPAGuide:
        return MAPAGuide(self.model, self.encoder, self.x, **options)

    def bound(self, guide: MAPAGuide, **options: Any) -> float:
        return -MAPA_ELBO().loss(self.model, guide, self.x, **options)


# The bound.


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("split", [(N, 0), (N, 3), (4, N - 4), (0, N), (1, 2 * N)])
def test_all_codes_are_the_exact_evidence(share: str, split: tuple[int, int]) -> None:
    toy = Toy()
    guide = toy.guide(share=share, top=split[0], samples=split[1])
    assert toy.bound(guide) == pytest.approx(toy.exact().sum().item(), abs=1e-9)


def test_without_a_table_the_sum_is_exact() -> None:
    toy = Toy()
    guide = MAPAGuide(toy.model, EncodedCodes(toy.encoder, toy.x))
    assert toy.bound(guide) == pytest.approx(toy.exact().sum().item(), abs=1e-9)


@pytest.mark.parametrize("share", ["pair", "shared"])
@pytest.mark.parametrize("far", [5.0, 14.0, 20.0, 1e4])
@pytest.mark.parametrize("parts", [1, 2])
def test_codes_that_a_row_does_not_use_make_no_difference(
    share: str, far: float, parts: int
) -> None:
    """Even where they would fit so much better that products of the factors underflow."""
    x = torch.tensor([[0.0], [far]], dtype=torch.float32)
    codes = FreeCodes(x.flip(0)).float()  # each row's own code is far away

    def model(x: Tensor) -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
            for part in range(parts):
                pyro.sample(f"x{part}", dist.Normal(z, 1.0).to_event(1), obs=x)

    table = Table(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.9, 0.1]] * 2).log(), 2)
    guide = MAPAGuide(model, codes, x, table=table, top=1, samples=0, share=share)
    own = -parts * (0.5 * far**2 + 0.5 * math.log(2 * math.pi)) - math.log(2)
    loss = MAPA_ELBO().differentiable_loss(model, guide, x)
    assert loss.item() == pytest.approx(-2 * own, rel=1e-6)
    loss.backward()
    assert (codes.codes.grad - parts * torch.tensor([[far], [-far]])).abs().max() < 1e-6 * far
    with torch.no_grad():
        posterior = guide.explain(x).log_q.exp()
    assert (posterior - torch.tensor([0.0, 1.0])).abs().max() < (1e-5 if far > 10 else 1e-4)


@pytest.mark.parametrize("share", ["pair", "shared"])
def test_nearest_code_alone_is_the_autoencoder(share: str) -> None:
    toy = Toy()
    own = toy.table(toy.x, toy.encoder(toy.x)).diagonal().sum() - N * math.log(N)
    guide = toy.guide(share=share, top=1, samples=0)
    assert toy.bound(guide) == pytest.approx(own.item(), abs=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_more_summed_codes_raise_the_bound(share: str) -> None:
    toy = Toy()
    values = [toy.bound(toy.guide(share=share, top=top, samples=0)) for top in range(1, N + 1)]
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))
    # Pooled, the rows' own codes are all there are; otherwise every added term is positive.
    assert len(set(values)) == (1 if share == "pooled" else N)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("replace", [True, False])
def test_more_draws_raise_the_mean(share: str, replace: bool) -> None:
    toy = Toy(rows=24)
    exact, runs = toy.exact().sum(), 200
    means, errors = [], []
    for samples in (1, 3, 6):
        guide = toy.guide(share=share, top=0, samples=samples, replace=replace)
        found = torch.tensor([toy.bound(guide) for _ in range(runs)])
        means.append(found.mean().item())
        errors.append(found.std().item() / runs**0.5)
    pairs = itertools.pairwise(zip(means, errors, strict=True))
    for (low, error), (high, other) in pairs:
        assert low <= high + 3 * math.hypot(error, other)
    assert means[0] < means[-1] + 3 * math.hypot(errors[0], errors[-1])
    assert means[-1] <= exact + 3 * errors[-1] + 1e-9


@pytest.mark.parametrize("share", SHARES)
def test_gradients_are_those_of_the_exact_evidence(share: str) -> None:
    toy = Toy()
    guide = toy.guide(share=share, top=3, samples=N - 3)
    MAPA_ELBO().loss_and_grads(toy.model, guide, toy.x)
    parameters = [*toy.encoder.parameters(), *toy.decoder.parameters()]
    found = [parameter.grad for parameter in parameters]
    expected = torch.autograd.grad(-toy.exact().sum(), parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_gradients_of_a_step_are_those_of_its_own_bound(share: str) -> None:
    """With fixed draws, autograd of the log of the weighted sum."""
    toy = Toy()
    guide = toy.guide(share=share, top=1, samples=2)
    guide.prepare(toy.x)
    seen: list[Any] = []
    inner = guide._placed
    guide._placed = lambda index, weights, **options: (
        seen.append((index, weights)) or inner(index, weights, **options)
    )
    MAPA_ELBO().loss_and_grads(toy.model, guide, toy.x)
    (index, weights) = seen[-1]
    table = toy.table(toy.x, toy.encoder(toy.x))
    chosen = table[:, index] if index.dim() == 1 else table.gather(1, index)
    bound = (chosen + weights).logsumexp(-1).sum() - N * math.log(N)
    parameters = [*toy.encoder.parameters(), *toy.decoder.parameters()]
    expected = torch.autograd.grad(-bound, parameters)
    for parameter, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_minibatches_are_unbiased_for_the_exact_sum(share: str) -> None:
    toy = Toy()
    guide = MAPAGuide(toy.minibatches, toy.encoder, toy.x, share=share, top=N, samples=0)
    exact, order = toy.exact(), []
    for seed in range(5):
        torch.manual_seed(seed)
        found = -MAPA_ELBO().loss(toy.minibatches, guide, toy.x)
        torch.manual_seed(seed)
        index = torch.randperm(N)[:3]
        order.append(index)
        assert found == pytest.approx(3 * exact[index].sum().item(), abs=1e-9)
    assert len({tuple(index.tolist()) for index in order}) > 1


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_true_posterior_has_no_variance(replace: bool, samples: int) -> None:
    toy = Toy()
    posterior = Table.from_log_weights(toy.table(toy.x, toy.encoder(toy.x)).detach())
    options = {"share": "pair", "top": 0, "samples": samples, "replace": replace}
    guide = toy.guide(table=posterior, **options)
    for _ in range(3):
        assert toy.bound(guide) == pytest.approx(toy.exact().sum().item(), abs=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_warm_up_is_an_autoencoder(share: str) -> None:
    """For as many training steps as asked, and over a save; evaluations do not count."""
    toy = Toy()
    options = {"share": share, "top": N, "samples": 0}
    guide, loss = toy.guide(warm_up=3, **options), MAPA_ELBO()
    own = toy.table(toy.x, toy.encoder(toy.x)).diagonal().sum() - N * math.log(N)
    exact = toy.exact().sum().item()

    def step(guide: MAPAGuide) -> float:
        return -loss.differentiable_loss(toy.model, guide, toy.x).item()

    assert -loss.loss(toy.model, guide, toy.x) == pytest.approx(exact)
    assert [step(guide) for _ in range(2)] == pytest.approx([own.item()] * 2)
    again = MAPAGuide(toy.model, nn.Linear(2, D), toy.x, name="again", **options)
    again.prepare(toy.x)
    again.load_state_dict(guide.state_dict())
    for each in (guide, again):
        assert [step(each), step(each)] == pytest.approx([own.item(), exact])


def test_few_neighbours_are_a_lower_bound() -> None:
    toy = Toy()
    exact = toy.exact().sum().item()
    values = [toy.bound(toy.guide(neighbours=k, top=k, samples=0, share="pair")) for k in (2, 5)]
    assert values[0] < values[1] < exact


@pytest.mark.slow
def test_passes_are_counted_as_expected() -> None:
    """The number of different codes that independent draws touch, against its expectation."""
    toy = Toy(rows=30)
    S, guide = 4, toy.guide(share="shared", top=1, samples=4, replace=True, neighbours=30)
    guide.prepare(toy.x)
    index, log_q = guide.table.rows(torch.arange(30))
    q = torch.zeros(30, 30).scatter(1, index, log_q.exp().double())
    q[range(30), index[:, 0]] = 0
    q = q / q.sum(1, keepdim=True)
    certain = torch.zeros(30, dtype=torch.bool).scatter(0, index[:, 0], True)
    expected = torch.where(certain, 1.0, 1 - ((1 - q) ** S).prod(0)).sum()
    assert certain.all() == (expected == 30)
    rows = torch.arange(10)
    expected = torch.where(
        torch.zeros(30, dtype=torch.bool).scatter(0, index[:10, 0], True),
        1.0,
        1 - ((1 - q[:10]) ** S).prod(0),
    ).sum()
    counts = []
    part = MAPAGuide(
        toy.model,
        EncodedCodes(toy.encoder, toy.x),
        table=guide.table,
        rows=lambda x: rows,
        share="shared",
        top=1,
        samples=S,
        replace=True,
    )
    for _ in range(200):
        MAPA_ELBO().loss(toy.model, part, toy.x[:10])
        assert part.passes is not None and part.passes.rows == 10
        counts.append(float(part.passes.codes))
    found = torch.tensor(counts)
    assert abs(found.mean() - expected) < 4 * found.std() / 200**0.5


@pytest.mark.parametrize("share", SHARES)
def test_variants_that_cannot_be_told_apart_are_both_served(share: str) -> None:
    """Two decoders with one distribution of data: latents turned and moved, codes with them."""
    toy, other = Toy(), Toy()
    other.x = toy.x
    turn = torch.tensor([[0.0, -2.0], [0.5, 1.0]])
    other.encoder = nn.Sequential(toy.encoder, nn.Linear(D, D))
    other.decoder = nn.Sequential(nn.Linear(D, D), toy.decoder)
    with torch.no_grad():
        other.encoder[1].weight.copy_(turn)
        other.encoder[1].bias.copy_(torch.tensor([3.0, -1.0]))
        inverse = turn.inverse()
        other.decoder[0].weight.copy_(inverse)
        other.decoder[0].bias.copy_(-inverse @ other.encoder[1].bias)
    guides = [
        each.guide(share=share, top=1, samples=2, name=f"g{i}")
        for i, each in enumerate((toy, other))
    ]
    found = []
    for each, guide in zip((toy, other), guides, strict=True):
        guide.prepare(toy.x)
        torch.manual_seed(5)
        found.append(each.bound(guide))
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    first, second = (guide.explain(toy.x) for guide in guides)
    torch.testing.assert_close(first.log_q, second.log_q)


@pytest.mark.parametrize("share", SHARES)
def test_duplicates_in_the_data(share: str) -> None:
    toy = Toy()
    toy.x = torch.cat([toy.x[:3]] * 3)
    guide = toy.guide(share=share, top=N, samples=0)
    assert toy.bound(guide) == pytest.approx(toy.exact().sum().item(), abs=1e-9)
    assert math.isfinite(toy.bound(toy.guide(share=share, top=1, samples=2)))


@pytest.mark.slow
def test_fit_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Minibatches made outside of the model, rows told apart by numbers, and a warm-up."""
    results = []
    for stops in ((4,), (1, 2, 4)):
        for place, epochs in enumerate(stops):
            pyro.clear_param_store()
            torch.manual_seed(0)
            toy = Toy()

            def model(x: Tensor, rows: Tensor, toy: Toy = toy) -> None:
                toy.model(x)

            numbers = torch.arange(N)
            codes = EncodedCodes(toy.encoder, toy.x)
            options = {"rows": lambda x, rows: rows, "warm_up": 5, "inputs": lambda x, rows: x}
            guide = MAPAGuide(model, codes, toy.x, top=1, samples=2, **options)
            fit(
                model,
                guide,
                (toy.x, numbers),
                loss=MAPA_ELBO(),
                epochs=epochs,
                batch_size=3,
                seed=1,
                checkpoint=tmp_path / f"{len(stops)}.pt",
                resume=place > 0,
                progress=False,
            )
        results.append([value.detach().clone() for value in toy.decoder.parameters()])
    for one, other in zip(*results, strict=True):
        assert (one == other).all()


@pytest.mark.slow
def test_training_climbs() -> None:
    toy = Toy(rows=40)
    guide = toy.guide(top=1, samples=4)
    svi = SVI(toy.model, guide, pyro.optim.Adam({"lr": 0.02}), MAPA_ELBO())
    before = toy.exact().mean()
    for _ in range(150):
        svi.step(toy.x)
    assert toy.exact().mean() > before + 1.0


def test_looped_particles_are_one_step() -> None:
    x = torch.randn(4)
    guide = MAPAGuide(with_global, FreeCodes(torch.randn(4, 1)), x, warm_up=5)
    loss = MAPA_ELBO(num_particles=3, vectorize_particles=False)
    loss.loss_and_grads(with_global, guide, x)
    assert guide.steps_to_warm_up == 4
    loss.loss(with_global, guide, x)
    assert guide.steps_to_warm_up == 4


@pytest.mark.parametrize("top", [0, 1])
def test_fractions_draw_at_least_one(top: int) -> None:
    toy = Toy()
    guide = toy.guide(top=top, samples=0.2)
    guide.prepare(toy.x)
    loss = MAPA_ELBO()
    loss.loss(toy.model, guide, toy.x[:1])
    assert guide.passes.codes == top + 1


def test_tables_without_data_need_to_know_rows() -> None:
    """A table that was saved does not say which data it is of; the codes' inputs do."""
    toy = Toy()
    table = toy_table(toy)
    with pytest.raises(ValueError, match="give the data of the table"):
        MAPAGuide(toy.model, FreeCodes(torch.randn(N, D)), table=table)
    codes = EncodedCodes(toy.encoder, toy.x)
    guide = MAPAGuide(toy.model, codes, table=table, top=1, samples=0, share="pair")
    own = toy.table(toy.x, toy.encoder(toy.x)).diagonal() - math.log(N)
    assert toy.bound(guide) == pytest.approx(own.sum().item())
    with pytest.raises(ValueError, match="kernel"):  # new data, and nothing to compare them by
        MAPA_ELBO().loss(toy.model, guide, toy.x + 1)


def test_none_asks_for_the_prior_even_with_rows() -> None:
    toy = Toy()

    def model(x: Tensor | None, rows: Tensor) -> None:
        toy.model(x, len(rows))

    guide = MAPAGuide(model, toy.encoder, toy.x, rows=lambda x, rows: rows, neighbours=2)
    with pytest.raises(ValueError, match="needs data"):
        guide(None, torch.arange(N))
    guide.prepare(toy.x, torch.arange(N))
    with pyro.plate("draws", 200, dim=-2):
        z = guide(None, torch.zeros(5, dtype=torch.long))["z"]
    used = (z.reshape(-1, 1, D) == toy.encoder(toy.x)).all(-1).double().mean(0)
    assert ((used - 1 / N).abs() < 4.5 * math.sqrt((N - 1) / N**2 / 1000)).all()


def test_models_with_data_of_their_own() -> None:
    """Without arguments, rows are those of the data, and codes are weighed by them."""
    toy = Toy()
    guide = MAPAGuide(lambda: toy.model(toy.x), toy.encoder, toy.x, neighbours=4)
    found = guide.explain()
    table = toy.table(toy.x, toy.encoder(toy.x)).detach().gather(1, found.index)
    torch.testing.assert_close(found.log_q, table.log_softmax(-1))
    drawn = poutine.trace(guide).get_trace().nodes["MAPAGuide_code"]["fn"].logits
    torch.testing.assert_close(drawn, found.log_q)


def test_latent_scales_need_a_kernel() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match="scale that depends on other latents"):
        MAPAGuide(model, nn.Linear(2, 2), x).prepare(x)


def test_rows_may_be_unknown() -> None:
    """`rows` says None for new data, which are looked up."""
    toy = Toy()

    def model(x: Tensor, rows: Tensor | None = None) -> None:
        toy.model(x)

    options = {"rows": lambda x, rows=None: rows, "inputs": lambda x, rows=None: x}
    guide = MAPAGuide(model, toy.encoder, toy.x, **options)
    known, new = guide.explain(toy.x[:3], torch.arange(3)), guide.explain(toy.x[:3] + 0.0)
    assert (known.index == new.index).all()
    torch.testing.assert_close(known.log_q, new.log_q)


def test_learned_scales_have_perplexities() -> None:
    """What a scale starts from says nothing about the noise."""
    x = torch.randn(40, 2)

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    guide = MAPAGuide(model, nn.Linear(2, 2), x, neighbours=16)
    guide.prepare(x[:6])
    assert guide.table.kernel == Gaussian(perplexity=8.0)


# Likelihoods: the kernel follows from the model.


def likelihoods() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    draw = torch.rand(N, 3)
    return {
        "normal": (lambda y: dist.Normal(y, 0.5).to_event(1), torch.randn(N, 3)),
        "bernoulli": (lambda y: dist.Bernoulli(logits=y).to_event(1), draw.round()),
        "continuous": (lambda y: dist.ContinuousBernoulli(logits=y).to_event(1), draw),
        "poisson": (lambda y: dist.Poisson(y.exp()).to_event(1), (5 * draw).floor()),
        "categorical": (
            lambda y: dist.Categorical(logits=torch.stack([y, -y, 0 * y], -1)).to_event(1),
            (3 * draw).floor().long(),
        ),
        "one hot": (
            lambda y: dist.OneHotCategorical(logits=y),
            torch.eye(3)[(3 * draw[:, 0]).long()],
        ),
        "exponential": (lambda y: dist.Exponential(y.exp()).to_event(1), draw + 0.01),
    }


@pytest.mark.parametrize("name", likelihoods())
@pytest.mark.parametrize("share", ["pair", "pooled"])
def test_likelihoods(name: str, share: str) -> None:
    likelihood, x = likelihoods()[name]
    decoder, codes = nn.Linear(2, 3), torch.randn(N, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(decoder(z)), obs=x)

    guide = MAPAGuide(model, FreeCodes(codes), x, share=share, top=3, samples=N - 3)
    table = likelihood(decoder(codes)).log_prob(x[:, None]).double()
    exact = table.logsumexp(-1).sum().item() - N * math.log(N)
    assert -MAPA_ELBO().loss(model, guide, x) == pytest.approx(exact, abs=1e-5)
    few = MAPAGuide(model, FreeCodes(codes), x, share=share, top=1, samples=1, name="few")
    assert math.isfinite(MAPA_ELBO().loss(model, few, x))


# Other latents beside the codes.


def with_global(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)


def test_latents_outside_the_plate_have_a_guide() -> None:
    x, codes = torch.randn(5), FreeCodes(torch.randn(5, 1))
    guide = MAPAGuide(with_global, codes, x, top=5, samples=0)
    loss = MAPA_ELBO(num_particles=4, vectorize_particles=True)
    guide.prepare(x)
    torch.manual_seed(2)
    found = -loss.loss(with_global, guide, x)
    torch.manual_seed(2)
    with pyro.plate(PARTICLE_PLATE, 4, dim=-2):
        trace = poutine.trace(guide.others).get_trace(x)
    trace.compute_log_prob()
    shift = trace.nodes["shift"]["value"]
    table = dist.Normal(codes()[:, 0] + shift[..., None], 0.5).log_prob(x[:, None])
    rows = table.logsumexp(-1).sum(-1) - 5 * math.log(5)
    own = dist.Normal(0.0, 1.0).log_prob(shift) - trace.nodes["shift"]["log_prob"]
    assert found == pytest.approx((rows + own[:, 0]).mean().item(), abs=1e-9)
    before = {name: value.clone() for name, value in guide.named_parameters()}
    SVI(with_global, guide, pyro.optim.Adam({"lr": 0.01}), MAPA_ELBO()).step(x)
    assert all((value != before[name]).any() for name, value in guide.named_parameters())


def with_class(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(z + 2.0 * k, 0.5), obs=x)


@pytest.mark.parametrize("share", SHARES)
def test_discrete_sites_are_summed_beside_the_codes(share: str) -> None:
    x, codes = torch.randn(5), FreeCodes(torch.randn(5, 1))
    model = config_enumerate(with_class)
    options = {"share": share, "site": "z", "kernel": Gaussian(0.5)}
    guide = MAPAGuide(model, codes, x, top=2, samples=3, **options)
    loc = codes()[:, 0] + 2.0 * torch.arange(3.0)[:, None]
    table = dist.Normal(loc, 0.5).log_prob(x[:, None, None])
    table = table + torch.tensor([0.2, 0.5, 0.3]).log()[:, None] - math.log(5)
    exact = table.flatten(1).logsumexp(-1).sum().item()
    assert -MAPA_ELBO().loss(model, guide, x) == pytest.approx(exact, abs=1e-9)
    found = guide.explain(x)
    weights = table.logsumexp(1).log_softmax(-1).gather(1, found.index)
    torch.testing.assert_close(found.log_q, weights)


# Any model: brute force, one code at a time.

# Each model once: some rows differ in their guides alone.
SAME = ("auto_", "messenger_", "exact_")
SAME_MODEL = {"delta_log_density", "shared_parameter", "lazy_parameter", "mixed_below", "mixture"}
SAME_MODEL |= {"guide_list", "auxiliary_outside"}
MODELS = [
    row for row in models.ROWS if not row.name.startswith(SAME) and row.name not in SAME_MODEL
]
EXPLICIT = {"explicit_subsample": lambda x, index: pyro.plate("data", len(x), subsample=index)}
SITES = {"constrained": "rate", "events": "v", "mask_false": "z", "obs_mask": "z", "nested": "w"}
SITES |= {"crossed": "r", "markov": "z0", "unequal_scales": "z", "vectorized_of_sequential": "z0"}
SITES |= {"sequential_of_vectorized": "z0"}
NOWHERE = ValueError, "no continuous latent site inside a vectorised pyro.plate"
SCALED = ValueError, "'z' has scale .* put it around the whole model"
TWO_PLATES = NotImplementedError, "'z0?' is in '(row|item|group)', '(column|item|group)'"
DISCRETE = NotImplementedError, "Latent site 'k' is discrete"
REFUSED = {
    **dict.fromkeys(["no_plate", "no_latents", "discrete", "annealed_discrete"], NOWHERE),
    **dict.fromkeys(["masked_discrete", "mixed_global"], NOWHERE),
    **dict.fromkeys(["sequential", "sequential_twice", "sequential_subsample"], NOWHERE),
    **dict.fromkeys(["sequential_global", "sequential_mixed"], NOWHERE),
    **dict.fromkeys(["annealed", "annealed_subsample", "tensor_scale", "unequal_scales"], SCALED),
    **dict.fromkeys(["grid", "grid_with_gap", "grid_reversed"], TWO_PLATES),
    **dict.fromkeys(["sequential_of_vectorized", "vectorized_of_sequential"], TWO_PLATES),
    "markov": (NotImplementedError, "'z0' is inside pyro.markov"),
    **dict.fromkeys(["mixed_above", "annealed_mixed", "masked_mixed"], DISCRETE),
}


def brute_force(model: Callable, guide: MAPAGuide, args: tuple, seed: int) -> float:
    """Return the bound with all codes, from one run of the model for each of them."""
    rows, other, scale = [], 0.0, 1.0
    for code in guide.codes().detach():
        with torch.no_grad():
            torch.manual_seed(seed)
            rest = poutine.trace(guide.others).get_trace(*args)
            given = poutine.replay(_at_code(model, str(guide.site), code), trace=rest)
            trace = poutine.trace(given).get_trace(*args)
            trace.compute_log_prob()
            rest.compute_log_prob()
        frame = trace.nodes[guide.site]["cond_indep_stack"][0]
        found = [s for s in sites(trace) if s["name"] != guide.site]
        inside = [s for s in found if frame.name in {f.name for f in s["cond_indep_stack"]}]
        outside = [s for s in found if not any(s is other for other in inside)]
        scale = float(inside[0]["scale"])
        rows.append(sum(_by_row(s["log_prob"], frame) / scale for s in inside))
        other = sum(float(s["log_prob_sum"]) for s in outside)
        other -= sum(float(s["log_prob_sum"]) for s in sites(rest))
    table = torch.stack(rows, -1) + guide.codes.log_weights
    return scale * table.logsumexp(-1).sum().item() + other


class _at_code(poutine.messenger.Messenger):
    """Runs a model with every row of a site at one code."""

    def __init__(self, model: Callable, site: str, code: Tensor) -> None:
        super().__init__()
        self.model, self.site, self.code = model, site, code

    def __call__(self, *args: Any) -> Any:
        with self:
            return self.model(*args)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            transform = torch.distributions.biject_to(msg["fn"].support)
            shape = transform.inverse_shape(msg["fn"].event_shape)
            value = transform(self.code.reshape(shape))
            frame = msg["cond_indep_stack"][0]
            batch = (frame.size, *[1] * (-frame.dim - 1))
            msg["value"], msg["is_observed"] = value.expand(*batch, *value.shape), True


def _by_row(log_prob: Tensor, frame: Any) -> Tensor:
    """Sum all dims but the plate's."""
    return log_prob.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1)


def _by_hand(row: Row) -> MAPAGuide:
    model, _ = row.build()
    site = SITES.get(row.name)
    size = 2 if site == "v" else 1
    create_plates = EXPLICIT.get(row.name)
    return MAPAGuide(model, FreeCodes(torch.randn(5, size)), site=site, create_plates=create_plates)


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_any_model(row: Row) -> None:
    guide, args = _by_hand(row), row.args()
    model = guide._model.model
    loss = MAPA_ELBO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if row.name in REFUSED:
            error, message = REFUSED[row.name]
            with pytest.raises(error, match=message):
                loss.loss(model, guide, *args)
            return
        loss.loss(model, guide, *args)
        torch.manual_seed(11)
        found = -loss.loss(model, guide, *args)
        assert found == pytest.approx(brute_force(model, guide, args, seed=11), abs=1e-8)
        assert guide(*args)[guide.site].isfinite().all()
    before = {name: value.clone() for name, value in guide.codes.named_parameters()}
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss).step(*args)
    assert all((value != before[name]).any() for name, value in guide.codes.named_parameters())


# The guide by itself.


@pytest.mark.parametrize("neighbours", [N, 4])
def test_posterior_over_the_neighbours(neighbours: int) -> None:
    toy = Toy()
    guide = toy.guide(neighbours=neighbours)
    found = guide.explain(toy.x)
    assert found.index.shape == (N, neighbours)
    table = toy.table(toy.x, toy.encoder(toy.x)).detach().gather(1, found.index)
    torch.testing.assert_close(found.log_q, table.log_softmax(-1))


def test_new_data_are_explained_by_known_codes() -> None:
    toy, new = Toy(), torch.randn(4, 2)
    guide = toy.guide(neighbours=N)
    guide.prepare(toy.x)
    found = guide.explain(new)
    table = toy.table(new, toy.encoder(toy.x)).detach()
    torch.testing.assert_close(found.log_q, table.gather(1, found.index).log_softmax(-1))
    torch.manual_seed(0)
    with pyro.plate("draws", 4000, dim=-2):
        runs = guide(new)["z"].detach()
    codes = toy.encoder(toy.x).detach()
    drawn = (runs[:, :, None] == codes).all(-1).double()
    assert (drawn.sum(-1) == 1).all()
    probs = table.softmax(-1)
    error = (probs * (1 - probs) / 4000).sqrt()
    assert ((drawn.mean(0) - probs).abs() <= 4.5 * error + 1e-3).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    toy, new = Toy(), torch.randn(4, 2)
    guide = toy.guide()
    guide.prepare(toy.x)
    options = {"num_samples": 6, "parallel": parallel, "return_sites": ["z", "x"]}
    draws = Predictive(toy.model, guide=guide, **options)(new)
    assert draws["z"].shape == (6, 4, D)
    codes = toy.encoder(toy.x).detach()
    assert (draws["z"][..., None, :] == codes).all(-1).any(-1).all()
    prior = Predictive(toy.model, guide=guide, **options)(None, 50)
    assert prior["x"].shape == (6, 50, 2)
    used = (prior["z"].reshape(-1, 1, D) == codes).all(-1).double().mean(0)
    assert ((used - 1 / N).abs() < 4.5 * math.sqrt((N - 1) / N**2 / 300)).all()


def test_particles_with_latents_of_their_own() -> None:
    """Under a plate each particle has its own value of the global latent, and its own weights."""
    x, codes = torch.randn(5), FreeCodes(torch.randn(5, 1))
    guide = MAPAGuide(with_global, codes, x)
    guide.prepare(x)
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    seen = trace.nodes["MAPAGuide_code"]["fn"].logits
    shift = trace.nodes["shift"]["value"]
    index = guide.table.rows(torch.arange(5)).index
    table = dist.Normal(codes()[:, 0] + shift[..., None], 0.5).log_prob(x[:, None])
    expected = table.gather(-1, index.expand(3, -1, -1)).log_softmax(-1)
    torch.testing.assert_close(seen, expected)
    assert trace.nodes["z"]["value"].shape == (3, 5)


def test_rows_are_found() -> None:
    """By the model's subsampling, by rows=, or anew; never by their place alone."""
    toy = Toy()
    index = torch.tensor([4, 1, 7])
    options = {"table": toy_table(toy), "top": 1, "samples": 0, "share": "pair"}
    codes = EncodedCodes(toy.encoder, toy.x)
    own = toy.table(toy.x, toy.encoder(toy.x)).diagonal() - math.log(N)

    def given(x: Tensor, index: Tensor) -> None:
        toy.model(x)

    guide = MAPAGuide(given, codes, rows=lambda x, index: index, name="a", **options)
    found = MAPA_ELBO().loss(given, guide, toy.x[index], index)
    assert found == pytest.approx(-own[index].sum().item())
    # Without rows= a minibatch is new data, whose nearest codes are its own.
    anew = MAPAGuide(toy.model, codes, toy.x, top=1, samples=0, share="pair", name="b")
    assert MAPA_ELBO().loss(toy.model, anew, toy.x[index]) == pytest.approx(
        -own[index].sum().item()
    )
    # Other data of the same size are new data, too.
    turned = toy.x.flip(0)
    assert MAPA_ELBO().loss(toy.model, anew, turned) == pytest.approx(-own.sum().item())
    changed = toy.x.clone()
    MAPA_ELBO().loss(toy.model, anew, changed)
    changed.copy_(turned)  # in place: the same tensor, other numbers
    assert MAPA_ELBO().loss(toy.model, anew, changed) == pytest.approx(-own.sum().item())


def toy_table(toy: Toy) -> Table:
    return Table.from_log_weights(Gaussian(toy.scale)(toy.x, toy.x))


@pytest.mark.slow
def test_codes_with_a_scale_are_a_guide_for_every_loss() -> None:
    toy = Toy()
    codes = EncodedCodes(toy.encoder, toy.x, scale=0.8)
    guide = MAPAGuide(toy.model, codes, toy.x, neighbours=N)
    found = log_marginal(toy.model, guide, toy.x, num_particles=4000, diagnostics=True)
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 161)] * 2)
    joint = toy.table(toy.x, grid) + dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
    exact = (joint + 2 * math.log(12 / 160)).logsumexp(-1)
    assert ((found.log_marginal - exact).abs() < 4.5 * found.standard_error + 1e-3).all()
    loss = IWAE_ELBO(4)
    before = {name: value.clone() for name, value in guide.named_parameters()}
    SVI(toy.model, guide, pyro.optim.Adam({"lr": 0.01}), loss).step(toy.x)
    assert all((value != before[name]).any() for name, value in guide.named_parameters())


def test_points_have_no_density() -> None:
    toy = Toy()
    guide = toy.guide()
    for loss in (Trace_ELBO(), IWAE_ELBO(2)):
        with pytest.raises(NotImplementedError, match="points: it has draws and no density"):
            loss.loss(toy.model, guide, toy.x)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 0.3])
def test_recovered_model(scale: float | None) -> None:
    """An ordinary model: its evidence by an ordinary guide, beside quadrature."""
    toy = Toy()
    codes = EncodedCodes(toy.encoder, toy.x, scale=scale)
    guide = MAPAGuide(toy.model, codes, toy.x)
    guide.prepare(toy.x)
    model = guide.recovered(**({} if scale else {"kind": "kde"}))
    assert model.prior.kind == ("kernels" if scale else "kde")
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 241)] * 2)
    joint = toy.table(toy.x, grid) + model.prior().log_prob(grid)
    exact = (joint + 2 * math.log(12 / 240)).logsumexp(-1).detach()

    def wide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(D), 1.5).to_event(1))

    found = log_marginal(model, wide, toy.x, num_particles=20_000, diagnostics=True)
    assert ((found.log_marginal - exact).abs() < 4.5 * found.standard_error + 1e-3).all()
    assert Predictive(model, num_samples=7)(None, 5)["x"].shape == (7, 5, 2)


def test_saved_and_copied() -> None:
    toy = Toy()
    guide = toy.guide(top=N, samples=0)
    value = toy.bound(guide)
    fresh = MAPAGuide(toy.model, nn.Linear(2, D), toy.x, top=N, samples=0, name="fresh")
    fresh.prepare(toy.x)
    assert toy.bound(fresh) != pytest.approx(value)
    fresh.load_state_dict(guide.state_dict())
    assert toy.bound(fresh) == pytest.approx(value)
    pyro.clear_param_store()
    again = pickle.loads(pickle.dumps(guide))
    assert toy.bound(again) == pytest.approx(value)
    with pytest.raises(RuntimeError, match=r"call guide\.attach\(model\)"):
        again.explain(toy.x)
    again.attach(toy.model)
    torch.testing.assert_close(again.explain(toy.x).log_q, guide.explain(toy.x).log_q)
    pyro.clear_param_store()
    assert toy.bound(copy.deepcopy(guide)) == pytest.approx(value)


def test_float32() -> None:
    toy = Toy()
    toy.x, toy.encoder, toy.decoder = toy.x.float(), toy.encoder.float(), toy.decoder.float()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(toy.decoder(z), 0.4).to_event(1), obs=x)

    guide = MAPAGuide(model, EncodedCodes(toy.encoder, toy.x).float(), toy.x, top=1, samples=3)
    assert MAPA_ELBO().differentiable_loss(model, guide, toy.x).dtype == torch.float32
    assert guide(toy.x)["z"].dtype == torch.float32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", SHARES)
def test_on_a_gpu(share: str) -> None:
    """The table and the data stay on the CPU; codes and decoder are on the device."""
    toy = Toy()
    exact = toy.exact().sum().item()
    toy.encoder.cuda(), toy.decoder.cuda()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D).cuda(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(toy.decoder(z), toy.scale).to_event(1), obs=x.cuda())

    codes = EncodedCodes(toy.encoder, toy.x).cuda()
    guide = MAPAGuide(model, codes, toy.x, share=share, top=N, samples=0, kernel=Gaussian(0.4))
    assert -MAPA_ELBO().loss(model, guide, toy.x) == pytest.approx(exact)
    assert guide(toy.x)["z"].is_cuda


# What cannot be right raises.


def reshaping(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.reshape(len(x), 2), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("samples", [0, 1])
def test_models_that_cannot_broadcast_are_told_how(share: str, samples: int) -> None:
    """Even where there are as many codes as rows, so that the shapes would fit by chance."""
    x = torch.randn(4, 2)
    guide = MAPAGuide(reshaping, nn.Linear(2, 2), x, top=1, samples=samples, share=share)
    with pytest.raises(ValueError, match=r"'z' at many codes at once.*share='pair'.*invalid for"):
        MAPA_ELBO().loss(reshaping, guide, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "alone"}, "share must be one of"),
        ({"top": -1}, "top must be an integer >= 0"),
        ({"top": 0, "samples": 0}, "one of them positive"),
        ({"samples": 0.5, "share": "pair"}, "only a pool without replacement"),
        ({"warm_up": 3, "data": None}, "warm_up= takes each row's nearest code"),
        ({"kernel": Gaussian(1.0), "data": None}, "kernel= makes the table from data"),
        ({"inputs": lambda x: 2 * x}, "observes other numbers than the inputs"),
        ({"warm_up": -1}, "warm_up must be an integer >= 0"),
        ({"neighbours": 0}, "neighbours must be an integer >= 1"),
        ({"site": "w"}, "no latent site 'w'; there are .'z'"),
        ({"data": torch.randn(5, 2)}, "over 5 components, and there are 9 codes"),
        ({"codes": FreeCodes(torch.randn(N, 3))}, "length 3, and latent site 'z' takes 2"),
        ({"inputs": lambda x: x[:3], "kernel": Gaussian(1.0)}, "inputs= gives 3 rows"),
        ({"rows": lambda x: 2}, "rows= gives"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    toy = Toy()
    given: dict[str, Any] = {"codes": EncodedCodes(toy.encoder, toy.x), "data": toy.x, **options}
    with pytest.raises(ValueError, match=message):
        MAPA_ELBO().loss(toy.model, MAPAGuide(toy.model, **given), toy.x)


def test_encoder_without_data() -> None:
    with pytest.raises(ValueError, match="give the training data as third argument"):
        MAPAGuide(Toy().model, nn.Linear(2, 2))


def test_loss_is_for_this_guide() -> None:
    toy = Toy()
    with pytest.raises(TypeError, match=r"trains a MAPAGuide.*AutoNormal"):
        MAPA_ELBO().loss(toy.model, autoguide.AutoNormal(toy.model), toy.x)


def test_one_loss_serves_many_models() -> None:
    toy, loss = Toy(), MAPA_ELBO()
    guide = MAPAGuide(toy.model, EncodedCodes(toy.encoder, toy.x))
    first = loss.loss(toy.model, guide, toy.x)
    x = torch.randn(4)

    def deeper(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, None, None])

    loss.loss(deeper, MAPAGuide(deeper, GridCodes(3), name="other"), x)
    assert loss.loss(toy.model, guide, toy.x) == pytest.approx(first)
    assert math.isinf(loss.max_plate_nesting)
