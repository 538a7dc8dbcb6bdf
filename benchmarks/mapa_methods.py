"""The methods of the MAPA benchmark: how each is made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MAPA_ELBO, MAPAGuide
from pyro_recursive.datasets import Curve
from pyro_recursive.mapa.candidates import Plan
from pyro_recursive.mapa.recover import recover_prior
from pyro_recursive.mapa.table import Table

BASELINE = "VAE"
KDE = "KDE"
NEIGHBOURS = 128  # that a row of the table keeps
ALL = 500  # codes: as many as there are training points, or more
MakeTable = Callable[[Curve], Table]


@dataclass(frozen=True)
class Method:
    """A bound: with ``particles`` that of an IWAE (of a VAE, if one); with ``options`` of MAPA."""

    particles: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    table: MakeTable | None = None  # in place of that of the kernel
    refresh: bool = False


def _of_the_paper(samples: int, top: int = 1, **more: Any) -> Method:
    """Return the paper's bound: independent draws, each row for itself."""
    options = {"top": top, "samples": samples, "share": "shared", "replace": True}
    return Method(options=options, **more)


def _pooled(samples: float, top: int = 1) -> Method:
    return Method(options={"top": top, "samples": samples, "share": "pooled", "replace": False})


def _posterior(points: Tensor, data: Curve) -> Table:
    """Return the posterior of the index over the training rows, for decoded codes ``[M, 2]``."""
    distance = torch.cdist(data.train.double(), points.double()) / data.scale
    return Table.from_log_weights((-0.5 * distance.square()).to(data.train.dtype))


def true_table(data: Curve) -> Table:
    """Return the posterior of the index under the true decoder, at the true latents."""
    return _posterior(data.decoder(data.train_latents), data)


def _uniform(data: Curve) -> Table:
    return Table.uniform(len(data.train), len(data.train))


METHODS: dict[str, Method] = {
    BASELINE: Method(1),
    **{f"IWAE {s}": Method(s) for s in (5, 10, 20)},
    **{f"MAPA {s}": _of_the_paper(s) for s in (1, 5, 10, 20)},
    "pooled .2": _pooled(0.2, top=0),
    "pooled .5": _pooled(0.5, top=0),
    **{f"pooled {s}": _pooled(s) for s in (1, 2)},
    "MAPA-GT 5": _of_the_paper(5, top=0, refresh=True),
    "MAPA true 5": _of_the_paper(5, top=0, table=true_table),
    "uniform 5": _of_the_paper(5, top=0, table=_uniform),
    "AE": Method(options={"top": 1, "samples": 0, "share": "shared"}),
    "exact sum": _pooled(0, top=ALL),
    KDE: Method(),
}


def network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """Return three hidden layers."""
    sizes = [inputs, hidden, hidden, hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Learner:
    """A decoder and what it is trained with; `generator` is what it comes to."""

    guide: Any
    loss: ELBO

    def __init__(self, data: Curve, outputs: int, hidden: int) -> None:
        self.data = data
        self.decoder = network(1, 2, hidden)  # first: the same for all methods of one seed
        self.encoder = network(2, outputs, hidden)

    def model(self, x: Tensor, rows: Tensor | None = None) -> None:
        """p(z) p(x | z) for points ``[rows, 2]``."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            noise = dist.Normal(self.decoder(z), self.data.scale).to_event(1)
            pyro.sample("x", noise, obs=x)

    def start(self, batch_size: int) -> None:
        """Get all parameters into place."""

    def begin(self, warming: bool) -> None:
        """Get ready for an epoch."""

    def refresh(self) -> None:
        """Look at the current model."""

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters, in place."""
        return [*self.decoder.parameters(), *self.encoder.parameters()]

    def passes(self) -> float:
        """Return the decoder passes for each point of the last step."""
        raise NotImplementedError

    def generator(self) -> Callable[[Tensor], Tensor]:
        """Return what takes standard normals ``[n, 1]`` to points of the curve ``[n, 2]``."""
        raise NotImplementedError


class Variational(Learner):
    """A VAE, or an IWAE: the mean-field posterior of an encoder."""

    def __init__(self, data: Curve, method: Method, hidden: int) -> None:
        super().__init__(data, 2, hidden)
        self.particles, self.guide = method.particles, self._guide
        one = method.particles == 1
        self.loss = Trace_ELBO(max_plate_nesting=1) if one else IWAE_ELBO(method.particles)
        self.loss.max_plate_nesting = 1

    def _guide(self, x: Tensor, rows: Tensor | None = None) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def passes(self) -> float:
        """Return the samples of a row."""
        return float(self.particles)

    def generator(self) -> Callable[[Tensor], Tensor]:
        """Return the decoder: its prior is the standard normal."""
        return self.decoder


class Empirical(Learner):
    """A decoder of codes of the training points."""

    def __init__(self, data: Curve, method: Method, hidden: int) -> None:
        super().__init__(data, 1, hidden)
        self.method, self.loss = method, MAPA_ELBO(max_plate_nesting=1)
        self.guide = MAPAGuide(
            self.model,
            self.encoder,
            data.train,
            table=None if method.table is None else method.table(data),
            neighbours=NEIGHBOURS if method.options["top"] < ALL else ALL,
            rows=lambda x, rows: rows,
            **method.options,
        )
        self.plan = self.guide.plan

    def start(self, batch_size: int) -> None:
        """Build the table from distances, if there is no other."""
        self.guide.prepare(self.data.train[:batch_size], torch.arange(batch_size))

    @torch.no_grad()
    def points(self) -> Tensor:
        """Return what the codes of the training points decode to, ``[N, 2]``."""
        return self.decoder(self.encoder(self.data.train))

    def begin(self, warming: bool) -> None:
        """Start as an autoencoder: from a decoder that is constant the sums are slow to move."""
        self.guide.plan = Plan(1, 0, "shared") if warming else self.plan

    def refresh(self) -> None:
        """Take the exact posterior of the index, where the method has that as its table."""
        if self.method.refresh:
            self.guide.table = _posterior(self.points(), self.data)

    def passes(self) -> float:
        """Return the different codes of the last step for each of its rows."""
        return self.guide.passes.codes / self.guide.passes.rows

    def generator(self) -> Callable[[Tensor], Tensor]:
        """Return the decoder after the quantile map of the codes."""
        with torch.no_grad():
            prior = recover_prior(self.encoder(self.data.train), "copula", held_out=0)
        return lambda noise: self.decoder(prior.from_normal(noise))


def build(method: Method, data: Curve, hidden: int, seed: int) -> Learner:
    """Return a method with the initial networks of a seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    kind = Variational if method.particles else Empirical
    return kind(data, method, hidden)
