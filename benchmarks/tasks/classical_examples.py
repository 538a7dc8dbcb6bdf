"""Pyro's examples of classical statistics: hierarchical models, mixtures, chains, processes.

Written from the models' mathematics, with small synthetic data but for the schools and the players.
"""

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from benchmarks.tasks.example import Example
from benchmarks.tasks.posteriors import EFFECTS, ERRORS
from pyro_recursive import AmortizedGuide, FlowGuide, RecursiveMixtureGuide
from pyro_recursive.guides.gaussian_families import LowRank

HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)
AT_BATS = 45
PARALLEL = {"enumerate": "parallel"}


def eight_schools() -> Example:
    """Eight schools, not centred: a funnel."""

    def model(effects: Tensor, errors: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(effects)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, errors), obs=effects)

    guides = {
        "AutoNormal": lambda: AutoNormal(model),
        "AmortizedGuide full": lambda: AmortizedGuide(model, family="full"),
        "RecursiveMixtureGuide": lambda: RecursiveMixtureGuide(model, 2),
        "FlowGuide": lambda: FlowGuide(model, "coupling"),
    }
    return Example(model, guides, (torch.tensor(EFFECTS), torch.tensor(ERRORS)), rate=0.01)


def baseball() -> Example:
    """Batting averages, partially pooled."""

    def model(hits: Tensor) -> None:
        mean = pyro.sample("mean", dist.Uniform(0.0, 1.0))
        count = pyro.sample("count", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", len(hits)):
            chance = pyro.sample("chance", dist.Beta(mean * count, (1 - mean) * count))
            pyro.sample("hits", dist.Binomial(AT_BATS, chance), obs=hits)

    guides = {
        "AutoNormal": lambda: AutoNormal(model),
        "AmortizedGuide": lambda: AmortizedGuide(model),
        "RecursiveMixtureGuide": lambda: RecursiveMixtureGuide(model, 2),
    }
    return Example(model, guides, (torch.tensor(HITS, dtype=torch.get_default_dtype()),))


def horseshoe() -> Example:
    """Sparse regression with a horseshoe prior, written for one sample: ``x @ weights``."""
    x = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    y = x[:, 0] - 2 * x[:, 1] + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        shrinkage = pyro.sample("lambda", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        weights = pyro.sample("weights", dist.Normal(0.0, tau * shrinkage).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)

    guides = {
        "AutoNormal": lambda: AutoNormal(model),
        "AmortizedGuide low rank": lambda: AmortizedGuide(model, family=LowRank(2)),
    }
    return Example(model, guides, (x, y))


def gamma_def() -> Example:
    """A sparse gamma deep exponential family with two layers of local latents."""
    counts = torch.poisson(2 * torch.rand(20, 12, generator=torch.Generator().manual_seed(0)))
    sizes = {"top": (3, 4), "bottom": (4, 12)}

    def model(counts: Tensor) -> None:
        top, bottom = (
            pyro.sample(f"w_{name}", dist.Gamma(0.3, 0.3).expand(shape).to_event(2))
            for name, shape in sizes.items()
        )
        with pyro.plate("data", len(counts)):
            upper = pyro.sample("z_top", dist.Gamma(0.3, 0.3).expand([3]).to_event(1))
            rate = 0.3 / (upper @ top)
            lower = pyro.sample("z_bottom", dist.Gamma(0.3, rate).to_event(1))
            pyro.sample("x", dist.Poisson(lower @ bottom).to_event(1), obs=counts)

    def positive(name: str, shape: tuple[int, ...], plates: int) -> None:
        loc = pyro.param(f"{name}_loc", torch.zeros(shape))
        scale = pyro.param(f"{name}_scale", torch.full(shape, 0.1), constraint=constraints.positive)
        fn = dist.LogNormal(loc, scale).to_event(len(shape) - plates)
        pyro.sample(name, fn)

    def own(counts: Tensor) -> None:
        for name, shape in sizes.items():
            positive(f"w_{name}", shape, 0)
        with pyro.plate("data", len(counts)):
            positive("z_top", (len(counts), 3), 1)
            positive("z_bottom", (len(counts), 4), 1)

    class Easy(EasyGuide):
        def guide(self, counts: Tensor) -> None:
            self._group("w_.*", 60, ())
            with self.plate("data", len(counts), dim=-1):
                self._group("z_.*", 7, (len(counts),))

        def _group(self, match: str, size: int, rows: tuple[int, ...]) -> None:
            loc = pyro.param(f"{match}_loc", torch.zeros(*rows, size))
            scale = pyro.param(
                f"{match}_scale", torch.full((*rows, size), 0.1), constraint=constraints.positive
            )
            self.group(match=match).sample(f"all_{match[0]}", dist.Normal(loc, scale).to_event(1))

    guides = {
        "its own": lambda: own,
        "EasyGuide": lambda: Easy(model),
        "AutoNormal": lambda: AutoNormal(model),
        "AmortizedGuide": lambda: AmortizedGuide(model),
    }
    return Example(model, guides, (counts,))


def gaussian_process() -> Example:
    """Classification by contrib.gp, which does variational inference of its own."""
    x = torch.linspace(-2, 2, 20)
    y = (x > 0).to(x)
    process = gp.models.VariationalGP(x, y, gp.kernels.RBF(1), gp.likelihoods.Binary())
    return Example(process.model, {"its own": lambda: process.guide})


def latent_dirichlet_allocation() -> Example:
    """Topics of documents; the topic of each word is enumerated."""
    words = torch.randint(8, (12, 5), generator=torch.Generator().manual_seed(0))

    def model(words: Tensor) -> None:
        with pyro.plate("topics", 3):
            weights = pyro.sample("topic_weights", dist.Gamma(1.0, 1.0))
            topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(8)))
        with pyro.plate("documents", words.shape[1]):
            shares = pyro.sample("shares", dist.Dirichlet(weights))
            with pyro.plate("words", len(words)):
                topic = pyro.sample("topic", dist.Categorical(shares), infer=PARALLEL)
                pyro.sample("word", dist.Categorical(topics[topic]), obs=words)

    return _summed(model, "topic", words)


def gaussian_mixture() -> Example:
    """A mixture of three normals; the component of each row is enumerated."""
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)) + torch.arange(30) % 3 * 4

    def model(x: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(4.0, 4.0))
        with pyro.plate("data", len(x)):
            component = pyro.sample("component", dist.Categorical(shares), infer=PARALLEL)
            pyro.sample("x", dist.Normal(locs[component], 1.0), obs=x)

    return _summed(model, "component", x)


def hidden_markov() -> Example:
    """A hidden Markov model of several sequences; the states are enumerated."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(5) % 2 * 3

    def model(x: Tensor) -> None:
        with pyro.plate("states", 2):
            rows = pyro.sample("transitions", dist.Dirichlet(torch.ones(2)))
            locs = pyro.sample("locs", dist.Normal(1.0, 2.0))
        with pyro.plate("sequences", len(x)):
            state = torch.tensor(0)
            for step in pyro.markov(range(x.shape[1])):
                fn = dist.Categorical(rows[state])
                state = pyro.sample(f"state_{step}", fn, infer=PARALLEL)
                pyro.sample(f"x_{step}", dist.Normal(locs[state], 1.0), obs=x[:, step])

    return _summed(model, "state_.*", x)


def capture_recapture() -> Example:
    """Cormack-Jolly-Seber: whether an animal is alive is enumerated."""
    seen = torch.bernoulli(torch.full((20, 5), 0.5), generator=torch.Generator().manual_seed(0))
    seen[:, 0] = 1

    def model(seen: Tensor) -> None:
        survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
        detection = pyro.sample("detection", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", len(seen)):
            alive = torch.ones(())
            for year in pyro.markov(range(1, seen.shape[1])):
                fn = dist.Bernoulli(survival * alive)
                alive = pyro.sample(f"alive_{year}", fn, infer=PARALLEL)
                chance = dist.Bernoulli(detection * alive)
                pyro.sample(f"seen_{year}", chance, obs=seen[:, year])

    return _summed(model, "alive_.*", seen)


def _summed(model: Callable, hidden: str, data: Tensor) -> Example:
    """Return an example whose enumerated sites, with names of a pattern, guides leave out."""
    blocked = poutine.block(model, hide_fn=lambda site: bool(re.fullmatch(hidden, site["name"])))
    guides: dict[str, Callable[[], Any]] = {
        "AutoNormal": lambda: AutoNormal(blocked),
        "AmortizedGuide": lambda: AmortizedGuide(model),
    }
    return Example(model, guides, (data,), enumerated=True)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "eight schools": eight_schools,
    "baseball": baseball,
    "horseshoe": horseshoe,
    "sparse gamma DEF": gamma_def,
    "VariationalGP": gaussian_process,
    "LDA": latent_dirichlet_allocation,
    "GMM": gaussian_mixture,
    "HMM": hidden_markov,
    "capture-recapture": capture_recapture,
}
