"""Every row's draw under the posterior of every row: the table ``log q(z_j | x_i)``.

A guide draws once for all rows of a batch. Then it runs again, under a plate of particles, with the
latents of one row given to all rows: each particle holds the draw of another row.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_recursive.evaluation.row_plate import check_density, latent, no_density, rows_plate
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import check_match
from pyro_recursive.tracing.densities import log_prob_of
from pyro_recursive.tracing.handlers import RunCache
from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.tracing.plates import Particles, PlateLayout
from pyro_recursive.tracing.program import Program, structure_of, without
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    SiteTable,
    is_delta,
    plates_of,
    sites,
    subsample_sites,
)

__all__ = ["PosteriorTable", "RowDraws", "alone"]

DRAWN_ROWS = 5000  # draws times rows in one pass of guide and model
CHUNK_ROWS = 50_000  # the same where draws are exchanged: networks see the rows once in each pass


@dataclass(frozen=True)
class RowDraws:
    """S draws of a guide for all rows, in one run, and what other runs of it start from.

    ``state`` is the random state before the run: noise outside the sites, of dropout say, is the
    same in all runs. ``memory`` is what the guide need not compute twice.
    """

    count: int
    trace: poutine.Trace
    state: list[Tensor]
    memory: dict[Any, Any] = field(default_factory=dict)


class PosteriorTable:
    """A guide's draws for the B rows of one batch, and their densities in each other's rows.

    The rows are the entries of the plate around the local latents, those of the minibatch where it
    is subsampled. Latents outside of it keep one value a draw, for all rows, and do not count.

    :param program: the guide and its arguments, with the model where that is to run, too
    :param plate: the rows' plate; None finds the one around all latents that are in any
    :param chunk_size: how many rows' draws one pass gives to all rows; None is about 50,000 / B
    :raises ValueError: there is no such plate, or no density of a row at another row's draw; names
        the site. ``chunk_size`` is below 1
    """

    def __init__(
        self, program: Program, plate: str | None = None, chunk_size: int | None = None
    ) -> None:
        """Look at one run of the guide, which decides the minibatch of all others."""
        check_at_least(1, chunk_size=chunk_size)
        structure = structure_of(program, fresh=True)
        if structure.mixing is not None:
            raise ValueError(
                f"The density of one sample depends on the value of '{structure.mixing}' in "
                "another, when all run in one pass: the program sums over a dim or indexes it from "
                "the left, where the samples are. Count dims from the right (z.sum(-1), z[..., 0])."
            )
        self.program, self.nesting = program, structure.max_plate_nesting
        trace = self._run(2, None)
        self.minibatch = subsample_sites(trace)
        self.frame = rows_plate(latent(trace), plate)
        local = [site for site in latent(trace) if self.frame.name in plates_of(site)]
        check_density(local)
        self.local = frozenset(site["name"] for site in local)
        self.chunk_size = chunk_size or max(1, CHUNK_ROWS // self.num_rows)

    @property
    def num_rows(self) -> int:
        """B, the number of rows."""
        return self.frame.size

    def draw(self, count: int) -> RowDraws:
        """Draw ``count`` times for each row, in one pass."""
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
            for site in latent(draws.trace)
            if site["name"] in self.local and not site["infer"].get("is_auxiliary")
        }

    def strips(self, draws: RowDraws) -> Iterator[Tensor]:
        """Yield the table ``log q(z_j | x_i)`` in nats, ``[C, B]`` float64, for C draws at a time.

        The draws j come in the order of ``[S, B]``.
        """
        after = random_state()
        for numbers in torch.arange(draws.count * self.num_rows).split(self.chunk_size):
            given = self._given(draws, numbers)
            set_random_state(draws.state)
            with RunCache(draws.memory):
                again = self._run(len(numbers), without(given, is_delta))
            set_random_state(after)
            self._check_computed(again, given)
            counted = [site for site in sites(again) if _is_density(site)]
            yield self._summed([s for s in counted if self.frame.name in plates_of(s)], numbers)

    def log_prior(self, draws: RowDraws) -> Tensor:
        """Run the model on the draws; return its log-density of the rows' latents.

        ``[S, B]`` in nats, float64, given the latents outside the rows.

        :raises ValueError: a site is inside the rows' plate in one of the programs only
        """
        with self._particles(draws.count):
            model = self.program.run_model(draws.trace)
        check_match(SiteTable(model, draws.trace), self.nesting)
        found = [site for site in latent(model) if self.frame.name in plates_of(site)]
        names = {site["name"] for site in found}
        for name in sorted(names ^ (self.local & set(model.nodes))):
            inside, outside = ("model", "guide") if name in names else ("guide", "model")
            raise ValueError(
                f"Site '{name}' is inside the rows' plate '{self.frame.name}' in the {inside}, and "
                f"not in the {outside}. Put it there in both, or name other rows with plate=."
            )
        return self._summed(found, range(draws.count))

    def _particles(self, count: int) -> pyro.plate:
        return pyro.plate(PARTICLE_PLATE, count, dim=-self.nesting - 1)

    def _run(self, count: int, values: poutine.Trace | None) -> poutine.Trace:
        try:
            with self._particles(count):
                return self.program.run_guide(values)
        except Exception as error:
            error.add_note(
                f"{count} samples run in one pass, under one more plate on the left: the guide "
                "must broadcast."
            )
            raise

    def _by_row(self, site: Site, count: int) -> Tensor:
        """Return a local site's value with its rows in front, ``[S, B, *inner plates, *event]``."""
        value, event_dim = site["value"], site["fn"].event_dim
        value = value.movedim(self.frame.dim - event_dim, 1)
        return value.expand(count, self.num_rows, *value.shape[2:])

    def _given(self, draws: RowDraws, numbers: Tensor) -> poutine.Trace:
        """Copy the trace: each particle holds one draw of one row, in all rows."""
        copy = draws.trace.copy()
        draw, row = numbers // self.num_rows, numbers % self.num_rows
        for site in latent(draws.trace):
            if site["name"] in self.local:
                place = self.frame.dim - site["fn"].event_dim
                taken = self._by_row(site, draws.count)[draw, row].unsqueeze(place)
                shape = list(taken.shape)
                shape[place] = self.num_rows
                value = taken.expand(shape)
            else:
                value = site["value"][draw]
            copy.nodes[site["name"]] = {**site, "value": value}
        return copy

    def _check_computed(self, again: poutine.Trace, given: poutine.Trace) -> None:
        """Raise where rows compute different values from the same draws."""
        for site in latent(again):
            if site["name"] in self.local and is_delta(site):
                expected = given.nodes[site["name"]]["value"]
                if not torch.allclose(site["value"], expected, 1e-4, 1e-6, equal_nan=True):
                    raise no_density(site)

    def _summed(self, found: list[Site], numbers: Collection) -> Tensor:
        """Sum log-densities over all but particles and rows, ``[particles, B]``."""
        frame = plates_of(found[0])[self.frame.name]
        particles = Particles(1, len(numbers), -self.nesting - 1)
        layout = PlateLayout(particles, self.nesting, (frame,))
        summed = layout.gather([[(site, _log_prob(site, frame)) for site in found]])
        assert summed is not None
        return summed[0].double()


def alone(guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Program:
    """Return the program of a guide that is looked at without its model."""
    return Program(_nothing, guide, args, kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for the model."""


def _is_density(site: Site) -> bool:
    """Whether a guide site is part of log q: latents, and the factors of a change of variables."""
    return not site["is_observed"] or isinstance(site["fn"], Unit)


def _log_prob(site: Site, frame: Any) -> Tensor:
    """Return a site's log-density with its mask; scales are no part of a density."""
    masks = (site["mask"], getattr(site["fn"], "_mask", None))
    if any(isinstance(mask, Tensor) and _varies(mask, frame.dim) for mask in masks):
        raise ValueError(
            f"Site '{site['name']}' has a mask that differs between the rows of plate "
            f"'{frame.name}', whose latents are then not the same variables. Pass rows of one mask "
            "at a time."
        )
    return scale_and_mask(log_prob_of(site, site["fn"]), mask=site["mask"])


def _varies(mask: Tensor, dim: int) -> bool:
    return mask.dim() >= -dim and bool((mask != mask.narrow(dim, 0, 1)).any())
