"""Enumerated latents in evaluation: draws and likelihoods against all assignments, one by one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_recursive.evaluation import (
    Draws,
    log_likelihoods,
    posterior_draws,
    predict,
    predictive_draws,
    prior_draws,
)
from pyro_recursive.evaluation.draws import SiteDraws
from pyro_recursive.evaluation.enumerated import with_enumerated
from pyro_recursive.evaluation.model_runs import ModelRuns, run_on_draws
from pyro_recursive.mapa import Empiricalized, GridCodes
from pyro_recursive.tracing.compatibility import log_prob_of
from pyro_recursive.tracing.conditionals import _draw
from pyro_recursive.tracing.enumeration import packed_dims
from pyro_recursive.tracing.sites import sites, unmasked
from tests.models.enumerated import ENUMERATED, PARALLEL, Enumerated, gmm
from tests.models.row import data, normal, table

S = 20_000
ROW = {row.name: row for row in ENUMERATED}


def one_hot(x: Tensor) -> None:
    """Vectors as values; ``x`` is ``[groups, items]``."""
    locs = torch.tensor([-1.0, 0.3, 1.5])
    with pyro.plate("group", 2, dim=-2):
        z = normal("z", 0.0, 1.0)
        fn = dist.OneHotCategorical(torch.tensor([0.3, 0.2, 0.5]))
        y = pyro.sample("y", fn, infer=PARALLEL)
        with pyro.plate("item", 3, dim=-1):
            normal("x", z + (y * locs).sum(-1), 1.0, obs=x)


def one_hot_guide(x: Tensor) -> None:
    with pyro.plate("group", 2, dim=-2):
        normal("z", 0.2, 0.7)


def above_inner_plates(x: Tensor) -> None:
    """A latent for all groups, one for each, and one for each item, in a loop over two parts."""
    logits = torch.tensor([[0.8, -0.6], [-0.3, 0.9]])
    z = normal("z", 0.0, 1.0)
    y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
    with pyro.plate("group", 2, dim=-2):
        a = pyro.sample("a", dist.Categorical(logits=logits[y]), infer=PARALLEL)
        item = pyro.plate("item", 3, dim=-1)
        for part in pyro.plate("part", 2):
            with item:
                infer = {"enumerate": "sequential"}
                b = pyro.sample(f"b{part}", dist.Bernoulli(logits=logits[a, y]), infer=infer)
                normal(f"x{part}", z + b + 0.5 * y + part, 1.0, obs=x)


def only_enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])), infer=PARALLEL)
        normal("x", 1.0 * y, 1.0, obs=x)


def single_guide(x: Tensor) -> None:
    normal("z", 0.3, 0.6)


CASES = [
    *ENUMERATED,
    Enumerated("one_hot", one_hot, one_hot, one_hot_guide, table),
    Enumerated("inner_plates", above_inner_plates, above_inner_plates, single_guide, table),
    Enumerated("no_latents", only_enumerated, only_enumerated, lambda x: None),
]
over = pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)


# --- Draws against all assignments


def repeated(draws: Draws, count: int) -> Draws:
    """Return the first draw of the sites that are not summed, so many times."""
    kept = {name: site for name, site in draws.sites.items() if name not in draws.summed}
    found = {
        name: replace(site, value=site.value[:1].expand(count, *site.value.shape[1:]))
        for name, site in kept.items()
        if site.kind == "latent"
    }
    return replace(draws, sites=found, count=count, summed=frozenset()).of_this_call()


def supports(model: Callable, x: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
    """Return the values of each enumerated site, ``[C, *event]``."""
    trace, found = poutine.trace(model).get_trace(x), {}
    for name in names:
        fn = trace.nodes[name]["fn"]
        values = fn.enumerate_support(expand=False)
        found[name] = values.reshape(len(values), *fn.event_shape)
    return found


def indices(drawn: Draws, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return which value each entry of the enumerated sites has, one-hot ``[S, entries, C]``."""
    found = {}
    for name, support in values.items():
        site = drawn.sites[name]
        entries = site.value.reshape(len(drawn), -1, 1, *support.shape[1:])
        same = entries == support
        found[name] = same.flatten(3).all(-1).double() if support.dim() > 1 else same.double()
        assert (found[name].sum(-1) == 1).all()
    return found


def assignments(drawn: Draws, values: dict[str, Tensor]) -> Draws:
    """Return all assignments of values to entries, as draws of the enumerated sites."""
    counts = {name: drawn[name][0].numel() // values[name][0].numel() for name in values}
    axes = [torch.arange(len(values[name])) for name in values for _ in range(counts[name])]
    every = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    found = repeated(drawn, len(every))
    start, new = 0, dict(found.sites)
    for name, count in counts.items():
        index = every[:, start : start + count]
        site, start = drawn.sites[name], start + count
        value = values[name][index].reshape(len(every), *site.value.shape[1:])
        new[name] = replace(site, value=value)
    return replace(found, sites=new)


def log_joint(model: Callable, x: Tensor, draws: Draws, observed: bool = True) -> Tensor:
    """Return log p(x, y, z) of the data that are seen, without scales, ``[S]``."""

    def collect(runs: ModelRuns) -> dict[str, SiteDraws]:
        pairs = []
        for trace in runs.traces:
            pairs.append([])
            for site in sites(trace):
                if observed or not site["is_observed"]:
                    is_summed = site["name"] not in kept and not site["is_observed"]
                    log_prob = log_prob_of(site, unmasked(site["fn"]) if is_summed else site["fn"])
                    if site["mask"] is not None and not is_summed:
                        log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, 0.0)
                    pairs[-1].append((site, log_prob))
        total = runs.layout.gather(pairs)
        return {"joint": SiteDraws(total[0])}

    kept = draws.sites.keys() - {n for n in draws.sites if n in draws.summed}
    found = run_on_draws(model, (x,), {}, draws, collect, len(draws))
    return found["joint"].value


def exact(row: Enumerated, drawn: Draws) -> tuple[Draws, Tensor, dict[str, Tensor]]:
    """Return all assignments, their posterior probabilities, and the values of each site."""
    values = supports(row.model, row.x(), drawn.summed)
    every = replace(assignments(drawn, values), summed=drawn.summed)
    return every, log_joint(row.model, row.x(), every).softmax(0), values


def check_frequencies(found: dict[str, Tensor], expected: dict[str, Tensor], p: Tensor) -> None:
    """Compare how often entries, and pairs of entries, have each value with the probabilities."""
    one = torch.cat([each.flatten(1) for each in found.values()], 1)
    all_of_them = torch.cat([expected[name].flatten(1) for name in found], 1)
    frequency, share = one.T @ one / len(one), all_of_them.T @ (p.unsqueeze(1) * all_of_them)
    variance = (share * (1 - share)).clamp_min(0) / len(one)
    z = (frequency - share) / variance.sqrt()
    often = variance * len(one) ** 2 > 10
    assert z[often].abs().max() < 4.8
    assert (frequency - share)[~often].abs().max() < 60 / len(one)


@over
def test_draws_have_their_exact_probabilities(row: Enumerated) -> None:
    """All of them at the same z: the joint posterior of all pairs of entries."""
    once = posterior_draws(row.model, row.guide, row.x(), num_draws=1)
    assert once.summed
    drawn = with_enumerated(row.model, (row.x(),), {}, repeated(once, S), S)
    assert drawn.summed == once.summed
    every, p, values = exact(row, drawn)
    assert p.max() < 0.999
    check_frequencies(indices(drawn, values), indices(every, values), p)


def responsibilities(x: Tensor, draws: Draws) -> Tensor:
    """Return p(y | z) of `gmm`, ``[S, rows, 3]``."""
    log_prior = torch.tensor([0.2, -0.4, 0.5]).log_softmax(-1)
    likely = dist.Normal(torch.tensor([-1.5, 0.2, 2.0]), 0.9).log_prob(draws["z"].unsqueeze(-1))
    return (log_prior + likely).softmax(-1)


HOW = {
    "one pass": {},
    "chunks": {"chunk_size": 700},
    "vmap": {"vectorize_particles": "vmap"},
    "one by one": {"vectorize_particles": False, "num_draws": 100},
    "psis": {"resample": "psis"},
}


@pytest.mark.parametrize("how", HOW)
def test_each_draw_has_its_own_posterior(how: str) -> None:
    x, options = data(), {"num_draws": 3000, **HOW[how]}
    draws = posterior_draws(gmm, ROW["gmm"].guide, x, **options)
    assert draws["y"].shape == draws["z"].shape and draws["y"].dtype == torch.long
    assert draws.sites["y"].plates == ("data",) and draws.sites["y"].kind == "latent"
    p, y = responsibilities(x, draws), torch.nn.functional.one_hot(draws["y"], 3)
    error = (p * (1 - p)).mean(0).sqrt() / len(draws) ** 0.5
    assert ((y - p).mean(0) / error).abs().max() < 4.5
    # Also where p is small or large.
    assert ((y - p) * p).mean().abs() < 4.5 * ((p**3 * (1 - p)).mean() / p.numel()).sqrt()
    log_p = torch.logsumexp(
        torch.tensor([0.2, -0.4, 0.5]).log_softmax(-1)
        + dist.Normal(torch.tensor([-1.5, 0.2, 2.0]), 0.9).log_prob(draws["z"].unsqueeze(-1)),
        -1,
    ) + dist.Normal(draws["z"], 0.7).log_prob(x)
    torch.testing.assert_close(draws.log_p, log_p)  # summed over y


def test_a_model_of_one_sample() -> None:
    """``locs[y]`` of latent locations runs under `torch.vmap`."""

    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer=PARALLEL)
            loc = pyro.deterministic("loc", locs[y])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("weights", dist.Dirichlet(torch.full((3,), 3.0)))
        pyro.sample("locs", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    x = data()
    draws = posterior_draws(model, guide, x, num_draws=4000)
    locs = draws["locs"].unsqueeze(1)
    p = (draws["weights"].unsqueeze(1).log() - (x.unsqueeze(-1) - locs) ** 2 / 2).softmax(-1)
    y = torch.nn.functional.one_hot(draws["y"], 3)
    error = (p * (1 - p)).mean(0).sqrt() / len(draws) ** 0.5
    assert ((y - p).mean(0) / error).abs().max() < 4.5
    torch.testing.assert_close(draws["loc"], draws["locs"].gather(1, draws["y"]))


def test_a_support_of_one_value() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(1)), infer=PARALLEL)
            normal("x", normal("z", 0.0, 1.0) + y, 1.0, obs=x)

    draws = posterior_draws(model, ROW["gmm"].guide, data(), num_draws=5)
    assert draws["y"].tolist() == [[0] * 4] * 5
    found = log_likelihoods(model, draws, data())["x"]
    torch.testing.assert_close(found, dist.Normal(draws["z"], 1.0).log_prob(data()))


def test_codes_in_place_of_a_latent() -> None:
    """Their index is drawn, and the latent computed from it; the data are those of a mixture."""
    decoder, x = torch.nn.Linear(1, 2), torch.tensor([[0.4, -0.2], [0.0, 0.3]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    topographic = Empiricalized(model, GridCodes(3))
    draws = posterior_draws(topographic, lambda x: None, x, num_draws=4000)
    codes = topographic.codes()
    likely = dist.Normal(decoder(codes), 0.5).to_event(1).log_prob(x.unsqueeze(1)).detach()
    joint = topographic.codes.log_weights.detach() + likely
    p, index = joint.softmax(-1), torch.nn.functional.one_hot(draws["z_index"], 3)
    error = (p * (1 - p) / 4000).sqrt()
    assert ((index.double().mean(0) - p).abs() < 4.5 * error).all()
    torch.testing.assert_close(draws["z"], codes.detach()[draws["z_index"]])
    found = log_likelihoods(topographic, draws, x)
    assert set(found.sites) == {"x"}
    weights = topographic.codes.log_weights.logsumexp(0)
    torch.testing.assert_close(found["x"], (joint.logsumexp(-1) - weights).detach().expand(4000, 2))


def test_impossible_values_are_not_drawn() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])), infer=PARALLEL)
            support = dist.Uniform(torch.tensor([-1.0, 3.0])[y], 4.0, validate_args=False)
            pyro.sample("x", support, obs=x)

    draws = posterior_draws(model, lambda x: None, torch.tensor([0.0, 3.5, 9.0]), num_draws=500)
    assert (draws["y"][:, 0] == 0).all() and 0.3 < draws["y"][:, 1].double().mean() < 0.99
    assert (draws["y"][:, 2] == 0).all()  # by no value


def test_draws_that_the_prior_excludes() -> None:
    """They are no masked data."""

    def model(x: Tensor) -> None:
        y = pyro.sample("y", dist.Bernoulli(0.4), infer=PARALLEL)
        probs = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
        w = pyro.sample("w", dist.Categorical(logits=probs[y.long()].log()))
        normal("x", y + w, 1.0, obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Categorical(torch.ones(3)))

    x = torch.tensor(0.5)
    draws = posterior_draws(model, guide, x, num_draws=50)
    found, excluded = log_likelihoods(model, draws, x)["x"], draws["w"] == 2
    assert excluded.any() and found[excluded].isneginf().all()
    assert found[~excluded].isfinite().all()


def test_plates_are_added_in_one_order() -> None:
    """The order of a set of strings differs from process to process, and draws follow it."""
    product = torch.zeros(2)
    product._pyro_dims = "z"  # type: ignore[attr-defined]
    found = _draw(product, "z", {}, dict.fromkeys("hcgbfdae", 1))
    assert packed_dims(found) == "abcdefgh"


def chain_of_two(x: Tensor) -> None:
    """A first step's value 0 is likelier by 40 nats, through all but impossible second steps."""
    to_second = torch.tensor([[0.0, -120.0], [-120.0, 0.0]])
    first = pyro.sample("y0", dist.Categorical(logits=torch.tensor([0.0, -160.0])), infer=PARALLEL)
    second = pyro.sample("y1", dist.Categorical(logits=to_second[first]), infer=PARALLEL)
    pyro.sample("x", dist.Normal(torch.tensor([240.0**0.5, 0.0])[second], 1.0), obs=x)


def test_factors_that_disagree_in_single_precision() -> None:
    """Pyro's own draws are wrong there."""
    torch.set_default_dtype(torch.float32)
    x = torch.tensor(0.0)
    draws = posterior_draws(chain_of_two, lambda x: None, x, num_draws=2000)
    assert (draws["y0"] == 0).all()
    assert draws["y1"].double().mean().item() == pytest.approx(0.5, abs=0.06)

    def in_plate(x: Tensor) -> None:
        with pyro.plate("draws", 200):
            chain_of_two(x)

    model = infer_discrete(in_plate, first_available_dim=-2)
    assert (poutine.trace(model).get_trace(x).nodes["y0"]["value"] == 1).all()


def test_scales_do_not_count() -> None:
    """Tempered weights, and latents given the data as they are."""
    row, draws = ROW["scaled"], []
    for model in (row.model, gmm):
        pyro.set_rng_seed(3)
        z = posterior_draws(gmm, ROW["gmm"].guide, row.x(), num_draws=50)
        draws.append(with_enumerated(model, (row.x(),), {}, repeated(z, 500)))
    assert torch.equal(draws[0]["y"], draws[1]["y"])


def subsampled_items(x: Tensor) -> None:
    with pyro.plate("group", 2, dim=-2):
        y = pyro.sample("y", dist.Bernoulli(0.4), infer=PARALLEL)
        with pyro.plate("item", 3, subsample_size=2, dim=-1) as index:
            normal("x", 1.0 * y, 1.0, obs=x[:, index])


def test_a_part_of_the_data_is_not_enough() -> None:
    message = r"'y' is enumerated and depends on all of plate 'item', of which there are 2 of 3"
    with pytest.raises(ValueError, match=message):
        posterior_draws(subsampled_items, lambda x: None, table(), num_draws=5)


def test_rows_of_a_minibatch() -> None:
    """The draws keep the rows that the enumerated latents are of."""

    def model(x: Tensor) -> None:
        z = normal("z", 0.0, 1.0)
        with pyro.plate("data", 100, subsample_size=2) as index:
            y = pyro.sample("y", dist.Bernoulli(0.5), infer=PARALLEL)
            pyro.deterministic("row", index)
            normal("x", z + 20.0 * y, 1.0, obs=x[index])

    x = 20.0 * (torch.arange(100) % 3 == 0)
    draws = posterior_draws(model, lambda x: normal("z", 0.0, 0.1), x, num_draws=20)
    assert draws["row"].unique().numel() == 2 and "data" in draws.minibatch.nodes
    assert torch.equal(20.0 * draws["y"], x[draws["row"]])
    new = predictive_draws(model, draws, x)["x"]
    assert (new - x[draws["row"]]).abs().max() < 6


# --- Compiled passes


@pytest.mark.parametrize("name", ["gmm", "hmm", "lda"])
def test_compiled_passes_draw_the_same(name: str, graphs: list[int]) -> None:
    """Graphs are traced and run here; compiling them is tested elsewhere."""
    row, found = ROW[name], []
    for compile in (False, True):
        pyro.clear_param_store()
        row.guide(row.x())
        pyro.set_rng_seed(1)
        options = {"num_draws": 30, "chunk_size": 8, "compile": compile}
        found.append(posterior_draws(row.model, row.guide, row.x(), **options))
    assert graphs[:2] == [2, 2]  # of the guide's draws, and of the enumerated latents
    for site in found[0].sites:
        torch.testing.assert_close(found[1][site], found[0][site], rtol=1e-10, atol=1e-10)


# --- Likelihoods


@over
def test_likelihoods_sum_over_all_assignments(row: Enumerated) -> None:
    x = row.x()
    draws = posterior_draws(row.model, row.guide, x, num_draws=3)
    assert draws.summed
    found = log_likelihoods(row.model, draws, x)
    once = repeated(draws, 1)
    again = log_likelihoods(row.model, once, x)  # as those of a Markov chain, without y
    total = sum(site.value[0].nan_to_num(0.0).sum() for site in found.sites.values())
    expected = sum(site.value[0].nan_to_num(0.0).sum() for site in again.sites.values())
    torch.testing.assert_close(total, expected)
    every, _, _ = exact(row, draws)
    with_data, without = (
        log_joint(row.model, x, every, observed).logsumexp(0) for observed in (True, False)
    )
    torch.testing.assert_close(total, with_data - without, rtol=1e-12, atol=1e-12)


# The columns that each model has, and the plates of each.
COLUMNS: dict[str, dict[str, tuple[int, ...]]] = {
    "gmm": {"x": (4,)},
    "minibatch": {"x": (2,)},
    "loop": {f"x{i}": () for i in range(4)},
    "weighted_rows": {"x": (4,)},
    "masked_rows": {"x": (4,)},
    "labelled": {"y_observed": (4,), "x": (4,)},
    "hmm": {"x0+x1+x2": (2,)},
    "long_memory": {"x0+x1+x2+x3": ()},
    "two_chains": {"x0+x1+x2": (2,)},
    "recapture": {"x0+x1+x2+x3": (4,)},
    "lda": {"x": (3, 2)},
    "nested": {"x": (2,)},
    "siblings": {"x_two+x_three": (4,)},
    "outside": {"x": (4,)},
    "mixed": {"x": (4,)},
    "above": {"x": (2,)},
    "one_hot": {"x": (2,)},
    "inner_plates": {"x0+x1": ()},
}
# In these the model with sums by hand has a likelihood with the same entries.
BY_HAND = ("weighted_rows", "masked_rows", "hmm", "long_memory", "two_chains", "recapture", "lda")
BY_HAND = (*BY_HAND, "nested", "siblings", "mixed", "above", "gmm")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_for_each_entry_of_the_plates_around_a_sum(name: str) -> None:
    row = next(row for row in CASES if row.name == name)
    draws = posterior_draws(row.model, row.guide, row.x(), num_draws=5)
    found = log_likelihoods(row.model, draws, row.x())
    assert {n: tuple(s.value.shape[1:]) for n, s in found.sites.items()} == COLUMNS[name]
    assert not found.factors and all(site.kind == "observed" for site in found.sites.values())
    if name in BY_HAND:
        by_hand = log_likelihoods(row.collapsed, repeated_all(draws), row.x())
        (value,), (expected,) = (
            [s.value for s in each.sites.values()] for each in (found, by_hand)
        )
        torch.testing.assert_close(value, expected.reshape(value.shape), equal_nan=True)
    if name == "masked_rows":
        assert found["x"].isnan().any(0).tolist() == [False, True, False, False]
    if name == "loop":
        assert [found.sites[f"x{i}"].cell for i in range(4)] == [{"data": i} for i in range(4)]


def repeated_all(draws: Draws) -> Draws:
    """Return draws without the enumerated latents."""
    kept = {name: site for name, site in draws.sites.items() if name not in draws.summed}
    return replace(draws, sites=kept, summed=frozenset())


@pytest.mark.parametrize("how", [{}, {"vectorize_particles": False}, {"chunk_size": 2}])
def test_how_likelihoods_run(how: dict[str, Any]) -> None:
    row = ROW["hmm"]
    draws = posterior_draws(row.model, row.guide, row.x(), num_draws=5)
    found = log_likelihoods(row.model, draws, row.x(), **how)
    expected = log_likelihoods(row.collapsed, repeated_all(draws), row.x())
    torch.testing.assert_close(found["x0+x1+x2"], expected["x"])


@pytest.mark.parametrize("name", ["hmm", "siblings", "nested", "lda"])
def test_inverse_likelihoods_agree(name: str) -> None:
    """E over y of 1 / p(x | y, z) is 1 / p(x | z): what leave-one-out needs no draw of y for."""
    row = ROW[name]
    once = posterior_draws(row.model, row.guide, row.x(), num_draws=1)
    every, p, _ = exact(row, once)
    given = log_likelihoods(row.model, replace(every, summed=frozenset()), row.x())
    total = sum(v.value.nan_to_num(0.0).flatten(1).sum(1) for v in given.sites.values())
    summed = log_likelihoods(row.model, once, row.x())
    expected = sum(v.value.nan_to_num(0.0).sum() for v in summed.sites.values())
    torch.testing.assert_close((p.log() - total).logsumexp(0), -expected)


def test_sites_of_a_step_are_seen_if_any_is() -> None:
    """A sequence without any step has no likelihood."""

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            z, y = normal("z", 0.0, 1.0), torch.tensor(0)
            for t in pyro.markov(range(len(x))):
                with poutine.mask(mask=t < lengths):
                    probs = torch.tensor([[0.8, 0.2], [0.3, 0.7]])[y]
                    y = pyro.sample(f"y{t}", dist.Categorical(probs), infer=PARALLEL)
                    normal(f"x{t}", z + y, 1.0, obs=x[t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            normal("z", 0.0, 1.0)

    args = torch.randn(2, 3), torch.tensor([2, 0, 1])
    draws = posterior_draws(model, guide, *args, num_draws=4)
    found = log_likelihoods(model, draws, *args)["x0+x1"]
    assert found.isnan().any(0).tolist() == [False, True, False]
    loc = draws["z"][:, 2]
    parts = [w.log() + dist.Normal(loc + y, 1.0).log_prob(args[0][0, 2]) for y, w in
             enumerate(torch.tensor([0.8, 0.2]))]  # fmt: skip
    torch.testing.assert_close(found[:, 2], torch.logaddexp(*parts))


def test_factors_under_a_sum_are_told_apart() -> None:
    def model(x: Tensor) -> None:
        z = normal("z", 0.0, 1.0)
        y = pyro.sample("y", dist.Bernoulli(0.3), infer=PARALLEL)
        pyro.factor("prior", -((z - y) ** 2))
        with pyro.plate("data", len(x)):
            normal("x", z, 1.0, obs=x)

    draws = posterior_draws(model, single_guide, data(), num_draws=3)
    found = log_likelihoods(model, draws, data())
    assert found.factors == ("prior",) and set(found.sites) == {"prior", "x"}


def test_draws_with_values_of_the_latents_are_not_summed() -> None:
    """Those of the prior, and of a guide that samples them."""
    row, x = ROW["siblings"], data()
    prior = prior_draws(row.model, x, num_draws=20_000)
    assert not prior.summed and prior["y"].double().mean().item() == pytest.approx(0.6, abs=0.02)
    loc = prior["z"] + torch.tensor([-1.0, 1.5])[prior["y"]]
    error = prior["x_two"] - loc.unsqueeze(1)
    assert error.mean().abs() < 0.03 and error.var().item() == pytest.approx(1.0, abs=0.03)
    found = log_likelihoods(row.model, prior, x)
    expected = dist.Normal(loc.unsqueeze(1), 1.0).log_prob(x + torch.arange(2).unsqueeze(-1))
    torch.testing.assert_close(found["x_two"], expected)


# --- Predictive draws and new rows


def test_posterior_predictive_data_are_given_the_drawn_latents() -> None:
    row, x = ROW["siblings"], data()
    draws = posterior_draws(row.model, row.guide, x, num_draws=5000)
    new = predictive_draws(row.model, draws, x)
    assert set(new.sites) == {"x_two", "x_three"}
    loc = draws["z"] + torch.tensor([-1.0, 1.5])[draws["y"]]
    for name, scale in (("x_two", 1.0), ("x_three", 2.0)):
        error = (new[name] - loc.unsqueeze(1)) / scale
        assert error.mean((0, 1)).abs().max() < 4.5 / (error.shape[1] * len(draws)) ** 0.5
        assert error.var().item() == pytest.approx(1.0, abs=0.03)


def missing(x: Tensor, w: Tensor | None = None) -> None:
    """Two data of each row that one choice explains."""
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
        normal("w", torch.tensor([5.0, -5.0])[y], 1.0, obs=w)
        normal("x", z + torch.tensor([-1.0, 1.0])[y], 0.5, obs=x)


def test_missing_data_are_drawn_given_the_enumerated_latents() -> None:
    x = data()

    def guide(x: Tensor, w: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            normal("z", 0.1 * x, 0.8)

    found = predict(missing, guide, x, num_draws=S)["w"]
    z = dist.Normal(0.1 * x, 0.8).sample((S,)).unsqueeze(-1)
    likely = dist.Normal(z + torch.tensor([-1.0, 1.0]), 0.5).log_prob(x.unsqueeze(-1))
    p = (torch.tensor([0.3, 0.7]).log() + likely).softmax(-1)[..., 0]
    share = (found > 0).double().mean(0)
    assert ((share - p.mean(0)).abs() < 4.5 * (0.5 / S) ** 0.5).all()
    assert (found.abs().mean() - 5).abs() < 0.05


def test_a_global_choice_needs_its_training_data() -> None:
    def model(x: Tensor) -> None:
        y = pyro.sample("y", dist.Bernoulli(0.5), infer=PARALLEL)
        z = normal("z", 0.0, 1.0)
        with pyro.plate("data", len(x)):
            normal("x", z + 8.0 * y, 1.0, obs=x)

    train = torch.tensor([8.3, 7.6, 8.1])
    guide = lambda x: normal("z", 0.0, 0.5)  # noqa: E731
    draws = posterior_draws(model, guide, train, num_draws=2000)
    assert (draws["y"] == 1).all()
    new = torch.tensor([8.0, 0.0])
    found = predict(model, draws, new)
    expected = dist.Normal(8.0, (1 + 0.25) ** 0.5).log_prob(new)
    torch.testing.assert_close(found.log_p[0], expected[0], rtol=0, atol=0.05)
    assert (found["x"].mean(0) - 8).abs().max() < 0.15
    with pytest.raises(ValueError, match=r"no draws of \['y'\], outside .*Pass posterior_draws"):
        predict(model, guide, new)
