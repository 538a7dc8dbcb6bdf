"""Priors recovered from codes: their densities by other routes, and models that have them."""

import copy
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from pyro_recursive.mapa.recover import KINDS, recover_prior, with_prior
from pyro_recursive.mapa.recovered_priors import RecoveredPrior, bandwidth, leave_one_out

pytestmark = pytest.mark.slow  # fits and integrals

SHORT: dict[str, dict[str, Any]] = {  # what makes each kind fast, or possible
    "copula": {},
    "flow": {"steps": 10, "hidden": (8,), "transforms": 2},
    "kde": {},
    "kernels": {"scale": 0.3},
}


def short(codes: Tensor, kind: str, **options: Any) -> RecoveredPrior:
    return recover_prior(codes, kind, **{"held_out": 0, **SHORT[kind], **options})


def codes_of(kind: str, rows: int = 40) -> Tensor:
    """Return codes of two groups, of one number for the copula and two for the others."""
    size = 1 if kind == "copula" else 2
    codes = torch.randn(rows, size) * torch.tensor([1.0, 0.5])[:size]
    codes[::2] += 3
    return codes


def two_groups(rows: int, size: int) -> Tensor:
    codes = torch.randn(rows, size)
    codes[:, 0] += 3 * torch.randint(0, 2, (rows,)).mul(2).sub(1)
    return codes


# All kinds


def test_a_flow_seeds_the_cpu_alone_and_restores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    codes, before = codes_of("flow"), torch.get_rng_state()
    one, other = (short(codes, "flow", steps=1).parameters() for _ in range(2))
    assert all(map(torch.equal, one, other))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one_and_draws_follow_it(kind: str) -> None:
    codes = codes_of(kind)
    prior = short(codes, kind)()
    size = codes.shape[1]
    assert prior.batch_shape == () and prior.event_shape == (size,)
    low, high = codes.min() - 8, codes.max() + 8
    axis = torch.linspace(low, high, 400_001 if size == 1 else 301)
    points = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    mass = prior.log_prob(points).exp() * (axis[1] - axis[0]) ** size
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    draws = prior.sample((4000,))
    assert draws.shape == (4000, size)
    for moment in (lambda z: z, lambda z: z**2, lambda z: z[:, :1] * z[:, -1:]):
        expected, found = mass @ moment(points), moment(draws)
        error = found.std(0) / math.sqrt(4000)
        assert ((found.mean(0) - expected).abs() < 4.5 * error + 2e-3).all()


@pytest.mark.parametrize("kind", ["copula", "kde", "kernels"])
def test_weights_are_as_repetitions(kind: str) -> None:
    codes = codes_of(kind, 6)
    times = torch.tensor([3, 1, 1, 2, 1, 4])
    weighted = short(codes, kind, log_weights=times.log() + 7)
    repeated = short(codes.repeat_interleave(times, 0), kind)
    assert weighted.num_codes == 6 and repeated.num_codes == 12
    z = 3 * torch.randn(50, codes.shape[1])
    torch.testing.assert_close(weighted().log_prob(z), repeated().log_prob(z))
    padded = torch.cat([times.log(), torch.full((6,), -math.inf)])
    none = short(torch.cat([codes, codes + 50]), kind, log_weights=padded)
    torch.testing.assert_close(none().log_prob(z), weighted().log_prob(z))


@pytest.mark.parametrize("kind", KINDS)
def test_affine_maps_of_codes_are_those_of_the_prior(kind: str) -> None:
    codes = codes_of(kind)
    size = codes.shape[1]
    stretch = torch.tensor([100.0, 0.01])[:size]
    scale = {"scale": 0.3 * stretch} if kind == "kernels" else {}
    z = codes[:10] + 0.1
    found = short(codes * stretch - 7, kind, **scale)().log_prob(z * stretch - 7)
    expected = short(codes, kind)().log_prob(z) - stretch.log().sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_codes_are_not_part_of_the_first_fit(kind: str) -> None:
    codes = codes_of(kind, 30)
    prior = short(codes, kind, held_out=0.2, seed=5)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    rest, whole = short(codes[order[6:]], kind, seed=5), short(codes, kind, seed=5)
    expected = rest().log_prob(codes[order[:6]]).mean().item()
    assert prior.held_out_log_prob == pytest.approx(expected)
    assert whole.held_out_log_prob is None
    z = codes[:5] + 0.2
    torch.testing.assert_close(prior().log_prob(z), whole().log_prob(z))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_copied_pickled_and_in_single_precision(kind: str) -> None:
    codes, before = codes_of(kind), torch.get_rng_state()
    prior = short(codes, kind)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in prior.parameters())
    z = codes[:7] + 0.1
    expected = prior().log_prob(z)
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        torch.testing.assert_close(other().log_prob(z), expected)
        assert other.kind == kind and other.num_codes == 40
    single = short(codes.float(), kind)
    assert single().log_prob(z.float()).dtype == single().sample().dtype == torch.float32
    torch.testing.assert_close(single().log_prob(z.float()).double(), expected, rtol=0, atol=2e-2)
    moved = copy.deepcopy(prior).to(torch.float32)
    assert moved().sample((3,)).dtype == torch.float32
    expanded = prior().expand([4, 3])
    assert expanded.sample().shape == (4, 3, codes.shape[1])
    torch.testing.assert_close(expanded.log_prob(z[0].expand(4, 3, -1)), expected[0].expand(4, 3))


@pytest.mark.parametrize("kind", ["flow", "kde", "kernels"])
def test_trainable_parameters_have_gradients(kind: str) -> None:
    codes = codes_of(kind)
    prior = short(codes, kind, trainable=True)
    prior().log_prob(codes).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())


@pytest.mark.parametrize("kind", ["copula", "flow"])
def test_maps_of_normals(kind: str) -> None:
    codes = codes_of(kind)
    prior = short(codes, kind)
    w = torch.randn(20, codes.shape[1])
    z = prior.from_normal(w)
    volume = torch.stack(
        [torch.linalg.slogdet(torch.func.jacrev(prior.from_normal)(row))[1] for row in w]
    )
    expected = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) - volume
    torch.testing.assert_close(prior().log_prob(z.clone()), expected)
    with pytest.raises(NotImplementedError, match="'kde' prior is no map"):
        short(codes, "kde").from_normal(w)


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recover_prior(torch.randn(20, 1)).kind == "copula"
    assert recover_prior(torch.randn(20, 2), held_out=0, steps=1).kind == "flow"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert recover_prior(torch.randn(20, 2)).kind == "kde"


@pytest.mark.parametrize(
    "codes, options, error, message",
    [
        (torch.zeros(3, 1, dtype=torch.int64), {}, ValueError, "floats"),
        (torch.randn(5), {}, ValueError, r"floats \[N, D\].*codes\[:, None\]"),
        (torch.tensor([[0.0], [math.nan]]), {}, ValueError, "1 codes are not finite"),
        (torch.randn(5, 1), {"kind": "gmm"}, ValueError, "kind must be 'auto' or one of"),
        (torch.randn(5, 2), {"kind": "copula"}, ValueError, "codes of one number"),
        (torch.ones(5, 1), {}, ValueError, "equal in a coordinate"),
        (torch.ones(5, 2), {"kind": "kde"}, ValueError, "equal in a coordinate"),
        (torch.randn(3, 5), {"kind": "kde", "held_out": 0}, ValueError, "in a hyperplane"),
        (torch.randn(5, 1), {"scale": 0.1}, ValueError, "scale is for kind='kernels'"),
        (torch.randn(5, 1), {"kind": "kernels"}, ValueError, "which needs it"),
        (torch.randn(2, 1), {}, ValueError, "too few to hold 1 out"),
        (torch.randn(5, 1), {"log_weights": torch.zeros(4)}, ValueError, r"must be \[5\]"),
        (torch.randn(2, 1), {"log_weights": torch.full((2,), -math.inf)}, ValueError, "above -inf"),
        (torch.randn(5, 2), {"kind": "flow", "flow": "gf"}, ValueError, "flow must be one of"),
        (torch.randn(5, 1), {"steps": 3}, TypeError, "steps"),
    ],
)
def test_wrong_arguments(codes: Tensor, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        recover_prior(codes, **options)


# Copula


def test_quantiles_of_the_map_are_the_codes() -> None:
    codes = torch.randn(101, 1).exp()
    prior, values = short(codes, "copula"), codes[:, 0].sort()[0]
    ranks = torch.special.ndtri((torch.arange(101) + 0.5) / 101)
    torch.testing.assert_close(prior.from_normal(ranks), values)
    w = torch.linspace(-6, 6, 5001)
    assert (prior.from_normal(w).diff() > 0).all()
    torch.testing.assert_close(prior().transforms[0].inv(prior.from_normal(w)), w)
    slopes = prior.from_normal(ranks[[0, -1]] + 1e-3 * torch.tensor([-1.0, 1.0])) - values[[0, -1]]
    outer = (values[[10, -1]] - values[[0, -11]]) / (ranks[[10, -1]] - ranks[[0, -11]])
    torch.testing.assert_close(slopes / 1e-3, outer * torch.tensor([-1.0, 1.0]), rtol=1e-6, atol=0)
    normal = short(3 + 2 * ranks[:, None], "copula")()
    z = torch.linspace(-10, 15, 60)[:, None]
    torch.testing.assert_close(normal.log_prob(z), dist.Normal(3.0, 2.0).log_prob(z[:, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_ties_and_close_codes_leave_a_finite_density(dtype: torch.dtype) -> None:
    codes = torch.randn(2000, 1, dtype=dtype).mul(20).round() / 20
    codes[0] = codes[1] * (1 + torch.finfo(dtype).eps)
    prior = short(codes, "copula")()
    assert prior.log_prob(codes).isfinite().all()
    draws = prior.sample((2000,))
    assert draws.isfinite().all() and prior.log_prob(draws).isfinite().all()
    smooth = short(codes, "copula", knots=40)()
    assert smooth.log_prob(codes).max() < 0.5, "a normal's density is below -0.9"


def test_what_jagged_densities_cost() -> None:
    z, standard = torch.randn(4000, 1), dist.Normal(0.0, 1.0)
    for knots, low, high in ((None, 0.38, 0.46), (50, 0.03, 0.07)):
        lost = []
        for _ in range(40):
            prior = short(torch.randn(500, 1), "copula", knots=knots)()
            lost.append((standard.log_prob(z)[:, 0] - prior.log_prob(z)).mean())
        assert low < torch.stack(lost).mean() < high


# Windows


def test_leave_one_out_is_that_of_loops() -> None:
    codes = torch.randn(12, 2)
    codes[3] = codes[7]
    log_weights = torch.randn(12).log_softmax(0)
    widths = torch.tensor([0.1, 0.5, 2.0])
    expected = []
    for h in widths:
        total = torch.zeros(())
        for i in range(12):
            others = [j for j in range(12) if not torch.equal(codes[j], codes[i])]
            terms = [
                log_weights[j] + dist.Normal(codes[j], h).log_prob(codes[i]).sum() for j in others
            ]
            density = torch.stack(terms).logsumexp(0) - log_weights[others].logsumexp(0)
            total = total + log_weights[i].exp() * density
        expected.append(total)
    torch.testing.assert_close(leave_one_out(codes, log_weights, widths), torch.stack(expected))
    halves = [leave_one_out(codes, log_weights, widths, part) for part in torch.arange(11).split(6)]
    points = codes.unique(dim=0, return_inverse=True)[1]
    first = torch.zeros(11).index_add_(0, points, log_weights.exp())[:6].sum()
    torch.testing.assert_close(first * halves[0] + (1 - first) * halves[1], torch.stack(expected))


def test_bandwidth_is_the_best_and_duplicates_do_not_change_it() -> None:
    codes = two_groups(60, 2)
    equal = torch.full((60,), -math.log(60))
    width = bandwidth(codes, equal)
    near = width * torch.tensor([0.8, 1.0, 1.25])
    assert leave_one_out(codes, equal, near).argmax() == 1
    twice = bandwidth(codes.repeat(2, 1), torch.full((120,), -math.log(120)))
    assert twice == pytest.approx(width)


@pytest.mark.parametrize("kind", ["kde", "kernels"])
def test_windows_are_a_mixture_of_normals(kind: str) -> None:
    codes = torch.randn(30, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.3, 1.0], [0.0, 0.0, 5.0]])
    scale = torch.tensor([0.3, 2.0, 1.0])
    prior = short(codes, kind, **({"width": 0.4} if kind == "kde" else {"scale": scale}))
    covariance = (
        0.4**2 * torch.cov(codes.T, correction=0) if kind == "kde" else scale.square().diag()
    )
    components = dist.MultivariateNormal(codes, covariance)
    expected = dist.MixtureSameFamily(dist.Categorical(torch.ones(30)), components)
    z = codes[:10] + torch.randn(10, 3)
    torch.testing.assert_close(prior().log_prob(z), expected.log_prob(z))
    assert prior.width == pytest.approx(0.4 if kind == "kde" else 0.6 ** (1 / 3))


# Flow


@pytest.mark.parametrize("size", [1, 2])
def test_flow_beats_a_normal_on_two_groups(size: int) -> None:
    codes, new = two_groups(1000, size), two_groups(2000, size)
    prior = recover_prior(codes, "flow", steps=300)
    normal = dist.Normal(codes.mean(0), codes.std(0)).to_event(1)
    found = prior().log_prob(new)
    gain = found - normal.log_prob(new)
    assert gain.mean() > 0.2 + 4 * gain.std() / math.sqrt(2000)  # of 0.46 for the true density
    assert prior.held_out_log_prob == pytest.approx(found.mean().item(), abs=0.4)


def test_flow_starts_as_a_normal_and_keeps_its_best() -> None:
    codes = 5 + 3 * torch.randn(100, 2)
    prior = short(codes, "flow", steps=1, lr=2.0)
    assert prior.steps_taken == 0, "a step that made it worse is not kept"
    normal = dist.Normal(codes.mean(0), codes.std(0, correction=0)).to_event(1)
    torch.testing.assert_close(prior().log_prob(codes), normal.log_prob(codes))


# A model with another prior


class Line:
    """``z ~ N(0, 1)``, ``x ~ N(2 z, 0.5)`` for each row, of a minibatch if so asked."""

    def __init__(self, subsample_size: int | None = None) -> None:
        self.subsample_size = subsample_size

    def __call__(self, x: Tensor | None, size: int) -> None:
        with pyro.plate("data", size, subsample_size=self.subsample_size) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            rows = None if x is None else x[index]
            pyro.sample("x", dist.Normal(2 * z, 0.5), obs=rows)


SITES = {
    "scalar": dist.Normal(0.0, 1.0),
    "vector": dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "matrix": dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
    "positive": dist.Gamma(1.0, 1.0),
    "positive vector": dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    "simplex": dist.Dirichlet(torch.ones(4)),
    "interval": dist.Uniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 7.0])).expand([5, 2]),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.LogNormal(torch.zeros(2), 1.0)
    ),
}


@pytest.mark.parametrize("kind", ["flow", "kde", "kernels"])
@pytest.mark.parametrize("name", SITES)
def test_sites_keep_shapes_and_supports(name: str, kind: str) -> None:
    fn = SITES[name]
    size = {"scalar": 1, "vector": 3, "matrix": 6, "simplex": 3, "positive vector": 2}.get(name, 1)
    prior = short(torch.randn(20, size), kind)

    def model() -> Tensor:
        with pyro.plate("columns", 2), pyro.plate("rows", 5):
            return pyro.sample("z", fn)

    old = poutine.trace(model).get_trace().nodes["z"]
    trace = poutine.trace(with_prior(model, "z", prior)).get_trace()
    new = trace.nodes["z"]
    assert new["value"].shape == old["value"].shape
    assert new["fn"].batch_shape == (5, 2) and new["fn"].event_shape == fn.event_shape
    support = new["fn"].support
    assert support.check(new["value"]).all()
    transform = torch.distributions.biject_to(support)
    u = transform.inv(new["value"]).reshape(5, 2, size)
    shape = transform.inv(new["value"]).shape
    volume = transform.log_abs_det_jacobian(u.reshape(shape), new["value"])
    expected = prior().log_prob(u) - volume.reshape(5, 2, -1).sum(-1)
    trace.compute_log_prob()
    torch.testing.assert_close(new["log_prob"], expected)


def test_minibatches_keep_their_scale_and_conditions_hold() -> None:
    prior = short(torch.randn(20, 1), "copula")
    recovered = with_prior(Line(subsample_size=2), "z", prior)
    trace = poutine.trace(recovered).get_trace(torch.zeros(10), 10)
    assert trace.nodes["z"]["scale"] == 5 and trace.nodes["z"]["value"].shape == (2,)
    z = torch.tensor([0.3, -0.2])
    held = poutine.trace(poutine.condition(recovered, {"z": z})).get_trace(torch.zeros(10), 10)
    assert held.nodes["z"]["is_observed"]
    held.compute_log_prob()
    torch.testing.assert_close(held.nodes["z"]["unscaled_log_prob"], prior().log_prob(z[:, None]))


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable_priors_are_learned_and_others_are_no_parameters(trainable: bool) -> None:
    x, codes = torch.randn(10) + 6, torch.randn(20, 1)

    def guide(x: Tensor, size: int) -> None:
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(x / 2, 0.2))

    prior = short(codes, "kernels", trainable=trainable)
    recovered = with_prior(Line(), "z", prior)
    SVI(recovered, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x, 10)
    names = [name for name in pyro.get_param_store() if name.startswith("z_prior")]
    assert bool(names) == trainable
    assert torch.equal(prior().components.mean, codes) != trainable


def test_any_distribution_or_callable_may_be_the_prior() -> None:
    prior = dist.Normal(torch.full((1,), 9.0), 0.1).to_event(1)
    for each in (prior, lambda: prior):
        recovered = with_prior(Line(), "z", each)
        assert (Predictive(recovered, num_samples=5)(None, 3)["z"] - 9).abs().max() < 1


def model_of(fn: Any, obs: Tensor | None = None) -> Any:
    return lambda: pyro.sample("z", fn, obs=obs)


@pytest.mark.parametrize(
    "model, site, message",
    [
        (model_of(dist.Normal(0.0, 1.0)), "y", r"no sample site 'y'.*\['z'\]"),
        (model_of(dist.Normal(0.0, 1.0), torch.zeros(())), "z", "is observed, masked or a Delta"),
        (model_of(dist.Delta(torch.zeros(()))), "z", "is observed, masked or a Delta"),
        (model_of(dist.Normal(0.0, 1.0).mask(True)), "z", "is observed, masked or a Delta"),
        (model_of(dist.Normal(torch.zeros(2), 1.0).to_event(1)), "z", "vectors of length 2"),
    ],
)
def test_sites_without_a_prior_to_replace(model: Any, site: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_prior(model, site, short(torch.randn(5, 1), "kernels"))()
