"""Guides that enumerate latents, and models of theirs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from tests.models.row import normal, positive, real

PARALLEL = {"enumerate": "parallel"}


def embed(name: str, *values: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(values))


def rows(x: Tensor, **plate: Any) -> None:
    with pyro.plate("data", len(x), **plate) as index:
        y = pyro.sample("y", dist.Categorical(logits=embed("prior", 0.2, -0.4, 0.5)))
        z = normal("z", embed("m", -1.0, 0.3, 1.2)[y], 0.9)
        normal("x", z + embed("w", 0.4, -0.6, 0.1)[y], positive("noise", 0.7), obs=x[index])


def rows_guide(x: Tensor, infer: Any = None, **plate: Any) -> None:
    with pyro.plate("data", len(x), **plate) as index:
        logits = x[index].unsqueeze(-1) * embed("c", 0.7, -0.2, 0.4)
        fn = dist.Categorical(logits=logits)
        y = pyro.sample("y", fn, infer=PARALLEL if infer is None else infer)
        loc = embed("a", 0.3, -0.5, 0.8)[y] + real("b", 0.6) * x[index]
        normal("z", loc, embed("s", 0.6, 0.9, 0.7)[y])


def scaled(program: Callable, scale: float) -> Callable:
    return poutine.scale(program, scale=scale)


LABELS, SUPPORTED = torch.tensor([1, 0, 0, 1]), torch.tensor([False, True, False, False])


def labelled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        fn = dist.Categorical(logits=embed("prior", 0.2, -0.4))
        y = pyro.sample("y", fn, obs=LABELS, obs_mask=SUPPORTED)
        z = normal("z", embed("m", -1.0, 0.3)[y], 0.9)
        normal("x", z, positive("noise", 0.7), obs=x)


def labelled_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        logits = x.unsqueeze(-1) * embed("c", 0.7, -0.2)
        with poutine.mask(mask=~SUPPORTED):
            y = pyro.sample("y_unobserved", dist.Categorical(logits=logits), infer=PARALLEL)
        y = torch.where(SUPPORTED, LABELS, y)
        normal("z", embed("a", 0.3, -0.5)[y] + real("b", 0.6) * x, 0.8)


def chained(x: Tensor) -> None:
    """Two enumerated sites with a sampled one before and between, all given those before."""
    with pyro.plate("data", len(x)):
        u = normal("u", 0.0, 1.0)
        one = pyro.sample("one", dist.Bernoulli(logits=u + real("p", 0.3)))
        z = normal("z", one - u, 1.0)
        logits = torch.stack(torch.broadcast_tensors(z, one - z, u), -1)
        two = pyro.sample("two", dist.Categorical(logits=logits))
        normal("x", z + two * real("w", 0.5), 0.7, obs=x)


class Fixed(dist.Normal):
    """Draws numbers that do not depend on how many are drawn."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * torch.arange(float(self.batch_shape[-1])).cos()


def chained_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", Fixed(real("k", 0.2) * x, 0.8))
        one = pyro.sample("one", dist.Bernoulli(logits=u * real("c", 0.7)), infer=PARALLEL)
        z = pyro.sample("z", Fixed(one * real("a", 0.4) + u, positive("s", 0.9)))
        logits = torch.stack(torch.broadcast_tensors(z * real("d", 0.3), one, u), -1)
        pyro.sample("two", dist.Categorical(logits=logits), infer=PARALLEL)


def both(x: Tensor) -> None:
    """Another latent, enumerated in the model."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(logits=real("p", 0.3)))
        z = normal("z", y - 0.5, 1.0)
        logits = torch.stack([y, -y, y + 0.5], -1) * real("r", 0.6)
        k = pyro.sample("k", dist.Categorical(logits=logits), infer=PARALLEL)
        normal("x", z + embed("w", 0.4, -0.6, 0.1)[k], 0.7, obs=x)


def both_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(logits=real("c", 0.7) * x), infer=PARALLEL)
        normal("z", y * real("a", 0.4) + x / 2, positive("s", 0.9))


def outside(x: Tensor) -> None:
    y = pyro.sample("y", dist.Categorical(logits=embed("prior", 0.2, -0.4, 0.5)))
    with pyro.plate("data", len(x)):
        normal("x", normal("z", embed("m", -1.0, 0.3, 1.2)[y], 0.9), 0.7, obs=x)


def outside_guide(x: Tensor) -> None:
    fn = dist.Categorical(logits=embed("c", 0.7, -0.2, 0.4))
    y = pyro.sample("y", fn, infer=PARALLEL)
    with pyro.plate("data", len(x)):
        normal("z", embed("a", 0.3, -0.5, 0.8)[y] + x / 2, positive("s", 0.9))


def alone(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(logits=real("p", 0.3)))
        normal("x", y * real("w", 0.5), 0.7, obs=x)


def alone_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=real("c", 0.7) * x), infer=PARALLEL)


def nested(x: Tensor) -> None:
    """An inner plate with data of each row."""
    with pyro.plate("data", len(x), dim=-2):
        y = pyro.sample("y", dist.Bernoulli(logits=real("p", 0.3)))
        z = normal("z", y - 0.5, 1.0)
        with pyro.plate("word", 3, dim=-1):
            k = normal("k", z * real("w", 0.5), 1.0)
            normal("x", k, 0.7, obs=x.unsqueeze(-1) + torch.arange(3.0))


def nested_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        logits = real("c", 0.7) * x.unsqueeze(-1)
        y = pyro.sample("y", dist.Bernoulli(logits=logits), infer=PARALLEL)
        z = normal("z", y * real("a", 0.4), positive("s", 0.9))
        with pyro.plate("word", 3, dim=-1):
            normal("k", z + y, 0.8)


def loop(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        y = pyro.sample(f"y{i}", dist.Bernoulli(logits=real("p", 0.3)))
        normal(f"x{i}", normal(f"z{i}", y - 0.5, 1.0), 0.7, obs=x[i])


def loop_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        y = pyro.sample(f"y{i}", dist.Bernoulli(logits=real("c", 0.7) * x[i]), infer=PARALLEL)
        normal(f"z{i}", y * real("a", 0.4) + x[i] / 2, positive("s", 0.9))


PROGRAMS: dict[str, tuple[Callable, Callable]] = {
    "rows": (rows, rows_guide),
    "sequential": (rows, lambda x: rows_guide(x, infer={"enumerate": "sequential"})),
    "configured": (rows, config_enumerate(lambda x: rows_guide(x, infer={}))),
    "marked_in_both": (config_enumerate(rows), rows_guide),
    "scaled": (scaled(rows, 0.4), scaled(rows_guide, 0.4)),
    "minibatch": tuple(
        partial(each, subsample=torch.tensor([2, 0])) for each in (rows, rows_guide)
    ),
    "labelled": (labelled, labelled_guide),
    "chained": (chained, chained_guide),
    "both": (both, both_guide),
    "outside": (outside, outside_guide),
    "alone": (alone, alone_guide),
    "nested": (nested, nested_guide),
    "loop": (loop, loop_guide),
}
