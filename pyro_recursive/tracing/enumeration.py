"""Enumerated latents of a model, summed exactly inside the log-density.

A model's latent that is marked ``infer={"enumerate": ...}``, and that the guide does not sample,
runs with all its values at once, in dims left of all plates (Pyro's `EnumMessenger`). Its density
and all that depend on it become one: log sum_y p(y) p(x | y), in the plates that enclose them all.
Only log p changes by it, so that every bound and estimator is as without.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_recursive.tracing.compatibility import (
    batch_shapes,
    check_batch_shape,
    check_enumerable,
    log_prob_of,
    masked_log_prob,
)
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.sites import (
    SUMMED,
    Site,
    SiteRecord,
    SiteTable,
    entry_of,
    own_scale,
    same_scale,
    sites,
    unmasked,
)

# What Python and torch say where a program needs one number and finds a tensor of several.
_ONE_VALUE = ("ambiguous", "converted to Scalar", "single element", "one element tensors")


class EnumeratedModel:
    """A model with all values of its enumerated latents at once, in dims from ``dim`` leftwards.

    Those that are ``guided`` have the guide's values. Sequential enumeration runs in parallel as
    well: the sum is the same.
    """

    def __init__(self, model: Callable, guided: Container[str], dim: int) -> None:
        self.guided, self.last = guided, ""
        self.model = _Enumerate(dim)(poutine.infer_config(model, self._config))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def check_branches(self, error: Exception) -> None:
        """Raise a clearer error where the model may have branched on an enumerated value."""
        if self.last and any(words in str(error) for words in _ONE_VALUE):
            known = str(error).splitlines()[0].rstrip(".")
            raise NotImplementedError(
                f"Model site '{self.last}' is enumerated, and after it the model raises: {known}. "
                "If it branches on an enumerated value, sample that in the guide "
                "(estimator='vimco'), or write the branch with torch.where."
            ) from error

    def _config(self, site: Any) -> Any:
        name, infer = site["name"], site["infer"]
        if site["type"] != "sample" or site["is_observed"] or not infer.get("enumerate"):
            return {}
        if name in self.guided:
            return {"enumerate": None}
        if site["done"]:
            raise ValueError(
                f"Model site '{name}' is enumerated, and a handler inside the model gives it a "
                "value (poutine.replay, infer_discrete). Pass the model without the handler, or "
                "with the value as data (pyro.condition)."
            )
        check_enumerable(site)
        self.last = name
        return {"enumerate": "parallel", SUMMED: True}


class _Enumerate(EnumMessenger):
    """Pyro's handler, without its look at `Tensor.data`, which `torch.vmap` does not have."""

    def _pyro_post_sample(self, msg: Any) -> None:
        shape = getattr(msg["value"], "shape", None)
        if shape is not None:
            value = SimpleNamespace(data=SimpleNamespace(shape=shape), dim=lambda: len(shape))
            super()._pyro_post_sample({**msg, "value": value})  # which writes to `infer`


class StableRing(LogRing):
    """Sums of products in log space: terms are added before they are exponentiated.

    Pyro's ring exponentiates each factor by itself, and loses the gradient where two disagree by
    16 nats in single precision. Dims are summed one by one, those of the smallest tables first.
    """

    def sumproduct(self, terms: Iterable[Tensor], dims: Iterable[str]) -> Tensor:
        rest: dict[int, Tensor] = dict(enumerate(terms))
        buckets = {dim: {i for i, term in rest.items() if dim in packed_dims(term)} for dim in dims}
        sizes = {dim: self._dim_to_size[dim] for term in rest.values() for dim in packed_dims(term)}

        def cost(dim: str) -> float:
            union = {each for i in buckets[dim] for each in packed_dims(rest[i])}
            return math.prod(sizes[each] for each in union)

        costs = {dim: cost(dim) for dim in sorted(buckets)}
        for new in range(len(rest), len(rest) + len(buckets)):
            dim = min(costs, key=costs.__getitem__)
            joined = buckets.pop(dim)
            del costs[dim]
            rest[new] = self.log_sum(_product([rest.pop(i) for i in sorted(joined)]), dim)
            for other in buckets.keys() & set(packed_dims(rest[new])):
                buckets[other] = buckets[other] - joined | {new}
                costs[other] = cost(other)
        return _product(list(rest.values()))

    def log_sum(self, term: Tensor, dim: str) -> Tensor:
        """Sum a packed product of all factors of a latent over its values."""
        return _log_sum(term, dim)


def packed_dims(term: Tensor) -> str:
    """Return the symbols of a packed tensor's dims."""
    return term._pyro_dims  # type: ignore[attr-defined]


def _packed(term: Tensor, dims: str) -> Tensor:
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term


def _product(terms: list[Tensor]) -> Tensor:
    first, *others = terms
    if not others:
        return first
    expanded = packed.broadcast_all(*terms)
    return _packed(sum(expanded[1:], expanded[0]), packed_dims(expanded[0]))


def _log_sum(term: Tensor, dim: str) -> Tensor:
    """Return the log of the sum over a dim; the gradient is 0 where all entries are -inf."""
    axis = packed_dims(term).index(dim)
    largest = term.detach().amax(axis, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    total = (term - largest).exp().sum(axis)
    dead = total == 0
    log = torch.where(dead, -math.inf, torch.where(dead, 1.0, total).log())
    return _packed(log + largest.squeeze(axis), packed_dims(term).replace(dim, ""))


@dataclass(frozen=True)
class Marginal:
    """A log-density that enumerated latents are summed out of, scaled, and the names of its sites.

    ``site`` has the frames of the plates that enclose all of them; ``reached`` are the plates of
    some of them, whose entries depend on each other by the sum.
    """

    site: Site
    log_prob: Tensor
    names: frozenset[str]
    reached: frozenset[str]

    def check_apart(self, names: frozenset[str]) -> None:
        """Raise where some of the sites are among those named, inside plates, and others not."""
        if self.names & names and (outside := self.names - names):
            every, some = (", ".join(map(repr, sorted(each))) for each in (self.names, outside))
            verb = "is" if len(outside) == 1 else "are"
            raise ValueError(
                f"Sites {every} are summed together, and {some} {verb} outside the plates of the "
                "data: the sum does not split by entry. Use global_latents='joint' with all data, "
                "or sample the enumerated site in the guide."
            )


def is_enumerated(table: SiteTable) -> bool:
    """Whether the model ran with all values of a latent at once."""
    return any("_enumerate_dim" in record.site["infer"] for record in table.model)


def most_values(trace: poutine.Trace, nesting: int) -> int:
    """Return the largest number of values of enumerated latents in one density of a model."""
    shapes = (torch.broadcast_shapes(*batch_shapes(site)) for site in sites(trace))
    return max((_values(nesting + 1, shape) for shape in shapes), default=1)


def marginalised(table: SiteTable, layout: PlateLayout) -> tuple[list[SiteRecord], list[Marginal]]:
    """Return a model's sites that depend on no enumerated latent, and what the others sum to."""
    ordinary, components = factorised(table, layout)
    return ordinary, [each.marginal(layout) for each in components]


def factorised(table: SiteTable, layout: PlateLayout) -> tuple[list[SiteRecord], list["Component"]]:
    """Return a model's sites that depend on no enumerated latent, and the others in components."""
    table.traces[0].symbolize_dims()
    enumerated = {
        record.site["infer"]["_enumerate_symbol"]: record
        for record in table.model
        if "_enumerate_dim" in record.site["infer"]
    }
    width = layout.max_plate_nesting + 1
    ordinary: list[SiteRecord] = []
    components: list[Component] = []
    for record in table.model:
        if all(_values(width, shape) == 1 for shape in batch_shapes(record.site)):
            ordinary.append(record)
            continue
        factor = _factor(record, enumerated, width)
        new, others = Component(table.traces[0], enumerated, [factor]), []
        for each in components:
            if each.symbols & factor.symbols:
                new.factors = each.factors + new.factors
            else:
                others.append(each)
        components = [*others, new]
    return ordinary, components


def _values(width: int, shape: torch.Size) -> int:
    """Return the size of a batch shape left of so many dims, where those of enumeration are."""
    return math.prod(shape[: max(0, len(shape) - width)])


@dataclass(frozen=True)
class Factor:
    """The packed log-density of a site, with its mask and without scale, and the dims to sum."""

    record: SiteRecord
    term: Tensor
    symbols: frozenset[str]

    @property
    def frames(self) -> dict[str, Any]:
        """The frames of all plates by name, the particle plate's too."""
        return {frame.name: frame for frame in self.record.site["cond_indep_stack"]}


def _factor(record: SiteRecord, enumerated: dict[str, SiteRecord], width: int) -> Factor:
    site = record.site
    if "_enumerate_dim" in site["infer"]:
        log_prob = log_prob_of(site, unmasked(site["fn"]))  # which sums to 1 where masked, too
    else:
        log_prob = masked_log_prob(site)
    check_batch_shape(site, log_prob.shape[max(0, log_prob.dim() - width) :])
    try:
        term = packed.pack(log_prob, site["infer"]["_dim_to_symbol"])
    except ValueError as error:
        raise ValueError(
            f"Site '{record.name}' has batch shape {tuple(log_prob.shape)}, and a dim of it "
            "belongs to no plate and to no enumerated site: index dims from the right."
        ) from error
    return Factor(record, term, frozenset(packed_dims(term)) & enumerated.keys())


@dataclass
class Component:
    """Sites that are summed together over the values of enumerated latents, those by symbol."""

    trace: poutine.Trace
    enumerated: dict[str, SiteRecord]
    factors: list[Factor]

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset[str]().union(*(factor.symbols for factor in self.factors))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all packed dims."""
        pairs = [zip(packed_dims(f.term), f.term.shape, strict=True) for f in self.factors]
        return {dim: size for each in pairs for dim, size in each}

    def contracted(
        self, factors: Iterable[Factor], ring: StableRing
    ) -> dict[frozenset[str], list[Tensor]]:
        """Sum the enumerated latents out of factors: packed terms, by the symbols of plates."""
        self._check_outside()
        tree = OrderedDict[frozenset[str], list[Tensor]]()
        for factor in factors:
            vectorized = [name for name, frame in factor.frames.items() if frame.vectorized]
            ordinal = frozenset(self.trace.plate_to_symbol[name] for name in vectorized)
            tree.setdefault(ordinal, []).append(factor.term)
        try:
            return contract_tensor_tree(tree, set(self.symbols), ring=ring)
        except NotImplementedError as error:
            raise self._crossing() from error

    def marginal(self, layout: PlateLayout) -> Marginal:
        ring = StableRing(dim_to_size=self.sizes)
        ((term,),) = self.contracted(self.factors, ring).values()
        frames = self.frames(layout)
        scale = self._scale(frames, layout)
        names = frozenset(factor.record.name for factor in self.factors)
        log_prob = scale_and_mask(packed.unpack(term, self.trace.symbol_to_dim), scale)
        plates = {name for factor in self.factors for name in factor.record.plates}
        site = joint_site(self.factors, frames)
        return Marginal(site, log_prob, names, frozenset(plates - frames.keys()))

    def frames(self, layout: PlateLayout) -> dict[str, Any]:
        """Return the frames of the plates that enclose all sites; sequential ones in one entry."""
        first, *others = [factor.frames for factor in self.factors]
        frames = {}
        for name, frame in first.items():
            if not all(name in each for each in others):
                continue
            if frame.vectorized or len({entry_of(each[name]) for each in (first, *others)}) == 1:
                frames[name] = frame
            elif name in layout.sequential:
                raise ValueError(
                    f"Sites {self._named()} are summed together, and are in several entries of "
                    f"the sequential plate '{name}'. Use a loop without a plate."
                )
        return frames

    def _scale(self, frames: dict[str, Any], layout: PlateLayout) -> Any:
        """Return the scale of all sites, without the shared plates' subsample scale."""
        first, *others = [factor.record for factor in self.factors]
        scale = first.site["scale"]
        for other in others:
            if not same_scale(scale, other.site["scale"], values=is_validation_enabled()):
                raise ValueError(
                    f"Sites '{first.name}' and '{other.name}' are summed together and have scales "
                    f"{_brief(scale)} and {_brief(other.site['scale'])}: the logarithm of their "
                    "sum has no one scale. Put one poutine.scale around both, and in a subsampled "
                    "plate both of them or none."
                )
        if isinstance(scale, Tensor):
            inside = {frame.dim for frame in frames.values() if frame.vectorized}
            wide = [dim for dim in range(-scale.dim(), 0) if scale.shape[dim] > 1]
            if not inside.issuperset(wide):
                raise ValueError(
                    f"Sites {self._named()} are summed together, and their scale differs inside "
                    "the sum. Give it the plates of all of them."
                )
        return own_scale(first.site, layout.names)

    def _check_outside(self) -> None:
        """Raise where a site outside a plate depends on an enumerated one inside."""
        for factor in self.factors:
            for symbol in factor.symbols:
                inside = self.enumerated[symbol]
                for name, frame in inside.plates.items():
                    if frame.vectorized and frame.size > 1 and name not in factor.frames:
                        raise ValueError(
                            f"The density of '{factor.record.name}', outside plate '{name}', "
                            f"depends on '{inside.name}', which is enumerated inside it: the sum "
                            f"does not split by entry. Sample '{inside.name}' in the guide."
                        )

    def _crossing(self) -> NotImplementedError:
        """Return the error for latents in plates that cross: each entry depends on all others."""
        for factor in self.factors:
            stacks = [self.enumerated[symbol].plates.keys() for symbol in sorted(factor.symbols)]
            for one in stacks:
                for other in stacks:
                    if one - other and other - one:
                        plates = f"'{min(one - other)}' and '{min(other - one)}'"
                        return NotImplementedError(
                            f"Plates {plates} cross at site '{factor.record.name}', which depends "
                            "on sites enumerated in each: the sum has C**(size) terms. Make the "
                            "smaller plate sequential (`for i in pyro.plate(...)`), or sample one "
                            "of them in the guide."
                        )
        every = {name for factor in self.factors for name in factor.record.plates}
        return NotImplementedError(
            f"Sites {self._named()} depend on sites enumerated in plates {sorted(every)}, which "
            "cross. Make the smaller plate sequential, or sample one of them in the guide."
        )

    def _named(self) -> str:
        return ", ".join(f"'{factor.record.name}'" for factor in self.factors)


def joint_site(factors: Iterable[Factor], frames: dict[str, Any]) -> Site:
    """Return what stands for the sites of factors, in the plates of these frames."""
    name = "+".join(factor.record.name for factor in factors)
    return {"name": name, "cond_indep_stack": tuple(frames.values()), "infer": {}}


def _brief(scale: Any) -> str:
    return f"of shape {list(scale.shape)}" if isinstance(scale, Tensor) else f"{scale:g}"
