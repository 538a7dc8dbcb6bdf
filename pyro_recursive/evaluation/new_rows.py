"""New rows under a fitted guide: draws of their data, and the log-density of each row."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.effect import GuideMessenger
from torch import Tensor

from pyro_recursive.evaluation.calls import sampling, shown_as_html
from pyro_recursive.evaluation.draws import Draws, SiteDraws
from pyro_recursive.evaluation.enumerated import with_enumerated
from pyro_recursive.evaluation.evidence import Evidence, WeightSums
from pyro_recursive.evaluation.model_runs import (
    ModelRuns,
    enumerated_without,
    is_computed,
    is_factor,
    run_on_draws,
)
from pyro_recursive.evaluation.predictions import predictive_draws
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import check_batch_shape, masked_log_prob
from pyro_recursive.tracing.conditionals import Conditional, conditionals
from pyro_recursive.tracing.dependence import dependence_of
from pyro_recursive.tracing.enumeration import is_enumerated
from pyro_recursive.tracing.handlers import DryRun
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.plates import PlateLayout, layout_of
from pyro_recursive.tracing.program import Program, without
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    SiteRecord,
    SiteTable,
    is_delta,
    latent_sites,
    plates_of,
    sites,
    subsample_sites,
)


@dataclass(frozen=True)
class Prediction:
    """Draws of the data of new rows, and the log-density of the data that were given.

    ``predicted["y"]`` is a ``[S, *plates, *event]``-dim tensor. ``log_p`` is log p(row | training
    data) in nats, float64 ``[*plates]`` for ``plates``, each row by itself; ``standard_error`` in
    nats and ``ess`` in draws are those of the estimate. The three are None where no data are given.
    """

    draws: Draws
    log_p: Tensor | None = None
    standard_error: Tensor | None = None
    ess: Tensor | None = None
    plates: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.draws[name]

    _repr_html_ = shown_as_html

    def __str__(self) -> str:
        lines = [
            f"{'draws':18} {len(self.draws):12}",
            f"{'sites':18} {', '.join(self.draws.sites)}",
        ]
        if self.log_p is not None and self.standard_error is not None and self.ess is not None:
            numbers = {
                "rows": self.log_p.numel(),
                "mean log_p, nats": self.log_p.mean().item(),
                "largest error": self.standard_error.max().item(),
                "smallest ess": self.ess.min().item(),
            }
            lines += [f"{name:18} {value:12.6g}" for name, value in numbers.items()]
        return "\n".join(lines)


@sampling()
@torch.no_grad()
def predict(
    model: Callable,
    guide: Callable | Draws,
    *args: Any,
    num_draws: int = 1000,
    plate: str | None = None,
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> Prediction:
    """Predict new rows by a fitted guide: draw their data, and score the data that are given.

        log p(x_i | data) = log E_{g ~ q} int p(x_i, z_i | g) dz_i        (nats)

    for global latents g, drawn from the guide, and local ones z_i. Local latents of the draws are
    from their prior given g. For the density they are from their prior and, in equal parts, from
    the guide where it has a distribution of its own for each row, as encoders have, and no row
    depends on the latents of another; enumerated ones are summed out of it, unless other latents
    of rows are not the guide's. Data that the model observes are drawn anew, and those that it was
    not given (``y=None``); where the call has some data of the rows, only the missing ones, and
    local latents are the guide's. Densities leave scales out; masked entries count as missing.

    Args:
        model: called with ``args`` and ``kwargs``, those of the new rows.
        guide: called alike; or `posterior_draws` of it on its training data, whose local latents
            are left out.
        num_draws: S, for a guide.
        plate: that of the new rows, by default all plates around all observed sites. Latents
            outside keep their posterior.
        chunk_size, vectorize_particles: as in `pyro_recursive.log_marginal`.

    Raises:
        ValueError: it is not clear which rows are new; a global latent has no draws.

    >>> import pyro, pyro.distributions as dist
    >>> pyro.set_rng_seed(0)
    >>> def model(x, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
    >>> guide = lambda x, y=None: pyro.sample("slope", dist.Normal(0.5, 0.1))
    >>> predict(model, guide, torch.ones(3))["y"].shape
    torch.Size([1000, 3])
    >>> predict(model, guide, torch.ones(3), torch.zeros(3)).log_p.round(decimals=1).tolist()
    [-1.0, -1.0, -1.0]
    """
    check_at_least(1, num_draws=num_draws, chunk_size=chunk_size)
    run: dict[str, Any] = {"chunk_size": chunk_size, "vectorize_particles": vectorize_particles}
    program = Program(model, _no_guide if isinstance(guide, Draws) else guide, args, kwargs)
    single = outline(model, args, kwargs)
    empty = Draws({}, num_draws, minibatch=_part(single))
    drawn = guide if isinstance(guide, Draws) else _guide_draws(program, empty, run)
    new = _new_rows(program, single, drawn, plate)
    kept = {name: each for name, each in drawn.sites.items() if name not in new.local}
    fixed = replace(empty, sites=kept, count=len(drawn))
    missing = _lacking(single, drawn)
    undrawn = {site["name"] for site in latent_sites(single)} - drawn.sites.keys()
    if new.rows and (lacking := sorted(undrawn - new.local)):
        raise ValueError(
            f"There are no draws of {lacking}, outside plates {sorted(new.rows)}. Pass "
            "posterior_draws(model, guide, *training_data) in place of the guide."
        )
    if new.data and missing and not isinstance(guide, Draws):
        summed = frozenset(enumerated_without(single, drawn.sites))
        found = _missing_data(program, replace(fixed, sites=drawn.sites), new, missing, summed, run)
    else:
        found = predictive_draws(model, fixed, *args, **run, **kwargs).sites
    draws = Draws({n: s for n, s in found.items() if n not in drawn.sites}, len(drawn))
    if not new.data:
        return Prediction(draws)
    if new.proposed and any(dependence_of(program).get(name) for name in new.rows):
        new = new._replace(proposed=frozenset())  # a row's weight is not that of its own latents
    summed = new.local.intersection(enumerated_without(single, new.proposed))
    others = new.local - summed
    if enumerates := bool(summed) and (not new.proposed or others == new.proposed):
        prior = ModelRuns.latents, chunk_size, vectorize_particles
        found = run_on_draws(model, args, kwargs, fixed, *prior)
        fixed = replace(fixed, sites={**kept, **{name: found[name] for name in others}})
    evidence, plates = _row_densities(program, fixed, new, run, enumerates)
    return Prediction(draws, *evidence, plates)


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """Stand for the guide where its draws are given."""


def _part(single: poutine.Trace) -> poutine.Trace:
    """Return the subsample sites of a trace that leave rows out."""
    chosen = poutine.Trace()
    for name, site in subsample_sites(single).nodes.items():
        if len(site["value"]) != site["fn"].size:
            chosen.add_node(name, **site)
    return chosen


def _guide_draws(program: Program, empty: Draws, run: dict[str, Any]) -> Draws:
    """Return draws of all latents of a guide, whose plates need not be those of the new rows."""
    call = DryRun()(program.guide), program.args, program.kwargs  # rows of another number
    try:
        return replace(empty, sites=run_on_draws(*call, empty, ModelRuns.latents, **run))
    except Exception as error:
        error.add_note(
            "The guide ran on the new rows. If it cannot, pass posterior_draws(model, guide, "
            "*training_data) in its place."
        )
        raise


def _lacking(single: poutine.Trace, drawn: Draws) -> list[str]:
    """Return the latents of a call without draws: data that it was not given, usually.

    Sites that are enumerated in training have none either, and are drawn from the model.
    """
    latent = [site for site in latent_sites(single) if not site["infer"].get("enumerate")]
    return [site["name"] for site in latent if site["name"] not in drawn.sites]


class NewRows(NamedTuple):
    """The plates of the new rows, and the names of the sites inside.

    ``data`` are observed, factors included, ``local`` latent; ``proposed`` are those of ``local``
    for which the guide has a distribution in each row.
    """

    rows: frozenset[str]
    data: frozenset[str]
    local: frozenset[str]
    proposed: frozenset[str]


def _new_rows(program: Program, single: poutine.Trace, drawn: Draws, plate: str | None) -> NewRows:
    data = _data(sites(single))
    missing = _lacking(single, drawn)
    shown = data or [site for site in sites(single) if site["name"] in missing]
    if not shown:
        raise ValueError("Nothing to predict: the model observes no site, and all have draws.")
    rows = _row_plates(shown, latent_sites(single)) if plate is None else frozenset([plate])
    inside = frozenset(site["name"] for site in data if rows <= plates_of(site).keys())
    local = [s["name"] for s in latent_sites(single) if rows & plates_of(s).keys()]
    if not inside and data:
        known = sorted({name for site in data for name in plates_of(site)})
        raise ValueError(f"No data are in plate '{plate}', only in {known}.")
    proposed = _proposed(program, single, rows, frozenset(local)) if local else frozenset()
    return NewRows(rows, inside, frozenset(local), proposed)


def _data(found: list[Site]) -> list[Site]:
    """Return the observed sites; a factor outside the plates of others is a part of the prior."""
    observed = [site for site in found if site["is_observed"] and not is_computed(site)]
    if not any(plates_of(site) for site in found):
        return observed
    return [site for site in observed if plates_of(site) or not is_factor(site)]


def _row_plates(data: Sequence[Site], latents: Sequence[Site]) -> frozenset[str]:
    """Return the plates around all data; raise where latents are in a part of them."""
    stacks = [frozenset(plates_of(site)) for site in data]
    rows = frozenset.intersection(*stacks)
    if not rows and any(stacks):
        names = {site["name"]: sorted(plates_of(site)) for site in data}
        raise ValueError(f"The data share no plate, {names}: pass plate=, that of the new rows.")
    for site in latents:
        own = rows & plates_of(site).keys()
        if own and own != rows:
            raise ValueError(
                f"Latent '{site['name']}' is in plates {sorted(own)}, the data in {sorted(rows)}. "
                f"Pass plate='{min(own)}' if its entries are new, else the other plate."
            )
    return rows


def _proposed(
    program: Program, single: poutine.Trace, rows: frozenset[str], local: frozenset[str]
) -> frozenset[str]:
    """Return the local latents for which the guide has a density in each of the new rows.

    All that it samples, or none: those of a joint guide, with parameters for other rows, computed
    from others, or masked have no such density.
    """
    guide = poutine.unwrap(program.guide)
    of_training_rows = isinstance(guide, LatentGuide) and not guide.by_row
    if of_training_rows or isinstance(guide, GuideMessenger):
        return frozenset()
    table = SiteTable(single, outline(program.guide, program.args, program.kwargs))
    here = {record.name: _sizes(record) for record in table.model}
    found = [record for record in table.guide if record.name in local]
    names = {record.name for record in found}
    if any(r.is_masked for r in table.model if r.name in names) or any(
        is_delta(r.site) or not rows <= r.row_plates.keys() or _sizes(r) != here[r.name]
        for r in found
    ):
        return frozenset()
    return frozenset(names)


def _sizes(record: SiteRecord) -> dict[str, int]:
    return {name: frame.size for name, frame in record.plates.items()}


def _missing_data(
    program: Program,
    drawn: Draws,
    new: NewRows,
    missing: list[str],
    summed: frozenset[str],
    run: dict[str, Any],
) -> dict[str, SiteDraws]:
    """Draw the data that a call lacks, given those that it has; ``summed`` are enumerated."""
    if unknown := sorted(new.local - set(missing) - new.proposed - summed):
        raise ValueError(
            f"Data {missing} are to be drawn given {sorted(new.data)}: the guide needs a "
            f"distribution of {unknown} for each new row, as by an encoder."
        )
    call = program.model, program.args, program.kwargs
    if summed:
        drawn = with_enumerated(*call, drawn, undrawn=frozenset(missing), **run)
    return run_on_draws(*call, drawn, lambda runs: runs.each(lambda s: s["name"] in missing), **run)


# --- The density of each row


def _row_densities(
    program: Program, fixed: Draws, new: NewRows, run: dict[str, Any], enumerates: bool
) -> tuple[Evidence, tuple[str, ...]]:
    """Return log p of each row, and the plates of the rows.

    Where it ``enumerates`` latents of rows, ``fixed`` has draws of the others from their prior.
    """
    sums = WeightSums()
    plates: list[str] = []

    def unseen(site: Site) -> bool:  # data of other rows
        return site["is_observed"] and not is_computed(site) and site["name"] not in new.data

    def collect(runs: ModelRuns) -> dict[str, SiteDraws]:
        particles = runs.layout.particles
        plate: Any = nullcontext()
        if particles.dim is not None:
            plate = pyro.plate(PARTICLE_PLATE, runs.samples, dim=particles.dim)
        enum_dim = -runs.nesting - 2 if enumerates else None
        pairs = []  # of the prior's draws; then of the guide's
        with plate:
            if new.proposed:
                pairs = [_of_prior(program, trace) for trace in runs.traces]
                pairs += [_of_guide(program, trace, new.local, enum_dim) for trace in runs.traces]
        pairs = pairs or [(trace, poutine.Trace()) for trace in runs.traces]
        tables = [SiteTable(without(trace, unseen), guide) for trace, guide in pairs]
        layout = layout_of(particles, tables, new.data | new.local)
        found = _log_weights(tables, layout, new)
        plates[:] = [frame.name for frame in layout.plates]
        sums.add(found.logsumexp(0) - math.log(len(found)))
        return {}

    call = program.model, program.args, program.kwargs
    run_on_draws(*call, fixed, collect, enumerates=enumerates, **run)
    return sums.evidence(), tuple(plates)


def _of_prior(program: Program, trace: poutine.Trace) -> tuple[poutine.Trace, poutine.Trace]:
    """Return a run of the model, whose local latents are from the prior, and the guide's on it."""
    return trace, program.run_guide(trace)


def _of_guide(
    program: Program, trace: poutine.Trace, local: frozenset[str], enum_dim: int | None
) -> tuple[poutine.Trace, poutine.Trace]:
    """Return runs of model and guide with local latents of the guide, at the same global ones."""
    guide = program.run_guide(without(trace, lambda site: site["name"] in local))
    source = guide.copy()
    for name, site in subsample_sites(trace).nodes.items():
        if name not in source.nodes:
            source.add_node(name, **site)
    return program.run_model(source, enum_dim), guide


def _log_weights(tables: Sequence[SiteTable], layout: PlateLayout, new: NewRows) -> Tensor:
    """Return log p(x, z | g) - log r(z | g) of each row, ``[proposals, S, *plates]`` in float64.

    Of the latents that the guide proposes, r is the mixture of their prior and the guide in equal
    parts; others are from their prior, which cancels.
    """
    count = layout.particles.total if layout.particles.dim is None else 1
    terms = [_terms(table, layout, new) for table in tables]

    def gathered(pairs: Sequence[list[tuple[Site, Tensor]]]) -> Tensor:
        found = []
        for start in range(0, len(pairs), count):
            total = layout.gather(pairs[start : start + count])
            assert total is not None  # there are data in the rows
            found.append(total[0].expand(layout.particles.total, *layout.shape).double())
        return torch.stack(found)

    log_likelihood = gathered([data for data, _ in terms])
    if not new.proposed:
        return log_likelihood
    log_prior = gathered([prior for _, prior in terms])
    inside = [[r for r in t.guide if new.rows <= r.row_plates.keys()] for t in tables]
    # Both halves have the density of an auxiliary draw, and so has the target: it cancels.
    guided = [[r for r in rs if r.name in new.proposed or is_factor(r.site)] for rs in inside]
    log_guide = gathered([[(r.site, _log_prob(r.site)) for r in records] for records in guided])
    log_guide = log_guide.nan_to_num(nan=-math.inf, neginf=-math.inf)
    mixture = torch.logaddexp(log_prior, log_guide) - math.log(2)
    return log_likelihood + log_prior - mixture


def _terms(
    table: SiteTable, layout: PlateLayout, new: NewRows
) -> tuple[list[tuple[Site, Tensor]], list[tuple[Site, Tensor]]]:
    """Return log p of the rows' data and of what the guide proposes, enumerated latents summed."""
    ordinary, summed = table.model, list[Conditional]()
    if is_enumerated(table):
        ordinary, summed = conditionals(table, layout)
    data = [(r.site, _log_prob(r.site)) for r in ordinary if r.name in new.data]
    prior = [(r.site, _log_prob(r.site)) for r in ordinary if r.name in new.proposed]
    for each in summed:
        if each.log_likelihood is not None:
            data.append((each.site, each.log_likelihood.nan_to_num(0.0, math.inf, -math.inf)))
        if each.log_prior is not None:
            prior.append((each.site, each.log_prior))
    return data, prior


def _log_prob(site: Site) -> Tensor:
    """Return a site's log-density with its mask and without its scale."""
    log_prob = masked_log_prob(site)
    check_batch_shape(site, log_prob.shape)
    return log_prob
