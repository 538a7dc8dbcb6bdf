"""Bad data, whatever the way in: an error that says what, where and what to do; nothing changes.

`DATA` is the table: an input, the ways in, the error. A failed step must leave no trace: the steps
after it are compared, bit for bit, with those of a run without it. Other arguments are in
test_bad_arguments.py; what each loss, guide or file refuses of its own is with its other tests.
"""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
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
NONE = Search(draws=1, steps=1)
Arguments = tuple[Any, ...]


# --- Programs


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


class Kind(NamedTuple):
    guide: Callable[[Callable], Any]
    loss: Callable[[], Any]
    ways: tuple[str, ...] = ("log_marginal", "gaps")


STAGES = Schedule(first=2, propose=2, refine=2, draws=100)
KINDS = {
    "hand": Kind(by_hand, lambda: IWAE_ELBO(3, estimator="dreg"), ("log_marginal",)),
    "amortized": Kind(encoded, lambda: MIWAE_ELBO(2, 3)),
    "mixture": Kind(
        lambda m: MixtureGuide(m, [encoded(m), encoded(m)]), lambda: Stratified_ELBO(2)
    ),
    "recursive": Kind(
        lambda m: RecursiveMixtureGuide(m, [encoded(m), encoded(m)], schedule=STAGES),
        lambda: RecursiveMixture_ELBO(4),
    ),
    "flow": Kind(
        lambda m: FlowGuide(m, "coupling", encoder=nn.Linear(2, 3), hidden=(4,), transforms=2),
        lambda: PIWAE_ELBO(2, 2),
    ),
    "refined": Kind(lambda m: SemiAmortizedGuide(m, encoded(m), steps=2), lambda: IWAE_ELBO(2)),
    "mapa": Kind(lambda m: MAPAGuide(m, nn.Linear(2, 1), features()), MAPA_ELBO, ()),
}  # fmt: skip
every_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ("hand", "mixture") else pytest.mark.slow) for k in KINDS],
)


def features() -> Tensor:
    return torch.tensor([[0.3, -1.2], [0.8, 0.1], [-0.5, 0.9], [1.4, 0.4]])


def numbers() -> Tensor:
    return torch.tensor([0.5, -0.3, 1.1, 0.2])


def good(kind: str) -> Arguments:
    return (features(),) if kind == "mapa" else (features(), numbers())


def spoiled(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[1] = value
    return tensor


# --- Data


class Bad(NamedTuple):
    """Arguments of model and guide, and the error; ``other`` where a guide or a way has its own.

    In ``other`` None says that the input is fine there.
    """

    arguments: Callable[[], Arguments]
    error: type[Exception]
    message: str
    other: dict[str, tuple[type[Exception], str] | None] = {}  # noqa: RUF012


FED = (
    r"(The encoder|The weights' network) of latents \['z'\] in plate 'data' failed on inputs of "
    r"shape \[{}\], {}.*Select and convert its inputs"
)
NUMBERS = r"(The encoder|The weights' network) of latents \['z'\] in plate 'data' returned NaN.*"
OF_PYRO = RuntimeError, "mat1 and mat2"  # a guide by hand: its own error, with Pyro's trace shapes
LENGTHS = ValueError, r"The tensors of data need one number of rows, got lengths \[4, {}\]"
NO_TENSOR = TypeError, "data must be tensors or a torch DataLoader, got {}"
NOT_FINITE = NonFiniteError, r"step 3.*data tensor '{}'"
CODES = ValueError, "queries have shape .* a row, and the references"

DATA = {
    "x has another width": Bad(
        lambda: (torch.ones(ROWS, 3), numbers()), RuntimeError, FED.format(r"\d, 3", "float64"),
        {"hand": OF_PYRO, "mapa": CODES, "mapa first": (ValueError, "fails with latent site")},
    ),
    "x has no features": Bad(
        lambda: (torch.ones(ROWS), numbers()), RuntimeError, FED.format("4", "float64"),
        {"hand": OF_PYRO, "mapa": CODES, "mapa first": (ValueError, "fails with latent site"),
         "mixture first": (ValueError, "weights='linear' needs inputs that are one tensor"),
         "recursive first": (ValueError, "weights='linear' needs inputs that are one tensor")},
    ),
    "x has integers": Bad(  # Linear of torch: no conversion that would hide a mistake
        lambda: (features().long(), numbers()), RuntimeError, FED.format(r"\d, 2", "int64"),
        {"hand": OF_PYRO, "mapa": None},
    ),
    "y has another length": Bad(
        lambda: (features(), numbers()[:3]), ValueError,
        r"Site 'y' has batch shape \(3,\), and plate 'data' at dim -1 has 4 entries.*"
        "same number of rows",
    ),
    "y has one row": Bad(  # broadcasting, as everywhere in Pyro; of data, `fit` knows better
        lambda: (features(), numbers()[:1]), ValueError, "",
        dict.fromkeys((*KINDS, "log_marginal", "gaps")),
    ),
    "y is a column": Bad(
        lambda: (features(), numbers()[:, None]), ValueError,
        r"Site 'y' has batch shape \(4, [14]\).* dim -2 belongs to no plate.*to_event",
    ),
    "y has NaN": Bad(
        lambda: (features(), spoiled(numbers(), torch.nan)), ValueError,
        r"Site 'y' observes values that are NaN or infinite: 1 of 4, at \[\[1\]\]. Clean.*mask",
        {"fit": (NonFiniteError, NOT_FINITE[1].format(1))},
    ),
    "y is infinite": Bad(
        lambda: (features(), spoiled(numbers(), torch.inf)), ValueError,
        r"Site 'y' observes values that are NaN or infinite: 1 of 4, at \[\[1\]\]",
        {"fit": (NonFiniteError, NOT_FINITE[1].format(1))},
    ),
    "x has NaN": Bad(
        lambda: (spoiled(features(), torch.nan), numbers()), ValueError,
        NUMBERS + r"in rows \[0\]. Clean the data",
        {"hand": (ValueError, "Expected parameter loc"), "mapa": (ValueError, "needs finite data"),
         "mapa first": (ValueError, r"Site 'x' observes values that are NaN or inf.*\[\[0, 1\]\]"),
         "fit": (NonFiniteError, NOT_FINITE[1].format(0))},
    ),
    "no rows": Bad(
        lambda: (features()[:0], numbers()[:0]), ValueError,
        r"A plate cannot be empty, and argument 0 has shape \[0, 2\].*Leave out batches without",
    ),
    "y is an array": Bad(
        lambda: (features(), numbers().numpy()), TypeError,
        "Site 'y' has a ndarray as its value.*torch.as_tensor",
    ),
    "y is a list": Bad(
        lambda: (features(), numbers().tolist()), TypeError,
        "Site 'y' has a list as its value.*torch.as_tensor",
    ),
    "y is true or false": Bad(
        lambda: (features(), numbers() > 0), RuntimeError,
        r"At site 'y', with a value of shape \[4\] and type torch.bool.*Convert the value",
    ),
    "y has integers": Bad(  # converted by Normal.log_prob, exactly
        lambda: (features(), numbers().long()), ValueError, "",
        dict.fromkeys((*KINDS, "log_marginal", "gaps", "fit")),
    ),
}  # fmt: skip


def expectation(bad: Bad, kind: str, way: str) -> tuple[type[Exception], str] | None:
    for key in (f"{kind} {way}", way, kind):
        if key in bad.other:
            return bad.other[key]
    return bad.error, bad.message


def arguments_of(bad: Bad, kind: str) -> Arguments:
    return bad.arguments()[:1] if kind == "mapa" else bad.arguments()


class Run:
    """A model, a guide and an optimiser, from one seed."""

    def __init__(self, kind: str) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        self.kind = KINDS[kind]
        self.decoder = nn.Linear(1, 2)
        self.model = model_of(self.decoder)
        self.guide = self.kind.guide(self.model)
        self.svi = SVI(self.model, self.guide, pyro.optim.Adam({"lr": 0.01}), self.kind.loss())

    def step(self, seed: int, *arguments: Any) -> float:
        pyro.set_rng_seed(seed)
        return self.svi.step(*arguments)

    def state(self) -> Any:
        """All that training moves: parameters, buffers, what the optimiser remembers."""
        store = pyro.get_param_store()
        modules = (self.decoder, self.guide)
        return (
            {name: store[name].unconstrained().detach().clone() for name in store},
            [dict(m.state_dict()) for m in modules if isinstance(m, nn.Module)],
            self.svi.optim.get_state(),
        )


def cloned(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def skip_where_absent(name: str, kind: str) -> None:
    if kind == "mapa" and name.startswith("y "):
        pytest.skip("a MAPAGuide's model has one observed site")


@every_kind
@pytest.mark.parametrize("name", DATA)
def test_a_bad_batch_leaves_no_trace(name: str, kind: str) -> None:
    """Neither in the first step, when all is made, nor in the third."""
    skip_where_absent(name, kind)
    bad, clean, seen = DATA[name], Run(kind), []
    for seed in range(4):
        clean.step(seed, *good(kind))
        seen.append(cloned(clean.state()))
    for position, way in ((0, "first"), (2, "third")):
        expected = expectation(bad, kind, way)
        run = Run(kind)
        for seed in range(position):
            run.step(seed, *good(kind))
        if expected is None:
            run.step(position, *arguments_of(bad, kind))
            continue
        with pytest.raises(expected[0], match=f"(?s){expected[1]}"):
            run.step(position, *arguments_of(bad, kind))
        if position:
            assert same(run.state(), seen[position - 1])
        for seed in range(position, 4):
            run.step(seed, *good(kind))
        assert same(run.state(), seen[-1]), f"after a bad {way} step"


@every_kind
@pytest.mark.parametrize("name", DATA)
def test_bad_data_cannot_be_evaluated(name: str, kind: str) -> None:
    skip_where_absent(name, kind)
    run = Run(kind)
    run.step(0, *good(kind))
    before = cloned(run.state())
    ways: dict[str, Callable] = {
        "log_marginal": partial(log_marginal, num_particles=10),
        "gaps": partial(gaps, num_particles=10, search=NONE),
    }
    for way in KINDS[kind].ways:
        expected = expectation(DATA[name], kind, way)
        if expected is None:
            ways[way](run.model, run.guide, *arguments_of(DATA[name], kind))
            continue
        with pytest.raises(expected[0], match=f"(?s){expected[1]}"):
            ways[way](run.model, run.guide, *arguments_of(DATA[name], kind))
    assert same(run.state(), before)


@pytest.mark.filterwarnings("ignore:Training has ended with")
@every_kind
@pytest.mark.parametrize("name", DATA)
def test_a_bad_third_batch_ends_fit(name: str, kind: str) -> None:
    """With the parameters that two good batches left."""
    skip_where_absent(name, kind)
    expected = expectation(DATA[name], kind, "fit")
    if name == "y has one row" or expected is None:
        pytest.skip("batches of a DataLoader are the caller's: broadcasting is as in a step")

    def train(*batches: Arguments) -> Any:
        run = Run(kind)
        loader = DataLoader(list(batches), batch_size=None, collate_fn=tuple)
        try:
            options = {"loss": run.kind.loss(), "epochs": 1, "seed": 4, "progress": False}
            fit(run.model, run.guide, loader, **options)
        except Exception as error:
            return run.state(), error
        return run.state(), None

    two = [good(kind), good(kind)]
    after_two, nothing = train(*two)
    assert nothing is None
    after_bad, error = train(*two, arguments_of(DATA[name], kind))
    with pytest.raises(expected[0], match=f"(?s){expected[1]}"):
        raise error
    assert same(after_bad, after_two)


WHOLE = {
    "y has another length": (ValueError, LENGTHS[1].format(3)),
    "y has one row": (ValueError, LENGTHS[1].format(1)),
    "no rows": (ValueError, r"data need one number of rows, got lengths \[0, 0\]"),
    "y is an array": (TypeError, NO_TENSOR[1].format("ndarray")),
    "y is a list": (TypeError, NO_TENSOR[1].format("list")),
}


@pytest.mark.parametrize("name", WHOLE)
def test_fit_knows_what_data_are(name: str) -> None:
    run = Run("amortized")
    with pytest.raises(WHOLE[name][0], match=WHOLE[name][1]):
        fit(run.model, run.guide, DATA[name].arguments(), loss=IWAE_ELBO(2), epochs=1)
    assert not pyro.get_param_store().keys()


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own
def test_without_validation_nan_data_are_seen_in_the_loss_alone() -> None:
    """Nothing waits for the device then: the step is taken, and the loss is NaN, as in Pyro."""
    data = features(), spoiled(numbers(), torch.nan)
    for loss in (Trace_ELBO(), IWAE_ELBO(2)):
        with pyro.validation_enabled(False):
            run = Run("hand")
            run.svi = SVI(run.model, run.guide, pyro.optim.Adam({"lr": 0.01}), loss)
            assert np.isnan(run.step(0, *data))
        assert any(each.isnan().any() for each in run.state()[0].values())
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="data tensor '1'"):
        run = Run("hand")
        fit(run.model, run.guide, data, loss=IWAE_ELBO(2), epochs=1, progress=False)
    assert all(each.isfinite().all() for each in run.state()[0].values())


def test_a_mask_hides_what_is_missing() -> None:
    """The remedy of the message works, and gives the evidence of what is there."""
    x = spoiled(numbers(), torch.nan)
    there = x.isfinite()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=there):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.nan_to_num())

    def posterior(x: Tensor) -> None:
        variance = torch.where(there, 0.5, 1.0)
        with pyro.plate("data", len(x)):
            loc = torch.where(there, x.nan_to_num() / 2, 0.0)
            pyro.sample("z", dist.Normal(loc, variance.sqrt()))

    exact = torch.where(there, dist.Normal(0.0, 2**0.5).log_prob(x.nan_to_num()), 0.0)
    torch.testing.assert_close(log_marginal(model, posterior, x, num_particles=5), exact)


# --- Types of data


BINARY = [0.0, 1.0, 1.0, 0.0]
TYPES = ("float32", "float64", "int64", "int32", "uint8", "bool")
LIKELIHOODS: dict[str, tuple[Callable[[Tensor], Any], set[str]]] = {
    "Normal": (lambda z: dist.Normal(z, 1.0), {"bool"}),
    # Their log-densities are made for numbers of the parameters' kind: torch's own error.
    "Bernoulli": (lambda z: dist.Bernoulli(logits=z), {"int64", "int32", "uint8", "bool"}),
    "Categorical": (lambda z: dist.Categorical(logits=torch.stack([z, -z], -1)), set()),
    "Poisson": (lambda z: dist.Poisson(z.exp()), set()),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_types_of_data(likelihood: str) -> None:
    """A type makes no difference, or the error names site and type."""
    make, refused = LIKELIHOODS[likelihood]

    def model(x: Tensor) -> None:
        with pyro.plate("data", ROWS):
            pyro.sample("x", make(pyro.sample("z", dist.Normal(0.0, 1.0))), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", ROWS):
            pyro.sample("z", dist.Normal(torch.zeros(ROWS), 1.0))

    def loss(x: Tensor) -> float:
        pyro.set_rng_seed(2)
        return IWAE_ELBO(3).loss(model, guide, x)

    expected = loss(torch.tensor(BINARY, dtype=torch.float64))
    for name in TYPES:
        x = torch.tensor(BINARY).to(getattr(torch, name))
        if name in refused:
            with pytest.raises(RuntimeError, match=rf"At site 'x'.* type torch.{name}.*Convert"):
                loss(x)
        else:
            # Bernoulli works in the precision of its data.
            assert loss(x) == pytest.approx(expected, rel=1e-6 if name == "float32" else 1e-12)
    if likelihood != "Normal":
        with pytest.raises(ValueError, match=r"At site 'x'.*to be within the support"):
            loss(torch.full((ROWS,), 0.5))
