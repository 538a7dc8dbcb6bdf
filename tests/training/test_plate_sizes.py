"""Plates of the rows of a batch: those that take it for all data, and what cannot be shared."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from pyro_recursive.training import fit
from pyro_recursive.training.plate_sizes import check_shares
from tests.oracles.training import (
    ROWS,
    auto_normal,
    factor_of_rows,
    few_rows,
    known_size,
    loop_over_rows,
    normal_data,
    prior_factor,
    run,
)

# --- One process: a batch taken for all data


def grouped(plate: Callable[[Tensor], Any], own: Any = 1.0, all_: float = 1.0) -> Callable:
    """Return a model of a global mean whose rows, and two columns, are in plates."""

    def model(x: Tensor) -> None:
        with poutine.scale(scale=all_):
            mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
            with poutine.scale(scale=own), pyro.plate("columns", 2, dim=-2), plate(x):
                pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.stack([x, x]))

    return model


def of_batch(x: Tensor) -> Any:
    return pyro.plate("data", len(x), dim=-1)


def of_all(x: Tensor) -> Any:
    return pyro.plate("data", ROWS, subsample=x, dim=-1)


def local(x: Tensor) -> None:
    """All latents in one plate of the rows, the data in another; 4 columns as in a batch of 4."""
    with pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 4, dim=-2), of_batch(x):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(4, len(x)))


def loop(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=x[i])


def as_many_groups(x: Tensor) -> None:
    """4 means, each of the columns of a batch of 4 rows."""
    with pyro.plate("groups", 4, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with of_batch(x):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x.expand(4, len(x)))


def as_many_sensors(x: Tensor) -> None:
    """4 sensors whose data are all in each call, beside a minibatch of 4 rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("sensors", 4):
        pyro.sample("s", dist.Normal(mean, 1.0), obs=torch.ones(4))
    with of_all(x):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class LocalGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


vectorised = Trace_ELBO(num_particles=4, vectorize_particles=True)
loader = DataLoader(TensorDataset(normal_data()), 4)
part = DataLoader(TensorDataset(normal_data()), 8, sampler=SubsetRandomSampler(range(8)))


def in_a_dict(x: Tensor) -> tuple[dict[str, Tensor]]:
    return ({"x": x},)


def of_dict(model: Callable) -> Callable:
    return lambda batch: model(batch["x"])


MISLED: dict[str, tuple[Callable, dict[str, Any], bool]] = {
    "plate of the batch": (grouped(of_batch), {"kl_warmup": 5}, True),
    "in a loop": (loop, {}, True),
    "as many groups": (as_many_groups, {}, True),
    "as many sensors": (as_many_sensors, {}, False),
    "loader": (grouped(of_batch), {"data": loader, "batch_size": None}, True),
    "all scaled": (grouped(of_batch, all_=0.1), {}, True),
    "scaled by hand": (grouped(of_batch, own=3.0), {}, False),
    "row by row": (grouped(of_batch, own=torch.tensor([3.0, 1.0, 1.0, 1.0])), {}, False),
    "plate of all, as many columns": (grouped(of_all), {"batch_size": 2}, False),
    "full batch": (grouped(of_batch), {"batch_size": None}, False),
    "all of a part": (grouped(of_batch), {"data": part, "batch_size": None}, False),
    "local": (local, {"guide": LocalGuide()}, False),
    "dicts": (of_dict(grouped(of_batch)), {"transform": in_a_dict}, True),
    "dicts of all": (of_dict(grouped(of_all)), {"transform": in_a_dict}, False),
    "vectorised": (grouped(of_batch), {"loss": vectorised}, True),
}


@pytest.mark.parametrize("name", MISLED)
def test_a_batch_taken_for_all_data_is_told(name: str) -> None:
    model, changes, misled = MISLED[name]
    guide = AutoNormal(poutine.block(model, hide_fn=lambda site: False))
    arguments = {**auto_normal(), "transform": None, "model": model, "guide": guide, **changes}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(lambda: arguments, epochs=2).rows[0] > 1
    assert len(caught) == misled
    for warning in caught:
        assert warning.filename == run.__code__.co_filename
        assert re.search(
            "Plate 'data' has 4 rows, those of a batch, of 12: .*latent 'mean'.* counts 3 times "
            r"too much. Write pyro.plate\('data', 12, subsample=x\)",
            str(warning.message),
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Plate 'data' has 4 rows")
@pytest.mark.parametrize(("plate", "rows"), [(of_all, ROWS), (of_batch, 4)])
def test_the_remedy_gives_the_posterior_of_all_rows(plate: Callable, rows: int) -> None:
    """The posterior of a normal mean in closed form."""
    guide = AutoNormal(grouped(plate), init_scale=0.3)
    adam = partial(torch.optim.Adam, lr=0.03)
    loss = Trace_ELBO(num_particles=30, vectorize_particles=True, max_plate_nesting=2)
    options = {"optimizer": adam, "epochs": 60, "loss": loss, "progress": False}
    fit(grouped(plate), guide, normal_data(), batch_size=4, **options)
    assert guide.scales.mean.item() == pytest.approx((0.25 + 2 * rows) ** -0.5, rel=0.15)


# --- Several processes


def of_mean(likelihood: Callable[[Tensor, Tensor], Any]) -> Callable:
    """Return a model of a mean, from the log-likelihood's sites given it."""

    def model(x: Tensor) -> None:
        likelihood(pyro.sample("mean", dist.Normal(0.0, 1.0)), x)

    return model


def two_for_each_row(mean: Tensor, x: Tensor) -> None:
    with pyro.plate("twice", 2 * len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x.repeat(2))


def statistics(mean: Tensor, x: Tensor) -> None:
    pyro.sample("average", dist.Normal(mean, len(x) ** -0.5), obs=x.mean())


def no_plate(mean: Tensor, x: Tensor) -> None:
    for i in range(len(x)):
        pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=x[i])


def event(mean: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x)


def mean_of_likelihoods(mean: Tensor, x: Tensor) -> None:
    with pyro.plate("data", 7, subsample=x), poutine.scale(scale=1 / len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def four_rows(x: Tensor) -> None:
    for i in pyro.plate("data", 4):
        pyro.sample(f"x{i}", dist.Normal(0.0, 1.0), obs=x[i])


def prior_of_rows(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.mean(), 1.0))
    with pyro.plate("data", 7, subsample=x):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def factor_in_guide(x: Tensor) -> None:
    pyro.sample("mean", dist.Delta(pyro.param("loc", torch.tensor(0.3))))
    pyro.factor("guided", -x.sum(), has_rsample=True)


def in_no_plate(site: str) -> str:
    return rf"density of {site}, in no plate of the rows, .*Write pyro.plate\(name, N, subsample=x"


REFUSED: dict[str, tuple[Callable, Any, str]] = {
    "plate": (grouped(of_batch), AutoNormal,
              r"'data' has the size of a batch. Write pyro.plate\('data', N, subsample=x\) with N"),
    "loop": (loop, AutoNormal, "Plate 'data' has the size of a batch"),
    "twice": (of_mean(two_for_each_row), AutoNormal, "Plate 'twice' has the size of a batch"),
    "fixed": (four_rows, AutoNormal, r"do not run with a part of a batch \(index 2 is out of"),
    "event": (of_mean(event), AutoNormal, in_no_plate("model site 'x'")),
    "no plate": (of_mean(no_plate), AutoDelta, in_no_plate(r"model site 'x\d'")),
    "statistics": (of_mean(statistics), AutoDelta, in_no_plate("model site 'average'")),
    "factor": (factor_of_rows, AutoDelta, in_no_plate("model site 'all'")),
    "prior": (prior_of_rows, AutoDelta, in_no_plate("model site 'mean'")),
    "guide's factor": (known_size, lambda _: factor_in_guide, in_no_plate("guide site 'guided'")),
    "scale": (of_mean(mean_of_likelihoods), AutoNormal, "The scale of model site 'x' dep"),
}  # fmt: skip


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_cannot_be_shared_are_refused(name: str, rows: int) -> None:
    model, make_guide, message = REFUSED[name]
    if name == "fixed" and rows < 4:
        return
    with pytest.raises(ValueError, match=message):
        check_shares(model, make_guide(model), (few_rows(rows),))


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of a batch, but a dict has none"):
        check_shares(known_size, AutoDelta(known_size), ({"x": 4.0},))


def test_rows_in_a_dict_are_shared() -> None:
    for model, make, message in (REFUSED["plate"], REFUSED["twice"]):
        with pytest.raises(ValueError, match=message):
            check_shares(of_dict(model), make(of_dict(model)), ({"x": few_rows(4)},))
    model = of_dict(known_size)
    check_shares(model, AutoDelta(model), ({"x": few_rows(4)},))


def other_minibatch(x: Tensor) -> None:
    """Other data with minibatches of their own, and a latent that the guide does not have."""
    noise = torch.randn(len(x))  # later draws differ between batches
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    kinds = dist.Categorical(torch.ones(50))
    scale = 1.0 + pyro.sample("kind", kinds, infer={"enumerate": "parallel"})
    with pyro.plate("others", 50, subsample_size=6) as index:
        bias = pyro.sample("bias", dist.Normal(mean, 1.0))
        pyro.sample("other", dist.Normal(bias, scale), obs=index.double())
    with pyro.plate("rest", 50, subsample_size=3) as index:
        pyro.sample("more", dist.Normal(mean, scale), obs=index.double())
    with pyro.plate("data", 7, subsample=x), poutine.scale(scale=noise.exp()):
        pyro.sample("x", dist.Normal(mean + noise, scale), obs=x)


def amortized(x: Tensor) -> None:
    """Its latents outside the plate of the rows are amortised."""
    noise = torch.randn(len(x))
    pyro.sample("mean", dist.Normal((x + noise).mean(), 1.0))
    with pyro.plate("others", 50, subsample_size=6) as index:
        pyro.sample("bias", dist.Normal(index.double(), 1.0))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_what_is_of_no_row_may_be_outside_of_their_plates(rows: int) -> None:
    for model in (known_size, loop_over_rows, prior_factor):
        check_shares(model, AutoNormal(model), (few_rows(rows),))
    check_shares(other_minibatch, amortized, (few_rows(rows),))
