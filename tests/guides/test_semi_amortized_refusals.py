"""What semi-amortised guides refuse, with what was got."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, MixtureGuide, SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.updates import FixedStart, GradientUpdate, LearnedUpdate
from tests.oracles.refinement import ROWS, SIZE, model_of, network, semi


def test_inference_mode_is_refused() -> None:
    guide, x = semi(model_of(network()), test_steps=0), torch.randn(ROWS, 3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Use torch\.no_grad\(\)"):
        guide(x)
    guide.eval()
    with torch.inference_mode():
        assert guide(x)["z"].shape == (ROWS, SIZE)


def test_a_site_without_the_plate_of_the_draws_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1), 0.7), obs=x.sum(-1))

    x = torch.randn(3)
    for draws in (1, 3):
        pyro.clear_param_store()
        base = AmortizedGuide(model, FixedStart(2), plate="data")
        guide = SemiAmortizedGuide(model, base, draws=draws)
        if draws == 1:
            assert guide.refine(x).params.shape == (3, 2)
            continue
        with pytest.raises(ValueError, match=r"'total' has batch shape .*no plate.*draws=1"):
            guide.refine(x)


def test_two_guides_of_one_name_are_told_apart() -> None:
    x, model = torch.randn(ROWS, 3), model_of(network())
    first, second = semi(model), semi(model)
    first(x)
    with pytest.raises(ValueError, match=r"Another guide named 'SemiAmortizedGuide'.*name="):
        second(x)
    semi(model, name="other")(x)


REFUSED: dict[str, tuple[Callable[[Callable], Any], type[Exception], str]] = {
    "mode": (
        lambda model: semi(model, mode="third_order"),
        ValueError,
        r"mode must be one of \('first_order'.*got 'third_order'",
    ),
    "estimator": (
        lambda model: semi(model, estimator="dreg"),
        ValueError,
        r"estimator must be one of \('stl', 'pathwise'\), got 'dreg'",
    ),
    "direct": (
        lambda model: semi(model, mode="distill", direct=0.1),
        ValueError,
        "need a mode of",
    ),
    "learned": (
        lambda model: semi(model, mode="svi", update=LearnedUpdate()),
        ValueError,
        "need a mode of",
    ),
    "rate": (lambda model: GradientUpdate(rate=0.0), ValueError, "Need rate=0.0 > 0"),
    "momentum": (lambda model: GradientUpdate(momentum=1.0), ValueError, "momentum=1.0 < 1"),
    "clip": (lambda model: GradientUpdate(clip=0.0), ValueError, "clip=0.0 > 0"),
    "twice": (
        lambda model: SemiAmortizedGuide(model, semi(model)),
        ValueError,
        "A SemiAmortizedGuide cannot be refined again",
    ),
    "component": (
        lambda model: MixtureGuide(model, [semi(model), AmortizedGuide(model, nn.Linear(3, 4))]),
        ValueError,
        "SemiAmortizedGuide cannot be a component of a mixture",
    ),
    "used_before": (
        lambda model: SemiAmortizedGuide(model, used(model)),
        ValueError,
        "has run on its own cannot be renamed.*state_dict",
    ),
    "autoguides": (
        lambda model: SemiAmortizedGuide(
            model, MixtureGuide(model, [AutoNormal(model)] * 2, weights="shared", plate="data")
        )(torch.randn(ROWS, 3)),
        TypeError,
        "AutoNormal.*Use AmortizedGuide or FlowGuide",
    ),
    "no_rows": (
        lambda model: SemiAmortizedGuide(model, AmortizedGuide(model))(torch.randn(ROWS, 3)),
        ValueError,
        "Refinement needs rows.*plate=",
    ),
    "mixture_of_tables": (
        lambda model: SemiAmortizedGuide(model, MixtureGuide(model, 2, plate="data"), mode="svi")(
            torch.randn(ROWS, 3)
        ),
        NotImplementedError,
        "MixtureGuide has no table to keep rows in",
    ),
}


def used(model: Callable) -> MixtureGuide:
    guide = MixtureGuide(model, [AmortizedGuide(model, nn.Linear(3, 4)) for _ in range(2)])
    guide(torch.randn(ROWS, 3))
    return guide


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_was_got(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make(model_of(network()))


def test_discrete_latents_are_refused() -> None:
    def model(x: Tensor, enumerate: str | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": enumerate})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x[:, 0])

    x = torch.randn(ROWS, 3)
    with pytest.raises(NotImplementedError, match=r"'k' is discrete: enumerate it"):
        semi(model, nn.Linear(3, 2))(x)
    guide = semi(model, nn.Linear(3, 2), name="other")
    with pytest.raises(NotImplementedError, match=r"'k' is not this guide's.*Marginalise it"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x, enumerate="parallel")
