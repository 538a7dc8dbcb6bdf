"""Whether the entries of a plate are independent given what is outside: found by swapping values.

Some of a plate's entries get other values of their latents, then the others. No density outside
the plate may change, in model or guide, nor that of an entry which keeps its values. This is a
test: it finds what these values show, and may miss a dependence.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_recursive.tracing.handlers import ComponentIndex, DryRun
from pyro_recursive.tracing.isolation import isolated, random_state, set_random_state
from pyro_recursive.tracing.perturbed import perturbed
from pyro_recursive.tracing.plates import data_plates
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.sites import (
    PlateDependence,
    Site,
    SiteRecord,
    SiteTable,
    entry_of,
    independent_plates_of,
    is_delta,
    latent_sites,
    layers,
    plates_of,
    sites,
)

PARTS_IF_DISCRETE = 4  # a step function of the latents may have the same value after one swap

Density = tuple[Site, list[tuple[Tensor, int]]]  # tensors, each with its number of event dims


def dependence_of(program: Program) -> dict[str, PlateDependence]:
    """Return what depends on the latents inside plates, found once for each structure.

    Tested are the plates that enclose all sites, those that enclose all data, and those of sites
    that are not reparameterised; a plate that cannot be tested is left out. Batch normalisation
    runs in eval mode, as it would couple the rows of any minibatch. The program is tested at its
    parameters and data and near them, as in `choice.choose`.
    """
    structure = structure_of(program)
    if structure.dependence is None:
        with isolated(), DryRun(), torch.no_grad(), _batch_norm_in_eval_mode():
            found = [_tested(program)]
            if found[0]:
                with suppress(Exception), perturbed(program) as near:
                    found.append(_tested(near))
        structure.dependence = {
            name: reduce(or_, (each[name] for each in found if name in each)) for name in found[0]
        }
    return structure.dependence


def independent_plates(program: Program) -> frozenset[str]:
    """Return the plates whose entries are independent given what is outside."""
    return frozenset(name for name, found in dependence_of(program).items() if not found)


def _tested(program: Program) -> dict[str, PlateDependence]:
    try:
        guide = program.run_guide()
        is_enumerated = bool(structure_of(program).enumerated)
        if not is_enumerated and not any(map(plates_of, latent_sites(guide))):
            return {}
        swaps = _Swaps(program, guide)
        drawn = {r.name for r in swaps.table.model if not r.site["is_observed"]}
        if not drawn <= {record.name for record in swaps.latents}:
            return {}  # what the model draws itself need not be the same in two runs
        names = _plates_to_test(swaps.table, swaps.latents)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a program that cannot run says so itself
        return {}
    found = {}
    for name in names:
        try:
            result = swaps.dependence(name)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # other values may be impossible
            continue
        if result is not None:
            found[name] = result
    return found


def _plates_to_test(table: SiteTable, latents: list[SiteRecord]) -> list[str]:
    stacks = [set(record.row_plates) for record in table.records]
    enclosing = set.intersection(*stacks) if stacks else set()
    discrete = [record for record in latents if record.group in ("score", "model")]
    scored = {name for record in discrete for name in record.row_plates}
    inside = {name for record in latents for name in record.plates}
    return sorted((enclosing | scored | data_plates(r.site for r in table.model)) & inside)


class _Swaps:
    """Runs of a program on the values of one guide run, some of them replaced."""

    def __init__(self, program: Program, guide: poutine.Trace) -> None:
        self.program, self.guide = program, guide
        self.enumerated: dict[str, Site] = {}
        # Not the values themselves: transforms remember those, and need not invert them.
        self.values = {s["name"]: s["value"].clone() for s in latent_sites(self.guide)}
        self.state = random_state()
        self.table = self._run(self.values)
        self.enumerated = {record.name: record.site for record in self.table.enumerated}
        if self.enumerated:  # drawn by the model, and given to it from now on
            self.values |= {name: site["value"] for name, site in self.enumerated.items()}
            self.table = self._run(self.values)
        self.latents = [
            record
            for record in self.table.records
            if (record.group != "model" or record.name in self.enumerated)
            and record.name in self.values
        ]
        self.before = _densities(self.table)

    def dependence(self, plate: str) -> PlateDependence | None:
        """Return what depends on latents in a plate; None where runs cannot be compared."""
        inside = [record for record in self.latents if plate in record.plates]
        found = self._found(plate, inside)
        summed = [record for record in inside if record.group == "model"]
        if found and summed and summed[0].plates[plate].vectorized:
            own = self._found(plate, summed) if len(summed) < len(inside) else found
            found = replace(found, summed=(*own.outside, *own.coupled))
        kept = torch.ones(inside[0].plates[plate].size, dtype=torch.bool)
        if found and _difference(self.before, _densities(self._run(self.values)), plate, kept):
            return None
        return found

    def _found(self, plate: str, inside: list[SiteRecord]) -> PlateDependence:
        """Return what other values of these latents in some entries show."""
        drawn = self._drawn_again(inside)
        discrete = any(
            r.group in ("score", "model") and not isinstance(r.site["fn"], ComponentIndex)
            for r in inside
        )
        # A generator of its own, as all runs start from one random state.
        random = torch.Generator().manual_seed(0)
        found = PlateDependence()
        for is_swapped in _parts(inside[0].plates[plate].size, discrete, random):
            swapped = {}
            for record in inside:
                other = _other_value(record.site, drawn.get(record.name), random)
                swapped[record.name] = _swap(record, plate, is_swapped, other)
            after = _densities(self._run({**self.values, **swapped}))
            found = found | _difference(self.before, after, plate, ~is_swapped)
        return found

    def _run(self, values: dict[str, Tensor]) -> SiteTable:
        """Run model and guide on values, always with the same noise."""
        set_random_state(self.state)
        replayed = self.guide.copy()
        for name in replayed.nodes.keys() & values.keys():
            replayed.nodes[name] = {**replayed.nodes[name], "value": values[name]}
        guide = self.program.run_guide(replayed)
        source = guide.copy()
        for name in self.enumerated.keys() & values.keys():
            source.add_node(name, **{**self.enumerated[name], "value": values[name]})
        return SiteTable(self.program.run_model(source), guide)

    def _drawn_again(self, inside: list[SiteRecord]) -> dict[str, Tensor]:
        """Return other values of the sites inside, given the same minibatch and sites outside."""
        names = {record.name for record in inside if record.group != "model"}
        kept = self.guide.copy()
        for name in names:
            kept.remove_node(name)
        drawn = self.program.run_guide(kept)
        return {name: drawn.nodes[name]["value"] for name in names}


def _densities(table: SiteTable) -> tuple[list[Density], list[Density]]:
    """Return the densities of model and guide."""
    of_model, of_guide = ([(s, _density(s)) for s in sites(trace)] for trace in table.traces)
    return of_model, of_guide


def _parts(size: int, discrete: bool, random: torch.Generator) -> Iterator[Tensor]:
    """Yield which entries are swapped: a part of them, then the others."""
    for _ in range(PARTS_IF_DISCRETE if discrete else 1):
        number = (
            int(torch.randint(1, max(size, 2), (), generator=random)) if discrete else size // 2
        )
        part = torch.randperm(size, generator=random) < max(number, 1)
        yield part
        if size > 1:
            yield ~part


def _other_value(site: Site, drawn: Tensor | None, random: torch.Generator) -> Tensor:
    """Return the drawn value, or for discrete sites one that differs in every entry.

    What is not drawn has a support of one value, if it does not differ.
    """
    base, value = layers(site["fn"])[-1], site["value"]
    if base.has_enumerate_support:
        support = base.enumerate_support(expand=False)
        support = support.reshape(len(support), *base.event_shape).to(value)
        if len(support) > 1:
            same = value.unsqueeze(value.dim() - base.event_dim) == support
            index = (same.flatten(-base.event_dim).all(-1) if base.event_dim else same).long()
            index = index.argmax(-1)
            shift = torch.randint(1, len(support), index.shape, generator=random).to(index.device)
            return support[(index + shift) % len(support)]
    elif base.support is constraints.nonnegative_integer:
        return value + 1
    return value if drawn is None else drawn


def _swap(record: SiteRecord, plate: str, is_swapped: Tensor, other: Tensor) -> Tensor:
    """Return the site's value with other entries of the plate where they are swapped."""
    value, frame = record.site["value"], record.plates[plate]
    if not frame.vectorized:
        return other if is_swapped[entry_of(frame)] else value.clone()
    dim = frame.dim - record.site["fn"].event_dim
    rows = is_swapped.to(value.device).reshape(-1, *[1] * (-dim - 1))
    return torch.where(rows, other, value)


def _difference(
    before: tuple[list[Density], list[Density]],
    after: tuple[list[Density], list[Density]],
    plate: str,
    is_kept: Tensor,
) -> PlateDependence:
    """Return the sites that have changed and may not."""
    outside: dict[str, str] = {}
    coupled: list[str] = []
    for where, one, other in zip(("model", "guide"), before, after, strict=True):
        for (site, first), (_, second) in zip(one, other, strict=True):
            pairs = zip(first, second, strict=True)
            changes = [_changed(*each) for each in pairs]
            # A model's site has the guide's `infer` by replay.
            own = plates_of(site) if where == "model" else independent_plates_of(site)
            if plate not in own:
                if any(bool(change.any()) for change in changes):
                    outside[site["name"]] = where
            elif any(_changed_in(change, plates_of(site)[plate], is_kept) for change in changes):
                coupled.append(site["name"])
    return PlateDependence(outside, tuple(coupled))


def _changed(first: tuple[Tensor, int], second: tuple[Tensor, int]) -> Tensor:
    """Return where two densities differ by more than rounding."""
    (one, event_dim), (other, _) = first, second
    slack = torch.finfo(one.dtype).eps ** (2 / 3) if one.is_floating_point() else 0.0
    near = (one - other).abs() <= slack * (1 + torch.minimum(one.abs(), other.abs()))
    changed = ~(near | (one == other) | (one.isnan() & other.isnan()))
    return changed.flatten(changed.dim() - event_dim).any(-1) if event_dim else changed


def _changed_in(changed: Tensor, frame: Any, is_kept: Tensor) -> bool:
    """Whether a density changed in an entry of the plate that kept its values."""
    if not frame.vectorized:
        return bool(is_kept[entry_of(frame)] and changed.any())
    if changed.dim() >= -frame.dim and changed.shape[frame.dim] == len(is_kept):
        changed = changed & is_kept.to(changed.device).reshape(-1, *[1] * (-frame.dim - 1))
    return bool(changed.any())


def _density(site: Site) -> list[tuple[Tensor, int]]:
    """Return a site's log-density; of a computed value, the value and its log-density."""
    fn = site["fn"]
    if is_delta(site):
        base = layers(fn)[-1]
        return [(base.v, fn.event_dim), (base.log_density, fn.event_dim - base.event_dim)]
    log_prob = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    return [(scale_and_mask(log_prob, site["scale"], site["mask"]), 0)]


@contextmanager
def _batch_norm_in_eval_mode() -> Iterator[None]:
    changed: list[nn.Module] = []

    def leave_training(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, _BatchNorm) and module.training:
            module.training = False
            changed.append(module)

    hook = register_module_forward_pre_hook(leave_training)
    try:
        yield
    finally:
        hook.remove()
        for module in changed:
            module.training = True
