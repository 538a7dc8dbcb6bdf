"""The aggregate posterior: closed forms, quadrature, and guides run again row by row."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_recursive import AmortizedGuide, FlowGuide
from pyro_recursive.evaluation.information import active_units, mutual_information, rate_of
from pyro_recursive.evaluation.posterior_tables import PosteriorTable, table_of
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.sites import is_delta, latent_sites
from tests.models import ROWS, Row, local, local_guide
from tests.models.guides import KIND, ROW, setting
from tests.models.small import in_rows, normal, normal_loop, normal_rows, prior_of

SLOPE, SCALE = 0.8, 0.5  # of the linear encoder: q(z | x) = N(SLOPE * x, SCALE)


def rows(count: int = 6) -> Tensor:
    return torch.linspace(-1.5, 2.0, count)


linear_guide = in_rows(lambda x: normal("z", SLOPE * x, SCALE))
collapsed_guide = in_rows(lambda x: normal("z", 0.3, 0.7))


def repeated(estimate: Callable[[], Tensor], times: int = 40) -> tuple[Tensor, Tensor]:
    """Return mean and standard error of an estimate, each from another random state."""
    found = []
    for _ in range(times):
        torch.rand(1)
        found.append(estimate())
    found = torch.stack(found)
    return found.mean(0), found.std(0) / times**0.5


def mixture_entropy(loc: Tensor, scale: float) -> Tensor:
    """Return the entropy of an even mixture of normals, by quadrature on a fine grid."""
    z = torch.linspace(float(loc.min()) - 12 * scale, float(loc.max()) + 12 * scale, 20001)
    log_q = dist.Normal(loc[:, None], scale).log_prob(z).logsumexp(0) - math.log(len(loc))
    return -torch.trapezoid(log_q.exp() * log_q, z)


def entropy(scale: float) -> float:
    return 0.5 * math.log(2 * math.pi * math.e * scale**2)


# --- Values


@pytest.mark.parametrize("num_draws", [1, 3])
def test_collapsed_posterior_knows_nothing(num_draws: int) -> None:
    found = rate_of(normal_rows, collapsed_guide, rows(), num_draws=num_draws)
    assert abs(found.mutual_information) < 1e-12
    assert abs(found.kl - found.aggregate_kl) < 1e-12
    assert all(part.dtype == torch.float64 and part.shape == () for part in found)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_separated_posteriors_reach_the_cap(size: int) -> None:
    found = mutual_information(linear_guide, 1e3 * torch.arange(size), num_draws=2)
    assert found.item() == pytest.approx(math.log(size), abs=1e-12)


def test_linear_encoder_meets_closed_form_and_quadrature() -> None:
    x = rows()
    mean, error = repeated(lambda: torch.stack(rate_of(normal_rows, linear_guide, x, num_draws=50)))
    kl = kl_divergence(dist.Normal(SLOPE * x, SCALE), dist.Normal(0.0, 1.0)).mean()
    information = mixture_entropy(SLOPE * x, SCALE) - entropy(SCALE)
    exact = torch.stack([kl, information, kl - information])
    assert ((mean - exact).abs() < 4 * error).all()
    assert (error < 0.02).all()  # so that the line above can fail


def test_positive_latents_have_the_rates_of_their_logarithms() -> None:
    model = in_rows(lambda x: pyro.sample("z", dist.LogNormal(0.0, 1.0)))
    guide = in_rows(lambda x: pyro.sample("z", dist.LogNormal(SLOPE * x, SCALE)))

    found = []
    for programs in ((model, guide), (normal_rows, linear_guide)):
        pyro.set_rng_seed(4)
        found.append(torch.stack(rate_of(*programs, rows(), num_draws=3)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


# --- Any guide: the table against the guide run for one row at a time


def global_guide(x: Tensor) -> None:
    """A global latent which the local ones depend on; plates inside the rows."""
    w = normal("w", 0.2, 0.6)
    with pyro.plate("data", len(x), dim=-2):
        a = normal("a", w * x[:, :1], 0.7)
        with pyro.plate("inner", 2, dim=-1):
            b = normal("b", a + x, 0.5)
        for t in pyro.plate("steps", 2):
            normal(f"c{t}", b.sum(-1, keepdim=True) + t, 0.9)


@in_rows
def discrete_guide(x: Tensor) -> None:
    logits = torch.stack([x[:, 0], x[:, 1], 0 * x[:, 0]], -1)
    normal("z", pyro.sample("k", dist.Categorical(logits=logits)) + x[:, 0], 0.4)


@in_rows
def factor_guide(x: Tensor) -> None:
    """A change of variables by hand, and an observation, which is no part of the density."""
    normal("seen", x[:, 0], obs=torch.zeros(len(x)))
    u = normal("u", x[:, 0], 0.8, infer={"is_auxiliary": True})
    pyro.factor("jacobian", -u, has_rsample=True)
    pyro.sample("z", dist.Delta(u.exp()))


BY_HAND = {"global": global_guide, "discrete": discrete_guide, "factor": factor_guide}
FLOWS = ("coupling", "iaf", "maf")
AMORTIZED = ("encoder", "encoder_full", "mixture_encoders", "mixture_unlike")


def guide_and_data(name: str) -> tuple[Callable, Tensor]:
    """Make a guide with parameters away from where rows are alike."""
    if name in BY_HAND:
        return BY_HAND[name], torch.randn(5, 2)
    s = setting(ROW["constrained"])
    is_flow = name in FLOWS
    guide = FlowGuide(s.model, name, encoder=s.encoder()) if is_flow else KIND[name].build(s)
    guide(*s.args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return guide, *s.args


def table_row_by_row(guide: Callable, x: Tensor, rows_table: PosteriorTable, draws: Any) -> Tensor:
    """Return the table [B, B] of one draw: each entry from a run of the guide for a single row."""
    table = torch.empty(len(x), len(x))
    for j in range(len(x)):
        given = poutine.Trace()
        for site in latent_sites(draws.trace):
            value = site["value"][0]
            if site["name"] in rows_table.local:
                value = value.narrow(rows_table.frame.dim - site["fn"].event_dim, j, 1)
            if not is_delta(site):
                given.add_node(site["name"], **{**site, "value": value})
        for i in range(len(x)):
            trace = poutine.trace(poutine.replay(guide, given)).get_trace(x[i : i + 1])
            trace.compute_log_prob()
            table[j, i] = sum(
                site["log_prob"].sum()
                for name, site in trace.nodes.items()
                if name in rows_table.local or name == "jacobian"
            )
    return table


@pytest.mark.quick("global", "discrete", "factor", "coupling", "encoder", "mixture_unlike")
@pytest.mark.parametrize("name", [*BY_HAND, *FLOWS, *AMORTIZED])
def test_table_is_that_of_rows_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guide, x = guide_and_data(name)
    with torch.no_grad():
        rows_table = table_of(guide, (x,), {})
        draws = rows_table.draw(1)
        table = torch.cat(list(rows_table.blocks(draws)))
        expected = table_row_by_row(guide, x, rows_table, draws)
    torch.testing.assert_close(table, expected, rtol=1e-9, atol=1e-9)
    assert table.std(1).min() > 0.01  # rows differ
    pyro.set_rng_seed(3)
    whole = mutual_information(guide, x, num_draws=20)
    monkeypatch.setattr("pyro_recursive.evaluation.posterior_tables.CHUNK_ROWS", 20)
    pyro.set_rng_seed(3)
    chunked = mutual_information(guide, x, num_draws=20)
    torch.testing.assert_close(whole, chunked)
    assert -0.1 < chunked < math.log(len(x)) + 1e-12  # of few draws; above 0 in expectation


def test_global_latents_are_those_of_the_draw() -> None:
    """With several draws, each has its own: the diagonal is the density of the draws."""
    x = torch.randn(4, 2)
    rows_table = table_of(global_guide, (x,), {})
    draws = rows_table.draw(3)
    table = torch.cat(list(rows_table.blocks(draws))).unflatten(0, (3, 4))
    draws.trace.compute_log_prob()
    own = sum(
        site["log_prob"].flatten(2).sum(-1) if site["log_prob"].dim() > 2 else site["log_prob"]
        for name, site in draws.trace.nodes.items()
        if name in rows_table.local
    )
    torch.testing.assert_close(table.diagonal(dim1=1, dim2=2), own)
    assert rows_table.local == {"a", "b", "c0", "c1"}


@pytest.mark.slow
def test_autoguides_with_a_plate() -> None:
    """AutoNormal's densities stand at auxiliary sites, its Jacobians at Delta sites."""

    model = in_rows(lambda x: normal("x", pyro.sample("z", dist.Gamma(3.0, 2.0)), obs=x))
    found = []
    for make in (AutoNormal, AutoNormalMessenger):
        pyro.clear_param_store()
        guide = make(model, init_scale=0.4)
        guide(rows())
        with torch.no_grad():
            guide.locs.z.copy_(rows())
        pyro.set_rng_seed(2)
        found.append(torch.stack(rate_of(model, guide, rows(), num_draws=2)))
    torch.testing.assert_close(*found)
    mean, error = repeated(lambda: mutual_information(guide, rows(), num_draws=20))
    exact = mixture_entropy(rows(), 0.4) - entropy(0.4)
    assert abs(mean - exact) < 4 * error


REFUSED = {
    "no_plate", "exact_no_plate", "exact_global", "no_latents",
    "grid", "grid_reversed", "crossed", "exact_grid_reversed", "exact_loop_of_plate",
    "sequential", "sequential_subsample", "sequential_of_vectorized", "vectorized_of_sequential",
    "mask_handler", "obs_mask", "unequal_scales", "masked_discrete", "masked_mixed",
    "ragged", "exact_ragged",
    "auto_delta", "auto_delta_local", "auto_multivariate", "auto_low_rank", "auto_iaf",
    "auto_gaussian", "guide_list",
}  # fmt: skip


@pytest.mark.quick(12)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_model(row: Row) -> None:
    model, guide = row.build()
    if row.name in REFUSED:
        with pytest.raises(ValueError, match=r"[Pp]late|mask|Delta"):
            rate_of(model, guide, *row.args())
        return
    found = rate_of(model, guide, *row.args(), num_draws=2)
    rows_in_all = table_of(guide, row.args(), {}).num_rows
    assert found.mutual_information <= math.log(rows_in_all) + 1e-12
    assert (found.mutual_information + found.aggregate_kl).item() == pytest.approx(found.kl.item())


# --- Plates, scales, modes


def test_a_named_plate_has_the_rows() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("row", len(x), dim=-2), pyro.plate("column", 3, dim=-1):
            normal("z", x)

    x = 100 * torch.randn(4, 3)
    assert mutual_information(guide, x, plate="row").exp().item() == pytest.approx(4)
    assert mutual_information(guide, x, plate="column").exp().item() == pytest.approx(3)


def test_all_runs_share_one_minibatch_and_its_scale_is_left_out() -> None:
    x = rows(20)
    model, guide = (partial(program, subsample_size=3) for program in (local, local_guide))
    rows_table = table_of(guide, (x,), {})
    (index,) = (site["value"] for site in rows_table.minibatch.nodes.values())
    for draws in (rows_table.draw(2), rows_table.draw(1)):
        z = draws.trace.nodes["z"]["value"].flatten()
        expected = dist.Normal(0.4 * x[index] + 0.1, 0.9).log_prob(z[:, None])
        torch.testing.assert_close(torch.cat(list(rows_table.blocks(draws))), expected)
    found = rate_of(model, guide, x, num_draws=2)
    assert found.mutual_information < math.log(3)
    assert active_units(guide, x).variances["z"].shape == (1,)


def test_scales_and_warm_up_change_nothing() -> None:
    found = []
    for context in (poutine.scale(scale=1.0), poutine.scale(scale=0.1), KLWarmup(0.3)):
        pyro.set_rng_seed(1)
        with context:
            found.append(torch.stack(rate_of(normal_rows, linear_guide, rows())))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_dropout_is_the_same_in_all_runs() -> None:
    encoder = nn.Sequential(nn.Linear(1, 40), nn.Dropout(0.5), nn.Linear(40, 1))

    def guide(x: Tensor) -> None:
        loc = encoder(x[:, None])[:, 0]
        seen.append(loc)
        with pyro.plate("data", len(x)):
            normal("z", loc, 0.1)

    seen: list[Tensor] = []
    rows_table = table_of(guide, (rows(),), {})
    draws = rows_table.draw(1)
    after, first = torch.get_rng_state(), len(seen)
    list(rows_table.blocks(draws))
    assert all(torch.equal(loc, seen[first - 1]) for loc in seen[first:])
    assert torch.equal(torch.get_rng_state(), after)


# --- Active units


def vector_guide(x: Tensor) -> None:
    """Two units that depend on the data, one that does not, and a global latent that moves all."""
    w = normal("w", 0.0, 3.0)
    with pyro.plate("data", len(x)):
        loc = torch.stack([x, 0.2 * x, 0 * x], -1) + w[..., None]
        pyro.sample("u", dist.Normal(loc, torch.tensor([0.5, 2.0, 2.0])).to_event(1))
        pyro.sample("v", dist.Normal(5.0, 1.0).expand([2, 2]).to_event(2))


@pytest.mark.slow
def test_variances_of_posterior_means_are_unbiased() -> None:
    x = rows(12)
    mean, error = repeated(
        lambda: active_units(vector_guide, x, num_draws=2).variances["u"], times=300
    )
    exact = x.var() * torch.tensor([1.0, 0.2, 0.0]) ** 2
    assert ((mean - exact).abs() < 4 * error).all()
    # Without the correction the mean would be off by the noise of two draws.
    assert (4 * error < torch.tensor([0.5, 2.0, 2.0]) ** 2 / 2).all()


def test_units_are_counted_over_all_sites() -> None:
    found = active_units(vector_guide, rows(50), num_draws=4000)
    assert {name: tuple(v.shape) for name, v in found.variances.items()} == {"u": (3,), "v": (4,)}
    assert found.number == 2
    assert found.variances["u"][0].item() == pytest.approx(rows(50).var().item(), rel=0.02)


# --- What is refused


@in_rows
def auxiliary(x: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3), infer={"is_auxiliary": True})
    normal("z", x + k)


@in_rows
def non_centred(x: Tensor) -> None:
    e = normal("e", torch.zeros(len(x)), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(x + e))


from_the_left = in_rows(lambda x: normal("w", normal("z", x).sum(0)))
masked = in_rows(lambda x: pyro.sample("z", dist.Normal(x, 1.0).mask(x > 0)))
point = in_rows(lambda x: pyro.sample("z", dist.Delta(x)))


@in_rows
def masked_event(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x[:, None], 1.0).mask(x[:, None] > 0).to_event(1))


WRONG: dict[str, tuple[Any, str]] = {
    "no plate": (lambda x: normal("z", 0.0), r"in plate 'any': \{'z': \[\]\}"),
    "no latent": (lambda x: None, r"in plate 'any': \{\}"),
    "loop": (prior_of(normal_loop), "Plate 'data' is a loop.*with pyro.plate"),
    "auxiliary": (auxiliary, "site 'k' is auxiliary.*MixtureGuide"),
    "point": (point, "site 'z' is computed"),
    "non-centred": (non_centred, "site 'z' is computed.*Sample it"),
    "mask": (masked, "mask of site 'z' differs between rows of plate 'data'"),
    "mask in events": (masked_event, "mask of site 'z' differs between rows of plate 'data'"),
    "from the left": (from_the_left, "value of 'z' in another.*Index dims from the right"),
    "joint": (AmortizedGuide(normal_rows), r"site 'z' has one joint density.*plate='data'"),
    "joint of Pyro": (AutoDiagonalNormal(normal_rows), "site 'z' is computed.*AutoNormal"),
}


@pytest.mark.parametrize("name", WRONG)
def test_guides_without_rows_are_refused(name: str) -> None:
    guide, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        mutual_information(guide, rows())


@pytest.mark.parametrize("guide", [AmortizedGuide, AutoNormal])
def test_masked_latents_are_refused(guide: Any) -> None:
    """The posteriors of rows are over different entries, so that they have no mixture."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x, obs_mask=x > 0)

    options = {"plate": "data"} if guide is AmortizedGuide else {}
    of_rows = guide(model, **options)
    with pytest.raises(ValueError, match="mask of site 'x_unobserved' differs between rows"):
        rate_of(model, of_rows, rows())


def test_wrong_numbers_and_plates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_draws must be .* >= 2"):
        active_units(linear_guide, rows(), num_draws=1)
    with pytest.raises(ValueError, match="at least 2 rows"):
        active_units(linear_guide, rows(1))
    with pytest.raises(ValueError, match=r"in plate 'row': \{'z': \['data'\]\}"):
        active_units(linear_guide, rows(), plate="row")


@pytest.mark.parametrize("inside", ["model", "guide"])
def test_model_and_guide_must_agree_on_the_rows(inside: str) -> None:
    vector = dist.Normal(torch.zeros(6), 1.0).to_event(1)  # a shape that the guide can live with
    outside = {
        "model": lambda x: (normal("w", 0.0), collapsed_guide(x)),
        "guide": lambda x: (pyro.sample("w", vector), normal_rows(x)),
    }
    with_data = in_rows(lambda x: (normal("w", 0.0), normal("x", normal("z", 0.0), obs=x)))
    without = in_rows(lambda x: (normal("w", 0.0), normal("z", 0.0)))
    programs = (with_data, outside[inside]) if inside == "model" else (outside[inside], without)
    message = f"'w' is inside plate 'data' in the {inside}, not in"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        rate_of(*programs, rows())


def test_what_cannot_run_in_one_pass_says_so() -> None:
    def guide(x: Tensor) -> None:
        w = normal("w", 0.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.stack([x, x], -1) + w, 1.0).to_event(1))

    with pytest.raises(ValueError, match="under a plate of samples: the guide raises"):
        mutual_information(guide, rows())
