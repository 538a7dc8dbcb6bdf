"""MAPAGuide by itself: its posteriors, rows, copies and refusals; the bound on any model."""

import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MAPA_ELBO, MAPAGuide, log_marginal
from pyro_recursive.mapa.codes import EncodedCodes, FreeCodes
from pyro_recursive.mapa.kernels import Gaussian
from pyro_recursive.tracing.sites import sites, with_plate_sizes
from tests import models
from tests.models import Row
from tests.models.autoencoder import Curve, D, N, decoding, with_global

SHARES = ["pair", "shared", "pooled"]


# Posteriors.


@pytest.mark.parametrize("neighbours", [N, 4])
def test_posterior_over_the_neighbours(neighbours: int) -> None:
    toy = Curve()
    for i, model in enumerate((toy.model, lambda *x: toy.model(toy.x))):  # one has its own data
        guide = MAPAGuide(model, toy.encoder, toy.x, neighbours=neighbours, name=f"guide{i}")
        found = guide.explain(*(() if i else (toy.x,)))
        assert found.index.shape == (N, neighbours)
        table = toy.log_probs().detach().gather(1, found.index)
        torch.testing.assert_close(found.log_q, table.log_softmax(-1))


def test_new_data_are_explained_by_known_codes() -> None:
    toy, new = Curve(), torch.randn(4, 2)
    guide = toy.guide(neighbours=N)
    guide.prepare(toy.x)
    found = guide.explain(new)
    table = toy.log_probs(new).detach()
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
    toy, new = Curve(), torch.randn(4, 2)
    guide = toy.guide()
    with pytest.raises(ValueError, match="needs data"):
        guide(None, N)
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
    toy = Curve()
    index = torch.tensor([4, 1, 7])
    options = {"table": toy.table(), "top": 1, "samples": 0, "share": "pair"}
    codes = EncodedCodes(toy.encoder, toy.x)
    own = toy.own()

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


# Which rows of the table.


def test_tables_without_data_need_to_know_rows() -> None:
    """A table that was saved does not say which data it is of; the codes' inputs do."""
    toy = Curve()
    table = toy.table()
    with pytest.raises(ValueError, match="give its data"):
        MAPAGuide(toy.model, FreeCodes(torch.randn(N, D)), table=table)
    codes = EncodedCodes(toy.encoder, toy.x)
    guide = MAPAGuide(toy.model, codes, table=table, top=1, samples=0, share="pair")
    own = toy.own()
    assert toy.bound(guide) == pytest.approx(own.sum().item())
    with pytest.raises(ValueError, match="kernel"):  # new data, and nothing to compare them by
        MAPA_ELBO().loss(toy.model, guide, toy.x + 1)


def test_rows_may_be_unknown() -> None:
    """`rows` says None for new data, which are looked up."""
    toy = Curve()

    def model(x: Tensor, rows: Tensor | None = None) -> None:
        toy.model(x)

    options = {"rows": lambda x, rows=None: rows, "inputs": lambda x, rows=None: x}
    guide = MAPAGuide(model, toy.encoder, toy.x, **options)
    known, new = guide.explain(toy.x[:3], torch.arange(3)), guide.explain(toy.x[:3] + 0.0)
    assert (known.index == new.index).all()
    torch.testing.assert_close(known.log_q, new.log_q)


def test_attach_reaches_the_guide_of_the_other_latents() -> None:
    x, codes = torch.randn(5), FreeCodes(torch.randn(5, 1))

    def bounded(x: Tensor) -> None:  # its guide asks the model for the support
        scale = pyro.sample("scale", dist.Uniform(0.0, x.abs().max()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), scale), obs=x)

    guide = MAPAGuide(bounded, codes, x, kernel=Gaussian(0.5))
    guide.prepare(x)
    loaded = pickle.loads(pickle.dumps(guide))
    loaded.attach(bounded)
    assert loaded(x).keys() == {"scale", "z"}


# Other losses, and recovered priors.


@pytest.mark.slow
def test_codes_with_a_scale_are_a_guide_for_every_loss() -> None:
    toy = Curve()
    codes = EncodedCodes(toy.encoder, toy.x, scale=0.8)
    guide = MAPAGuide(toy.model, codes, toy.x, neighbours=N)
    found = log_marginal(toy.model, guide, toy.x, num_particles=4000, diagnostics=True)
    exact = toy.evidence(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert ((found.log_marginal - exact).abs() < 4.5 * found.standard_error + 1e-3).all()
    loss = IWAE_ELBO(4)
    before = {name: value.clone() for name, value in guide.named_parameters()}
    SVI(toy.model, guide, pyro.optim.Adam({"lr": 0.01}), loss).step(toy.x)
    assert all((value != before[name]).any() for name, value in guide.named_parameters())


def test_points_have_no_density() -> None:
    toy = Curve()
    guide = toy.guide()
    for loss in (Trace_ELBO(), IWAE_ELBO(2)):
        with pytest.raises(NotImplementedError, match="points without a density"):
            loss.loss(toy.model, guide, toy.x)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 0.3])
def test_recovered_model(scale: float | None) -> None:
    """An ordinary model: its evidence by an ordinary guide, beside quadrature."""
    toy = Curve()
    codes = EncodedCodes(toy.encoder, toy.x, scale=scale)
    guide = MAPAGuide(toy.model, codes, toy.x)
    guide.prepare(toy.x)
    model = guide.recovered(**({} if scale else {"kind": "kde"}))
    assert model.prior.kind == ("kernels" if scale else "kde")
    exact = toy.evidence(model.prior())

    def wide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(D), 1.5).to_event(1))

    found = log_marginal(model, wide, toy.x, num_particles=20_000, diagnostics=True)
    assert ((found.log_marginal - exact).abs() < 4.5 * found.standard_error + 1e-3).all()
    assert Predictive(model, num_samples=7)(None, 5)["x"].shape == (7, 5, 2)


def test_recovered_codes_are_those_of_eval_mode() -> None:
    toy = Curve()
    norm, off = nn.BatchNorm1d(2), nn.Dropout().eval()
    toy.encoder = nn.Sequential(nn.Linear(2, D), norm, nn.Dropout(), off)
    guide = toy.guide()
    guide.prepare(toy.x)
    prior = guide.recovered("kernels", scale=0.1, held_out=0).prior
    assert [part.training for part in toy.encoder] == [True, True, True, False]
    assert not norm.num_batches_tracked
    codes = toy.encoder.eval()(toy.x)
    expected = dist.Normal(codes, 0.1).to_event(1).log_prob(codes[:, None]).logsumexp(-1)
    torch.testing.assert_close(prior().log_prob(codes), expected - math.log(N))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", SHARES)
def test_on_a_gpu(share: str) -> None:
    """The table and the data stay on the CPU; codes and decoder are on the device."""
    toy = Curve()
    exact = toy.exact().sum().item()
    toy.encoder.cuda(), toy.decoder.cuda()
    zeros = torch.zeros(D).cuda()
    model = decoding(toy.decoder, lambda y: dist.Normal(y, toy.scale).to_event(1), zeros)
    codes = EncodedCodes(toy.encoder, toy.x).cuda()
    guide = MAPAGuide(model, codes, toy.x, share=share, top=N, samples=0, kernel=Gaussian(0.4))
    assert -MAPA_ELBO().loss(model, guide, toy.x) == pytest.approx(exact)
    assert guide(toy.x)["z"].is_cuda


# Any model: brute force, one code at a time.

# Each model once: some rows differ in their guides alone.
SAME = ("auto_", "messenger_", "exact_")
SAME_MODEL = {"delta_log_density", "lazy_parameter", "mixed_below", "guide_list"}
MODELS = [
    row for row in models.ROWS if not row.name.startswith(SAME) and row.name not in SAME_MODEL
]
EXPLICIT = {"explicit_subsample": lambda x, index: pyro.plate("data", len(x), subsample=index)}
SITES = {"constrained": "rate", "events": "v", "mask_false": "z", "obs_mask": "z", "nested": "w"}
SITES |= {"crossed": "r", "markov": "z0", "unequal_scales": "z", "vectorized_of_sequential": "z0"}
SITES |= {"sequential_of_vectorized": "z0", "ragged": "z0"}
NOWHERE = ValueError, "no continuous latent site inside a vectorised pyro.plate"
SCALED = ValueError, "'z' has its own scale: scale the whole model"
TWO_PLATES = NotImplementedError, "'z0?' is in '(row|item|group)', '(column|item|group)'"
DISCRETE = NotImplementedError, "Latent site 'k' is discrete"
REFUSED = {
    **dict.fromkeys(["no_plate", "no_latents", "discrete", "annealed_discrete"], NOWHERE),
    **dict.fromkeys(["masked_discrete", "mixed_global"], NOWHERE),
    **dict.fromkeys(["sequential", "sequential_subsample"], NOWHERE),
    **dict.fromkeys(["annealed", "tensor_scale", "unequal_scales"], SCALED),
    **dict.fromkeys(["grid", "grid_reversed"], TWO_PLATES),
    **dict.fromkeys(["sequential_of_vectorized", "vectorized_of_sequential"], TWO_PLATES),
    "ragged": (ValueError, "'z0' has its own scale"),
    "markov": (NotImplementedError, "'z0' is in pyro.markov"),
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
            trace = with_plate_sizes(poutine.trace(given).get_trace(*args))
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
            size = msg["fn"].batch_shape[frame.dim] if frame.size == -1 else frame.size
            batch = (size, *[1] * (-frame.dim - 1))
            msg["value"], msg["is_observed"] = value.expand(*batch, *value.shape), True


def _by_row(log_prob: Tensor, frame: Any) -> Tensor:
    """Sum all dims but the plate's."""
    size = log_prob.shape[frame.dim] if frame.size == -1 else frame.size
    return log_prob.movedim(frame.dim, 0).reshape(size, -1).sum(1)


def _by_hand(row: Row) -> MAPAGuide:
    model, _ = row.build()
    site = SITES.get(row.name)
    size = 2 if site == "v" else 1
    create_plates = EXPLICIT.get(row.name)
    return MAPAGuide(model, FreeCodes(torch.randn(5, size)), site=site, create_plates=create_plates)


@pytest.mark.quick(16)
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


# What cannot be right raises.


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("samples", [0, 1])
def test_models_that_cannot_broadcast_are_told_how(share: str, samples: int) -> None:
    """Even where there are as many codes as rows, so that the shapes would fit by chance."""
    x = torch.randn(4, 2)
    reshaping = decoding(lambda z: z.reshape(4, 2), lambda y: dist.Normal(y, 1.0).to_event(1))
    guide = MAPAGuide(reshaping, nn.Linear(2, 2), x, top=1, samples=samples, share=share)
    with pytest.raises(ValueError, match=r"'z' at many codes at once.*share='pair'.*invalid for"):
        MAPA_ELBO().loss(reshaping, guide, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "alone"}, "share must be one of"),
        ({"top": -1}, "top and samples must not be negative"),
        ({"top": 0, "samples": 0}, "or both 0"),
        ({"samples": 0.5, "share": "pair"}, "samples=0.5 needs a pool"),
        ({"kernel": Gaussian(1.0), "data": None}, "kernel= makes the table from data"),
        ({"inputs": lambda x: 2 * x}, "'x' does not observe the inputs"),
        ({"site": "w"}, "no latent site 'w'; there are .'z'"),
        ({"data": torch.randn(5, 2)}, "not over the 9 codes"),
        ({"codes": FreeCodes(torch.randn(N, 3))}, "'z' takes codes .2., got .3."),
        (
            {"inputs": lambda x: x[:3], "kernel": Gaussian(1.0)},
            "inputs= gives 3 rows",
        ),
        ({"rows": lambda x: 2}, "rows= gives"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    toy = Curve()
    given: dict[str, Any] = {"codes": EncodedCodes(toy.encoder, toy.x), "data": toy.x, **options}
    with pytest.raises(ValueError, match=message):
        MAPA_ELBO().loss(toy.model, MAPAGuide(toy.model, **given), toy.x)


def test_encoder_without_data() -> None:
    with pytest.raises(ValueError, match="needs the training data as third"):
        MAPAGuide(Curve().model, nn.Linear(2, 2))
