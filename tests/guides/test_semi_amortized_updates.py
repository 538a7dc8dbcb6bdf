"""Steps of refinement: clipping, learned updates, starts, their state and dtype."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate, LearnedUpdate
from tests.oracles.refinement import (
    ROWS,
    SIZE,
    TAKEN_UP,
    assert_all_close,
    at_numbers,
    conjugate,
    evidence,
    fixed_noise,
    masked,
    model_of,
    network,
    numbers_in,
    reached,
    row_gradient,
    semi,
    shake,
    trained,
    way,
)


def test_an_outlier_leaves_the_others_alone() -> None:
    x, results = torch.randn(3, 3), []
    update = GradientUpdate(0.05, clip=2.0)
    guide = semi(model_of(network()), FixedStart(4), seed=5, update=update)
    for size in (1.0, 1e6):
        results.append(guide.refine(torch.cat([x[:1], size * x[1:2], x[2:]])))
    one, other = (found.params for found in results)
    assert (one == other).all(-1).tolist() == [True, False, True]
    assert (other[1].norm() <= 5 * 0.05 / (1 - update.momentum) * 2 * 2**0.5).all()
    assert [found.clipped[1] == 1 for found in results] == [False, True]


def test_the_share_of_clipped_steps() -> None:
    net, encoder, x = network(), nn.Linear(3, 2 * SIZE), torch.randn(ROWS, 3)
    x *= torch.logspace(-1, 2, ROWS)[:, None]
    update = GradientUpdate(0.05, clip=8.0)
    guide = semi(model_of(net), encoder, steps=6, seed=5, update=update)
    found = guide.refine(x)
    _, steps = way(net, x, encoder(x), fixed_noise(5, 6, 1), update, estimator="stl")
    norms = torch.stack([torch.stack([b.norm(dim=-1) for b in g.chunk(2, -1)]) for g in steps])
    expected = (norms.amax(1) > 8).double().mean(0)
    assert len(expected.unique()) > 1
    assert_all_close([found.clipped], [expected])


def test_a_fixed_start_is_the_same_for_all_rows() -> None:
    start, x = torch.tensor([0.5, -0.5, -1.0, -1.0]), torch.randn(ROWS, 3)
    model = model_of(network())
    guide = semi(model, FixedStart(4, start), mode="svi", seed=5)
    for _ in range(2):
        found = guide.refine(x, steps=2)
        assert torch.equal(found.start, start.expand(ROWS, -1))
        assert (found.params[0] != found.params[1]).all()
        Trace_ELBO().loss_and_grads(model, guide, x)  # nothing is kept


@pytest.mark.slow
def test_a_learned_update_beats_a_gradient() -> None:
    """Trained for 300 steps on other data; three refinements each."""
    x, new = 1.6 * torch.randn(2, 64)
    start = AmortizedGuide(conjugate, FixedStart(2))
    learned = SemiAmortizedGuide(
        conjugate, start, steps=3, update=LearnedUpdate(hidden=(32,)), name="learned"
    )
    fixed = SemiAmortizedGuide(conjugate, AmortizedGuide(conjugate, FixedStart(2)), steps=3)
    svi = SVI(conjugate, learned, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1))
    for _ in range(300):
        svi.step(x)
    one, other = (guide.refine(new) for guide in (learned, fixed))
    gap, theirs = ((evidence(new) - found.elbo).mean() for found in (one, other))
    assert 0 <= gap < 0.05 * theirs
    assert (one.elbo > one.elbo_start).double().mean() > 0.9


@pytest.mark.parametrize("loss", ["trace", "dreg"])
def test_what_a_learned_update_learns(loss: str) -> None:
    """Each step climbs the bound that it leads to; what it is fed with are constants."""
    net, x = network(), torch.randn(ROWS, 3)
    model, encoder = model_of(net), nn.Linear(3, 2 * SIZE)
    update = LearnedUpdate(hidden=(6,))
    guide = semi(model, encoder, update=update, steps=3, seed=5)
    guide.prepare(x)
    shake(update)
    parameters = [*encoder.parameters(), *update.parameters()]
    found = trained(TAKEN_UP[loss](), model, guide, x, parameters)[1]
    numbers = encoder(x)
    climbed = torch.zeros(())
    for each in fixed_noise(5, 3, 1):
        gradient = row_gradient(net, x, numbers, each, "stl")
        climbed = climbed + (numbers * gradient).sum()
        numbers, _ = update(numbers.detach(), gradient, None, (SIZE, SIZE), x)
    _, _, by_numbers = at_numbers(TAKEN_UP[loss](), model, net, numbers, x)
    expected = torch.autograd.grad((numbers * by_numbers).sum() - climbed, parameters)
    assert all(e.ne(0).any() for e in expected)
    assert_all_close(found, expected)


class Network(nn.Linear):
    """Notes what it is told of the rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.told = inputs.detach()
        return super().forward(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_data(dtype: torch.dtype) -> None:
    """It starts at its posterior, with a gradient of exactly zero."""
    torch.set_default_dtype(dtype)
    x = torch.tensor([1.0, -1.0])  # the second one is masked
    network = Network(1 + 2 * 2 + 2, 4)
    for name, update in {"": GradientUpdate(), "learned": LearnedUpdate(network=network)}.items():
        guide = SemiAmortizedGuide(
            masked,
            AmortizedGuide(masked, FixedStart(2)),
            update=update,
            mode="second_order",
            steps=1,
            name=name or None,
        )
        found = numbers_in(guide, x).squeeze(-2)
        if not name:
            assert found[1].eq(0).all() and found[0].ne(0).all()
    told = network.told.reshape(2, -1)
    assert told[1, [3, 5]].eq(0).all()
    assert (told[1, [4, 6]] > -20).all() and (told[1, [4, 6]] < -7).all()
    assert (found.abs() < 20).all()


class Counts(nn.Module):
    """An encoder of integers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(5, size)

    def forward(self, x: Any) -> Tensor:
        return self.table(x["codes"] if isinstance(x, dict) else x).sum(-2)


def test_features_of_inputs_that_are_no_real_numbers() -> None:
    net = network()

    def model(x: Tensor) -> None:
        model_of(net)(x.double())

    x = torch.randint(5, (ROWS, 3))
    with pytest.raises(ValueError, match=r"inputs of type torch.int64\. .*features="):
        semi(model, Counts(4), update=LearnedUpdate())(x)
    base = AmortizedGuide(model, Counts(4), inputs=lambda x: {"codes": x})
    with pytest.raises(ValueError, match=r"inputs of type dict\. .*features="):
        SemiAmortizedGuide(model, base, update=LearnedUpdate())(x)
    features = Counts(2)
    guide = semi(model, Counts(4), update=LearnedUpdate((5,), features), name="counts")
    guide.prepare(x)
    shake(guide)
    trained(Trace_ELBO(), model, guide, x, list(guide.parameters()))
    assert features.table.weight.grad.ne(0).any()


@pytest.mark.parametrize("update", [lambda: GradientUpdate(learn_rate=True), LearnedUpdate])
def test_state_dict_and_param_store(update: Callable, tmp_path: Any) -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)

    def build() -> SemiAmortizedGuide:
        guide = semi(model, nn.Linear(3, 4), update=update(), seed=5)
        guide.prepare(x)
        shake(guide)
        return guide

    guide = build()
    guide(x)
    expected = reached(guide, x)
    other = build()
    assert (reached(other, x) != expected).any()
    other.load_state_dict(guide.state_dict())
    assert torch.equal(reached(other, x), expected)

    store = pyro.get_param_store()
    assert {name.split("$$$")[0] for name in store if "Semi" in name} == {
        "SemiAmortizedGuide.guide.encoder",
        "SemiAmortizedGuide.update",
    }
    store.save(tmp_path / "store")
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        store.load(tmp_path / "store")
    loaded = build()
    loaded(x)
    assert torch.equal(reached(loaded, x), expected)


@pytest.mark.parametrize("update", [GradientUpdate, LearnedUpdate])
@pytest.mark.parametrize("mode", ["first_order", "second_order"])
def test_float32(mode: str, update: Callable) -> None:
    net, x = network(), torch.randn(ROWS, 3)
    model = model_of(net)
    guide = semi(model, nn.Linear(3, 4), update=update(), mode=mode)
    guide.prepare(x)
    shake(guide)
    net.float()
    guide.to(torch.float32)
    x, parameters = x.float(), [*guide.parameters(), *net.parameters()]
    torch.set_default_dtype(torch.float32)
    assert guide.refine(x).elbo.dtype == torch.float32
    found = trained(Trace_ELBO(), model, guide, x, parameters)[1]
    assert {g.dtype for g in found} == {torch.float32}
    assert all(g.isfinite().all() and g.ne(0).any() for g in found)


def test_fixed_start_follows_the_rows() -> None:
    with_zeros = FixedStart(4).to(torch.float32)
    assert with_zeros(torch.ones(2, 3)).dtype == torch.float64
    assert with_zeros(torch.ones(2, 3, dtype=torch.long)).dtype == torch.float32
