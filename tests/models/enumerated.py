"""Models with enumerated latents, and the same models with the sums over them written by hand.

Both have one density of the sites that the guide samples, so that every loss with every estimator
has one value and one gradient on both.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import constraints

from tests.models.row import data, mask, normal, positive, real, table

PARALLEL = {"enumerate": "parallel"}
WORDS = torch.tensor([[0, 2], [1, 2], [1, 0]])
SEQUENCES = torch.tensor([[0.5, 1.5], [-1.0, 0.3], [1.2, 0.0]])
CAPTURES = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]])
LENGTHS = torch.tensor([3, 2])
LABELS = torch.tensor([1, 0, 0, 1])
# Values that observed labels do not hide: entry 1 is given.
SUPPORTED = torch.tensor([False, True, False, False])


def param(name: str, *values: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(values))


def chain(name: str = "transitions") -> Tensor:
    """Logits of a binary latent given the one before."""
    return pyro.param(name, lambda: torch.tensor([[0.8, -0.6], [-0.3, 0.9]])).log_softmax(-1)


def gaussian(loc: Tensor, x: Tensor, scale: Any = 1.0) -> Tensor:
    return dist.Normal(loc, scale).log_prob(x)


def summed(*terms: Tensor) -> Tensor:
    """The log of a sum over the last dim of products."""
    return sum(terms, torch.zeros(())).logsumexp(-1)


# A Gaussian mixture whose components generate a continuous latent.


def gmm(x: Tensor, infer: Any = None, **plate: Any) -> None:
    logits, locs = param("logits", 0.2, -0.4, 0.5), param("locs", -1.5, 0.2, 2.0)
    with pyro.plate("data", len(x), **plate) as index:
        y = pyro.sample(
            "y", dist.Categorical(logits=logits), infer=PARALLEL if infer is None else infer
        )
        z = normal("z", locs[y], 0.9)
        normal("x", z, positive("noise", 0.7), obs=x[index])


def gmm_collapsed(x: Tensor, infer: Any = None, **plate: Any) -> None:
    logits, locs = param("logits", 0.2, -0.4, 0.5), param("locs", -1.5, 0.2, 2.0)
    parts = dist.Categorical(logits=logits), dist.Normal(locs, 0.9)
    with pyro.plate("data", len(x), **plate) as index:
        z = pyro.sample("z", dist.MixtureSameFamily(*parts))
        normal("x", z, positive("noise", 0.7), obs=x[index])


def rows_guide(x: Tensor, infer: Any = None, **plate: Any) -> None:
    with pyro.plate("data", len(x), **plate) as index:
        normal("z", real("a", 0.6) * x[index] + real("b", 0.1), positive("s", 0.6))


def gmm_loop(x: Tensor, collapsed: bool = False) -> None:
    logits, locs = param("logits", 0.2, -0.4, 0.5), param("locs", -1.5, 0.2, 2.0)
    parts = dist.Categorical(logits=logits), dist.Normal(locs, 0.9)
    for i in pyro.plate("data", len(x)):
        if collapsed:
            z = pyro.sample(f"z{i}", dist.MixtureSameFamily(*parts))
        else:
            y = pyro.sample(f"y{i}", parts[0], infer=PARALLEL)
            z = normal(f"z{i}", locs[y], 0.9)
        normal(f"x{i}", z, 0.7, obs=x[i])


def loop_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        normal(f"z{i}", real("a", 0.6) * x[i] + real("b", 0.1), positive("s", 0.6))


def scaled(program: Callable, scale: Any) -> Callable:
    return poutine.scale(program, scale=scale)


def weighted_rows(x: Tensor, collapsed: bool = False) -> None:
    """A scale for each row, inside of the plate and without the latent."""
    scale = torch.tensor([0.5, 1.0, 2.0, 1.5])
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        with poutine.scale(scale=scale):
            if collapsed:
                two = gaussian(z.unsqueeze(-1) + param("locs", -1.0, 1.0), x.unsqueeze(-1))
                pyro.factor("x", summed(torch.tensor([0.3, 0.7]).log(), two))
            else:
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
                normal("x", z + param("locs", -1.0, 1.0)[y], 1.0, obs=x)


def masked_rows(x: Tensor, collapsed: bool = False) -> None:
    """A mask around the enumerated site and what it generates; the former has no effect."""
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        with poutine.mask(mask=mask()):
            if collapsed:
                two = gaussian(z.unsqueeze(-1) + param("locs", -1.0, 1.0), x.unsqueeze(-1))
                pyro.factor("x", summed(torch.tensor([0.3, 0.7]).log(), two))
            else:
                fn = dist.Categorical(torch.tensor([0.3, 0.7])).mask(mask())
                y = pyro.sample("y", fn, infer=PARALLEL)
                normal("x", z + param("locs", -1.0, 1.0)[y], 1.0, obs=x)


def labelled(x: Tensor, collapsed: bool = False) -> None:
    """Labels that are given in some rows (``obs_mask``), and enumerated in the others."""
    log_prior = param("logits", 0.3, -0.2).log_softmax(-1)
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        if collapsed:
            two = gaussian(z.unsqueeze(-1) + param("locs", -1.0, 1.0), x.unsqueeze(-1)) + log_prior
            given = two.gather(-1, LABELS.expand(two.shape[:-1]).unsqueeze(-1)).squeeze(-1)
            pyro.factor("x", torch.where(SUPPORTED, given, summed(two)))
        else:
            fn = dist.Categorical(logits=log_prior)
            y = pyro.sample("y", fn, obs=LABELS, obs_mask=SUPPORTED)  # `infer` has no effect
            normal("x", z + param("locs", -1.0, 1.0)[y], 1.0, obs=x)


# Chains.


def hmm(x: Tensor, collapsed: bool = False) -> None:
    """Padded sequences: a mask ends each of them; ``x`` is ``[time, sequences]``."""
    transitions, locs = chain(), param("locs", -0.5, 1.3)
    start = torch.tensor([0.6, 0.4]).log()
    with pyro.plate("data", x.shape[1], dim=-1):
        b = normal("z", 0.0, 0.7)
        if collapsed:
            state, before = start, torch.zeros(())
            for t, each in enumerate(x):
                state = before if t == 0 else before.logsumexp(-1, keepdim=True)
                state = start if t == 0 else summed(before.unsqueeze(-2), transitions.mT)
                likely = gaussian(locs + b.unsqueeze(-1), each.unsqueeze(-1), 0.8)
                here = (t < LENGTHS).unsqueeze(-1)
                before = state + torch.where(here, likely, 0.0)
            pyro.factor("x", summed(before))
            return
        y: Any = None
        for t in pyro.markov(range(len(x))):
            with poutine.mask(mask=t < LENGTHS):
                logits = start if t == 0 else transitions[y]
                y = pyro.sample(f"y{t}", dist.Categorical(logits=logits), infer=PARALLEL)
                normal(f"x{t}", locs[y] + b, 0.8, obs=x[t])


def hmm_guide(x: Tensor, **options: Any) -> None:
    with pyro.plate("data", x.shape[1], dim=-1):
        normal("z", param("m", 0.1, 0.2), param("s", 0.5, 0.6))


def long_memory(x: Tensor, collapsed: bool = False) -> None:
    """Each of four binary latents depends on the two before."""
    weights, z = param("weights", 0.7, -0.9), normal("z", 0.0, 1.0)

    def logit(one: Any, two: Any) -> Tensor:
        return weights[0] * one + weights[1] * two + 0.3

    if collapsed:
        total = []
        for ys in itertools.product((0.0, 1.0), repeat=len(x)):
            terms = [gaussian(z + y, each) for y, each in zip(ys, x, strict=True)]
            for t, y in enumerate(ys):
                before = ys[t - 1] if t else 0.0, ys[t - 2] if t > 1 else 0.0
                fn = dist.Bernoulli(logits=logit(*before).expand(()))
                terms.append(fn.log_prob(torch.tensor(y)))
            total.append(sum(terms, torch.zeros(())))
        pyro.factor("x", torch.stack(total, -1).logsumexp(-1))
        return
    one: Any = 0.0
    two: Any = 0.0
    for t in pyro.markov(range(len(x)), history=2):
        y = pyro.sample(f"y{t}", dist.Bernoulli(logits=logit(one, two)), infer=PARALLEL)
        normal(f"x{t}", z + y, 1.0, obs=x[t])
        one, two = y, one


def two_chains(x: Tensor, collapsed: bool = False) -> None:
    """Two chains beside each other, and data in an inner plate that depend on both.

    ``x`` is ``[sequences, time]``, and heard in two tones.
    """
    transitions, a, b = chain(), param("a", -0.5, 0.7), param("b", 0.2, 1.3)
    start, tones = torch.tensor([0.4, 0.6]).log(), torch.tensor([-0.3, 0.8])
    with pyro.plate("sequences", 2, dim=-2):
        z = normal("z", 0.0, 1.0)
        if collapsed:
            both = (transitions[:, None, :, None] + transitions[:, None]).reshape(4, 4)
            state = (start[:, None] + start).reshape(4)
            locs = (a[:, None] + b).reshape(4) + z.unsqueeze(-1) + tones.unsqueeze(-1)
            for t in range(x.shape[1]):
                state = summed(state.unsqueeze(-2), both.mT) if t else state
                state = state + gaussian(locs, x[:, t].reshape(-1, 1, 1)).sum(-2)
            pyro.factor("x", summed(state).unsqueeze(-1))
            return
        one: Any = None
        two: Any = None
        tone = pyro.plate("tone", 2, dim=-1)
        for t in pyro.markov(range(x.shape[1])):
            fn = dist.Categorical(logits=transitions[one] if t else start)
            one = pyro.sample(f"one{t}", fn, infer=PARALLEL)
            fn = dist.Categorical(logits=transitions[two] if t else start)
            two = pyro.sample(f"two{t}", fn, infer=PARALLEL)
            with tone:
                normal(f"x{t}", a[one] + b[two] + z + tones, 1.0, obs=x[:, t : t + 1].expand(2, 2))


def sequences_guide(x: Tensor, **options: Any) -> None:
    with pyro.plate("sequences", 2, dim=-2):
        normal("z", param("m", 0.2, -0.3).unsqueeze(-1), positive("s", 0.6))


def recapture(x: Tensor, collapsed: bool = False) -> None:
    """Animals that may die are seen again (Cormack, Jolly, Seber): ``x`` is ``[time, animals]``."""
    survival = pyro.sample("survival", dist.Beta(2.0, 1.0))
    seen = pyro.sample("seen", dist.Beta(1.0, 1.5))
    known = torch.zeros(x.shape[1], dtype=torch.bool)
    alive, dead = torch.ones(()), torch.zeros(())
    z: Any = torch.ones(x.shape[1])
    with pyro.plate("animals", x.shape[1], dim=-1):
        for t in pyro.markov(range(len(x))):
            stays = torch.where(known, survival, 1.0)
            if collapsed:
                alive, dead = alive * stays, dead + alive * (1 - stays)
                alive = alive * torch.where(known, torch.where(x[t] == 1, seen, 1 - seen), 1.0)
                dead = dead * torch.where(known, 1 - x[t], 1.0)
            else:
                with poutine.mask(mask=known):
                    z = pyro.sample(f"z{t}", dist.Bernoulli(stays * z), infer=PARALLEL)
                    pyro.sample(f"x{t}", dist.Bernoulli(seen * z), obs=x[t])
            known = known | (x[t] == 1)
        if collapsed:
            pyro.factor("x", (alive + dead).log())


def recapture_guide(x: Tensor, **options: Any) -> None:
    for name in ("survival", "seen"):
        pyro.sample(name, dist.Beta(positive(f"{name}_a", 1.7), positive(f"{name}_b", 1.2)))


def global_guide(x: Tensor, **options: Any) -> None:
    normal("z", real("a", 0.3), positive("s", 0.6))


# Plates inside of others.


def lda(words: Tensor, collapsed: bool = False) -> None:
    """``words`` is ``[words, documents]``."""
    phi = param("phi", 0.8, -0.3, 0.1, -0.5, 0.2, 0.9).reshape(2, 3).softmax(-1)
    with pyro.plate("documents", words.shape[1], dim=-1):
        theta = pyro.sample("z", dist.Dirichlet(torch.tensor([1.5, 1.2])))
        with pyro.plate("words", len(words), dim=-2):
            if collapsed:
                pyro.sample("x", dist.Categorical(theta @ phi), obs=words)
            else:
                topic = pyro.sample("y", dist.Categorical(theta), infer=PARALLEL)
                pyro.sample("x", dist.Categorical(phi[topic]), obs=words)


def lda_guide(words: Tensor, **options: Any) -> None:
    c = pyro.param("c", lambda: torch.tensor([2.0, 1.8]), constraint=constraints.positive)
    with pyro.plate("documents", words.shape[1], dim=-1):
        pyro.sample("z", dist.Dirichlet(c))


def nested(x: Tensor, collapsed: bool = False) -> None:
    """A latent of each group, and one of each item that depends on it; ``x`` is ``[2, 3]``."""
    of_group, of_item = param("logits", 0.3, -0.2).log_softmax(-1), chain()
    with pyro.plate("group", 2, dim=-2):
        z = normal("z", 0.0, 1.0)
        if collapsed:
            loc = z[..., None, None] + torch.tensor([-1.0, 1.5])
            items = summed(of_item, gaussian(loc, x[:, :, None, None]))
            pyro.factor("x", summed(of_group, items.sum(-2)).unsqueeze(-1))
            return
        a = pyro.sample("a", dist.Categorical(logits=of_group), infer=PARALLEL)
        with pyro.plate("item", 3, dim=-1):
            b = pyro.sample("b", dist.Categorical(logits=of_item[a]), infer=PARALLEL)
            normal("x", z + torch.tensor([-1.0, 1.5])[b], 1.0, obs=x)


def groups_guide(x: Tensor, **options: Any) -> None:
    with pyro.plate("group", 2, dim=-2):
        normal("z", param("m", 0.2, -0.3).unsqueeze(-1), positive("s", 0.6))


def siblings(x: Tensor, collapsed: bool = False) -> None:
    """One latent of each row with data in two plates beside each other."""
    locs = param("locs", -1.0, 1.5)
    with pyro.plate("data", len(x), dim=-1):
        z = normal("z", 0.0, 1.0)
        if collapsed:
            loc = z.unsqueeze(-1) + locs
            of_two, of_three = (
                sum(
                    (gaussian(loc, (x + i).unsqueeze(-1), scale) for i in range(n)), torch.zeros(())
                )
                for n, scale in ((2, 1.0), (3, 2.0))
            )
            pyro.factor("x", summed(torch.tensor([0.4, 0.6]).log(), of_two, of_three))
            return
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
        for name, n, scale in (("two", 2, 1.0), ("three", 3, 2.0)):
            with pyro.plate(name, n, dim=-2):
                normal(f"x_{name}", z + locs[y], scale, obs=x + torch.arange(n).unsqueeze(-1))


# Latents outside of the data plate, and score-handled ones beside the enumerated.


def outside(x: Tensor, collapsed: bool = False) -> None:
    """One enumerated latent for all rows: their weight is a joint one."""
    logits, locs = param("logits", 0.2, -0.4), param("locs", -1.0, 0.8)
    if not collapsed:
        loc = locs[pyro.sample("y", dist.Categorical(logits=logits), infer=PARALLEL)]
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0 if collapsed else loc, 0.9)
        normal("x", z, 0.7, obs=x)
    if collapsed:
        rows = gaussian(locs, z.unsqueeze(-1), 0.9).sum(-2)
        total = summed(logits.log_softmax(-1), rows)
        pyro.factor("joint", total - gaussian(torch.zeros(()), z, 0.9).sum(-1))


def mixed(x: Tensor, collapsed: bool = False) -> None:
    """A sampled choice in each row beside an enumerated one."""
    locs = param("locs", -1.0, 1.5)
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        k = pyro.sample("k", dist.Bernoulli(0.3))
        if collapsed:
            loc = (z + 0.8 * k).unsqueeze(-1) + locs
            two = torch.tensor([0.4, 0.6]).log(), gaussian(loc, x.unsqueeze(-1))
            pyro.factor("x", summed(*two))
        else:
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
            normal("x", z + 0.8 * k + locs[y], 1.0, obs=x)


def mixed_guide(x: Tensor, **options: Any) -> None:
    with pyro.plate("data", len(x)):
        normal("z", real("a", 0.4) * x, positive("s", 0.6))
        pyro.sample("k", dist.Bernoulli(logits=real("c", 0.3) * x))


def above(x: Tensor, collapsed: bool = False) -> None:
    """An enumerated latent of each group above sampled choices of its items: ``x`` is ``[2, 3]``.

    The sum makes the items of a group depend on each other.
    """
    locs = param("locs", -1.0, 1.5)
    with pyro.plate("group", 2, dim=-2):
        if not collapsed:
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
        with pyro.plate("item", 3, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            if not collapsed:
                normal("x", 0.8 * k + locs[y], 1.0, obs=x)
                return
        items = gaussian((0.8 * k).unsqueeze(-1) + locs, x.unsqueeze(-1)).sum(-2, keepdim=True)
        pyro.factor("x", summed(torch.tensor([0.4, 0.6]).log(), items))


def above_guide(x: Tensor, **options: Any) -> None:
    with pyro.plate("group", 2, dim=-2), pyro.plate("item", 3, dim=-1):
        pyro.sample("k", dist.Bernoulli(logits=real("c", 0.3) * x))


class Enumerated(NamedTuple):
    """A model with enumerated latents, the same with their sums by hand, and a guide.

    ``joint`` marks rows that warn that one weight covers all data; ``discrete`` those with
    score-handled sites.
    """

    name: str
    model: Callable
    collapsed: Callable
    guide: Callable
    x: Callable[[], Tensor] = data
    joint: bool = False
    discrete: bool = False


def row(name: str, model: Callable, guide: Callable, *rest: Any, **options: Any) -> Enumerated:
    return Enumerated(name, model, partial(model, collapsed=True), guide, *rest, **options)


def of_gmm(name: str, handler: Callable = lambda each: each, **options: Any) -> Enumerated:
    own = (partial(each, **options) for each in (gmm, gmm_collapsed, rows_guide))
    return Enumerated(name, *map(handler, own))


SEQUENTIAL = {"infer": {"enumerate": "sequential"}}
ENUMERATED = [
    of_gmm("gmm"),
    of_gmm("sequential", **SEQUENTIAL),
    of_gmm("configured", config_enumerate, infer={}),
    of_gmm("expanded", infer={"enumerate": "parallel", "expand": True}),
    of_gmm("minibatch", subsample=torch.tensor([0, 2])),
    of_gmm("scaled", partial(scaled, scale=0.3)),
    of_gmm("tensor_scale", partial(scaled, scale=torch.tensor(1.7))),
    Enumerated("one_row", gmm, gmm_collapsed, rows_guide, lambda: data()[:1]),
    row("loop", gmm_loop, loop_guide),
    row("weighted_rows", weighted_rows, rows_guide),
    row("masked_rows", masked_rows, rows_guide),
    row("labelled", config_enumerate(labelled), rows_guide),
    row("hmm", hmm, hmm_guide, lambda: SEQUENCES),
    row("long_memory", long_memory, global_guide),
    row("two_chains", two_chains, sequences_guide, table),
    row("recapture", recapture, recapture_guide, lambda: 1.0 * CAPTURES),
    row("lda", lda, lda_guide, lambda: WORDS),
    row("nested", nested, groups_guide, table),
    row("siblings", siblings, rows_guide),
    row("outside", outside, rows_guide, joint=True),
    row("mixed", mixed, mixed_guide, discrete=True),
    row("above", above, above_guide, table, discrete=True),
]
