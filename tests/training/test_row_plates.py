"""Plates of the rows of a batch: found, shared between processes, taken for all data."""

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
from torch.utils.data import DataLoader, TensorDataset

from pyro_recursive.training import (
    fit,
)
from pyro_recursive.training.row_plates import Share, row_plates
from tests.oracles.training import (
    ROWS,
    auto_normal,
    factor_of_rows,
    few_rows,
    known_size,
    loop_over_rows,
    normal_data,
    prior_factor,
    rows_of_batch,
    run,
)


def grouped(plate: Callable[[Tensor], Any], own: float = 1.0, all_: float = 1.0) -> Callable:
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
    with pyro.plate("columns", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(4, len(x)))


def loop(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=x[i])


class LocalGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


def of_loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(normal_data()), 4, **options)


MISLED: dict[str, tuple[Callable, dict[str, Any], bool]] = {
    "plate of the batch": (grouped(of_batch), {}, True),
    "in a loop": (loop, {}, True),
    "loader": (grouped(of_batch), {"data": of_loader(), "batch_size": None}, True),
    "batches by themselves": (
        grouped(of_batch),
        {"data": DataLoader(list(normal_data().split(2)), batch_size=None), "batch_size": None},
        False,
    ),
    "warm-up": (grouped(of_batch), {"kl_warmup": 5}, True),
    "all scaled": (grouped(of_batch, all_=0.1), {}, True),
    "scaled by hand": (grouped(of_batch, own=3.0), {}, False),
    "plate of all": (grouped(of_all), {}, False),
    "plate of all, as many columns": (grouped(of_all), {"batch_size": 2}, False),
    "full batch": (grouped(of_batch), {"batch_size": None}, False),
    "one batch": (grouped(of_batch), {"batch_size": 99}, False),
    "local": (local, {"guide": LocalGuide()}, False),
    "vectorised": (
        grouped(of_batch), {"loss": Trace_ELBO(num_particles=4, vectorize_particles=True)}, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISLED)
def test_a_batch_taken_for_all_data_is_told(name: str) -> None:
    model, changes, misled = MISLED[name]
    guide = AutoNormal(poutine.block(model, hide_fn=lambda site: False))
    arguments = {**auto_normal(), "model": model, "guide": guide, **changes}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(lambda: arguments, epochs=2, transform=None)
    if not misled:
        assert not caught
        return
    (warning,) = caught
    assert warning.filename == run.__code__.co_filename
    assert re.search(
        "Plate 'data' has 4 rows, those of a batch, of 12: .*latent 'mean'.* counts 3 times too "
        r"much. Write pyro.plate\('data', 12, subsample=x\)",
        str(warning.message),
    )


@pytest.mark.slow
def test_the_remedy_gives_the_posterior_of_all_rows() -> None:
    """The posterior of a normal mean in closed form: of 12 rows, and of 4 for `of_batch`."""
    x, widths = normal_data(), []
    for plate in (of_all, of_batch):
        pyro.clear_param_store()
        guide = AutoNormal(grouped(plate), init_scale=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adam = partial(torch.optim.Adam, lr=0.03)
            loss = Trace_ELBO(num_particles=30, vectorize_particles=True, max_plate_nesting=2)
            options = {"optimizer": adam, "epochs": 60, "loss": loss, "progress": False}
            fit(grouped(plate), guide, x, batch_size=4, **options)
        widths.append(guide.scales.mean.item())
    assert widths[0] == pytest.approx((0.25 + 2 * ROWS) ** -0.5, rel=0.15)
    assert widths[1] == pytest.approx((0.25 + 2 * 4) ** -0.5, rel=0.15)


# --- Shares of several processes


@pytest.mark.parametrize("model", [known_size, rows_of_batch, loop_over_rows])
def test_plates_of_the_rows(model: Callable) -> None:
    expected = set() if model is known_size else {"data"}
    for rows in (1, 2, 4):
        assert row_plates(model, AutoNormal(model), (few_rows(rows),)) == expected


def subsample(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[index])


def test_a_plate_that_draws_its_own_rows_follows_them() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert row_plates(subsample, guide, (few_rows(6),)) == {"data"}
    with poutine.trace() as traced, Share({"data"}, rows=6, total=12):
        subsample(few_rows(6))
    assert traced.trace.nodes["x"]["scale"] == 6.0
    assert traced.trace.nodes["x"]["cond_indep_stack"][0].full_size == 12


def test_a_share_leaves_other_plates_alone() -> None:
    with poutine.trace() as traced, Share({"data"}, rows=4, total=8):
        rows_of_batch(few_rows(4))
    with Share({"data"}, rows=3, total=8):
        known_size_again = poutine.trace(known_size).get_trace(few_rows(4))
    nodes = traced.trace.nodes
    assert [nodes[name]["scale"] for name in ("mean", "w", "x")] == [1.0, 1.0, 2.0]
    assert known_size_again.nodes["x"]["scale"] == 7 / 4


def of_mean(likelihood: Callable[[Tensor, Tensor], Any]) -> Callable:
    """Return a model of a mean, from the log-likelihood's sites given it."""

    def model(x: Tensor) -> None:
        likelihood(pyro.sample("mean", dist.Normal(0.0, 1.0)), x)

    return model


def two_for_each_row(mean: Tensor, x: Tensor) -> None:
    with pyro.plate("twice", 2 * len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x.repeat(2))


statistics = of_mean(
    lambda mean, x: pyro.sample("average", dist.Normal(mean, len(x) ** -0.5), obs=x.mean())
)
loop_without_plate = of_mean(
    lambda mean, x: [pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=x[i]) for i in range(len(x))]
)


def mean_over_rows(x: Tensor) -> None:
    with poutine.scale(scale=1 / len(x)):
        rows_of_batch(x)


def latent_rows(x: Tensor, rows: int | None = None, factor: bool = False) -> None:
    with pyro.plate("data", rows or len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if rows is None and not factor:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    if factor:
        pyro.factor("all", z.sum())


def four_rows(x: Tensor) -> None:
    for i in pyro.plate("data", 4):
        pyro.sample(f"x{i}", dist.Normal(0.0, 1.0), obs=x[i])


def prior_of_rows(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.mean(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def factor_in_guide(x: Tensor) -> None:
    pyro.sample("mean", dist.Delta(pyro.param("loc", torch.tensor(0.3))))
    pyro.factor("guided", -x.sum(), has_rsample=True)


def draws(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def in_no_plate(mean: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x)


REFUSED: dict[str, tuple[Callable, Any, str]] = {
    "event": (of_mean(in_no_plate), AutoNormal,
              r"site 'x', in no plate .* shape \(4,\) with 4, shape \(2,\) with 2"),
    "scale": (mean_over_rows, AutoNormal,
              "the scale of site '(w|x|mean)' depends .* 0.25 with 4, 0.5 with 2"),
    "rows": (latent_rows, AutoNormal, "plate 'data' of site 'z.*' keeps its 4 rows"),
    "guide": (latent_rows, lambda _: partial(latent_rows, rows=4),
              "plate 'data' of site 'z' keeps its 4 rows"),
    "fixed": (four_rows, AutoNormal, "do not run with 2 rows after 4.*IndexError"),
    "dict": (known_size, AutoNormal, "it begins with dict"),
    "factor": (factor_of_rows, AutoDelta,
               "model site 'all', in no plate .* with 4, .*nats with 2"),
    "statistics": (statistics, AutoNormal, "model site 'average', in no plate"),
    "prior": (prior_of_rows, AutoNormal, "model site 'mean', in no plate"),
    "no plate": (loop_without_plate, AutoNormal,
                 "model site 'x2', in no plate .*nats with 4, no site with 2"),
    "twice": (of_mean(two_for_each_row), AutoNormal,
              r"'x', in no plate of the rows, .* shape \(8,\) with 4, shape \(4,\) with 2"),
    "guide's factor": (known_size, lambda _: factor_in_guide, "guide site 'guided', in no plate"),
    "latent rows": (partial(latent_rows, factor=True), lambda _: draws,
                    "model site 'all', in no plate"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_cannot_be_shared_are_refused(name: str) -> None:
    model, make_guide, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        row_plates(model, make_guide(model), ({},) if name == "dict" else (few_rows(4),))


def test_few_rows_are_seen_too() -> None:
    for model in (factor_of_rows, statistics, prior_of_rows, loop_without_plate):
        for rows in (2, 3):
            with pytest.raises(ValueError, match="in no plate of the rows, depends on its rows"):
                row_plates(model, AutoDelta(model), (few_rows(rows),))


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
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean + noise, scale), obs=x)


def amortized(x: Tensor) -> None:
    """Its latents outside the plate of the rows are amortised."""
    noise = torch.randn(len(x))
    pyro.sample("mean", dist.Normal((x + noise).mean(), 1.0))
    with pyro.plate("others", 50, subsample_size=6) as index:
        pyro.sample("bias", dist.Normal(index.double(), 1.0))


def test_what_is_of_no_row_may_be_outside_of_their_plates() -> None:
    for rows in (2, 8):
        assert row_plates(other_minibatch, amortized, (few_rows(rows),)) == {"data"}
        assert row_plates(prior_factor, AutoNormal(prior_factor), (few_rows(rows),)) == {"data"}
