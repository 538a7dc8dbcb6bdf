"""A mixture, chains and topics with enumerated latents, to time steps on.

All other latents are inside the plate of the data, so that each row has weights of its own.
"""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

VALUES = 8  # of an enumerated latent
STEPS, WORDS, DOCUMENTS, VOCABULARY = 30, 32, 50, 50
PARALLEL = {"enumerate": "parallel"}


@dataclass(frozen=True)
class Named:
    """What makes the names of parameters differ between the ways to train a model."""

    name: str

    def param(self, name: str, start: Tensor, positive: bool = False) -> Tensor:
        """Return a parameter that starts at a tensor."""
        constraint = constraints.positive if positive else constraints.real
        return pyro.param(f"{self.name} {name}", start, constraint=constraint)


def _spread(size: int) -> Tensor:
    return torch.linspace(-3.0, 3.0, size)


class Mixture(Named):
    """Components that generate a latent of each row, which is seen with noise: ``x`` is [rows]."""

    def model(self, x: Tensor) -> None:
        """Sum over the component of each row."""
        logits = self.param("logits", torch.zeros(VALUES))
        locs = self.param("locs", _spread(VALUES))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(locs[y], 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        """Give each row a normal of its own."""
        loc, scale = self.param("loc", x.clone()), self.param("scale", 0.5 + 0 * x, positive=True)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))


class Chains(Named):
    """Hidden Markov models with an effect of each sequence: ``x`` is [steps, sequences]."""

    def model(self, x: Tensor) -> None:
        """Sum over the states of each sequence."""
        transitions = self.param("transitions", 2 * torch.eye(VALUES))
        locs, start = self.param("locs", _spread(VALUES)), x.new_zeros(VALUES)
        with pyro.plate("sequences", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y: Any = None
            for step in pyro.markov(range(len(x))):
                fn = dist.Categorical(logits=transitions[y] if step else start)
                y = pyro.sample(f"y_{step}", fn, infer=PARALLEL)
                pyro.sample(f"x_{step}", dist.Normal(locs[y] + z, 1.0), obs=x[step])

    def guide(self, x: Tensor) -> None:
        """Give each sequence a normal of its own."""
        loc = self.param("loc", 0 * x[0])
        scale = self.param("scale", 0.5 + 0 * x[0], positive=True)
        with pyro.plate("sequences", x.shape[1]):
            pyro.sample("z", dist.Normal(loc, scale))


class Topics(Named):
    """Latent Dirichlet allocation with topics that are parameters: ``x`` is [words, documents]."""

    def model(self, x: Tensor) -> None:
        """Sum over the topic of each word."""
        number = VALUES * VOCABULARY
        start = torch.arange(number).reshape(VALUES, VOCABULARY) * 0.7
        topics = self.param("topics", start.sin()).softmax(-1)
        with pyro.plate("documents", x.shape[1]):
            z = pyro.sample("z", dist.Dirichlet(x.new_ones(VALUES, dtype=topics.dtype)))
            with pyro.plate("words", len(x)):
                y = pyro.sample("y", dist.Categorical(z), infer=PARALLEL)
                pyro.sample("x", dist.Categorical(topics[y]), obs=x)

    def guide(self, x: Tensor) -> None:
        """Give each document a Dirichlet distribution of its own."""
        start = torch.full((x.shape[1], VALUES), 2.0, device=x.device)
        with pyro.plate("documents", x.shape[1]):
            pyro.sample("z", dist.Dirichlet(self.param("concentration", start, positive=True)))


PROGRAMS: dict[str, type[Mixture] | type[Chains] | type[Topics]] = {
    "GMM": Mixture,
    "HMM": Chains,
    "LDA": Topics,
}


def data(kind: str) -> Tensor:
    """Return data of one of the programs: 1000 rows, 100 sequences, or 50 documents."""
    if kind == "GMM":
        return 2 * torch.randn(1000)
    if kind == "HMM":
        return 2 * torch.randn(STEPS, 100)
    return torch.randint(VOCABULARY, (WORDS, DOCUMENTS))
