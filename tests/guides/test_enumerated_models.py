"""Guides of models with enumerated latents: this package's leave these out, Pyro's need a block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
    Stratified_ELBO,
)
from tests.models.enumerated import ENUMERATED, Enumerated

PLATES = {"gmm": "data", "hmm": "data", "lda": "documents", "nested": "group", "recapture": None}
ROWS = [row for row in ENUMERATED if row.name in PLATES]
over = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
ignored = pytest.mark.filterwarnings("ignore:Plate '.*' encloses latent site")


def inputs(row: Enumerated, x: Tensor) -> Tensor:
    """The data of each row, ``[rows, features]``."""
    rows = x if row.name in ("gmm", "nested") else x.mT
    return rows.reshape(len(rows), -1).to(torch.get_default_dtype())


def encoded(model: Callable, row: Enumerated) -> AmortizedGuide:
    of_rows = partial(inputs, row)
    return AmortizedGuide(model, nn.Linear(of_rows(row.x()).shape[1], 2), inputs=of_rows)


def refined(model: Callable, row: Enumerated) -> SemiAmortizedGuide:
    return SemiAmortizedGuide(model, encoded(model, row), steps=1)


# With the loss that trains it.
GUIDES: dict[str, tuple[Callable[[Callable, Enumerated], Any], Callable[[], Any]]] = {
    "diagonal": (lambda model, row: AmortizedGuide(model), partial(IWAE_ELBO, 3)),
    "full": (lambda model, row: AmortizedGuide(model, family="full"), partial(IWAE_ELBO, 3)),
    "table": (
        lambda model, row: AmortizedGuide(model, plate=PLATES[row.name]),
        partial(IWAE_ELBO, 3, estimator="dreg"),
    ),
    "encoder": (encoded, partial(IWAE_ELBO, 3, estimator="stl")),
    "flow": (
        lambda model, row: FlowGuide(model, transforms=2, hidden=(4,)),
        partial(IWAE_ELBO, 3, estimator="dreg"),
    ),
    "mixture": (
        lambda model, row: MixtureGuide(model, 2, plate=PLATES[row.name]),
        partial(Stratified_ELBO, 2),
    ),
    "recursive": (
        lambda model, row: RecursiveMixtureGuide(model, 2, plate=PLATES[row.name]),
        partial(RecursiveMixture_ELBO, 3),
    ),
    "refined": (refined, partial(IWAE_ELBO, 3)),
}
PYROS = (
    *("AutoNormal", "AutoDelta", "AutoDiagonalNormal", "AutoMultivariateNormal"),
    *(
        "AutoLowRankMultivariateNormal",
        "AutoStructured",
        "AutoNormalMessenger",
        "AutoHierarchicalNormalMessenger",
    ),
)


def latents(program: Callable, x: Tensor) -> set[str]:
    """The latents of a program that are not auxiliary."""
    trace = poutine.trace(program).get_trace(x)
    names = trace.stochastic_nodes
    return {name for name in names if not trace.nodes[name]["infer"].get("is_auxiliary")}


def check(row: Enumerated, make: Callable[[Callable], Any], loss: Any) -> None:
    """Value and gradients are those of the model with the sums by hand."""
    found, state, names = [], {}, latents(row.guide, row.x())
    for model in (row.model, row.collapsed):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        guide = make(model)
        assert latents(guide, row.x()) == names
        guide.load_state_dict(state := state or guide.state_dict())
        pyro.set_rng_seed(3)
        value = loss.loss_and_grads(model, guide, row.x())
        leaves = dict(sorted(pyro.get_param_store().named_parameters())).values()
        grads = [leaf.grad.flatten() for leaf in leaves if leaf.grad is not None]
        found.append(torch.cat([torch.tensor([value]), *grads]))
    assert len(found[0]) > 2 and found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@ignored
@pytest.mark.quick(8)
@over
@pytest.mark.parametrize("kind", GUIDES)
def test_guides_leave_enumerated_latents_out(kind: str, row: Enumerated) -> None:
    if PLATES[row.name] is None and kind in ("encoder", "refined", "table", "mixture", "recursive"):
        pytest.skip("no local latents")
    make, loss = GUIDES[kind]
    check(row, lambda model: make(model, row), loss())


@ignored
@pytest.mark.quick(6)
@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row.name)  # a mixture has no transform
@pytest.mark.parametrize("kind", PYROS)
def test_pyros_guides_need_a_block(kind: str, row: Enumerated) -> None:
    hidden = latents(row.model, row.x()) - latents(row.guide, row.x())
    make = getattr(autoguide, kind)
    with pytest.raises(Exception, match="discrete"):
        make(row.model)(row.x())
    check(row, lambda model: make(poutine.block(model, hide=[*hidden])), IWAE_ELBO(3))
