"""Every row's draw under the posterior of every row: the table ``log q(z_j | x_i)``.

A guide draws once for all rows of a batch. Then it runs again, under a plate of particles, with the
latents of one row given to all rows: each particle holds the draw of another row.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_recursive.tracing.choice import require_plate
from pyro_recursive.tracing.compatibility import check_match, masked_log_prob
from pyro_recursive.tracing.conditionals import Conditional, conditionals
from pyro_recursive.tracing.enumeration import is_enumerated
from pyro_recursive.tracing.handlers import ComponentIndex, RunCache
from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.tracing.plates import Particles, PlateLayout
from pyro_recursive.tracing.program import Program, no_model, structure_of, without
from pyro_recursive.tracing.sites import (
    LEAVES_OUT,
    PARTICLE_PLATE,
    Site,
    SiteTable,
    independent_plates_of,
    is_delta,
    latent_sites,
    mask_of,
    plates_of,
    sites,
    subsample_sites,
)

DRAWN_ROWS = 5000  # draws times rows in one pass of guide and model
CHUNK_ROWS = 50_000  # entries of the table in one pass: networks read the rows once in each


@dataclass(frozen=True)
class RowDraws:
    """S draws of a guide for all rows, in one run, and what its other runs start from.

    ``state`` is the random state before the run: noise outside the sites, of dropout say, is the
    same in all runs. ``memory`` is the guide's `RunCache`.
    """

    count: int
    trace: poutine.Trace
    state: list[Tensor]
    memory: dict[Any, Any]


class PosteriorTable:
    """A guide's draws for the B rows of one batch, and their densities in each other's rows.

    The rows are the entries of the plate around the local latents. Latents outside of it have one
    value a draw, for all rows, and do not count. All runs have the minibatch of the first.

    Args:
        program: the guide and its arguments, with the model where `log_prior` is called.
        plate: the rows' plate; None is the one around all latents that are in any.
    """

    def __init__(self, program: Program, plate: str | None = None) -> None:
        alone = replace(program, model=no_model)
        require_plate(alone, structure_of(alone, fresh=True))
        self.structure = structure_of(program, fresh=True)
        self.program, self.nesting = program, self.structure.max_plate_nesting
        trace = self._run(2, None)
        self.minibatch = subsample_sites(trace)
        self.frame = _rows_frame(latent_sites(trace), plate)
        local = [site for site in latent_sites(trace) if self.frame.name in plates_of(site)]
        _check_density(local)
        self.local = frozenset(site["name"] for site in local)
        self.num_rows = self.frame.size

    def draw(self, count: int) -> RowDraws:
        state, memory = random_state(), RunCache()
        with memory:
            trace = self._run(count, self.minibatch)
        return RowDraws(count, trace, state, memory.content)

    def split(self, num_draws: int) -> Iterator[RowDraws]:
        """Yield so many draws for each row, about 5,000 rows at a time."""
        size = max(1, DRAWN_ROWS // self.num_rows)
        for start in range(0, num_draws, size):
            yield self.draw(min(size, num_draws - start))

    def values(self, draws: RowDraws) -> dict[str, Tensor]:
        """Return the rows' latents, without auxiliary ones: ``[S, B, units]`` for each site.

        The units are the plates inside a row and the event dims, flattened.
        """
        return {
            site["name"]: self._by_row(site, draws.count).reshape(draws.count, self.num_rows, -1)
            for site in latent_sites(draws.trace)
            if site["name"] in self.local and not site["infer"].get("is_auxiliary")
        }

    def blocks(self, draws: RowDraws) -> Iterator[Tensor]:
        """Yield the table ``log q(z_j | x_i)`` in nats, ``[C, B]`` float64, for C draws at a time.

        The draws j are in the order of ``[S, B]``.
        """
        after = random_state()
        size = max(1, CHUNK_ROWS // self.num_rows)
        for index in torch.arange(draws.count * self.num_rows).split(size):
            given = self._given(draws, index)
            set_random_state(draws.state)
            with RunCache(draws.memory):
                again = self._run(len(index), without(given, is_delta))
            set_random_state(after)
            for site in (s for s in latent_sites(again) if s["name"] in self.local and is_delta(s)):
                expected = given.nodes[site["name"]]["value"]
                if not torch.allclose(site["value"], expected, 1e-4, 1e-6, equal_nan=True):
                    raise _no_density(site)
            counted = [site for site in sites(again) if _is_density(site)]
            inside = [site for site in counted if self.frame.name in plates_of(site)]
            yield self._summed(self._log_probs(inside), index)

    def log_prior(self, draws: RowDraws) -> Tensor:
        """Run the model on the draws; return its log-density of the rows' latents.

        ``[S, B]`` in nats, float64, given the latents outside the rows, without enumerated latents.

        Raises ValueError where a site is inside the rows' plate in one of the programs only, or
        rows depend on each other by an enumerated latent outside.
        """
        enum_dim = -self.nesting - 2 if self.structure.enumerated else None
        particles = Particles(1, draws.count, -self.nesting - 1)
        with particles.plate():
            model = self.program.run_model(draws.trace, enum_dim)
        table, row = SiteTable(model, draws.trace), self.frame.name
        check_match(table, self.nesting)
        ordinary, summed = table.model, list[Conditional]()
        if is_enumerated(table):
            ordinary, summed = conditionals(table, PlateLayout(particles, self.nesting, ()))
        drawn = [record.site for record in ordinary if not record.site["is_observed"]]
        found = [s for s in drawn if row in plates_of(s) and "_enumerate_dim" not in s["infer"]]
        terms, names = self._log_probs(found), {site["name"] for site in found}
        for each in summed:
            if each.log_prior is not None and row in plates_of(each.site):
                for name in each.latent:
                    self._check_mask(model.nodes[name])
                names |= set(each.latent)
                terms.append((each.site, each.log_prior))
            elif shared := sorted(self.local & set(each.latent)):
                raise ValueError(
                    f"The prior of '{shared[0]}' is summed over an enumerated latent outside plate "
                    f"'{row}', by which rows depend on each other. Sample it in the guide."
                )
        for name in sorted(names ^ (self.local & set(model.nodes))):
            inside, outside = ("model", "guide") if name in names else ("guide", "model")
            raise ValueError(
                f"Site '{name}' is inside plate '{row}' in the {inside}, not in the {outside}."
            )
        require_plate(self.program, self.structure)
        return self._summed(terms, range(draws.count))

    def _run(self, count: int, values: poutine.Trace | None) -> poutine.Trace:
        with pyro.plate(PARTICLE_PLATE, count, dim=-self.nesting - 1):
            return self.program.run_guide(values)

    def _by_row(self, site: Site, count: int) -> Tensor:
        """Return a local site's value with its rows in front, ``[S, B, *inner plates, *event]``."""
        value, event_dim = site["value"], site["fn"].event_dim
        value = value.movedim(self.frame.dim - event_dim, 1)
        return value.expand(count, self.num_rows, *value.shape[2:])

    def _given(self, draws: RowDraws, index: Tensor) -> poutine.Trace:
        """Copy the trace: each particle holds one draw of one row, in all rows."""
        copy = draws.trace.copy()
        draw, row = index // self.num_rows, index % self.num_rows
        for site in latent_sites(draws.trace):
            if site["name"] in self.local:
                dim = self.frame.dim - site["fn"].event_dim
                taken = self._by_row(site, draws.count)[draw, row].unsqueeze(dim)
                shape = list(taken.shape)
                shape[dim] = self.num_rows
                value = taken.expand(shape)
            else:
                value = site["value"][draw]
            copy.nodes[site["name"]] = {**site, "value": value}
        return copy

    def _log_probs(self, found: Sequence[Site]) -> list[tuple[Site, Tensor]]:
        """Return the log-densities of sites with their masks and without their scales."""
        for site in found:
            self._check_mask(site)
        return [(s, masked_log_prob(s)) for s in found]

    def _check_mask(self, site: Site) -> None:
        """Raise where a site is masked in some rows."""
        mask, dim = mask_of(site), plates_of(site)[self.frame.name].dim - site["fn"].event_dim
        differs = bool(site["infer"].get(LEAVES_OUT))
        if mask is not None and mask.dim() >= -dim:
            differs |= bool((mask != mask.narrow(dim, 0, 1)).any())
        if differs:
            raise ValueError(
                f"The mask of site '{site['name']}' differs between rows of plate "
                f"'{self.frame.name}'."
            )

    def _summed(self, terms: Sequence[tuple[Site, Tensor]], index: Collection) -> Tensor:
        """Sum log-densities over all but particles and rows, ``[particles, B]``."""
        frame = plates_of(terms[0][0])[self.frame.name]
        particles = Particles(1, len(index), -self.nesting - 1)
        layout = PlateLayout(particles, self.nesting, (frame,))
        summed = layout.gather([terms])
        assert summed is not None
        return summed[0].double()


def table_of(
    guide: Callable, args: tuple, kwargs: dict[str, Any], plate: str | None = None
) -> PosteriorTable:
    """Return the table of a guide without its model."""
    return PosteriorTable(Program(no_model, guide, args, kwargs), plate)


def _is_density(site: Site) -> bool:
    """Whether a guide site is part of log q: latents, and the factors of a change of variables."""
    return not site["is_observed"] or isinstance(site["fn"], Unit)


def _rows_frame(found: Sequence[Site], plate: str | None) -> Any:
    """Return the frame of the rows' plate: by default the one around all latents in any plate."""
    inside = [site for site in found if plates_of(site) and plate in (None, *plates_of(site))]
    if not inside:
        listed = {site["name"]: sorted(plates_of(site)) for site in found}
        raise ValueError(f"No latent of the guide is in plate '{plate or 'any'}': {listed}.")
    if plate is None:
        shared = set.intersection(*(set(plates_of(site)) for site in inside))
        own = shared.intersection(*(independent_plates_of(site) for site in inside))
        candidates = own or shared
        if len(candidates) != 1:
            listed = {site["name"]: sorted(plates_of(site)) for site in inside}
            raise ValueError(f"The rows' plate is not clear: {listed}. Pass plate=.")
        (plate,) = candidates
    for site in inside:
        if plate not in independent_plates_of(site):
            raise ValueError(
                f"Guide site '{site['name']}' has one joint density over plate '{plate}'. Give the "
                f"guide an encoder, or plate='{plate}'."
            )
    frame = plates_of(inside[0])[plate]
    if not frame.vectorized:
        raise ValueError(f"Plate '{plate}' is a loop. Use `with pyro.plate(...)`.")
    return frame


def _check_density(local: Sequence[Site]) -> None:
    """Raise where all latents of the rows are computed, or sampled after an auxiliary one."""
    sampled = [s for s in local if not is_delta(s) and not isinstance(s["fn"], ComponentIndex)]
    if not sampled:
        raise _no_density(local[-1])
    auxiliary = [site for site in sampled if site["infer"].get("is_auxiliary")]
    # A value computed from an auxiliary draw has the draw's density; one sampled after it has not.
    if auxiliary and not any(is_delta(site) for site in local):
        raise ValueError(
            f"Guide site '{auxiliary[0]['name']}' is auxiliary: the density of the latents is an "
            "integral over it. Use a MixtureGuide."
        )


def _no_density(site: Site) -> ValueError:
    return ValueError(
        f"Guide site '{site['name']}' is computed (a Delta): it has no density. Sample it, as "
        "AutoNormal and AmortizedGuide do."
    )
