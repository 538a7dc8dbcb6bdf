"""The adapter of ArviZ's Pareto smoothing, and the weights of models and guides."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive import log_marginal
from pyro_recursive.bounds import pareto
from pyro_recursive.evaluation import (
    ImportanceWeights,
    effective_sample_size,
    importance_weights,
    psis,
)
from tests.models import ROWS, SCALED, Row
from tests.models.small import in_rows, normal, normal_rows

INF = math.inf

TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda z: z,
    "heavy": lambda z: z**2,
    "no_mean": lambda z: 3 * z**2,
    "bounded": lambda z: -(z**2),
    "narrow": lambda z: 0.01 * z,
    "wild": lambda z: 600 * z,
    "ties": lambda z: (4 * z).round() / 2,
    "few_with_weight": lambda z: torch.where(z > 1, z, -INF),
    "half_with_weight": lambda z: torch.where(z > 0, z, -INF),
    "shifted": lambda z: z - 1e5,
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("count", "relative_ess"),
    [(2, 1.0), (20, 1.0), (21, 0.3), (100, 0.3), (1000, 1.0), (1000, 3.0)],
)
def test_columns_are_those_of_arviz(tail: str, count: int, relative_ess: float) -> None:
    """For any batch; a failed fit has an infinite k-hat, nan in ArviZ."""
    log_weights = TAILS[tail](torch.randn(count, 2, 3))
    log_weights[0, log_weights.amax(0) == -INF] = 0.0
    found = psis(log_weights, relative_ess=relative_ess)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        import arviz

        smoothed, k = arviz.psislw(log_weights.movedim(0, -1).numpy(), relative_ess)
    k = torch.as_tensor(np.asarray(k)).nan_to_num(nan=INF, posinf=INF)
    torch.testing.assert_close(found.pareto_k, k)
    both = [found.log_weights, torch.as_tensor(smoothed).movedim(-1, 0)]
    if tail == "ties":  # the order of equal weights is arbitrary
        both = [each.sort(0).values for each in both]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(found.log_weights.logsumexp(0), torch.zeros(2, 3))


def test_weights_piled_up_at_a_local_maximum_are_no_tail() -> None:
    """As those of a Gaussian for a skewed posterior."""
    z = torch.randn(10_000, 40)
    log_weights = 0.02 * (z - z**3 / 3)  # 0.013 at z = 1, more at z < -2
    k = psis(log_weights).pareto_k
    of_all = torch.stack([_smoothed_tail(column) for column in log_weights.T])
    assert (of_all > 1).sum() >= 10
    assert (k < 0.7).all()


def _smoothed_tail(log_weights: torch.Tensor) -> torch.Tensor:
    """Return the k-hat of the whole tail."""
    tail = (log_weights - log_weights.max()).topk(301).values
    return pareto._smoothed(tail[:-1, None], tail[-1:])[1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_weights_have_no_tail(dtype: torch.dtype) -> None:
    """An exact guide is not reported as bad, whatever rounding does."""
    rounding = 30 * torch.finfo(dtype).eps * torch.randn(1000, 2, dtype=dtype)
    log_weights = torch.tensor(-123.4, dtype=dtype) + rounding
    log_weights[::2, 1] = -INF  # draws without weight leave the others equal
    found = psis(log_weights)
    assert found.pareto_k.tolist() == [0.0, 0.0]
    torch.testing.assert_close(found.log_weights, log_weights.double().log_softmax(0))


def test_too_little_to_say_anything() -> None:
    assert psis(torch.zeros(20)).pareto_k == INF
    assert psis(torch.zeros(1, 3)).log_weights.tolist() == [[0.0] * 3]
    three_different = torch.zeros(1000)
    three_different[:3] = torch.tensor([1.0, 2.0, 3.0])
    assert psis(three_different).pareto_k == INF
    nothing = psis(torch.full((1000, 2), -INF))
    assert (nothing.pareto_k == INF).all()
    assert (nothing.log_weights == -INF).all()


@pytest.mark.parametrize("wrong", [math.nan, INF])
def test_what_is_no_weight_is_refused(wrong: float) -> None:
    log_weights = torch.zeros(30, 2)
    log_weights[7, 1] = wrong
    with pytest.raises(ValueError, match=r"1 entries that are nan or \+inf, the first at \(7, 1\)"):
        psis(log_weights)
    with pytest.raises(ValueError, match="nan or"):
        effective_sample_size(log_weights)


# --- The weights of a model and a guide


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.name, marks=() if r.joint else pytest.mark.slow) for r in ROWS],
)
def test_weights_of_any_model(row: Row) -> None:
    """They have the shape of the shared plates, and make the same evidence."""
    model, guide = row.build()
    model_args = row.args()
    guide(*model_args)
    pyro.set_rng_seed(3)
    if row.name in SCALED:
        with pytest.raises(ValueError, match=r"Guide site '\w+' has a scale"):
            importance_weights(model, guide, *model_args, num_particles=12)
        return
    found = importance_weights(model, guide, *model_args, num_particles=12, chunk_size=5)
    assert found.plates == row.shared
    assert found.log_weights.shape == (12, *row.plates)
    assert found.pareto_k.shape == found.ess.shape == row.plates
    pyro.set_rng_seed(3)
    options = {"num_particles": 12, "chunk_size": 5, "diagnostics": True}
    expected = log_marginal(model, guide, *model_args, **options)
    torch.testing.assert_close(found.log_marginal, expected.log_marginal)
    torch.testing.assert_close(found.ess, expected.ess)


def guide_with(scale: Tensor) -> Callable:
    return in_rows(lambda x: normal("z", x / 2, scale))


def test_too_narrow_rows_are_told() -> None:
    """For normals of variance v and q, the weights w = p / q have k = 1 - q / v in the limit."""
    x = torch.linspace(-1.0, 2.0, 6)
    scale = torch.tensor([0.5**0.5, 0.8, 0.1, 1.0, 0.15, 0.5**0.5])
    found = importance_weights(normal_rows, guide_with(scale), x, num_particles=100_000)
    high = found.pareto_k > found.threshold
    assert high.tolist() == [False, False, True, False, True, False]
    assert found.pareto_k[0] == found.pareto_k[5] == 0.0
    assert found.summary()["entries"] == 6 and "high_k                  2" in str(found)


def test_minibatches_are_joined() -> None:
    x, guide = torch.linspace(-1.0, 2.0, 5), guide_with(torch.tensor(0.6))
    parts = [importance_weights(normal_rows, guide, rows, num_particles=30) for rows in x.split(3)]
    joined = ImportanceWeights.join(parts)
    assert joined.log_weights.shape == (30, 5) and joined.plates == ("data",)
    with pytest.raises(ValueError, match=r"need the same plates, got \[\('data',\), \(\)\]"):
        ImportanceWeights.join([joined, ImportanceWeights(joined.log_weights.sum(1))])
    first, second = torch.randn(30, 3, 4), torch.randn(30, 3, 2)
    parts = [ImportanceWeights(each, ("cols", "data")) for each in (first, second)]
    with pytest.raises(ValueError, match=r"plate= is needed, one of \['cols', 'data'\]"):
        ImportanceWeights.join(parts)
    joined = ImportanceWeights.join(parts, plate="data")
    assert torch.equal(joined.log_weights, torch.cat([first, second], 2))


def test_a_scale_of_the_model_is_part_of_its_density() -> None:
    """The posterior with a tripled likelihood is N(3 x / 4, 1 / 4); a guide may have a scale of 1.

    With another one, draws would come from q, and log q be 0.1 log q: k-hat "good" for any guide.
    """

    @in_rows
    def tempered(x: Tensor) -> None:
        z = normal("z", 0.0)
        with poutine.scale(scale=3.0):
            normal("x", z, obs=x)

    exact = poutine.scale(in_rows(lambda x: normal("z", 3 * x / 4, 0.5)), torch.ones(()))
    found = importance_weights(tempered, exact, torch.tensor([0.0, 2.0]))
    assert found.log_weights.std(0).max() < 1e-10 and found.pareto_k.max() == 0


POINTS = {"auto_delta": {"scale", "z"}, "guide_list": {"z"}}
POINTS |= {name: set() for name in ("auto_normal", "auto_multivariate", "hierarchy")}


@pytest.mark.parametrize("vectorize", [True, False])
def test_point_estimates_are_told(vectorize: bool) -> None:
    """Their weights are constant, which says nothing for them."""
    for row in ROWS:
        if row.name in POINTS:
            programs, options = row.build(), {"vectorize_particles": vectorize}
            weights = importance_weights(*programs, *row.args(), num_particles=5, **options)
            assert set(weights.points) == POINTS[row.name]
            options["chunk_size"] = 1  # a draw by itself is always one value
            weights = importance_weights(*programs, *row.args(), num_particles=3, **options)
            assert set(weights.points) == POINTS[row.name]
    told = str(ImportanceWeights(torch.zeros(30), (), ("scale",)))
    assert "point estimates of ['scale']" in told


@pytest.mark.parametrize("vectorize", [True, False])
def test_computed_latents_with_one_value_are_named(vectorize: bool) -> None:
    """In every draw of every chunk; one that differs in a single draw is not."""

    def model() -> None:
        for name in ("same", "moving", "drawn"):
            pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide() -> None:
        pyro.sample("same", dist.Delta(torch.tensor([0.3, 0.4]), event_dim=1))
        u = pyro.sample("drawn", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("moving", dist.Delta((u > 1.0).to(u), event_dim=1))

    found = importance_weights(
        model, guide, num_particles=30, chunk_size=8, vectorize_particles=vectorize
    )
    assert found.points == ("same",)
