"""Empirical priors: candidates by enumeration, the index, codes, and the handler."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Predictive, TraceEnum_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO
from pyro_recursive.mapa.candidates import Candidates, Plan, inclusion, systematic
from pyro_recursive.mapa.codes import (
    Codes,
    EncodedCodes,
    FreeCodes,
    GridCodes,
    PseudoInputCodes,
)
from pyro_recursive.mapa.empirical_model import CodeIndex, DecodedCodes, Empiricalized, OnCodes
from tests.models.autoencoder import with_global
from tests.models.losses import LOSSES
from tests.models.small import poisson_rows, vector_rows

M = 6  # codes
WAYS = [(share, replace) for share in ("pair", "shared", "pooled") for replace in (True, False)]


def proposal(rows: int = 3, width: int = M) -> tuple[Tensor, Tensor]:
    """Return a random table of neighbours, the nearest first."""
    log_q = torch.randn(rows, M).mul(1.5).sort(descending=True).values[:, :width].log_softmax(-1)
    index = torch.stack([torch.randperm(M)[:width] for _ in range(rows)])
    return index, log_q


def dense(found: Candidates, rows: int) -> Tensor:
    """Return the weight of each component for each row, ``[B, M]``: 0 where it is not decoded."""
    return torch.zeros(rows, M).scatter_add(
        1, found.codes.expand(rows, -1), found.log_weights.exp()
    )


# Which terms are summed, and what the drawn ones weigh.


@pytest.mark.parametrize(("share", "replace"), WAYS)
@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.slow
def test_weights_are_unbiased(share: str, replace: bool, top: int, samples: int) -> None:
    index, log_q = proposal()
    plan = Plan(top=top, samples=samples, share=share, replace=replace)
    runs = torch.stack([dense(plan(index, log_q, M), 3) for _ in range(1500)])
    error = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - 1).abs() <= 4.5 * error + 1e-12).all()


def starts(chances: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield the starts at which a systematic draw changes, with the length of each stretch."""
    for order in itertools.permutations(range(len(chances))):
        ends = chances[list(order)].cumsum(0)
        cuts = torch.cat([torch.zeros(1), (ends % 1), torch.ones(1)]).sort().values
        for low, high in itertools.pairwise(cuts.tolist()):
            if high - low > 1e-12:
                yield torch.tensor([*order, (low + high) / 2]), high - low


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_systematic_draws_have_their_chances_by_enumeration(number: int) -> None:
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    chances = inclusion(weights[None], number)
    mean, total = torch.zeros(5), 0.0
    for point, length in starts(chances[0]):
        order, start = point[:-1].long(), point[-1:]
        chosen = systematic(chances, order[None], start[None])[0]
        assert chosen.sum() == number
        mean, total = mean + length * chosen, total + length
    torch.testing.assert_close(mean / total, chances[0])


@pytest.mark.parametrize("number", [0, 1, 3, 5, 9])
def test_inclusion(number: int) -> None:
    weights = torch.rand(7, 6).exp() ** 4
    weights[0, 2:] = 0.0
    weights[1] = torch.tensor([1.0, 1e-20, 2e-20, 1e-300, 0, 0])
    weights[2] = 0.0
    chances = inclusion(weights, number)
    present = (weights > 0).sum(-1).clamp(max=number).double()
    torch.testing.assert_close(chances.sum(-1), present)
    assert (chances >= 0).all() and (chances <= 1).all()
    for row, own in zip(weights, chances, strict=True):
        some = (own < 1) & (row > 0)
        ratio = own[some] / row[some]
        if len(ratio) > 1:  # those that are not certain share in proportion
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("share", ["pair", "shared", "pooled"])
@pytest.mark.parametrize("samples", [M - 2, 2 * M])
def test_draws_without_replacement_end_in_the_sum(share: str, samples: int) -> None:
    found = Plan(top=2, samples=samples, share=share)(*proposal(), M)
    torch.testing.assert_close(dense(found, 3), torch.ones(3, M))


@pytest.mark.parametrize(("share", "replace"), WAYS)
def test_top_alone(share: str, replace: bool) -> None:
    index, log_q = proposal()
    found = dense(Plan(top=2, samples=0, share=share, replace=replace)(index, log_q, M), 3)
    expected = torch.zeros(3, M).scatter(1, index[:, :2], 1.0)
    if share == "pooled":
        expected = expected.amax(0).expand(3, -1)
    assert (found == expected).all()


@pytest.mark.parametrize("replace", [True, False])
def test_shared_is_pair_with_each_code_once(replace: bool) -> None:
    index, log_q = proposal(rows=5)
    options = {"top": 1, "samples": 3, "replace": replace}
    torch.manual_seed(1)
    pair = Plan(share="pair", **options)(index, log_q, M)
    torch.manual_seed(1)
    shared = Plan(share="shared", **options)(index, log_q, M)
    assert len(shared.codes) == len(shared.codes.unique()) == len(pair.codes.unique())
    torch.testing.assert_close(dense(shared, 5), dense(pair, 5))


@pytest.mark.parametrize(("share", "replace"), WAYS)
def test_rows_without_a_remainder(share: str, replace: bool) -> None:
    index, _ = proposal(rows=3)
    log_q = torch.full((3, M), -math.inf)
    log_q[:, 0] = 0.0  # isolated points
    log_q[1] = torch.tensor([0.0, -2000.0, -2001.0, *[-math.inf] * 3])  # underflows
    found = dense(Plan(top=1, samples=2, share=share, replace=replace)(index, log_q, M), 3)
    assert found.isfinite().all()
    own = index[:, 0]
    if share != "pooled":
        assert (found[[0, 2]] == torch.zeros(2, M).scatter(1, own[[0, 2], None], 1.0)).all()
    assert (found[range(3), own] == 1).all()
    assert found[1].sum() > 1


def test_a_fraction_of_a_draw_a_row() -> None:
    assert len(Plan(top=0, samples=0.4)(*proposal(rows=5), M).codes) == 2
    assert len(Plan(top=1, samples=0.2)(*proposal(rows=1), M).codes) == 2


# The index.


def test_the_index_has_its_log_weights_and_draws_by_them() -> None:
    logits = torch.randn(3, 4)
    index = CodeIndex(logits)
    assert (index.log_prob(index.enumerate_support(expand=False)) == logits.T).all()
    wide = index.expand([2, 3])
    assert (wide.log_prob(wide.enumerate_support()) == logits.T[:, None]).all()
    torch.testing.assert_close(index.probs, logits.softmax(-1))


# Codes.


def all_codes() -> dict[str, Codes]:
    inputs = torch.rand(5, 3)
    return {
        "encoded": EncodedCodes(nn.Linear(3, 2), inputs),
        "free": FreeCodes(torch.randn(5, 2)),
        "grid": GridCodes(3, 2, normal=True),
        "pseudo": PseudoInputCodes(nn.Linear(3, 2), inputs, bounds=(0, 1)),
        "scaled": FreeCodes(torch.randn(5, 2), scale=0.3, learn_scale=True),
        "weighted": FreeCodes(torch.randn(5, 2), weights=torch.arange(5.0), learn_weights=True),
    }


@pytest.mark.parametrize("kind", all_codes())
def test_codes(kind: str) -> None:
    codes = all_codes()[kind]
    every = codes()
    assert every.shape == (len(codes), 2)
    assert (codes(torch.tensor([3, 1])) - every[[3, 1]]).abs().max() < 1e-12
    assert codes.log_weights.exp().sum().item() == pytest.approx(1.0)
    again = all_codes()[kind]
    again.load_state_dict(codes.state_dict())
    torch.testing.assert_close(again(), every) if kind != "encoded" else None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreeCodes(torch.zeros(3))(), r"must be \[3, D\], got \[3\]"),
        (
            lambda: FreeCodes(torch.zeros(3, 1), weights=torch.tensor([1.0, -1.0, 1.0])),
            "finite numbers >= 0",
        ),
        (lambda: FreeCodes(torch.zeros(3, 1), learn_scale=True), "learn_scale needs a scale"),
        (lambda: EncodedCodes(lambda x: x[0], torch.zeros(3, 2))(), r"must be \[3, D\]"),
    ],
)
def test_codes_refuse(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_codes_are_where_their_start_or_encoder_is() -> None:
    there = {"device": "meta", "dtype": torch.float32}
    start, encoder, x = torch.ones(5, 2, **there), nn.Linear(3, 2, **there), torch.rand(5, 3)
    options: dict[str, Any] = {"scale": 0.3, "weights": torch.arange(5)}
    many: tuple[Codes, ...] = (
        FreeCodes(start, **options),
        EncodedCodes(encoder, x, **options),
        PseudoInputCodes(encoder, x.to(**there), **options),
    )
    for codes in many:
        for each in (codes.log_weights, codes.scale):
            assert each.device.type == "meta" and each.dtype == torch.float32
    moved, index = EncodedCodes(nn.Linear(3, 2), x), torch.tensor([4, 1])
    moved.encoder = encoder
    assert moved(index).device.type == "meta"
    images = EncodedCodes(lambda x: x / 255, torch.randint(255, (5, 2), dtype=torch.uint8))
    assert images.logits.dtype == torch.float64


# The handler, with Pyro's own loss.


gaussian = partial(vector_rows, noise=0.7)


def nothing(*args) -> None:
    return None


def mixture_evidence(x: Tensor, codes: Codes, scale: float = 0.7) -> Tensor:
    table = dist.Normal(codes(), scale).to_event(1).log_prob(x[:, None])
    return (table + codes.log_weights).logsumexp(-1)


@pytest.mark.parametrize("kind", ["encoded", "free", "grid", "pseudo", "weighted"])
def test_sum_over_all_codes_is_the_mixtures_evidence(kind: str) -> None:
    codes, x = all_codes()[kind], torch.randn(4, 2)
    model, loss = Empiricalized(gaussian, codes), TraceEnum_ELBO(max_plate_nesting=1)
    expected = -mixture_evidence(x, codes).sum().item()
    assert loss.loss(model, nothing, x) == pytest.approx(expected, abs=1e-10)
    found = loss.compute_marginals(model, nothing, x)["z_index"].probs
    table = dist.Normal(codes(), 0.7).to_event(1).log_prob(x[:, None]) + codes.log_weights
    torch.testing.assert_close(found, table.softmax(-1))


@pytest.mark.parametrize("loss", [TraceEnum_ELBO(max_plate_nesting=1), IWAE_ELBO(1)])
def test_codes_of_another_dtype_than_the_default(loss: ELBO) -> None:
    torch.set_default_dtype(torch.float32)
    codes, x = FreeCodes(torch.randn(5, 2)).double(), torch.randn(4, 2).double()
    value = loss.differentiable_loss(Empiricalized(gaussian, codes), nothing, x)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, -mixture_evidence(x, codes).sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_sums_over_codes(loss: str) -> None:
    """A global latent has several samples, each with its own sum for each row."""
    x, codes = torch.randn(5), FreeCodes(torch.randn(4, 1), weights=torch.tensor([1.0, 2, 3, 4]))

    def by_hand(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            parts = dist.Normal(codes()[:, 0] + shift.unsqueeze(-1), 0.5)
            pyro.sample(
                "x", dist.MixtureSameFamily(dist.Categorical(logits=logits()), parts), obs=x
            )

    def logits() -> Tensor:
        return codes.log_weights

    def guide(x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(0.3, pyro.param("scale", torch.tensor(0.7))))

    found = []
    for model in (Empiricalized(with_global, codes, "z"), by_hand):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        value = LOSSES[loss](2, 3, estimator="dreg").differentiable_loss(model, guide, x)
        leaves = codes.codes, pyro.param("scale")
        found.append(
            torch.cat([value.reshape(1), *map(torch.flatten, torch.autograd.grad(value, leaves))])
        )
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_codes(parallel: bool) -> None:
    weights = torch.tensor([0.7, 0.1, 0.2])
    codes = FreeCodes(torch.arange(3.0)[:, None].expand(-1, 2), weights=weights)

    def model(rows: int) -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1))

    draws = Predictive(Empiricalized(model, codes, "z"), num_samples=50, parallel=parallel)(100)
    z = draws["z"]
    assert z.shape == (50, 100, 2)
    shares = torch.stack([(z[..., 0] == k).double().mean() for k in range(3)])
    assert ((shares - weights).abs() < 4.5 * (weights * (1 - weights) / 5000).sqrt()).all()


@pytest.mark.slow
def test_scaled_codes_have_a_bound_of_their_evidence() -> None:
    codes, x = FreeCodes(torch.randn(5, 2), scale=0.4), torch.randn(4, 2)
    loss, model = TraceEnum_ELBO(max_plate_nesting=1), Empiricalized(gaussian, codes)
    runs = torch.tensor([-loss.loss(model, nothing, x) for _ in range(200)])
    evidence = mixture_evidence(x, codes, (0.7**2 + 0.4**2) ** 0.5).sum()
    assert runs.mean() < evidence + 3 * runs.std() / 200**0.5
    assert runs.mean() > evidence - 2.5
    assert runs.std() > 0.01


def test_every_parameter_learns() -> None:
    torch.manual_seed(3)
    codes = PseudoInputCodes(
        nn.Linear(2, 2), torch.randn(6, 2), learn_weights=True, scale=0.5, learn_scale=True
    )
    before = {name: value.clone() for name, value in codes.named_parameters()}
    model = Empiricalized(gaussian, codes)
    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(torch.randn(4, 2))
    assert all((value != before[name]).all() for name, value in codes.named_parameters())


def mixture_rows(x: Tensor) -> None:
    """The support of the latent is that of the mixture's components."""
    parts = dist.Gamma(torch.tensor([2.0, 9.0]), 1.0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
        pyro.sample("x", dist.Poisson(z), obs=x)


@pytest.mark.parametrize("model", [poisson_rows, mixture_rows])
def test_constrained_scalar_site(model) -> None:
    codes, x = FreeCodes(torch.randn(4, 1)), torch.tensor([0.0, 3.0, 1.0])
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(Empiricalized(model, codes), nothing, x)
    table = dist.Poisson(codes()[:, 0].exp()).log_prob(x[:, None])
    expected = table.logsumexp(-1) - math.log(4)
    assert loss == pytest.approx(-expected.sum().item())


def loss_on(model, codes: Tensor, log_weights: Tensor, nesting: int = 1) -> float:
    def handled() -> None:
        with OnCodes("z", lambda plate: DecodedCodes(codes, log_weights)):
            model()

    return TraceEnum_ELBO(max_plate_nesting=nesting).loss(handled, nothing)


@pytest.mark.parametrize("dim", [-1, -2, -3])
@pytest.mark.parametrize("paired", [False, True])
def test_plate_in_any_dim(dim: int, paired: bool) -> None:
    x, D = torch.randn(4), 2
    own = torch.randn(4, 3, D) if paired else torch.randn(3, D)
    log_weights = torch.randn(4, 3)

    def model() -> None:
        with pyro.plate("data", 4, dim=dim):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            seen = x.reshape(4, *[1] * (-dim - 1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=seen)

    table = dist.Normal(own.sum(-1), 1.0).log_prob(x[:, None]) + log_weights
    expected = -table.logsumexp(-1).sum().item()
    assert loss_on(model, own, log_weights, -dim) == pytest.approx(expected)


@pytest.mark.parametrize("inside", [True, False])
def test_masked_rows_count_nothing(inside: bool) -> None:
    mask, x = torch.tensor([True, False, True]), torch.randn(3, 2)

    def model() -> None:
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)

    codes, log_weights = torch.randn(4, 2), torch.randn(3, 4)
    log_weights = log_weights if inside else log_weights[0]
    table = dist.Normal(codes, 0.7).to_event(1).log_prob(x[:, None]) + log_weights
    expected = -table.logsumexp(-1)[mask].sum().item()
    assert loss_on(model, codes, log_weights) == pytest.approx(expected)


def two_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + y, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (two_sites, 2, r"\['z', 'y'\]; name one with site="),
        (gaussian, 3, "'z' takes codes .2., got .3."),
    ],
)
def test_refusals(model, size: int, message: str) -> None:
    """Those of sites and plates are in the tests of the guide, for all models."""
    codes = FreeCodes(torch.randn(4, size))
    with pytest.raises(ValueError, match=message):
        Empiricalized(model, codes)(torch.randn(3, 2))
