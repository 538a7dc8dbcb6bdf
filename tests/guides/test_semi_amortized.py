"""Refined rows: the contraction law, the evidence of conjugate models, forms of models."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, AmortizedGuide, MixtureGuide, SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.guide import MODES
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate
from tests.oracles.refinement import (
    BASES,
    NOISE,
    POSTERIOR,
    ROWS,
    SIZE,
    V,
    W,
    X,
    assert_all_close,
    conjugate,
    evidence,
    fixed_noise,
    hierarchy,
    kl,
    log_normal,
    masked,
    model_of,
    network,
    params_in,
    reached,
    semi,
    shake,
    trained,
    way,
)

# --- The contraction law


class Held(GradientUpdate):
    """Moves locations alone."""

    def forward(self, params: Tensor, gradient: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        loc, log_scale = gradient.chunk(2, -1)
        return super().forward(params, torch.cat([loc, 0 * log_scale], -1), *rest)


def contracted(steps: int, scale: float, rate: float, momentum: float, estimator: str) -> Tensor:
    """Return where the table's locations are, how far they come, and their derivative."""
    guide = SemiAmortizedGuide(
        conjugate,
        AmortizedGuide(conjugate, plate="data"),
        steps=steps,
        mode="second_order",
        update=Held(rate, momentum, clip=math.inf),
        estimator=estimator,
    )
    guide.prepare(X)
    table = guide.guide.free_local
    with torch.no_grad():
        table[:, 1] = math.log(scale)
    reached = params_in(guide, X)[:, 0]
    (slope,) = torch.autograd.grad(reached.sum(), table)
    return torch.stack([table[:, 0].detach(), reached.detach(), slope[:, 0]])


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_contraction(steps: int, momentum: float) -> None:
    """By powers of the dynamics of distance and velocity."""
    rate = 0.6 * V
    dynamics = torch.tensor([[1 - rate / V, rate * momentum], [-1 / V, momentum]])
    expected = torch.linalg.matrix_power(dynamics, steps)[0, 0]
    # At the posterior's scale the gradient of "stl" has no noise.
    start, end, slope = contracted(steps, math.sqrt(V), rate, momentum, "stl")
    assert_all_close([end - POSTERIOR], [expected * (start - POSTERIOR)], atol=1e-8, rtol=0)
    assert_all_close([slope], [expected.expand(3)], atol=1e-8, rtol=0)
    # At any scale the derivative of "pathwise" has none.
    start, end, slope = contracted(steps, 0.3, rate, momentum, "pathwise")
    assert_all_close([slope], [expected.expand(3)], atol=1e-8, rtol=0)
    assert (end - POSTERIOR - expected * (start - POSTERIOR)).abs().min() > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.95, 1.05])
def test_the_stable_range(momentum: float, share: float) -> None:
    rate = share * 2 * (1 + momentum) * V
    start, end, slope = contracted(80, math.sqrt(V), rate, momentum, "stl")
    closer = (end - POSTERIOR).abs() < (start - POSTERIOR).abs()
    if share < 1:
        assert closer.all() and (slope.abs() < 1e-3).all()
    else:
        assert not closer.any() and (slope.abs() > 1e3).all()


# --- Where the steps lead


@pytest.mark.slow
def test_many_steps_reach_the_evidence() -> None:
    """Locations and scales; "stl" leaves no noise at the posterior."""
    guide = semi(conjugate, nn.Linear(1, 2), update=GradientUpdate(rate=0.1), test_steps=250)
    guide.guide.inputs = guide.inputs = lambda x: x[:, None]
    guide.eval()
    found = guide.refine(X)
    assert_all_close([found.elbo], [evidence(X)], atol=1e-10, rtol=0)
    assert (found.elbo_start < evidence(X) - 0.05).all()
    exact = torch.stack([POSTERIOR, torch.full((3,), 0.5 * math.log(V))], -1)
    assert_all_close([found.params], [exact], atol=1e-10, rtol=0)
    assert -Trace_ELBO().loss(conjugate, guide, X) == pytest.approx(evidence(X).sum().item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss", [Trace_ELBO(2), IWAE_ELBO(3, estimator="dreg"), MIWAE_ELBO(1, 1, estimator="stl")]
)
def test_no_steps(loss: Any, mode: str) -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    model, results = model_of(net), []
    for refined in (False, True):
        pyro.clear_param_store()
        guide = AmortizedGuide(model, encoder)
        if refined:
            guide = SemiAmortizedGuide(model, guide, steps=0, mode=mode)
        guide.prepare(x)
        value, found = trained(loss, model, guide, x, [*encoder.parameters(), *net.parameters()])
        results.append([value, *found])
    assert all(map(torch.equal, *results))


def test_steps_in_evaluation() -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    guide = semi(model_of(net), encoder, steps=2, test_steps=4, seed=5)
    guide.prepare(x)

    def after(steps: int) -> Tensor:
        noise = fixed_noise(5, steps, 1)  # more steps have other noise: it is drawn at once
        return way(net, x, encoder(x), noise, guide.update, estimator="stl")[0][-1]

    for training, steps in {True: 2, False: 4}.items():
        guide.train(training)
        found = [reached(guide, x), params_in(guide, x), guide.refine(x).params]
        assert_all_close(found, [after(steps)] * 3)
    for steps in (0, 1):
        assert_all_close([guide.refine(x, steps=steps).params], [after(steps)])


def test_what_refine_returns() -> None:
    """The bounds are those of start and end, from draws."""
    x = torch.randn(400)
    guide = SemiAmortizedGuide(conjugate, AmortizedGuide(conjugate, FixedStart(2)), steps=3)
    found = guide.refine(x)
    assert [part.shape for part in found] == [(400, 2), (400, 2), (400,), (400,), (400,)]
    assert not found.params.requires_grad
    exact = torch.stack([V * W / NOISE**2 * x, torch.full((400,), 0.5 * math.log(V))], -1)
    for params, elbo in ((found.start, found.elbo_start), (found.params, found.elbo)):
        error = elbo - (evidence(x) - kl(params, exact))
        assert abs(error.mean()) < 4 * error.std() / 400**0.5 < 0.1
    assert (found.elbo - found.elbo_start).mean() > 0.3
    assert all(p.grad is None for p in guide.parameters())


@pytest.mark.parametrize("base", BASES)
def test_draws_have_the_density_of_their_family(base: str) -> None:
    """By the change of variables from the noise, or by mean and covariance; parts one by one."""
    x = torch.randn(1, 3)
    model = model_of(network())
    guide = SemiAmortizedGuide(model, BASES[base](model))
    guide.prepare(x)
    shake(guide)
    whole, params = guide.row_family(guide.groups[-1]), reached(guide.guide, x)[0]
    noise = torch.randn(whole.parts, whole.noise_dim)

    def draw(noise: Tensor) -> Tensor:
        return whole.draw(params, noise[None])[0]

    slope = torch.autograd.functional.jacobian(draw, noise)
    members = getattr(whole, "members", (whole,))
    sizes = [sum(member.blocks) for member in members]
    split = params.split([*sizes, len(params) - sum(sizes)])[: len(members)]
    for j, (member, own) in enumerate(zip(members, split, strict=True)):
        others = [i for i in range(whole.parts) if i != j]
        assert slope[j][:, others].eq(0).all()
        own_slope = slope[j][:, j, : member.noise_dim]
        u = draw(noise)[j]
        if base == "low_rank":
            found = member.distribution(own)
            assert_all_close([own_slope @ own_slope.mT], [found.covariance_matrix])
            assert_all_close([draw(0 * noise)[j]], [found.mean])
            continue
        expected = log_normal(noise[j], 0.0, 1.0) - own_slope.det().abs().log()
        assert_all_close([member.log_prob(own, u)], [expected])
        scored = member.scored_draw(own, noise[None, j : j + 1, : member.noise_dim])
        assert_all_close([part[0, 0] for part in scored], [u, expected])


# --- Forms of models


def grid(x: Tensor) -> None:
    with pyro.plate("column", x.shape[1], dim=-2), pyro.plate("row", x.shape[0], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(W * z, NOISE), obs=x.mT)


def groups(x: Tensor, items: bool = True) -> None:
    """A latent of each group, and where told one of each of its items, further left."""
    with pyro.plate("group", x.shape[0], dim=-1):
        w = pyro.sample("w", dist.Normal(0.3, 1.0))
        with pyro.plate("item", x.shape[1], dim=-2):
            z = pyro.sample("z", dist.Normal(w, 0.7)) if items else w
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)


def evidence_of_groups(x: Tensor, within: float) -> Tensor:
    covariance = within * torch.eye(x.shape[1]) + 1
    return dist.MultivariateNormal(torch.full((x.shape[1],), 0.3), covariance).log_prob(x)


FORMS: dict[str, tuple[Callable, int, Callable, dict[str, Any]]] = {
    "grid": (grid, 2, lambda x: evidence(x).mT, {"inputs": lambda x: x.mT[..., None]}),
    "groups": (groups, 14, lambda x: evidence_of_groups(x, 1.49), {"family": "full"}),
    "data": (lambda x: groups(x, False), 2, lambda x: evidence_of_groups(x, 1.0), {}),
    "masked": (masked, 2, lambda x: evidence(x) * (x > 0), {}),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_other_forms_reach_the_evidence(form: str) -> None:
    model, size, exact, options = FORMS[form]
    x = torch.randn(5) if form == "masked" else torch.randn(4, 3)
    start = FixedStart(size, row_dims=2 if form == "grid" else 1)
    guide = SemiAmortizedGuide(
        model,
        AmortizedGuide(model, start, **options),
        update=GradientUpdate(0.1 if size == 2 else 0.05),
        steps=150 if size == 2 else 300,
        draws=1 if form == "masked" else 2,
    )
    found, expected = guide.refine(x), exact(x)
    assert found.params.shape == (*expected.shape, size)
    assert found.clipped.shape == expected.shape
    assert_all_close([found.elbo], [expected], atol=1e-4, rtol=0)
    assert (found.elbo_start < found.elbo).any()


@pytest.mark.parametrize("particles", [0, 3])
def test_rows_are_given_the_global_values_of_their_particle(particles: int) -> None:
    """After many steps they have the posterior given these; of each particle its own."""
    x = torch.randn(4)
    guide = SemiAmortizedGuide(
        hierarchy,
        AmortizedGuide(hierarchy, nn.Linear(1, 2), inputs=lambda x: x[:, None], init_scale=2.0),
        update=GradientUpdate(0.1),
        steps=200,
    )
    guide.prepare(x)
    with pyro.plate("particles", particles, dim=-2) if particles else nullcontext():
        trace = poutine.trace(guide).get_trace(x)
    w, z = (trace.nodes[name] for name in ("w", "z"))
    precision = 1 / 0.64 + 1
    exact = dist.Normal((w["value"] / 0.64 + x) / precision, precision**-0.5)
    assert z["value"].shape == ((particles, 4) if particles else (4,))
    assert not particles or w["value"].std() > 0.1
    densities = [fn.log_prob(z["value"]) for fn in (z["fn"], exact)]
    assert_all_close(densities[:1], densities[1:], atol=1e-6, rtol=0)


def check_steps(model: Callable, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Check five steps against those on the ELBO of all rows, given data, draws and log q."""
    x, start = torch.randn(5), torch.tensor([0.2, -0.3])
    guide = SemiAmortizedGuide(
        model,
        AmortizedGuide(model, FixedStart(2, start), plate="data"),
        update=GradientUpdate(0.05, momentum=0.0, clip=math.inf),
        draws=3,
        seed=5,
    )
    params = start.expand(5, -1)
    for noise in fixed_noise(5, 5, 3, size=1):
        params = params.detach().requires_grad_()
        loc, log_scale = params.unbind(-1)
        z = loc + log_scale.exp() * noise[..., 0]
        log_q = dist.Normal(loc.detach(), log_scale.detach().exp()).log_prob(z)
        params = params + 0.05 * torch.autograd.grad(value(x, z, log_q), params)[0]
    assert_all_close([reached(guide, x)], [params.detach()])


@pytest.mark.parametrize("full", [None, 20])
def test_a_site_that_couples_rows(full: int | None) -> None:
    """Beside a minibatch it counts for as much as beside all rows: their share is what counts."""

    def coupled(x: Tensor) -> None:
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 0.7), obs=torch.tensor([1.0]))

    def value(x: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        gain = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - log_q
        total = dist.Normal(z.sum(-1), 0.7).log_prob(torch.tensor(1.0))
        return gain.sum(-1).mean() + 5 / (full or 5) * total.mean()

    check_steps(coupled, value)


def under_a_coin(x: Tensor) -> None:
    """An enumerated latent above all rows, which its sum couples."""
    y = pyro.sample("y", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(2.0 * y, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_sum_that_couples_rows() -> None:
    """The steps are those of the ELBO of all rows, in which the sum is one term."""

    def value(x: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        two = dist.Normal(torch.tensor([[0.0], [2.0]]), 1.0).log_prob(z.unsqueeze(-2)).sum(-1)
        total = (two + torch.tensor([0.6, 0.4]).log()).logsumexp(-1)
        return ((dist.Normal(z, 1.0).log_prob(x) - log_q).sum(-1) + total).mean()

    check_steps(under_a_coin, value)


def test_a_sum_over_rows_of_mixtures_is_refused() -> None:
    """Each row would choose its component by itself, beside those of the others in one sum."""
    parts = [AmortizedGuide(under_a_coin, FixedStart(2)) for _ in range(2)]
    guide = SemiAmortizedGuide(under_a_coin, MixtureGuide(under_a_coin, parts, weights="shared"))
    with pytest.raises(NotImplementedError, match=r"'y', 'z' are summed together .*plate 'data'"):
        guide.refine(torch.randn(5))


@pytest.mark.slow
def test_a_mixture_is_refined_as_a_whole() -> None:
    """Two posteriors of z given z ** 2: both places, and their weights."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 3.0))
            pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    x = torch.tensor([4.0, 9.0])
    starts = [FixedStart(2, torch.tensor([place, -1.0])) for place in (1.0, -1.0)]
    parts = [AmortizedGuide(model, start) for start in starts]
    mixture = MixtureGuide(model, parts, weights="shared")
    update = GradientUpdate(0.02, clip=10.0)
    guide = SemiAmortizedGuide(model, mixture, steps=125, draws=16, update=update)
    found = guide.refine(x)
    points = torch.arange(-6, 6, 0.001)[:, None]
    joint = dist.Normal(0.3, 3.0).log_prob(points) + dist.Normal(points**2, 0.5).log_prob(x)
    exact = joint.logsumexp(0) + math.log(0.001)
    assert (exact - found.elbo).max() < 0.05
    logits = found.params[:, -2:].softmax(-1)
    left = (joint[points[:, 0] < 0].logsumexp(0) - joint.logsumexp(0)).exp()
    assert_all_close([logits[:, 1]], [left], atol=0.02, rtol=0)
    loss = IWAE_ELBO(4, estimator="dreg+vimco")
    assert loss.loss(model, guide, x) == pytest.approx(-exact.sum().item(), abs=0.3)
