"""Bad data, whatever the way in: an error that says what, where and what to do; nothing changes.

`DATA` is the table: an input, the ways in, the error. A failed step must leave no trace: the steps
after it are compared, bit for bit, with those of a run without it.
"""

import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_recursive import (
    IWAE_ELBO,
    MAPA_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MAPAGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    Stratified_ELBO,
    fit,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation.search import Search
from pyro_recursive.training import NonFiniteError
from tests.oracles.bitwise import same

ROWS = 4  # as many as Stratified_ELBO(2) draws from two components: a dim must not pass for another
Arguments = tuple[Any, ...]
Error = tuple[type[Exception], str]


# Programs


def model_of(decoder: nn.Module) -> Callable:
    def model(x: Tensor, y: Any = None) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model


def encoded(model: Callable) -> AmortizedGuide:
    return AmortizedGuide(model, nn.Linear(2, 2))


def by_hand(model: Callable) -> Callable:
    encoder = nn.Linear(2, 2)

    def guide(x: Tensor, y: Any = None) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return guide


def growing(model: Callable) -> RecursiveMixtureGuide:
    schedule = Schedule(first=2, propose=2, refine=2, draws=100)
    return RecursiveMixtureGuide(model, [encoded(model), encoded(model)], schedule=schedule)


def flow(model: Callable) -> FlowGuide:
    return FlowGuide(model, "coupling", encoder=nn.Linear(2, 3), hidden=(4,), transforms=2)


KINDS: dict[str, tuple[Callable[[Callable], Any], Callable[[], Any]]] = {
    "hand": (by_hand, lambda: IWAE_ELBO(3, estimator="dreg")),
    "amortized": (encoded, lambda: MIWAE_ELBO(2, 3)),
    "mixture": (lambda m: MixtureGuide(m, [encoded(m), encoded(m)]), lambda: Stratified_ELBO(2)),
    "recursive": (growing, lambda: RecursiveMixture_ELBO(4)),
    "flow": (flow, lambda: PIWAE_ELBO(2, 2)),
    "refined": (lambda m: SemiAmortizedGuide(m, encoded(m), steps=2), lambda: IWAE_ELBO(2)),
    "mapa": (lambda m: MAPAGuide(m, nn.Linear(2, 1), features()), MAPA_ELBO),
}
EVALUATIONS: dict[str, Callable] = {
    "log_marginal": partial(log_marginal, num_particles=10),
    "gaps": partial(gaps, num_particles=10, search=Search(draws=1, steps=1)),
}


def features() -> Tensor:
    return torch.tensor([[0.3, -1.2], [0.8, 0.1], [-0.5, 0.9], [1.4, 0.4]])


def targets() -> Tensor:
    return torch.tensor([0.5, -0.3, 1.1, 0.2])


def good(kind: str) -> Arguments:
    return (features(),) if kind == "mapa" else (features(), targets())


def spoiled(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[1] = value
    return tensor


# Data


class Bad(NamedTuple):
    """Arguments of model and guide, and the error; ``other`` where a guide or a way has its own.

    In ``other`` None says that the input is fine there.
    """

    arguments: Callable[[], Arguments]
    error: type[Exception]
    message: str
    other: dict[str, Error | None] = {}  # noqa: RUF012


ENCODER = r"(encoder|weights' network) of latents \['z'\] in plate 'data' "
FED = ENCODER + r"failed on inputs of shape \[{}\], {}"
OF_PYRO = RuntimeError, "mat1 and mat2"  # a guide by hand: its own error, with Pyro's trace shapes
OF_MAPA = {"mapa": (ValueError, "ueries have shape"), "mapa first": (ValueError, "site 'z'")}
AT_SITE = ValueError, "At site 'x', with a value of shape"  # the check of a new guide's start
NOT_FINITE = "Site 'y' observes values that are NaN or infinite"
FINE = dict.fromkeys((*KINDS, *EVALUATIONS))

DATA = {
    "x has another width": Bad(
        lambda: (torch.ones(ROWS, 3), targets()), RuntimeError, FED.format(r"\d, 3", "float64"),
        {"hand": OF_PYRO, **OF_MAPA, "first": AT_SITE, "hand first": OF_PYRO},
    ),
    "x has no features": Bad(
        lambda: (torch.ones(ROWS), targets()), RuntimeError, FED.format("4", "float64"),
        {"hand": OF_PYRO, **OF_MAPA, "first": AT_SITE, "hand first": OF_PYRO},
    ),
    "x has integers": Bad(  # Linear of torch: no conversion that would hide a mistake
        lambda: (features().long(), targets()), RuntimeError, FED.format(r"\d, 2", "int64"),
        {"hand": OF_PYRO, "mapa": None},
    ),
    "y has another length": Bad(
        lambda: (features(), targets()[:3]), ValueError,
        r"Site 'y' has batch shape \(3,\).*plate 'data' has 4 rows",
    ),
    "y has one row": Bad(  # broadcasting, as everywhere in Pyro; of data, `fit` knows better
        lambda: (features(), targets()[:1]), ValueError, "", FINE | {"fit": None},
    ),
    "y is a column": Bad(
        lambda: (features(), targets()[:, None]), ValueError,
        r"Site 'y' has batch shape \(4, [14]\).* dim -2 .*no plate",
    ),
    "y has NaN": Bad(
        lambda: (features(), spoiled(targets(), torch.nan)), ValueError, NOT_FINITE,
        {"fit": (NonFiniteError, r"step 3.*data tensor '1'")},
    ),
    "x has NaN": Bad(
        lambda: (spoiled(features(), torch.nan), targets()), ValueError,
        ENCODER + r"returned NaN.*in rows \[0\]",
        {"hand": (ValueError, "Expected parameter loc"), "mapa": (ValueError, "needs finite data"),
         "first": (ValueError, "Site 'x' observes values that are NaN or infinite"),
         "hand first": (ValueError, "Expected parameter loc"),
         "fit": (NonFiniteError, r"step 3.*data tensor '0'")},
    ),
    "no rows": Bad(
        lambda: (features()[:0], targets()[:0]), ValueError,
        r"A plate cannot be empty, and argument 0 has shape \[0, 2\]",
    ),
    "y is an array": Bad(
        lambda: (features(), targets().numpy()), TypeError,
        "Site 'y' has a ndarray as its value.*torch.as_tensor",
    ),
    "y is true or false": Bad(
        lambda: (features(), targets() > 0), RuntimeError, "At site 'y'.*bool.*Convert the value",
    ),
    "y has integers": Bad(  # converted by Normal.log_prob, exactly
        lambda: (features(), targets().long()), ValueError, "", FINE | {"fit": None},
    ),
}  # fmt: skip


def expectation(name: str, kind: str, way: str) -> Error | None:
    bad = DATA[name]
    for key in (f"{kind} {way}", way, kind):
        if key in bad.other:
            return bad.other[key]
    return bad.error, bad.message


def arguments_of(name: str, kind: str) -> Arguments:
    return DATA[name].arguments()[: len(good(kind))]


class Run:
    """A model, a guide and an optimiser, from one seed."""

    def __init__(self, kind: str) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        guide, self.make_loss = KINDS[kind]
        self.decoder = nn.Linear(1, 2)
        self.model = model_of(self.decoder)
        self.guide = guide(self.model)
        self.optimizer = pyro.optim.Adam({"lr": 0.01})

    def step(self, seed: int, *arguments: Any, loss: Any = None) -> float:
        pyro.set_rng_seed(seed)
        svi = SVI(self.model, self.guide, self.optimizer, loss or self.make_loss())
        return svi.step(*arguments)

    def state(self) -> Any:
        """All that training moves: parameters, buffers, what the optimiser remembers."""
        store = pyro.get_param_store()
        modules = (self.decoder, self.guide)
        return (
            {name: store[name].unconstrained().detach().clone() for name in store},
            [dict(m.state_dict()) for m in modules if isinstance(m, nn.Module)],
            self.optimizer.get_state(),
        )


def cloned(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


@cache
def states_of_good_steps(kind: str) -> list[Any]:
    clean, seen = Run(kind), []
    for seed in range(4):
        clean.step(seed, *good(kind))
        seen.append(cloned(clean.state()))
    return seen


def fitted(kind: str, *batches: Arguments) -> tuple[Any, Exception | None]:
    """Return the state after `fit` on some batches, and what it has raised."""
    run = Run(kind)
    loader = DataLoader(list(batches), batch_size=None, collate_fn=tuple)
    options: dict[str, Any] = {"loss": run.make_loss(), "epochs": 1, "seed": 4, "progress": False}
    try:
        fit(run.model, run.guide, loader, **options)
    except Exception as error:
        return cloned(run.state()), error
    return cloned(run.state()), None


@cache
def fitted_on_two(kind: str) -> Any:
    state, error = fitted(kind, good(kind), good(kind))
    assert error is None
    return state


# A MAPAGuide's model has one observed site.
every_combination = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind in ("hand", "mixture") else pytest.mark.slow)
        for name in DATA
        for kind in KINDS
        if kind != "mapa" or not name.startswith("y ")
    ],
)


@pytest.mark.quick(4)
@every_combination
def test_a_bad_batch_leaves_no_trace(name: str, kind: str) -> None:
    """Neither in the first step, when all is made, nor in the third."""
    seen = states_of_good_steps(kind)
    for position, way in ((0, "first"), (2, "third")):
        expected = expectation(name, kind, way)
        run = Run(kind)
        for seed in range(position):
            run.step(seed, *good(kind))
        if expected is None:
            run.step(position, *arguments_of(name, kind))
            continue
        with pytest.raises(expected[0], match=f"(?s){expected[1]}"):
            run.step(position, *arguments_of(name, kind))
        if position:
            assert same(run.state(), seen[position - 1])
        for seed in range(position, 4):
            run.step(seed, *good(kind))
        assert same(run.state(), seen[-1]), f"after a bad {way} step"


@pytest.mark.quick(4)
@every_combination
def test_bad_data_cannot_be_evaluated(name: str, kind: str) -> None:
    run = Run(kind)
    run.step(0, *good(kind))
    before = cloned(run.state())
    ways = {"hand": ["log_marginal"], "mapa": []}.get(kind, list(EVALUATIONS))
    for way in ways:
        evaluate = partial(EVALUATIONS[way], run.model, run.guide, *arguments_of(name, kind))
        expected = expectation(name, kind, way)
        if expected is None:
            evaluate()
            continue
        with pytest.raises(expected[0], match=f"(?s){expected[1]}"):
            evaluate()
    assert same(run.state(), before)


@pytest.mark.quick(4)
@pytest.mark.filterwarnings("ignore:Training has ended with")
@every_combination
def test_a_bad_third_batch_ends_fit(name: str, kind: str) -> None:
    """With the parameters that two good batches left."""
    expected = expectation(name, kind, "fit")
    state, error = fitted(kind, good(kind), good(kind), arguments_of(name, kind))
    if expected is None:
        assert error is None
        return
    with pytest.raises(expected[0], match=f"(?s){expected[1]}"):
        raise error
    assert same(state, fitted_on_two(kind))


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own
def test_without_validation_nan_data_are_seen_in_the_loss_alone() -> None:
    """Nothing waits for the device then: the step is taken, and the loss is NaN, as in Pyro."""
    data = features(), spoiled(targets(), torch.nan)
    for loss in (Trace_ELBO(), IWAE_ELBO(2)):
        with pyro.validation_enabled(False):
            run = Run("hand")
            assert np.isnan(run.step(0, *data, loss=loss))
        assert any(each.isnan().any() for each in run.state()[0].values())
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="data tensor '1'"):
        run = Run("hand")
        fit(run.model, run.guide, data, loss=IWAE_ELBO(2), epochs=1, progress=False)
    assert all(each.isfinite().all() for each in run.state()[0].values())
