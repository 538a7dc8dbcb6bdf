"""MAPA's bound against brute force over all codes; its gradients, minibatches and training."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, autoguide, config_enumerate
from torch import Tensor, nn

from pyro_recursive import MAPA_ELBO, CompiledSVI, MAPAGuide
from pyro_recursive.mapa.codes import EncodedCodes, FreeCodes, GridCodes
from pyro_recursive.mapa.empirical_model import Empiricalized
from pyro_recursive.mapa.kernels import Gaussian
from pyro_recursive.mapa.table import Table
from pyro_recursive.tracing.sites import PARTICLE_PLATE
from tests.models.autoencoder import Curve, D, N, decoding, with_global

SHARES = ["pair", "shared", "pooled"]
over_shares = pytest.mark.parametrize("share", SHARES)
not_pooled = pytest.mark.parametrize("share", ["pair", "shared"])


# Limits.


@over_shares
@pytest.mark.parametrize("split", [(N, 0), (N, 3), (4, N - 4), (0, N), (1, 2 * N)])
def test_all_codes_are_the_exact_evidence(share: str, split: tuple[int, int]) -> None:
    toy = Curve()
    guide = toy.guide(share=share, top=split[0], samples=split[1])
    without_table = MAPAGuide(toy.model, EncodedCodes(toy.encoder, toy.x), name="without")
    for each in (guide, without_table):
        assert toy.bound(each) == pytest.approx(toy.exact().sum().item(), abs=1e-9)


@not_pooled
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


@over_shares
def test_more_summed_codes_raise_the_bound_from_an_autoencoder(share: str) -> None:
    toy = Curve()
    values = [toy.bound(toy.guide(share=share, top=top, samples=0)) for top in range(1, N + 1)]
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))
    if share != "pooled":
        assert values[0] == pytest.approx(toy.own().sum().item(), abs=1e-9)
    # Pooled, the rows' own codes are all there are; otherwise every added term is positive.
    assert len(set(values)) == (1 if share == "pooled" else N)


@pytest.mark.slow
@over_shares
@pytest.mark.parametrize("replace", [True, False])
def test_more_draws_raise_the_mean(share: str, replace: bool) -> None:
    toy, runs = Curve(rows=24), 200
    means, errors = [], []
    for samples in (1, 3, 6):
        guide = toy.guide(share=share, top=0, samples=samples, replace=replace)
        found = torch.tensor([toy.bound(guide) for _ in range(runs)])
        means.append(found.mean().item())
        errors.append(found.std().item() / runs**0.5)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        error = math.hypot(errors[first], errors[second])
        assert means[first] <= means[second] + 4 * error + 1e-9
    assert means[2] <= toy.exact().sum() + 4 * errors[2] + 1e-9


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_true_posterior_has_no_variance(replace: bool, samples: int) -> None:
    toy = Curve()
    posterior = Table.from_log_weights(toy.log_probs().detach())
    options = {"share": "pair", "top": 0, "samples": samples, "replace": replace}
    guide = toy.guide(table=posterior, **options)
    for _ in range(3):
        assert toy.bound(guide) == pytest.approx(toy.exact().sum().item(), abs=1e-9)


@over_shares
def test_duplicates_in_the_data(share: str) -> None:
    toy = Curve()
    toy.x = torch.cat([toy.x[:3]] * 3)
    guide = toy.guide(share=share, top=N, samples=0)
    assert toy.bound(guide) == pytest.approx(toy.exact().sum().item(), abs=1e-9)
    assert math.isfinite(toy.bound(toy.guide(share=share, top=1, samples=2)))


# Gradients.


def check_gradients(toy: Curve, guide: MAPAGuide, bound: Callable[[], Tensor]) -> None:
    MAPA_ELBO().loss_and_grads(toy.model, guide, toy.x)
    expected = torch.autograd.grad(-bound(), toy.parameters)
    for parameter, theirs in zip(toy.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-9, atol=1e-9)


@over_shares
def test_gradients_are_those_of_the_exact_evidence(share: str) -> None:
    toy = Curve()
    check_gradients(toy, toy.guide(share=share, top=3, samples=N - 3), lambda: toy.exact().sum())


@over_shares
def test_gradients_of_a_step_are_those_of_its_own_bound(share: str) -> None:
    """With fixed draws, autograd of the log of the weighted sum."""
    toy = Curve()
    guide = toy.guide(share=share, top=1, samples=2)
    guide.prepare(toy.x)
    seen: list[Any] = []
    inner = guide._decoded
    guide._decoded = lambda index, weights, **options: (
        seen.append((index, weights)) or inner(index, weights, **options)
    )

    def bound() -> Tensor:
        (index, weights), table = seen[-1], toy.log_probs()
        chosen = table[:, index] if index.dim() == 1 else table.gather(1, index)
        return (chosen + weights).logsumexp(-1).sum() - N * math.log(N)

    check_gradients(toy, guide, bound)


@over_shares
def test_minibatches_are_unbiased_for_the_exact_sum(share: str) -> None:
    toy = Curve()
    guide = MAPAGuide(toy.minibatches, toy.encoder, toy.x, share=share, top=N, samples=0)
    exact, order = toy.exact(), []
    for seed in range(5):
        torch.manual_seed(seed)
        found = -MAPA_ELBO().loss(toy.minibatches, guide, toy.x)
        torch.manual_seed(seed)
        index = torch.randperm(N)[:3]
        order.append(tuple(index.tolist()))
        assert found == pytest.approx(3 * exact[index].sum().item(), abs=1e-9)
    assert len(set(order)) > 1


# Steps of training.


@over_shares
def test_warm_up_is_an_autoencoder(share: str) -> None:
    """For as many training steps as asked, and over a save; evaluations do not count."""
    toy = Curve()
    options = {"share": share, "top": N, "samples": 0}
    guide, loss = toy.guide(warm_up=3, **options), MAPA_ELBO()
    own, exact = toy.own().sum().item(), toy.exact().sum().item()

    def step(guide: MAPAGuide) -> float:
        return -loss.differentiable_loss(toy.model, guide, toy.x).item()

    assert -loss.loss(toy.model, guide, toy.x) == pytest.approx(exact)
    assert [step(guide) for _ in range(2)] == pytest.approx([own] * 2)
    again = MAPAGuide(toy.model, nn.Linear(2, D), toy.x, name="again", **options)
    again.prepare(toy.x)
    again.load_state_dict(guide.state_dict())
    for each in (guide, again):
        assert [step(each), step(each)] == pytest.approx([own, exact])


def test_steps_after_the_warm_up_do_not_read_its_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, loss, read = Curve(), MAPA_ELBO(), list[Tensor]()
    guide = toy.guide(warm_up=2)
    guide.prepare(toy.x)
    counter = guide.steps_to_warm_up
    monkeypatch.setattr(Tensor, "__int__", lambda self: read.append(self) or self.item())

    def reads() -> list[int]:
        found = []
        for _ in range(5):
            read.clear()
            loss.loss_and_grads(toy.model, guide, toy.x)
            found.append(sum(each is counter for each in read))
        return found

    assert reads() == [1, 1, 1, 0, 0]
    counter.fill_(1)  # as of a state that is loaded
    assert reads() == [1, 1, 0, 0, 0] and counter == 0


def test_looped_particles_are_one_step() -> None:
    x = torch.randn(4)
    guide = MAPAGuide(with_global, FreeCodes(torch.randn(4, 1)), x, warm_up=5)
    loss = MAPA_ELBO(num_particles=3, vectorize_particles=False)
    loss.loss_and_grads(with_global, guide, x)
    assert guide.steps_to_warm_up == 4
    loss.loss(with_global, guide, x)
    assert guide.steps_to_warm_up == 4


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
    model = decoding(decoder, likelihood)
    guide = MAPAGuide(model, FreeCodes(codes), x, share=share, top=3, samples=N - 3)
    table = likelihood(decoder(codes)).log_prob(x[:, None]).double()
    exact = table.logsumexp(-1).sum().item() - N * math.log(N)
    assert -MAPA_ELBO().loss(model, guide, x) == pytest.approx(exact, abs=1e-5)
    few = MAPAGuide(model, FreeCodes(codes), x, share=share, top=1, samples=1, name="few")
    assert math.isfinite(MAPA_ELBO().loss(model, few, x))


def test_latent_scales_need_a_kernel() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        decoding(nn.Identity(), lambda y: dist.Normal(y, scale).to_event(1))(x)

    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match="scale depends on other latents"):
        MAPAGuide(model, nn.Linear(2, 2), x).prepare(x)


def test_learned_scales_have_perplexities() -> None:
    """What a scale starts from says nothing about the noise."""
    x = torch.randn(40, 2)

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        decoding(nn.Identity(), lambda y: dist.Normal(y, scale).to_event(1))(x)

    guide = MAPAGuide(model, nn.Linear(2, 2), x, neighbours=16)
    guide.prepare(x[:6])
    assert guide.table.kernel == Gaussian(perplexity=8.0)


# Other latents beside the codes.


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


@config_enumerate
def with_class(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(z + 2.0 * k, 0.5), obs=x)


@over_shares
def test_discrete_sites_are_summed_beside_the_codes(share: str) -> None:
    x, codes = torch.randn(5), FreeCodes(torch.randn(5, 1))
    options = {"share": share, "site": "z", "kernel": Gaussian(0.5)}
    guide = MAPAGuide(with_class, codes, x, top=2, samples=3, **options)
    loc = codes()[:, 0] + 2.0 * torch.arange(3.0)[:, None]
    table = dist.Normal(loc, 0.5).log_prob(x[:, None, None])
    table = table + torch.tensor([0.2, 0.5, 0.3]).log()[:, None] - math.log(5)
    exact = table.flatten(1).logsumexp(-1).sum().item()
    assert -MAPA_ELBO().loss(with_class, guide, x) == pytest.approx(exact, abs=1e-9)
    found = guide.explain(x)
    weights = table.logsumexp(1).log_softmax(-1).gather(1, found.index)
    torch.testing.assert_close(found.log_q, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_codes_and_classes_far_apart(dtype: torch.dtype) -> None:
    """Sums over both at once, in which products of factors would underflow in float32."""
    x, codes = torch.tensor([0.0, 40.0]), torch.tensor([30.0, -30.0, 9.0])

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            k = pyro.sample("k", dist.Categorical(x.new_tensor([0.2, 0.8])))
            for part in range(3):
                pyro.sample(f"x{part}", dist.Normal(z + 20.0 * k, 1.0), obs=x)
            with pyro.plate("copies", 2, dim=-2):
                more = pyro.sample("more", dist.Bernoulli(x.new_tensor([0.1, 0.6])[k]))
                pyro.sample("y", dist.Normal(z - 30.0 * more, 1.0), obs=x)

    loc = codes[:, None, None] + 20.0 * torch.arange(2.0)[:, None]  # codes, classes, rows
    three = 3 * dist.Normal(loc, 1.0).log_prob(x)
    chance = torch.tensor([0.1, 0.6])[:, None]
    two = torch.stack([(1 - chance).log().expand(2, 2), chance.log().expand(2, 2)])
    two = two + dist.Normal(codes[:, None, None, None], 1.0).log_prob(
        x + 30.0 * torch.arange(2.0)[:, None, None]
    )
    table = three + 2 * two.logsumexp(1) + torch.tensor([0.2, 0.8]).log()[:, None]
    expected = (table.flatten(0, 1).logsumexp(0) - math.log(3)).sum()
    own = FreeCodes(codes[:, None]).to(dtype)
    guide = MAPAGuide(model, own, site="z")
    loss = MAPA_ELBO().differentiable_loss(model, guide, x.to(dtype))
    assert -loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert own.codes.grad.isfinite().all() and own.codes.grad.abs().max() > 1.0


def test_rows_must_not_depend_on_the_codes_of_others() -> None:
    """Each row's sum would be over its own code alone."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    x = torch.randn(5)
    guide = MAPAGuide(model, FreeCodes(torch.randn(5, 1)), x)
    with pytest.raises(ValueError, match="'x' changes with enumerated latents in other entries"):
        MAPA_ELBO().loss(model, guide, x)


# The loss.


def steps(make: Callable[..., Any], guide: Callable[[], MAPAGuide], x: Tensor) -> list[Tensor]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    own = guide()
    svi = make(with_global, own, pyro.optim.Adam({"lr": 0.05}), MAPA_ELBO())
    losses = torch.tensor([svi.step(x) for _ in range(5)])
    return [losses, *(p.detach() for p in own.parameters()), torch.rand(())]


def test_compiled_steps() -> None:
    """Sums over all codes are compiled, with draws of other latents; drawn codes are not."""
    x, codes = torch.randn(6), torch.randn(4, 1)
    traced = partial(CompiledSVI, engine="graph", strict=True)
    found, expected = (
        steps(make, lambda: MAPAGuide(with_global, FreeCodes(codes)), x) for make in (traced, SVI)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    options = {"samples": 2, "neighbours": 3}
    with pytest.raises(NotImplementedError, match="values that vary in each step are read"):
        steps(traced, lambda: MAPAGuide(with_global, FreeCodes(x[:, None]), x, **options), x)


def test_loss_is_for_this_guide() -> None:
    toy = Curve()
    with pytest.raises(TypeError, match=r"trains a MAPAGuide.*AutoNormal"):
        MAPA_ELBO().loss(toy.model, autoguide.AutoNormal(toy.model), toy.x)


def test_the_loss_takes_any_guide_of_codes() -> None:
    toy = Curve()
    codes, steps = FreeCodes(toy.encoder(toy.x)), []
    guide = SimpleNamespace(
        site="z",
        others=lambda x: None,
        empiricalized=lambda model: Empiricalized(model, codes, "z"),
        end_step=lambda: steps.append(1),
    )
    found = MAPA_ELBO().loss_and_grads(toy.model, guide, toy.x)
    assert found == pytest.approx(-toy.exact().sum().item(), abs=1e-9)
    assert len(steps) == 1 and codes.codes.grad.abs().min() > 0


def test_one_loss_serves_many_models() -> None:
    toy, loss = Curve(), MAPA_ELBO()
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
