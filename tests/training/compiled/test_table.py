"""Compiled steps over the table of models: with each loss, each estimator and each kind of guide.

`REFUSED` are the combinations that cannot be traced, with the reason.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor

from pyro_recursive import IWAE_ELBO, CompiledSVI, RecursiveMixture_ELBO, Stratified_ELBO
from tests.models import ROWS, Row
from tests.models.guides import KINDS, MODELS, Kind, estimators_of, made, quiet
from tests.models.losses import LOSSES

STEPS = 4
ESTIMATORS = ("pathwise", "stl", "dreg", "vimco", "dreg+score", "rws-dreg")
# By row, or by row and kind of guide.
REFUSED = {
    "sequential_subsample": "values that vary in each step are read in Python",  # its index
    "mixture_prior refined_table": "no parameter has a gradient",
}
OF_KINDS = (
    *("subsample_size", "events", "modules", "hierarchy", "supports", "nested", "obs_mask"),
    *("mask_handler", "ragged", "angles", "series", "mixture_prior", "improper"),
)
Make = Callable[[], tuple[Any, Any, tuple, Any]]


def trained(make: Make, svi: Callable[..., Any]) -> list[Tensor]:
    """Return the losses of some steps, the parameters after them, and a random number."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, args, loss = make()
    with quiet():
        loss.loss(model, guide, *args)  # the structure of a program is found once
        steps = svi(model, guide, Adam({"lr": 0.01}), loss)
        torch.manual_seed(1)
        losses = [steps.step(*args) for _ in range(STEPS)]
    found = [p.detach().clone() for _, p in pyro.get_param_store().named_parameters()]
    return [torch.tensor(losses), *found, torch.rand(())]


def traced(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, engine="graph", strict=True)


def check(make: Make, refused: str | None) -> None:
    """Compare compiled steps with `SVI`, where it trains; they must be refused if so listed."""
    try:
        expected = trained(make, SVI)
    except (NotImplementedError, ValueError):
        return  # the tests of losses and guides say which
    if len(expected) == 2:  # no parameters
        return
    if refused is not None:
        with pytest.raises(NotImplementedError, match=refused):
            trained(make, traced)
        return
    for one, other in zip(expected, trained(make, traced), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def with_loss(row: Row, loss: str, estimator: Any) -> None:
    def make() -> tuple[Any, Any, tuple, Any]:
        return *row.build(), row.args(), LOSSES[loss](2, 4, estimator=estimator)

    check(make, REFUSED.get(row.name))


@pytest.mark.quick("obs_mask")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_steps_on_any_model_are_those_of_svi(row: Row) -> None:
    with_loss(row, "IWAE_ELBO", "vimco" if row.sites == "discrete" else "dreg")


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_under_any_loss_are_those_of_svi(loss: str, estimator: str) -> None:
    with_loss(next(row for row in ROWS if row.name == "subsample_size"), loss, estimator)


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_steps_with_several_global_samples_are_those_of_svi(estimator: str) -> None:
    row = next(row for row in ROWS if row.name == "hierarchy")

    def make() -> tuple[Any, Any, tuple, Any]:
        options: dict[str, Any] = {"estimator": estimator, "global_latents": "elbo"}
        return *row.build(), row.args(), LOSSES["IWAE_ELBO"](2, 4, num_globals=3, **options)

    check(make, None)


def with_kind(row: Row, kind: Kind, loss: Callable[[Any], Any]) -> None:
    def make() -> tuple[Any, Any, tuple, Any]:
        setting, guide = made(row, kind)
        return setting.model, guide, setting.args, loss(guide)

    reason = REFUSED.get(row.name) or REFUSED.get(f"{row.name} {kind.name}")
    check(make, reason)


def model_of(name: str) -> Row:
    return next(row for row in MODELS if row.name == name)


@pytest.mark.quick("gaussian")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_steps_of_any_guide_are_those_of_svi(kind: Kind) -> None:
    for number, name in enumerate(OF_KINDS):
        is_listed = f"{name} {kind.name}" in REFUSED
        if number == KINDS.index(kind) % len(OF_KINDS) or is_listed:
            with_kind(
                model_of(name),
                kind,
                lambda guide: IWAE_ELBO(4, estimator=estimators_of(kind, guide)[-1]),
            )
    if kind.mixture and not kind.name.startswith("refined"):
        with_kind(model_of("events"), kind, lambda guide: Stratified_ELBO(2))
    if kind.recursive:
        with_kind(model_of("events"), kind, lambda guide: RecursiveMixture_ELBO(4))
