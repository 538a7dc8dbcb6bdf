"""Random models and guides, as Pyro programs and as sums over single entries.

A program is a list of sites. `Pair` runs it in Pyro, vectorised by plates; `brute_force` computes
the same densities entry by entry, in scalars, with the formulas of the distributions written out.
Both take the noise of the guide's samples from one table.
"""

import itertools
import math
import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

Entry = tuple[tuple[str, int], ...]  # (plate, position in the minibatch) of each plate of a site


@dataclass(frozen=True)
class Plate:
    """A plate at a dim, or a sequential one where ``dim`` is None."""

    name: str
    size: int
    dim: int | None
    batch: int  # the rows of a minibatch; all rows where equal to ``size``


@dataclass(frozen=True)
class RandomSite:
    """A site whose location is linear in its parents; those of the guide may be others."""

    name: str
    kind: str  # normal, bernoulli, poisson, factor
    is_observed: bool
    plates: tuple[Plate, ...]
    event: int  # the entries of a vector, 0 for a scalar
    parents: tuple[tuple[str, float], ...]
    guide_parents: tuple[tuple[str, float], ...]
    masked: str  # "", "poutine" or "distribution"
    factor: float  # poutine.scale

    def sizes(self, whole: bool = True) -> tuple[int, ...]:
        return tuple(plate.size if whole else plate.batch for plate in self.plates)


@dataclass
class Parameters:
    """What a site has in the model or in the guide; fields have an entry for each plate entry."""

    loc: Tensor
    slope: Tensor
    log_scale: Tensor
    field: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.loc, self.slope, self.log_scale]

    def detached(self) -> "Parameters":
        return Parameters(*(each.detach() for each in self.leaves()), self.field)


class Noise:
    """Standard normals, or 0 and 1, by the guide's sites: ``[particles, *plates, *event]``.

    Samples are drawn afresh where there is no table, as in the runs that find the structure.
    """

    def __init__(self, particles: int) -> None:
        self.particles, self.tables, self.calls = particles, dict[str, Tensor](), dict[str, int]()

    def __call__(self, name: str, shape: torch.Size, fallback: Tensor) -> Tensor:
        table = self.tables.get(name)
        if table is None:
            return fallback
        if table.numel() == shape.numel():
            return table.reshape(shape)
        if torch._C._functorch.is_batchedtensor(fallback):  # under torch.vmap
            level = torch._C._functorch.maybe_get_level(fallback)
            return torch._C._functorch._add_batch_dim(table.reshape(-1, *shape), 0, level)
        number = self.calls[name] = self.calls.get(name, -1) + 1  # particles one by one
        return table[number % self.particles].reshape(shape)


class GivenNormal(dist.Normal):
    def __init__(self, loc: Tensor, scale: Tensor, noise: Noise, name: str) -> None:
        self.noise, self.name = noise, name
        super().__init__(loc, scale)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GivenNormal":
        shape = torch.Size(batch_shape)
        return GivenNormal(self.loc.expand(shape), self.scale.expand(shape), self.noise, self.name)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        assert not sample_shape
        normals = torch.randn(self.batch_shape, dtype=self.loc.dtype)
        return self.loc + self.scale * self.noise(self.name, self.batch_shape, normals)


class GivenBernoulli(dist.Bernoulli):
    def __init__(self, logits: Tensor, noise: Noise, name: str) -> None:
        self.noise, self.name = noise, name
        super().__init__(logits=logits)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GivenBernoulli":
        return GivenBernoulli(self.logits.expand(torch.Size(batch_shape)), self.noise, self.name)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        assert not sample_shape
        return self.noise(self.name, self.batch_shape, torch.bernoulli(self.probs.detach()))


def random_sites(rng: random.Random) -> list[RandomSite]:
    """Draw a program: its plates, sites and who depends on whom."""
    dims = rng.sample([-1, -2, -3], rng.choice([0, 1, 1, 2, 2, 3]))
    plates = []
    for number, dim in enumerate(dims):
        size = rng.choice([1, 2, 3, 3])
        is_small = size == 3 and rng.random() < 0.7
        plates.append(Plate(f"p{number}", size, dim, 2 if is_small else size))
    if rng.random() < 0.25:
        plates.append(Plate("loop", 2, None, 2))
    common = [plate for plate in plates if rng.random() < 0.5]
    has_global = rng.random() < 0.3
    discrete = rng.random() < 0.3
    sites: list[RandomSite] = []
    num_latent = rng.choice([1, 1, 2, 2, 3])
    for number in range(num_latent + rng.choice([1, 2])):
        is_observed = number >= num_latent
        own = [plate for plate in plates if plate in common or rng.random() < 0.4]
        if has_global:
            own = plates[:2] if number else []
        kind = rng.choice(["normal", "normal", "bernoulli", "poisson", "factor"])
        if not is_observed:
            entries = math.prod(plate.batch for plate in own)
            kind = "bernoulli" if discrete and number == 0 and entries <= 3 else "normal"
        event = 2 if kind == "normal" and rng.random() < 0.3 else 0
        latents = [site for site in sites if not site.is_observed]

        def some(latents: list[RandomSite] = latents) -> tuple[tuple[str, float], ...]:
            chosen = [site for site in latents if rng.random() < 0.6]
            return tuple((site.name, rng.uniform(-0.7, 0.7)) for site in chosen)

        parents = some()
        if is_observed and not parents:
            parents = ((rng.choice(latents).name, 0.6),)
        masked = rng.choice(["", "", "poutine", "distribution"]) if is_observed else ""
        factor = rng.choice([1.0, 1.0, 0.3]) if kind != "factor" else 1.0
        sites.append(
            RandomSite(
                f"{'x' if is_observed else 'z'}{number}",
                kind,
                is_observed,
                tuple(own),
                event,
                parents,
                () if is_observed else some(),
                masked if kind != "factor" else "",
                factor,
            )
        )
    return sites


@dataclass(eq=False)
class Pair:
    """A random model and guide; calling them runs Pyro's programs.

    ``one_particle`` counts the event dims from the left, as models written for one sample do.
    """

    sites: list[RandomSite]
    seed: int
    dtype: torch.dtype
    particles: int
    one_particle: bool = False
    theta: dict[str, Parameters] = field(default_factory=dict)
    phi: dict[str, Parameters] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    minibatch: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.noise = Noise(self.particles)

        def normals(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        for site in self.sites:
            whole, event = site.sizes(), (site.event,) if site.event else ()
            for table in (self.theta,) if site.is_observed else (self.theta, self.phi):
                scalars = [(0.4 * normals()).requires_grad_() for _ in range(3)]
                table[site.name] = Parameters(*scalars, normals(*whole))
            if site.is_observed:
                value = normals(*whole, *event)
                counts = value.abs().round()
                self.data[site.name] = value if site.kind == "normal" else counts.clamp(max=1)
                self.masks[site.name] = normals(*whole) > -0.5

    def draw_noise(self, generator: torch.Generator) -> None:
        """Fill the table of noise with normals; Bernoulli sites get theirs by the test."""
        self.noise.tables = {}
        for site in self.sites:
            for name, _ in [] if site.is_observed else self.iterations(site):
                rows = tuple(p.batch for p in self.vectorized(site))
                event = (site.event,) if site.event else ()
                shape = (self.particles, *rows, *event)
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.noise.tables[name] = noise.to(self.dtype)

    # --- In Pyro

    def model(self) -> None:
        self._run(is_guide=False)

    def guide(self) -> None:
        self.minibatch.clear()
        self._run(is_guide=True)

    def _run(self, is_guide: bool) -> None:
        used = {p.name: p for site in self.sites for p in site.plates}
        plates = {name: self._plate(plate) for name, plate in used.items()}
        values: dict[str, Tensor] = {}
        for site in self.sites:
            if is_guide and site.is_observed:
                continue
            loop = next((p for p in site.plates if p.dim is None), None)
            for i in plates[loop.name] if loop else (None,):
                with ExitStack() as stack:
                    for plate in self.vectorized(site):
                        index = stack.enter_context(plates[plate.name])
                        self.minibatch[plate.name] = index
                    name = site.name if i is None else f"{site.name}_{i}"
                    stack.enter_context(poutine.scale(scale=site.factor))
                    values[name] = self._sample(site, name, i, values, plates, is_guide)

    def _plate(self, plate: Plate) -> Any:
        if plate.dim is None:
            return pyro.plate(plate.name, plate.size)
        return pyro.plate(plate.name, plate.size, subsample_size=plate.batch, dim=plate.dim)

    def _sample(
        self,
        site: RandomSite,
        name: str,
        i: int | None,
        values: dict[str, Tensor],
        plates: dict[str, Any],
        is_guide: bool,
    ) -> Any:
        own = (self.phi if is_guide else self.theta)[site.name]
        loc = own.loc + own.slope * self._rows(site, own.field, i, plates)
        for parent, weight in site.guide_parents if is_guide else site.parents:
            loc = loc + weight * self._parent(site, parent, i, values)
        scale = own.log_scale.exp()
        if site.kind == "factor":
            return pyro.factor(name, -0.5 * loc**2)
        if is_guide and site.kind == "bernoulli":
            return pyro.sample(name, GivenBernoulli(loc, self.noise, name))
        if site.event:
            loc = loc.unsqueeze(-1).expand(*loc.shape, site.event)
        fn: Any
        if is_guide:
            fn = GivenNormal(loc, scale.expand_as(loc), self.noise, name)
        elif site.kind == "normal":
            fn = dist.Normal(loc, scale)
        elif site.kind == "bernoulli":
            fn = dist.Bernoulli(logits=loc)
        else:
            fn = dist.Poisson(loc.exp())
        fn = fn.to_event(1) if site.event else fn
        if not site.is_observed:
            return pyro.sample(name, fn)
        value = self._rows(site, self.data[site.name], i, plates, site.event)
        mask = self._rows(site, self.masks[site.name], i, plates)
        if site.masked == "distribution":
            fn = fn.mask(mask)
        with poutine.mask(mask=mask if site.masked == "poutine" else torch.tensor(True)):
            return pyro.sample(name, fn, obs=value)

    def _rows(
        self, site: RandomSite, table: Tensor, i: int | None, plates: Any, event: int = 0
    ) -> Tensor:
        """Return the minibatch's rows of a table ``[*plates, *event]``, at the dims of Pyro."""
        for axis, plate in reversed(list(enumerate(site.plates))):
            if plate.dim is None:
                table = table.select(axis, i or 0)
            else:
                table = table.index_select(axis, plates[plate.name].indices)
        vectorized = [p for p in site.plates if p.dim is not None]
        order = sorted(range(len(vectorized)), key=lambda n: vectorized[n].dim or 0)
        table = table.permute((*order, *range(len(vectorized), table.dim())))
        shape = [1] * max((-(p.dim or 0) for p in vectorized), default=0)
        for plate in vectorized:
            shape[plate.dim] = plate.batch
        return table.reshape((*shape, *((event,) if event else ())))

    def _parent(
        self, site: RandomSite, parent: str, i: int | None, values: dict[str, Tensor]
    ) -> Tensor:
        """Return a parent's value at the site's entries, summed over plates it is not in."""
        other = next(each for each in self.sites if each.name == parent)
        names = [name for name, j in self.iterations(other) if j is None or i in (None, j)]
        total = torch.zeros((), dtype=self.dtype)
        for value in (values[name] for name in names):
            if other.event and self.one_particle and self._is_flat(other):
                value = value[0] + value[1]  # of one sample alone
            elif other.event:
                value = value.sum(-1)
            for plate in self.vectorized(other):
                if plate not in site.plates:
                    value = value.sum(plate.dim, keepdim=True)
            total = total + value
        return total

    def _is_flat(self, site: RandomSite) -> bool:
        """Whether the guide's value has no batch dims in a run of one particle."""
        parents = (each for each in self.sites if each.name in dict(site.guide_parents))
        return not self.vectorized(site) and all(map(self._is_flat, parents))

    @staticmethod
    def vectorized(site: RandomSite) -> list[Plate]:
        found = [p for p in site.plates if p.dim is not None]
        return sorted(found, key=lambda plate: plate.dim or 0)

    @staticmethod
    def iterations(site: RandomSite) -> list[tuple[str, int | None]]:
        loop = next((p for p in site.plates if p.dim is None), None)
        if loop is None:
            return [(site.name, None)]
        return [(f"{site.name}_{i}", i) for i in range(loop.size)]

    # --- Entry by entry

    def entries(self, site: RandomSite) -> list[Entry]:
        ranges = [[(p.name, n) for n in range(p.batch)] for p in site.plates]
        return list(itertools.product(*ranges))

    def noise_of(self, site: RandomSite, entry: Entry) -> Tensor:
        """Return a sample's noise, ``[particles, *event]``."""
        where = dict(entry)
        name = f"{site.name}_{where['loop']}" if "loop" in where else site.name
        table = self.noise.tables[name]
        for plate in self.vectorized(site):
            table = table[:, where[plate.name]]
        return table

    def _whole_index(self, site: RandomSite, entry: Entry) -> tuple[int, ...]:
        return tuple(
            position if plate.dim is None else int(self.minibatch[plate.name][position])
            for plate, (_, position) in zip(site.plates, entry, strict=True)
        )

    def _loc(
        self,
        site: RandomSite,
        entry: Entry,
        own: Parameters,
        parents: tuple[tuple[str, float], ...],
        values: dict[str, dict[Entry, Tensor]],
    ) -> Tensor:
        loc = own.loc + own.slope * own.field[self._whole_index(site, entry)]
        loc = loc.expand(self.particles)
        mine = dict(entry)
        for parent, weight in parents:
            for other, value in values[parent].items():
                if all(mine.get(name, n) == n for name, n in other):
                    loc = loc + weight * (value.sum(-1) if value.dim() == 2 else value)
        return loc

    def sample(self, phi: dict[str, Parameters]) -> dict[str, dict[Entry, Tensor]]:
        """Return the guide's values as functions of its parameters and the noise."""
        values: dict[str, dict[Entry, Tensor]] = {}
        for site in (each for each in self.sites if not each.is_observed):
            values[site.name] = {}
            for entry in self.entries(site):
                noise, own = self.noise_of(site, entry), phi[site.name]
                if site.kind == "bernoulli":
                    values[site.name][entry] = noise
                    continue
                loc = self._loc(site, entry, own, site.guide_parents, values)
                loc = loc.unsqueeze(-1) if site.event else loc
                values[site.name][entry] = loc + own.log_scale.exp() * noise
        return values

    def log_prob(
        self,
        site: RandomSite,
        entry: Entry,
        own: Parameters,
        values: dict[str, dict[Entry, Tensor]],
        is_guide: bool = False,
    ) -> Tensor:
        """Return the log-density of one entry without mask and scales, ``[particles]``."""
        parents = site.guide_parents if is_guide else site.parents
        loc = self._loc(site, entry, own, parents, values)
        if site.kind == "factor":
            return -0.5 * loc**2
        if site.is_observed:
            value = self.data[site.name][self._whole_index(site, entry)]
        else:
            value = values[site.name][entry]
        if site.kind == "bernoulli":
            return value * loc - (1 + loc.exp()).log()
        if site.kind == "poisson":
            return value * loc - loc.exp() - torch.lgamma(value + 1)
        loc = loc.unsqueeze(-1) if site.event else loc
        standard = (value - loc) / own.log_scale.exp()
        density = -0.5 * standard**2 - own.log_scale - 0.5 * math.log(2 * math.pi)
        return density.sum(-1) if site.event else density

    def weight(self, site: RandomSite, entry: Entry, shared: list[Plate]) -> float:
        """Return what multiplies an entry's log-density inside the log-weights."""
        is_out = site.masked and not self.masks[site.name][self._whole_index(site, entry)]
        others = [plate for plate in site.plates if plate not in shared]
        return 0.0 if is_out else site.factor * math.prod(p.size / p.batch for p in others)

    def shared_plates(self, sites: list[RandomSite] | None = None) -> list[Plate]:
        """Return the plates around every site, or around all of some."""
        first, *others = self.sites if sites is None else sites
        return [p for p in first.plates if all(p in site.plates for site in others)]

    def has_discrete(self) -> bool:
        return any(site.kind == "bernoulli" for site in self.sites if not site.is_observed)

    def local_sites(self) -> list[RandomSite]:
        """Return the sites in a plate that encloses every observed site."""
        data = self.shared_plates([site for site in self.sites if site.is_observed])
        return [site for site in self.sites if any(p in data for p in site.plates)]

    def is_nested(self) -> bool:
        """Whether no site outside the data's plates depends on one inside."""
        inside = {site.name for site in self.local_sites()}
        return bool(inside) and not any(
            parent in inside
            for site in self.sites
            if site.name not in inside
            for parent, _ in (*site.parents, *site.guide_parents)
        )


@dataclass(frozen=True)
class Terms:
    """Sums of log-densities by entry of the shared plates, each ``[particles, entries]``.

    ``path`` is the log-weight with a graph through the samples alone, ``model`` is log p with a
    graph to the model's parameters, ``density`` log q to the guide's own. ``rest`` is what the
    scales took away from the density that the samples come from.
    """

    model: Tensor
    path: Tensor
    density: Tensor
    rest: Tensor
    log_q_discrete: Tensor  # [particles], whole density of the Bernoulli samples
    full: Tensor  # the log-weights with the whole graph


def brute_force(pair: Pair, only: list[RandomSite] | None = None) -> Terms:
    """Sum the log-densities of all entries, or of those of some sites."""
    sites = pair.sites if only is None else only
    shared = pair.shared_plates(sites) if sites else []
    columns = [tuple(c) for c in itertools.product(*(range(p.batch) for p in shared))]
    zero = torch.zeros(pair.particles, dtype=pair.dtype)
    sums = {name: [zero] * len(columns) for name in ("model", "path", "density", "rest", "full")}
    log_q_discrete = zero
    path = pair.sample(pair.phi)
    fixed = {name: {e: v.detach() for e, v in own.items()} for name, own in path.items()}
    for site in sites:
        for entry in pair.entries(site):
            column = columns.index(tuple(dict(entry)[plate.name] for plate in shared))
            weight = pair.weight(site, entry, shared)

            def add(
                name: str, value: Tensor, column: int = column, sums: dict[str, list] = sums
            ) -> None:
                sums[name][column] = sums[name][column] + value

            theta = pair.theta[site.name]
            add("model", weight * pair.log_prob(site, entry, theta, fixed))
            add("path", weight * pair.log_prob(site, entry, theta.detached(), path))
            add("full", weight * pair.log_prob(site, entry, theta, path))
            if site.is_observed:
                continue
            phi = pair.phi[site.name]
            add("path", -weight * pair.log_prob(site, entry, phi.detached(), path, True))
            add("full", -weight * pair.log_prob(site, entry, phi, path, True))
            own = pair.log_prob(site, entry, phi, fixed, True)
            add("density", weight * own)
            add("rest", (1 - weight) * own)
            if site.kind == "bernoulli":
                whole = pair.log_prob(site, entry, phi, path, True)
                log_q_discrete = log_q_discrete + whole
    stacked = {name: torch.stack(parts, -1) for name, parts in sums.items()}
    return Terms(**stacked, log_q_discrete=log_q_discrete)
