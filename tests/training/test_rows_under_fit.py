"""`fit` gives each row of a minibatch its own parameters, or refuses; so does `MinibatchRows`.

z_i ~ N(0, 1) and x_i ~ N(z_i, 0.5): at the exact posterior of each row any draw gives the exact
log p(x), so that losses are compared with closed forms.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    fit,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation.search import Search
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.training import MinibatchRows

N, SIZE, NOISE = 11, 4, 0.5  # the last batch has 3 rows
X = torch.linspace(-3.0, 4.0, N, dtype=torch.float64)
EXACT = dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(X)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def of_all(x: Tensor) -> None:
    """The plate has the size of the data."""
    with plate_of_all(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def plate_of_all(x: Tensor) -> pyro.plate:
    return pyro.plate("data", N, subsample=x)


def drawn_rows(x: Tensor) -> None:
    """A plate that draws rows that nothing looks at: those of the batch are meant."""
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def recursive(model: Callable, **options: Any) -> RecursiveMixtureGuide:
    return RecursiveMixtureGuide(model, 2, schedule=Schedule(first=1), **options)


def refined(model: Callable, **options: Any) -> SemiAmortizedGuide:
    return SemiAmortizedGuide(model, AmortizedGuide(model, **options), steps=2)


MAKE: dict[str, Callable[..., LatentGuide]] = {
    "one": AmortizedGuide,
    "full": partial(AmortizedGuide, family="full"),
    "mixture": lambda model, **options: MixtureGuide(model, 2, **options),
    "recursive": recursive,
    "refined": refined,
}
MODELS: dict[str, tuple[Callable, dict[str, Any], float]] = {
    "batch": (model, {}, 1.0),
    "all": (of_all, {"create_plates": plate_of_all}, N / SIZE),
    "drawn": (drawn_rows, {}, N / SIZE),
}


def put_at_the_posterior(guide: LatentGuide) -> None:
    inner = getattr(guide, "guide", guide)
    precision = 1 + NOISE**-2
    params = torch.stack([X * NOISE**-2 / precision, torch.full_like(X, precision**-0.5).log()], -1)
    for part in getattr(inner, "components", [inner]):
        part.free_local.data.copy_(params)


def trained(model: Callable, guide: Any, epochs: int = 3, **options: Any) -> Any:
    still = partial(torch.optim.SGD, lr=0.0)
    settings = {"loss": Trace_ELBO(), "optimizer": still, "batch_size": SIZE, "progress": False}
    return fit(model, guide, options.pop("data", X), epochs=epochs, **{**settings, **options})


@pytest.mark.filterwarnings("ignore:Training has ended with 1 of 2 components")
@pytest.mark.parametrize("rows", MODELS)
@pytest.mark.parametrize("kind", MAKE)
def test_rows_of_a_batch_have_their_own_parameters(kind: str, rows: str) -> None:
    program, options, _ = MODELS[rows]
    guide = MAKE[kind](program, plate="data", **options)
    trained(program, guide, epochs=1)  # creates the parameters of all rows
    put_at_the_posterior(guide)
    seen = []

    class Recorded(Trace_ELBO):
        def loss_and_grads(self, model: Any, guide: Any, x: Tensor) -> Any:
            value = super().loss_and_grads(model, guide, x)
            exact = EXACT[torch.searchsorted(X, x)].sum() * (N / len(x) if rows != "batch" else 1)
            seen.append((value, -exact.item()))
            return value

    trained(program, guide, loss=Recorded())
    found, exact = torch.tensor(seen, dtype=torch.float64).T
    assert len(found) == 3 * 3
    # Steps of a refinement at the exact posterior move nothing but for rounding.
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Training has ended with 1 of 2 components")
@pytest.mark.parametrize("kind", MAKE)
def test_evaluation_after_fit_has_the_parameters_of_each_row(kind: str) -> None:
    guide = MAKE[kind](model, plate="data")
    trained(model, guide, epochs=1)
    put_at_the_posterior(guide)
    torch.testing.assert_close(log_marginal(model, guide, X, num_particles=2), EXACT)
    few = {"num_particles": 40, "search": Search(steps=1)}
    torch.testing.assert_close(gaps(model, guide, X, **few).elbo, EXACT, rtol=1e-6, atol=1e-6)
    index = torch.tensor([8, 0, 3])
    with MinibatchRows(index, N):
        found = log_marginal(model, guide, X[index], num_particles=2)
        torch.testing.assert_close(found, EXACT[index])
        found = gaps(model, guide, X[index], **few).elbo
        torch.testing.assert_close(found, EXACT[index], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"'data' has 3 entries, .*for 11 rows. Say which"):
        log_marginal(model, guide, X[index], num_particles=2)


@pytest.mark.slow
def test_training_reaches_the_evidence() -> None:
    guide = AmortizedGuide(model, plate="data")
    adam = partial(torch.optim.Adam, lr=0.1)
    trained(model, guide, epochs=120, optimizer=adam, loss=IWAE_ELBO(2, estimator="dreg"))
    found = log_marginal(model, guide, X, num_particles=20_000)
    torch.testing.assert_close(found, EXACT, atol=0.02, rtol=0)
    loc = guide.free_local[:, 0].detach()
    torch.testing.assert_close(loc, X * NOISE**-2 / (1 + NOISE**-2), atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore:Training has ended with")
def test_a_growing_mixture_grows_in_batches() -> None:
    schedule = Schedule(first=6, propose=6, refine=6, joint=3, draws=64)
    guide = RecursiveMixtureGuide(model, 2, plate="data", schedule=schedule)
    trained(model, guide, epochs=9, loss=RecursiveMixture_ELBO(4))
    assert [tuple(part.free_local.shape) for part in guide.components] == [(N, 2), (N, 2)]


def test_resumed_and_whole_batches() -> None:
    """The parameters of a guide that was prepared on all data; all rows in a new order."""
    guide = AmortizedGuide(model, plate="data")
    guide.prepare(X)
    put_at_the_posterior(guide)
    for options in ({"batch_size": N}, {"batch_size": None}, {"batch_size": 1}):
        history = trained(model, guide, **options)
        size = options["batch_size"] or N
        assert history.loss == pytest.approx([-float(EXACT.sum()) * size / N] * 3)


def test_a_plate_of_as_many_groups_is_not_one_of_rows() -> None:
    """4 groups, whatever the batch: each has its own parameters in every batch of 4 rows."""

    def grouped(x: Tensor) -> None:
        with pyro.plate("groups", SIZE):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)

    guides = AmortizedGuide(grouped, plate="groups"), AmortizedGuide(grouped, name="joint")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Plate 'data' has 4 rows")
        for guide in (*guides, autoguide.AutoNormal(grouped)):
            trained(grouped, guide)
    assert guides[0].free_local.shape == (SIZE, 2)


# --- Refusals


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X), **options)


def half(x: Tensor) -> Tensor:
    return x[:2]


def in_a_dict(x: Tensor) -> tuple[dict[str, Tensor]]:
    return ({"x": x},)


def of_dict(batch: Any) -> None:
    model(batch["x"] if isinstance(batch, dict) else batch)


JOINT = "one distribution for all entries of plate 'data', and each batch has other rows"
REFUSED: dict[str, tuple[Callable, dict[str, Any], str]] = {
    "joint": (AmortizedGuide, {}, JOINT),
    "joint mixture": (lambda model: MixtureGuide(model, 2), {}, JOINT),
    "joint flow": (FlowGuide, {}, JOINT),
    "joint in order": (AmortizedGuide, {"shuffle": False}, JOINT),
    "joint, all in another order": (AmortizedGuide, {"batch_size": N}, JOINT),
    "loader": (partial(AmortizedGuide, plate="data"),
               {"data": loader(batch_size=SIZE), "batch_size": None}, "which rows these are"),
    "shuffled loader": (partial(AmortizedGuide, plate="data"),
                        {"data": loader(batch_size=N, shuffle=True), "batch_size": None},
                        "which rows these are is unknown. Give fit tensors"),
    "transform": (partial(AmortizedGuide, plate="data"), {"transform": half}, "is unknown"),
    "validation": (partial(AmortizedGuide, plate="data"), {"validation": X + 0.1}, "is unknown"),
    **{
        kind.__name__: (kind, {}, f"{kind.__name__} has parameters for 4 rows of plate 'data', and")
        for kind in (autoguide.AutoNormal, autoguide.AutoDelta, autoguide.AutoDiagonalNormal,
                     autoguide.AutoNormalMessenger)
    },
    "AutoNormal of dicts": (lambda _: autoguide.AutoNormal(of_dict),
                            {"transform": in_a_dict}, "AutoNormal has parameters for 4 rows"),
    "AutoNormal in a mixture": (lambda model: MixtureGuide(model, [autoguide.AutoNormal(model)]),
                                {}, "MixtureGuide has parameters for 4 rows"),
    "AutoNormal, other data for validation": (autoguide.AutoNormal,
                                              {"batch_size": None, "validation": X + 0.1},
                                              "AutoNormal has parameters for 11 rows"),
    "AutoNormal, all in another order": (autoguide.AutoNormal, {"batch_size": N}, "for 11 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_without_numbers_are_refused(name: str) -> None:
    make, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trained(of_dict, make(model), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": None},
        {"data": loader(batch_size=N), "batch_size": None},
        {"batch_size": None, "validation": X},
        {"transform": lambda x: x + 0.0, "batch_size": None},
    ],
)
def test_all_rows_in_order_need_no_numbers(options: dict[str, Any]) -> None:
    for make in (AmortizedGuide, partial(AmortizedGuide, plate="data"), autoguide.AutoNormal):
        pyro.clear_param_store()
        trained(model, make(model), **options)


def test_validation_on_the_training_data_has_their_rows() -> None:
    guide = AmortizedGuide(model, plate="data")
    trained(model, guide, epochs=1)
    put_at_the_posterior(guide)
    history = trained(model, guide, validation=X)
    assert history.validation == pytest.approx([-float(EXACT.sum()) / 3] * 3)


# --- SVI


def steps(guide: Any) -> SVI:
    return SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())


@pytest.mark.parametrize("make", [AmortizedGuide, partial(AmortizedGuide, plate="data")])
def test_other_rows_are_told_once(make: Callable) -> None:
    svi = steps(make(model))
    svi.step(X[:4])
    with pytest.warns(UserWarning, match="parameters for each row of plate 'data', and its inputs"):
        svi.step(X[4:8])
    svi.step(X[3:7])


def test_the_same_rows_are_told_nothing() -> None:
    """Nor copies of them, nor what says which rows they are, nor an encoder."""
    holes = X.clone()
    holes[2] = torch.nan
    guide = AmortizedGuide(model, plate="data")
    for x in (X, X, X.clone(), X.clone(), X, X.clone(), X.clone()):
        guide(x)
    other = AmortizedGuide(model, plate="data", name="other")
    other.prepare(X)
    with pyro.validation_enabled(False):
        other(holes)
        other(holes.clone())
    encoded = AmortizedGuide(lambda x: model(x[:, 0]), torch.nn.Linear(1, 2).double(), name="e")
    encoded(X[:4, None])
    encoded(X[4:8, None])
    svi = steps(AmortizedGuide(model, plate="data", name="numbered"))
    for index in torch.randperm(8).split(4):
        with MinibatchRows(index, 8):
            svi.step(X[index])


def test_new_rows_in_the_same_memory_are_told() -> None:
    guide, buffer = AmortizedGuide(model, plate="data"), X[:4].clone()
    guide(buffer)
    buffer.copy_(X[4:8])
    with pytest.warns(UserWarning, match="its inputs have changed"):
        guide(buffer)


def test_a_plate_that_draws_other_rows_than_the_inputs_is_refused() -> None:
    """Pyro's idiom ``pyro.plate("data", N, subsample_size=len(x))``, with x a minibatch."""
    guide = AmortizedGuide(drawn_rows, plate="data")
    with pytest.raises(ValueError, match="draws 4 of 11 rows, and the inputs are as many rows of"):
        guide(X[:4])
    index = torch.tensor([5, 0, 9])
    with MinibatchRows(index, N):
        guide(X[index])
        put_at_the_posterior(guide)
        exact = EXACT[index].sum() * N / 3
        loss = IWAE_ELBO(2).loss(drawn_rows, guide, X[index])
    assert loss == pytest.approx(-exact.item())
