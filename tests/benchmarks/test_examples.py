"""Pyro's own examples: what trains does climb, what is refused says why."""

import math
import re
from collections.abc import Iterable

import pytest
import torch

from benchmarks.examples import EXAMPLES, LOSSES, Settings, train

NEEDS_VIMCO = "is not reparameterised.*use 'vimco' or 'dreg.vimco'"
REFUSED = {
    "scANVI, enumerated": "Guide site 'y' is enumerated given a sampled site",
    "VariationalGP": "expectation over the guide",
    "CEVAE with classifiers": "Guide site 't' is observed: drop its obs=",
}
PATHWISE = {"IWAE dreg", "MIWAE", "PIWAE", "CIWAE"}
DISCRETE = {"SS-VAE, unlabelled", "AIR", "scANVI, unlabelled"}
FEW = ("Trace_ELBO", "IWAE dreg", "IWAE dreg+vimco")  # with all guides; others with the first


def losses_of(name: str, number: int) -> list[str]:
    """Return the losses of an example's guide; without discrete sites those with DReG are one."""
    losses = list(LOSSES if number == 0 else FEW)
    return losses if name in DISCRETE else [loss for loss in losses if loss != "IWAE dreg"]


CASES = [
    pytest.param(name, guide, losses_of(name, number), id=f"{name}-{guide}")
    for name, make in EXAMPLES.items()
    for number, guide in enumerate(make().guides)
]


def refusal(name: str, loss: str) -> str | None:
    """Return what the sentence of a refusal says, or None where the loss must train."""
    if name in DISCRETE and loss in PATHWISE:
        return NEEDS_VIMCO
    return None if loss == "Trace_ELBO" else REFUSED.get(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*share one joint weight")
@pytest.mark.parametrize(("name", "guide", "losses"), CASES)
def test_losses_train_or_are_refused(name: str, guide: str, losses: Iterable[str]) -> None:
    torch.set_default_dtype(torch.float32)
    for loss in losses:
        cell = train(EXAMPLES[name], guide, loss, Settings(seed=0, steps=20, samples=20))
        sentence = refusal(name, loss)
        if sentence is not None:
            assert re.search(sentence, cell["refused"]), (loss, cell)
            continue
        assert "refused" not in cell, (loss, cell)
        first, last = torch.tensor(cell["losses"]).split(10)
        error = math.sqrt((first.var() + last.var()) / 10)
        assert last.mean() < first.mean() + 2 * error, (loss, cell["losses"])
