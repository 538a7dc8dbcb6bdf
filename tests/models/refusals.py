"""Programs that no multi-sample bound can be right for."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.models.data_plate import empty_guide, local, local_guide
from tests.models.parameters import mixed_global, mixed_global_guide
from tests.models.plates import hierarchy, hierarchy_guide
from tests.models.row import Refusal, data, mask, normal, observe, pair, positive, real


def batch_without_plate(x: Tensor) -> None:
    observe(normal("z", torch.zeros(len(x)), 1.0), x)


def batch_without_plate_guide(x: Tensor) -> None:
    normal("z", real("a", 0.4) * x, 1.0)


def data_without_plate(x: Tensor) -> None:
    observe(normal("z", 0.0, 1.0), x)


def scalar_guide(x: Tensor) -> None:
    normal("z", real("a", 0.4), 1.0)


def masked_scalar_guide(x: Tensor) -> None:
    with poutine.mask(mask=mask()):
        normal("z", real("a", 0.4), 1.0)


def mask_without_plate(x: Tensor) -> None:
    with poutine.mask(mask=mask()):
        z = normal("z", 0.0, 1.0)
    observe(z, x[0])


def scale_without_plate(x: Tensor) -> None:
    with poutine.scale(scale=data().abs()):
        z = normal("z", 0.0, 1.0)
    observe(z, x[0])


def enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.35), infer={"enumerate": "parallel"})
        observe(k + real("mu", 0.3), x)


def enumerated_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = dist.Bernoulli(logits=real("a", 0.4) * x)
        pyro.sample("k", k, infer={"enumerate": "parallel"})


def extra_site_guide(x: Tensor) -> None:
    local_guide(x)
    normal("extra", 0.0, 1.0)


def uniform_guide(x: Tensor) -> None:
    """A density without a derivative in its value."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(-positive("s", 2.0), positive("t", 3.0)))


def two_data_sets(x: Tensor) -> None:
    with pyro.plate("first", len(x)):
        observe(normal("z", 0.0, 1.0), x)
    observe(normal("w", 0.0, 1.0), x[0], "y")


def two_data_sets_guide(x: Tensor) -> None:
    with pyro.plate("first", len(x)):
        normal("z", real("a", 0.4) * x, 1.0)
    normal("w", real("b", 0.4), 1.0)


def score_global_guide(x: Tensor) -> None:
    """A discrete site among the global latents."""
    pyro.sample("k", dist.Bernoulli(logits=real("a", 0.4)))
    local_guide(x)


def score_global(x: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(0.3))
    local(x)


SUBSAMPLED = r"Plate 'data' is subsampled \(2 of 4\).*site 'w'.*global_latents='elbo'.*Trace_ELBO"
NO_PLATE = r"Site '{}' .*dim -1 belongs to no plate.*pyro\.plate.*to_event"

REFUSALS = [
    Refusal(
        "subsampled_below_global",
        pair(hierarchy, hierarchy_guide, subsample_size=2),
        ValueError,
        SUBSAMPLED,
    ),
    Refusal(
        "subsampled_observations",
        pair(mixed_global, mixed_global_guide, subsample_size=2),
        ValueError,
        SUBSAMPLED,
        estimator="vimco",
    ),
    *(
        Refusal(model.__name__, pair(model, guide), ValueError, NO_PLATE.format(site))
        for model, guide, site in (
            (batch_without_plate, batch_without_plate_guide, "z"),
            (data_without_plate, scalar_guide, "x"),
            (mask_without_plate, masked_scalar_guide, "z"),
            (scale_without_plate, scalar_guide, "z"),
        )
    ),
    Refusal(
        "enumerated_in_model",
        pair(enumerated, empty_guide),
        NotImplementedError,
        r"Model site 'k' is to be enumerated.*TraceEnum_ELBO",
    ),
    Refusal(
        "enumerated_in_guide",
        pair(enumerated, enumerated_guide),
        NotImplementedError,
        r"Guide site 'k' asks for enumeration.*TraceEnum_ELBO",
    ),
    Refusal(
        "missing_in_guide",
        pair(local, empty_guide),
        ValueError,
        r"Model site 'z' is latent and the guide does not sample it.*Sample it in the guide",
    ),
    Refusal(
        "missing_in_model",
        pair(local, extra_site_guide),
        ValueError,
        r"Guide site 'extra' is no latent site of the model.*is_auxiliary",
    ),
    Refusal(
        "density_not_smooth",
        pair(local, uniform_guide),
        ValueError,
        r"Guide site 'z'.*does not depend smoothly.*estimator='pathwise'",
        estimator="dreg",
    ),
    Refusal(
        "no_data_plate",
        pair(two_data_sets, two_data_sets_guide),
        ValueError,
        r"global_latents='elbo' needs a plate that encloses every observed site",
        options={"global_latents": "elbo"},
    ),
    Refusal(
        "discrete_global",
        pair(score_global, score_global_guide),
        NotImplementedError,
        r"needs reparameterised global latents, and 'k' is not",
        estimator="vimco",
        options={"global_latents": "elbo"},
    ),
]
