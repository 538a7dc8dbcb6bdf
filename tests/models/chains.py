"""Pyro's examples of hidden Markov models, in small: music with several tones, and animals' steps.

Written from the models' mathematics. The chords and the animals' states are enumerated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.models.enumerated import PARALLEL
from tests.models.row import positive

CHORDS, TONES = 2, 2
NO_STEP = 1e-6  # in place of a zero, which has no density


def music() -> tuple[Tensor, Tensor]:
    """Which tones sound in three pieces, ``[pieces, time, tones]``, and the pieces' lengths."""
    one = [[1, 0], [1, 0], [0, 1], [0, 1]]
    two = [[0, 1], [1, 1], [1, 0], [0, 0]]
    three = [[1, 0], [0, 1], [0, 0], [0, 0]]
    return 1.0 * torch.tensor([one, two, three]), torch.tensor([4, 3, 2])


def transitions(name: str = "moves") -> Tensor:
    prior = dist.Dirichlet(0.9 * torch.eye(CHORDS) + 0.1)
    return pyro.sample(name, prior.to_event(1))


def chances(*shape: int) -> Tensor:
    """The chance of each tone, given chords."""
    prior = dist.Beta(0.1, 0.9).expand([*shape, TONES])
    return pyro.sample("chances", prior.to_event(len(shape) + 1))


def chord(name: str, moves: Tensor, before: Any) -> Tensor:
    fn = dist.Categorical(Vindex(moves)[..., before, :])
    return pyro.sample(name, fn, infer=PARALLEL)


def one_by_one(x: Tensor, lengths: Tensor) -> None:
    """Pieces in a sequential plate; ``moves[y]`` has no dim for samples."""
    moves, sounds = transitions(), chances(CHORDS)
    tone = pyro.plate("tone", TONES, dim=-1)
    for i in pyro.plate("pieces", len(x)):
        y: Any = 0
        for t in pyro.markov(range(int(lengths[i]))):
            y = pyro.sample(f"y{i}_{t}", dist.Categorical(moves[y]), infer=PARALLEL)
            with tone:
                here = sounds[y.squeeze(-1)]
                pyro.sample(f"x{i}_{t}", dist.Bernoulli(here), obs=x[i, t])


def in_a_plate(x: Tensor, lengths: Tensor, kind: str = "padded", batch: int | None = None) -> None:
    """Padded pieces; tones that depend on those before, or on two chains of chords."""
    shape = {"padded": (CHORDS,), "tones_before": (CHORDS, 2), "two_chains": (CHORDS, CHORDS)}
    moves, sounds = transitions(), chances(*shape[kind])
    others = transitions("other_moves") if kind == "two_chains" else None
    tone = pyro.plate("tone", TONES, dim=-1)
    with pyro.plate("pieces", len(x), batch, dim=-2) as pieces:
        lengths = lengths[pieces]
        y: Any = 0
        heard: Any = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                y = chord(f"y{t}", moves, y)
                if others is not None:
                    heard = chord(f"w{t}", others, heard)
                with tone as tones:
                    index = (y, tones) if kind == "padded" else (y, heard, tones)
                    fn = dist.Bernoulli(Vindex(sounds)[(..., *index)])
                    pyro.sample(f"x{t}", fn, obs=x[pieces, t])
                    if kind == "tones_before":
                        heard = x[pieces, t].long()


def animals() -> tuple[Tensor, Tensor]:
    """Lengths of steps, ``[animals, groups, time]``, and which animals there are."""
    x = torch.tensor(
        [
            [[0.4, NO_STEP, 1.9], [1.2, 2.2, 0.3]],
            [[2.5, 1.4, NO_STEP], [0.2, 0.1, 0.6]],
            [[0.7, 0.9, 1.1], [NO_STEP, NO_STEP, NO_STEP]],
        ]
    )
    return x, torch.tensor([[True, True], [True, True], [True, False]])


def effect(name: str, kind: str) -> Tensor:
    """The effect of a group or an animal on the transitions' logits, ``[*batch, 4]``."""
    if kind == "continuous":
        loc = pyro.param(f"loc_{name}", lambda: torch.tensor([0.5, -0.5, -0.2, 0.4]))
        fn = dist.Normal(loc, positive(f"scale_{name}", 0.8))
        return pyro.sample(f"effect_{name}", fn.expand([4]).to_event(1))
    thetas = pyro.param(f"thetas_{name}", lambda: torch.arange(8.0).reshape(2, 4).cos())
    chance = pyro.param(
        f"chance_{name}", lambda: torch.tensor([0.4, 0.6]), constraint=constraints.simplex
    )
    kind_of = pyro.sample(f"kind_{name}", dist.Categorical(chance), infer=PARALLEL)
    return Vindex(thetas)[..., kind_of, :]


def mixed_effects(x: Tensor, present: Tensor, of_group: str, of_animal: str) -> None:
    """Effects of groups and animals on transitions are discrete or continuous; steps may be none.

    The number of animals differs between groups.
    """
    shapes, rates = positive("shape", 1.5), pyro.param("rates", lambda: torch.tensor([0.2, 0.9]))
    stays = pyro.param("stays", lambda: torch.tensor([-1.0, 0.3]))
    with pyro.plate("group", x.shape[1], dim=-1):
        logits = effect("group", of_group)
        with pyro.plate("animal", len(x), dim=-2), poutine.mask(mask=present):
            logits = logits + effect("animal", of_animal)
            moves = logits.reshape((*logits.shape[:-1], 2, 2))
            y: Any = torch.tensor(0)
            for t in pyro.markov(range(x.shape[-1])):
                fn = dist.Categorical(logits=Vindex(moves)[..., y, :])
                y = pyro.sample(f"y{t}", fn, infer=PARALLEL)
                seen, none = x[..., t], x[..., t] == NO_STEP
                pyro.sample(f"none{t}", dist.Bernoulli(logits=stays[y]), obs=1.0 * none)
                step = dist.Gamma(shapes, rates[y].exp())
                either = dist.MaskedMixture(none, step, dist.Delta(torch.tensor(NO_STEP)))
                pyro.sample(f"x{t}", either, obs=seen)


def mixed_guide(x: Tensor, present: Tensor, of_group: str, of_animal: str) -> None:
    def sample(name: str, shape: torch.Size) -> None:
        loc = pyro.param(f"guide_loc_{name}", lambda: torch.full((*shape, 4), 0.1))
        scale = pyro.param(
            f"guide_scale_{name}",
            lambda: torch.full((*shape, 4), 0.7),
            constraint=constraints.positive,
        )
        pyro.sample(f"effect_{name}", dist.Normal(loc, scale).to_event(1))

    with pyro.plate("group", x.shape[1], dim=-1):
        if of_group == "continuous":
            sample("group", x.shape[1:2])
        with pyro.plate("animal", len(x), dim=-2), poutine.mask(mask=present):
            if of_animal == "continuous":
                sample("animal", x.shape[:2])


def global_latents(model: Callable) -> AutoNormal:
    return AutoNormal(poutine.block(model, expose=["moves", "other_moves", "chances"]))


class Chain(NamedTuple):
    """A model, a function that makes its guide, and the data of both."""

    name: str
    model: Callable
    guide: Callable[[Callable], Callable]
    args: Callable[[], tuple[Tensor, Tensor]]


def of_music(name: str, model: Callable) -> Chain:
    return Chain(name, model, global_latents, music)


def of_animals(of_group: str, of_animal: str) -> Chain:
    kinds = {"of_group": of_group, "of_animal": of_animal}
    guide = partial(mixed_guide, **kinds)
    return Chain(
        f"{of_group}, {of_animal}", partial(mixed_effects, **kinds), lambda model: guide, animals
    )


CHAINS = [
    of_music("one_by_one", one_by_one),
    *(
        of_music(kind, partial(in_a_plate, kind=kind))
        for kind in ("padded", "tones_before", "two_chains")
    ),
    *(of_animals(*kinds) for kinds in (("discrete", "discrete"), ("discrete", "continuous"))),
    *(of_animals(*kinds) for kinds in (("continuous", "discrete"), ("continuous", "continuous"))),
]
