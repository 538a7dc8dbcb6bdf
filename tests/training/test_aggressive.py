"""Aggressive training: which parameters move, when it stops, and interrupted runs."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormalMessenger
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_recursive import IWAE_ELBO, PIWAE_ELBO, AmortizedGuide, VampPrior
from pyro_recursive.evaluation.information import mutual_information
from pyro_recursive.training import Aggressive, History, NonFiniteError
from pyro_recursive.training import aggressive as module
from pyro_recursive.training.aggressive import Phase
from pyro_recursive.training.data import Minibatches
from tests.oracles import training as ordinary
from tests.oracles.bitwise import same
from tests.oracles.training import outcome, run, store

ROWS = 12
few = Aggressive(max_steps=3, check_every=2)


def rows(count: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def linear_model(x: Tensor) -> None:
    """A decoder that does not need its latent: x[1] depends on x[0]."""
    weight = pyro.param("weight", torch.tensor(1.0))
    slope = pyro.param("slope", torch.tensor(0.0))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = weight * pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.stack([z, z + slope * x[:, 0]], -1)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def linear_guide(x: Tensor) -> None:
    """A guide that learns slowly: its parameters are multiplied by 0.05."""
    loc = pyro.param("loc", torch.tensor(0.0))
    log_scale = pyro.param("log_scale", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.05 * loc * x.sum(-1), (0.05 * log_scale).exp()))


MODELS, GUIDES = {"weight", "slope", "scale"}, {"loc", "log_scale"}


def linear(**changes: Any) -> dict[str, Any]:
    return {
        "model": linear_model,
        "guide": linear_guide,
        "data": rows(),
        "loss": Trace_ELBO(),
        "validation": rows(5, seed=1),
        "aggressive": few,
        **changes,
    }


def train(program: Callable[[], dict[str, Any]] = linear, **changes: Any) -> History:
    return run(program, **{"transform": None, "epochs": 2, **changes})


# --- Who moves


class Watched(torch.optim.Adam):
    """Records the names of the parameters that each step moves."""

    moved: list[set[str]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = store()
        super().step(closure)
        after = store()
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        self.moved.append({name.replace("$$$", ".") for name in moved})


def movements(**changes: Any) -> tuple[History, list[set[str]]]:
    """Train with momentum and weight decay, which move all parameters with a gradient."""
    Watched.moved = []
    history = train(**{"optimizer": partial(Watched, lr=0.1, weight_decay=0.1), **changes})
    return history, Watched.moved


def shared() -> dict[str, Any]:
    """A VampPrior: the model uses the guide's encoder, and inputs of its own."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(2, 4), nn.Linear(2, 2)
    prior = VampPrior(lambda u: pyro.module("encoder", encoder)(u), rows(3))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc, log_scale = pyro.module("encoder", encoder)(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return linear(model=model, guide=guide)


def amortized() -> dict[str, Any]:
    """Parameters of the model that the guide's own runs of it use remain the model's."""
    torch.manual_seed(0)
    return linear(guide=AmortizedGuide(linear_model, nn.Linear(2, 2)))


def of_net(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize(
    ("program", "guides", "models"),
    [
        (partial(linear, loss=TraceMeanField_ELBO()), GUIDES, MODELS),
        (partial(linear, loss=RenyiELBO(alpha=0.5, num_particles=2)), GUIDES, MODELS),
        (partial(linear, loss=IWAE_ELBO(3, estimator="dreg")), GUIDES, MODELS),
        (partial(linear, loss=PIWAE_ELBO(2, 2)), GUIDES, MODELS),
        (lambda: linear(loss=ordinary.LossWithModule()), GUIDES, MODELS | of_net("own")),
        (shared, of_net("encoder"), of_net("decoder") | {"prior.raw_inputs"}),
        (amortized, of_net("AmortizedGuide.encoder"), MODELS),
    ],
)
def test_the_guide_moves_alone_and_then_the_model(
    program: Callable[[], dict[str, Any]], guides: set[str], models: set[str]
) -> None:
    options = Aggressive(max_steps=3, check_every=99)
    history, moved = movements(program=program, aggressive=options, batch_size=6)
    assert history.guide_steps == [6, 12]
    assert history.steps == [2, 4]
    assert moved == [guides, guides, guides, models] * 4


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_those_of_two_optimisers(fused: bool) -> None:
    """Parameters that are held keep their own number of steps, as with an Adam for each owner."""
    make = partial(torch.optim.Adam, lr=0.05, fused=fused, weight_decay=0.01)
    options = Aggressive(max_steps=2, check_every=99, patience=9)  # to the end
    train(optimizer=make, batch_size=None, aggressive=options, epochs=3, loss=TraceMeanField_ELBO())
    found = store()
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    elbo, optimizers = TraceMeanField_ELBO(), {}
    for part in ("guide", "guide", "model") * 3:
        loss = elbo.differentiable_loss(linear_model, linear_guide, rows())
        params = pyro.get_param_store()
        names = GUIDES if part == "guide" else MODELS
        mine = [params[name].unconstrained() for name in params if name in names]
        optimizer = optimizers.setdefault(part, make(mine))
        for name in params:
            params[name].unconstrained().grad = None
        loss.backward()
        optimizer.step()
    assert found.keys() == store().keys()
    for name, value in store().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def late_guide(x: Tensor) -> None:
    """A parameter that the first minibatches do not create."""
    shift = pyro.param("late", torch.tensor(0.1)) if x[0, 0] > 1 else 0.0
    loc = pyro.param("loc", torch.tensor(0.0)) + shift
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x.sum(-1), 1.0))


def late() -> dict[str, Any]:
    data = rows()
    data[:, 0] = 0.0
    data[-1, 0] = 2.0  # alone in its minibatch
    return linear(guide=late_guide, data=data)


def test_parameters_that_come_late_find_their_part() -> None:
    options = Aggressive(max_steps=24, check_every=99)
    _, moved = movements(program=late, aggressive=options, batch_size=1, epochs=1)
    assert all(names <= MODELS for names in moved[24::25])
    guides = {frozenset(names) for i, names in enumerate(moved) if i % 25 != 24}
    assert guides <= {frozenset({"loc"}), frozenset({"loc", "late"})}
    assert any("late" in names for names in guides)


# --- max_steps=0


def test_no_steps_are_ordinary_training_bit_for_bit(tmp_path: Path) -> None:
    options, found = {"validation": torch.ones(5, 2)}, []
    for aggressive in (None, Aggressive(max_steps=0)):
        path = tmp_path / f"{aggressive is None}.pt"
        history = run(ordinary.vae, aggressive=aggressive, checkpoint=path, **options)
        found.append(outcome(history, path))
    assert same(*found)
    assert found[0]["history"]["aggressive"] == [False] * 4
    assert set(found[0]["history"]["mutual_information"]) == {None}


# --- When the guide's steps stop


@pytest.mark.parametrize(
    ("losses", "rows", "size", "steps"),
    [
        ([3.0, 2.0, 1.0], [1, 1, 1], 1, 3),
        ([3.0, 2.0, 2.0, 1.0], [1, 1, 1, 1], 1, 3),  # no lower is no better
        ([3.0, 1.0, 2.0, 2.5, 0.0, 0.0], [1] * 6, 2, 4),
        ([3.0, 9.0, 2.0, 2.0, 0.0], [1] * 5, 2, 5),  # the fifth ends no block
        ([2.0, 4.0, 3.0, 2.0, 0.0], [2, 2, 1, 1, 1], 2, 4),  # 6 over 4 rows, then 5 over 2
        ([1.0, math.nan, 0.0], [1, 1, 1], 1, 2),
    ],
)
def test_the_guide_s_steps_end_with_a_block_that_is_no_better(
    losses: list[float], rows: list[int], size: int, steps: int
) -> None:
    left = iter(zip(losses, rows, strict=True))

    def step(*_: Any, owner: str) -> Tensor:
        loss, learner.group.rows = next(left)
        return torch.tensor(loss)

    learner = SimpleNamespace(step=step, group=SimpleNamespace(rows=0))
    options, batches = Aggressive(max_steps=len(losses), check_every=size), [()] * len(losses)
    Phase(options, learner, Minibatches(torch.ones(1)), None)._train_guide(iter(batches), 1)  # type: ignore[arg-type]
    assert len(losses) - len(list(left)) == steps


# --- When the phase stops


def script(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> Iterator[float]:
    left = iter(values)
    monkeypatch.setattr(module, "mutual_information", lambda *_, **__: torch.tensor(next(left)))
    return left


@pytest.mark.parametrize(
    ("patience", "values", "epochs"),
    [
        (1, [0.5, 0.5], 2),  # no growth
        (2, [0.5, 0.8, 0.7, 0.9, 0.8, 0.9], 6),
        (1, [0.5, math.nan], 2),
        (3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], None),
    ],
)
def test_the_phase_ends_when_the_information_stops_growing(
    patience: int, values: list[float], epochs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = script(monkeypatch, values)
    options = Aggressive(max_steps=1, patience=patience)
    total = len(values) if epochs is None else epochs + 2
    history, moved = movements(aggressive=options, batch_size=None, epochs=total)
    count = len(values) if epochs is None else epochs
    assert moved == [GUIDES, MODELS] * count + [GUIDES | MODELS] * (total - count)
    assert next(left, None) is None
    assert history.aggressive == [True] * count + [False] * (total - count)
    assert history.guide_steps == [*range(1, count + 1), *[count] * (total - count)]
    assert str(history.mutual_information) == str(values + [None] * (total - count))
    assert history.steps == list(range(1, total + 1))


def test_information_is_that_of_the_validation_data() -> None:
    frozen = partial(torch.optim.SGD, lr=0.0)
    program = ordinary.vae()
    encoder = program["model"].__self__
    held_out = torch.randn(40, 2)
    modes = []
    guide = program["guide"]

    def watched(x: Tensor) -> None:
        modes.append((len(x), encoder.training))
        guide(x)

    changes = {"guide": watched, "modules": [encoder], "validation": held_out, "epochs": 1}
    options = Aggressive(max_steps=1, rows=30, draws=2)
    history = run(lambda: program, optimizer=frozen, aggressive=options, **changes)
    encoder.eval()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30]
    pyro.set_rng_seed(0)
    expected = mutual_information(guide, held_out[order], num_draws=2)
    assert history.mutual_information == [expected.item()]
    assert history.mutual_information[0] < math.log(30)
    assert {mode for mode in modes if mode[0] == 30} == {(30, False)}
    norm = encoder.encoder[1]
    assert norm.num_batches_tracked == history.steps[-1] + history.guide_steps[-1]


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is the same without the measurement."""
    found = []
    for measure in (True, False):
        if not measure:
            script(monkeypatch, [1.0, 2.0, 3.0, 4.0])
        history = run(ordinary.vae, validation=torch.randn(9, 2), aggressive=few, epochs=2)
        found.append((history.loss, history.guide_steps, store()))
    assert same(*found)


# --- Data


def test_fresh_minibatches_leave_the_order_of_the_data_alone() -> None:
    seen: dict[bool, list[Tensor]] = {}
    for aggressive in (True, False):
        options = Aggressive(max_steps=2, check_every=99) if aggressive else None
        loss = ordinary.Noting()
        train(loss=loss, aggressive=options, batch_size=5, kl_warmup=2)
        seen[aggressive] = loss.batches
        if aggressive:  # warm-up weights the guide's steps too
            assert loss.scales == [0.5] * 9 + [1.0] * 9
    assert same(seen[True][2::3], seen[False])
    fresh = [batch for i, batch in enumerate(seen[True]) if i % 3 != 2]
    assert [len(batch) for batch in fresh] == [5] * 12  # never the rest of 2 rows
    assert len({tuple(batch[:, 0].tolist()) for batch in fresh}) == 12
    kept = torch.cat(fresh[:2])[:, 0].tolist()
    assert len(set(kept)) == 10  # each row once in a pass


def test_a_loader_is_read_by_a_second_iterator() -> None:
    loss, data = ordinary.Noting(), TensorDataset(rows())
    changes = {"batch_size": None, "aggressive": Aggressive(max_steps=2, check_every=99)}
    train(data=DataLoader(data, 4), loss=loss, **changes)
    seen = loss.batches
    parts = rows().split(4)
    assert same(seen[2::3], [*parts, *parts])
    fresh = [batch for i, batch in enumerate(seen) if i % 3 != 2]
    assert same(fresh, [*parts, *parts] * 2)  # it starts again at its end, and in each epoch
    with pytest.raises(ValueError, match="Set persistent_workers=False"):
        train(data=DataLoader(data, 4, num_workers=1, persistent_workers=True), **changes)


# --- NaN


@ordinary.quiet
@pytest.mark.parametrize("check_every", [None, 100])
def test_a_nan_in_a_step_of_the_guide_is_named(check_every: int | None) -> None:
    calls = iter(range(99))

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        # The search for the owners of parameters runs the guide once more.
        scale = torch.tensor(math.nan if next(calls) >= 3 else 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * x.sum(-1), scale))

    place = r"step 3 of the guide alone, before step 1, epoch 1.*guide site 'z', its distribution"
    if check_every:
        place = "guide site 'z', its distribution"
    before: list[dict[str, Tensor]] = []

    def look(*batch: Tensor) -> tuple[Tensor, ...]:
        before.append(store())
        return batch

    options = Aggressive(max_steps=5, check_every=99)
    changes = {"guide": guide, "transform": look, "aggressive": options}
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match=place):
        train(**changes, batch_size=None, check_every=check_every)
    if check_every is None:
        assert same(before[-1], store())


# --- What is refused


def ordinary_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([len(x), 2]).to_event(1), obs=x)


def fixed_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.sum(-1), 1.0))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": ordinary_model},
              "The model has no parameters of its own: all are the guide's .loc, log_scale"),
    "guide": ({"guide": fixed_guide}, "The guide has no parameters of its own"),
    "messenger": ({"guide": AutoNormalMessenger(linear_model), "validation": rows()},
                  "The model has no parameters of its own"),
    "points": ({"guide": AutoDelta(linear_model), "validation": rows()},
               "Guide site 'z' is computed"),
    "plate": ({"aggressive": Aggressive(2, plate="row")}, "is in plate 'row'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_aggressive_says_so_at_once(name: str) -> None:
    changes, message = REFUSED[name]
    taken = ordinary.Counted.steps
    with pytest.raises(ValueError, match=message):
        train(**{"batch_size": None, "optimizer": ordinary.Counted, **changes})
    # Before the second step of the model.
    assert ordinary.Counted.steps - taken <= few.max_steps + 1


# --- What it is for


@pytest.mark.slow
def test_a_lagging_guide_keeps_its_latent() -> None:
    """In ordinary training the decoder learns to explain the data without its latent."""
    adam, loss = partial(torch.optim.Adam, lr=0.02), TraceMeanField_ELBO()
    pyro.set_rng_seed(0)
    data, validation = torch.randn(2, 200, 1) + 0.3 * torch.randn(2, 200, 2)
    found = []
    for aggressive in (None, Aggressive(check_every=10)):
        options = {"optimizer": adam, "loss": loss, "aggressive": aggressive, "epochs": 30}
        history = train(data=data, validation=validation, batch_size=50, **options)
        found.append(mutual_information(linear_guide, validation, num_draws=10).item())
    assert found[0] < 0.05
    assert found[1] > 0.12
    assert history.aggressive[0]
    assert not history.aggressive[-1]
