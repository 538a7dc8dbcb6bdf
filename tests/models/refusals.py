"""Programs that no multi-sample bound can be right for, and guides that do not fit their model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from tests.models.data_plate import empty_guide, local, local_guide, scalar_guide
from tests.models.parameters import mixed_global, mixed_global_guide
from tests.models.plates import hierarchy, hierarchy_guide
from tests.models.row import Refusal, mask, normal, observe, real
from tests.models.small import normal_rows

# Batch dims without a plate, and sites that estimators cannot treat.


def batch_without_plate(x: Tensor) -> None:
    observe(normal("z", torch.zeros(len(x)), 1.0), x)


def batch_without_plate_guide(x: Tensor) -> None:
    normal("z", real("a", 0.4) * x, 1.0)


def data_without_plate(x: Tensor) -> None:
    observe(normal("z", 0.0, 1.0), x)


def mask_without_plate(x: Tensor) -> None:
    with poutine.mask(mask=mask()):
        z = normal("z", 0.0, 1.0)
    observe(z, x[0])


def enumerated(x: Tensor, **infer: Any) -> Tensor:
    """Return an enumerated latent of each row, whose value generates the row."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.35), infer={"enumerate": "parallel", **infer})
        observe(k + real("mu", 0.3), x)
    return k


def enumerated_guide(x: Tensor, is_global: bool = False) -> None:
    """Enumerate a latent of each row, given one that is sampled."""
    z = normal("z", real("loc", 0.2), 1.0) if is_global else 0.0
    with pyro.plate("data", len(x)):
        z = z if is_global else normal("z", real("loc", 0.2), 1.0)
        k = dist.Bernoulli(logits=real("a", 0.4) * z)
        pyro.sample("k", k, infer={"enumerate": "parallel"})


def enumerated_below(x: Tensor, is_global: bool = False) -> None:
    z = normal("z", 0.0, 1.0) if is_global else 0.0
    with pyro.plate("data", len(x)):
        z = z if is_global else normal("z", 0.0, 1.0)
        observe(pyro.sample("k", dist.Bernoulli(0.35)) + z, x)


def enumerated_branch(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        k = pyro.sample(f"k{i}", dist.Bernoulli(0.35), infer={"enumerate": "sequential"})
        observe(torch.tensor(1.0 if k else -1.0), x[i], f"x{i}")


def enumerated_counts(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        observe(pyro.sample("k", dist.Poisson(1.0), infer={"enumerate": "parallel"}), x)


def enumerated_scales(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.35), infer={"enumerate": "parallel"})
        with poutine.scale(scale=0.5):
            observe(k, x)


def enumerated_crossing(x: Tensor) -> None:
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", len(x), dim=-1)
    fn = dist.Bernoulli(0.35)
    with rows:
        one = pyro.sample("one", fn, infer={"enumerate": "parallel"})
    with columns:
        other = pyro.sample("other", fn, infer={"enumerate": "parallel"})
    with rows, columns:
        observe(one + other, x.expand(2, -1))


def enumerated_outside(x: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.35), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        observe(normal("z", k, 1.0), x)


def enumerated_inside(x: Tensor) -> None:
    observe(enumerated(x).sum(-1, keepdim=True), x[0], "total")


def enumerated_neighbours(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.35), infer={"enumerate": "parallel"})
        observe(k.roll(1, -1), x)


def two_data_sets(x: Tensor) -> None:
    normal_rows(x)
    observe(normal("w", 0.0, 1.0), x[0], "y")


def two_data_sets_guide(x: Tensor) -> None:
    local_guide(x)
    normal("w", real("c", 0.4), 1.0)


def discrete_global(x: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(0.3))
    local(x)


def discrete_global_guide(x: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(logits=real("c", 0.4)))
    local_guide(x)


# Guides of other sites, plates or shapes than the model's.


def extra_site_guide(x: Tensor) -> None:
    local_guide(x)
    normal("extra", 0.0, 1.0)


def guide_of(size: int = 4, obs: Any = None, infer: Any = None, **plate: Any) -> Callable:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", size, **plate):
            pyro.sample("z", dist.Normal(real("loc", 0.2), 1.0), obs=obs, infer=infer)

    return guide


def one_event_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(real("loc", 0.2).expand(len(x)), 1.0).to_event(1))


def observing_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        observe(normal("z", real("a", 0.4), 1.0), x)


def prior(x: Tensor) -> None:
    normal("z", 0.0, 1.0)


def centred_guide(x: Tensor) -> None:
    """Reparameterised in the guide, where Pyro makes the site a computed one."""
    poutine.reparam(lambda: normal("z", torch.tensor(0.5), 1.0), {"z": LocScaleReparam(0.0)})()


def half(program: Callable) -> Callable:
    return partial(program, subsample_size=2)


VIMCO, ELBO = {"estimator": "vimco"}, {"global_latents": "elbo"}
SUBSAMPLED = r"Plate 'data' is subsampled \(2 of 4\).*site 'w'.*global_latents='elbo'"
NO_PLATE = r"Site '{}' .*dim -1 belongs to no plate"
SIZES = r"Plate 'data' has {} in the model and {} in the guide, at site 'z'"
SHAPES = "disagree at site 'z'"
LARGER = guide_of(40, subsample_size=4)
OBSERVED = guide_of(obs=torch.zeros(4), infer={"is_auxiliary": True})

REFUSALS = [
    Refusal(*row)
    for row in (
        ("hierarchy", half(hierarchy), half(hierarchy_guide), SUBSAMPLED),
        ("mixed_global", half(mixed_global), half(mixed_global_guide), SUBSAMPLED, VIMCO),
        ("batch", batch_without_plate, batch_without_plate_guide, NO_PLATE.format("z")),
        ("data", data_without_plate, scalar_guide, NO_PLATE.format("x")),
        ("mask", mask_without_plate, poutine.mask(scalar_guide, mask()), NO_PLATE.format("z")),
        (
            "enumerated_given",
            enumerated_below,
            enumerated_guide,
            "'k' is enumerated given a sample",
        ),
        (
            "enumerated_below",
            partial(enumerated_below, is_global=True),
            partial(enumerated_guide, is_global=True),
            r"Guide site 'k' is enumerated in plates \['data'\], and the weights have plates \[\]",
        ),
        ("enumerated_branch", enumerated_branch, empty_guide, "'k0' is enumerated, and .*branch"),
        ("enumerated_samples", partial(enumerated, num_samples=4), empty_guide, "num_samples': 4}"),
        (
            "enumerated_elsewhere",
            infer_discrete(enumerated, first_available_dim=-3),
            empty_guide,
            "'k' is enumerated, and a handler",
        ),
        ("enumerated_counts", enumerated_counts, empty_guide, "'k' .*Poisson has no finite"),
        ("enumerated_scales", enumerated_scales, empty_guide, "'k' and 'x' .*scales 1 and 0.5"),
        (
            "enumerated_crossing",
            enumerated_crossing,
            empty_guide,
            "'rows' and 'columns' cross at s",
        ),
        ("enumerated_inside", enumerated_inside, empty_guide, "'total'.*outside plate 'data'.*'k'"),
        (
            "enumerated_neighbours",
            enumerated_neighbours,
            empty_guide,
            "'x' changes with enumerated",
        ),
        ("enumerated_outside", enumerated_outside, local_guide, "'k', 'z' are summed toget", ELBO),
        ("no_data_plate", two_data_sets, two_data_sets_guide, "elbo' needs a plate", ELBO),
        ("discrete_global", discrete_global, discrete_global_guide, "'k' is not repar", ELBO),
        ("missing_in_guide", local, empty_guide, "Model site 'z' is latent and the guide"),
        ("missing_in_model", local, extra_site_guide, "'extra' is no latent site of the model"),
        ("latent_observed", local, guide_of(obs=torch.zeros(4)), "Guide site 'z' is observed"),
        ("auxiliary_observed", local, OBSERVED, "Guide site 'z' is observed: drop its obs="),
        ("data_observed", local, observing_guide, "Guide site 'x' is observed"),
        ("smaller_plate", local, guide_of(3), SIZES.format("3 of 4 entries", "3 of 3")),
        ("plate_of_one", local, guide_of(1), SIZES.format("1 of 4 entries", "1 of 1")),
        ("larger_plate", normal_rows, LARGER, SIZES.format("4 of 4 entries", "4 of 40")),
        ("other_dim", normal_rows, guide_of(dim=-2), "'z' has batch shape|at site 'z'"),
        ("no_plate", local, scalar_guide, SHAPES + r".*\['data'\].*\[\]"),
        ("event_for_plate", local, one_event_guide, SHAPES),
        ("reparam_of_guide", prior, centred_guide, "'z' is observed.*put poutine.reparam"),
    )
]
