"""Plates of the rows of a batch: whether they state how many rows the data have.

``pyro.plate("data", N, subsample=x)`` states it; in ``pyro.plate("data", len(x))`` each batch, and
each process's share of a batch, is a data set of its own. `Share` makes such a plate a subsample of
the whole batch, so that each process's loss estimates the whole batch's, and their mean, weighted
by rows, is that loss, also with global latents. `RowCounts` finds a plate that takes a batch for
all data.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import Site, plates_of, sites, subsample_scale, subsample_sites
from pyro_recursive.training.data import Batch, rows_of

Key = tuple[str, str]  # "guide" or "model", and a site's name


def full_size(frame: Any) -> int:
    """Return the size of a plate, entries outside of a minibatch included."""
    return frame.size if frame.full_size is None else frame.full_size


def own_scale(site: Any) -> float | None:
    """Return a site's scale without that of its plates; None if it differs between entries."""
    scale = site["scale"] / math.prod(map(subsample_scale, plates_of(site).values()))
    if isinstance(scale, Tensor):
        return scale.item() if scale.numel() == 1 else None
    return float(scale)


class Share(Messenger):
    """Makes plates of the rows of a share subsamples of the whole batch.

    Args:
        plates: their names, from `row_plates`.
        rows: the rows of the share; plates of another size are left alone.
        total: the rows of the whole batch.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> with poutine.trace() as traced, Share({"data"}, rows=3, total=12):
        ...     model()
        >>> traced.trace.nodes["z"]["scale"]
        4.0
    """

    def __init__(self, plates: frozenset[str] | set[str], rows: int, total: int) -> None:
        super().__init__()
        self.plates, self.rows, self.total = plates, rows, total

    def _pyro_sample(self, msg: Any) -> None:
        # As an outer handler it comes after the plates, which have added their frames.
        if site_is_subsample(msg):
            return
        frames = []
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.plates and full_size(frame) == self.rows:
                frame = frame._replace(full_size=self.total)
                msg["scale"] = msg["scale"] * self.total / self.rows
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)


class Runs(NamedTuple):
    """A run of guide and model."""

    guide: poutine.Trace
    model: poutine.Trace

    def sites(self) -> dict[Key, Site]:
        """Return the sites of both that have a density."""
        traces = self._asdict().items()
        return {(kind, site["name"]): site for kind, trace in traces for site in sites(trace)}


def row_plates(model: Callable, guide: Callable, batch: Batch) -> frozenset[str]:
    """Return the plates that are as large as the batch, whatever its size.

    Runs guide and model on the batch and twice on a part of it; changes random states and buffers.
    Nothing outside of the plates of the rows may depend on these: such a density has no shares.
    A plate that states the size of the data and has fewer entries is one of the rows, too.

    Raises:
        ValueError: a part of the batch has a loss that is no estimate of the batch's.
    """
    part = _part(batch)
    rows = rows_of(batch), rows_of(part)
    run = partial(_run, model, guide, random_state())
    with _run_failures_named(*rows):
        whole, other = run(batch), run(part)
    comparison = Comparison(whole, other, *rows)
    comparison.check_sites()
    with _run_failures_named(*rows):
        again = run(part, given=comparison.common_values())
        densities = comparison.densities(whole), comparison.densities(again)
    comparison.check_densities(*densities)
    return comparison.row_plates


def _run(
    model: Callable,
    guide: Callable,
    state: list[Tensor],
    batch: Batch,
    given: poutine.Trace | None = None,
) -> Runs:
    """Trace guide and model, with random draws from one state and the values of given sites."""
    program = Program(model, guide, batch)
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
        set_random_state(state)
        guide_trace = program.run_guide(given)
        values = guide_trace.copy()
        for name, site in given.nodes.items() if given else ():
            if name not in guide_trace:
                values.add_node(name, **site)
        set_random_state(state)
        return Runs(guide_trace, program.run_model(values))


@contextmanager
def _run_failures_named(rows: int, part_rows: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Model or guide do not run with {part_rows} rows after {rows} "
            f"({type(error).__name__}: {error}). Use an AmortizedGuide, or pyro.plate(name, N, "
            "subsample=index)."
        ) from error


def _part(batch: Batch) -> Batch:
    """Return about half of a batch; of less than 4 rows twice as many, enough for a batch norm."""
    rows = rows_of(batch)
    if not batch or not isinstance(batch[0], Tensor) or not batch[0].dim():
        raise ValueError(
            "Processes share the rows of a batch, but it begins with "
            f"{type(batch[0]).__name__ if batch else 'nothing'}. Return tensors."
        )

    def cut(column: Any) -> Any:
        if not isinstance(column, Tensor) or not column.dim() or len(column) != rows:
            return column
        if rows > 3:
            return column[: -(-rows // 2)]
        return torch.cat([column, column[:1].expand_as(column)])

    return tuple(map(cut, batch))


class Comparison:
    """A run on a batch beside one on a part of it."""

    def __init__(self, whole: Runs, part: Runs, rows: int, part_rows: int) -> None:
        self.whole, self.part, self.rows, self.part_rows = whole, part, rows, part_rows
        others = part.sites()
        self.pairs = [(site, others[key]) for key, site in whole.sites().items() if key in others]
        frames = [
            (name, frame, plates_of(other)[name])
            for site, other in self.pairs
            for name, frame in plates_of(site).items()
            if name in plates_of(other)
        ]
        sizes = [(name, full_size(a), full_size(b), a.size != b.size) for name, a, b in frames]
        self.row_plates = frozenset(n for n, a, b, _ in sizes if (a, b) == (rows, part_rows))
        self.counted = self.row_plates.union(n for n, a, b, cut in sizes if cut and a == b)

    def is_outside(self, site: Site) -> bool:
        """Return whether a site is in no plate of the rows."""
        return not self.counted & plates_of(site).keys()

    def check_sites(self) -> None:
        """Raise where plates, shape or scale of a site depend on the rows as those of no share."""
        for one, two in self.pairs:
            self._check_plates(one, two)
            if one["value"].shape != two["value"].shape and self.is_outside(one):
                shapes = [f"shape {tuple(site['value'].shape)}" for site in (one, two)]
                self._refuse(f"site '{one['name']}', in no plate of the rows,", *shapes)
            scales = [scale for scale in (own_scale(one), own_scale(two)) if scale is not None]
            if len(scales) == 2 and not math.isclose(*scales, rel_tol=1e-6):
                self._refuse(f"the scale of site '{one['name']}'", *(f"{s:g}" for s in scales))

    def _check_plates(self, whole: Site, part: Site) -> None:
        before, after = plates_of(whole), plates_of(part)
        for name in sorted(self.row_plates & before.keys() & after.keys()):
            if full_size(before[name]) == full_size(after[name]):
                raise ValueError(
                    f"Processes cannot share a batch: plate '{name}' of site '{whole['name']}' "
                    f"keeps its {full_size(before[name])} rows. Use an AmortizedGuide."
                )

    def common_values(self) -> poutine.Trace:
        """Return the whole batch's minibatches of other plates and latents outside the rows."""
        chosen = poutine.Trace()
        drawn = subsample_sites(*self.part).nodes
        for name, site in subsample_sites(*self.whole).nodes.items():
            size, total = _sizes(site)
            if size < total and name in drawn and _sizes(drawn[name]) == (size, total):
                chosen.add_node(name, **site)
        for site in sites(*self.whole):
            if not site["is_observed"] and self.is_outside(site) and site["name"] not in chosen:
                chosen.add_node(site["name"], **site)
        return chosen

    def densities(self, runs: Runs) -> dict[Key, float]:
        """Return the log-densities outside the rows in nats; a guide's latents are not compared."""
        with torch.no_grad(), pyro.validation_enabled(False):
            for kind, trace in runs._asdict().items():
                trace.compute_log_prob(lambda _, site, kind=kind: self._is_common(kind, site))
        found = runs.sites().items()
        return {key: float(s["log_prob_sum"]) for key, s in found if self._is_common(key[0], s)}

    def _is_common(self, kind: str, site: Site) -> bool:
        """Return whether a site's density must not depend on the rows; amortised latents' may."""
        if site["infer"].get("_deterministic") or not self.is_outside(site):
            return False
        return kind == "model" or site["is_observed"]

    def check_densities(self, whole: dict[Key, float], part: dict[Key, float]) -> None:
        """Raise where a log-density outside the rows depends on them."""
        for key in dict.fromkeys([*whole, *part]):
            one, two = whole.get(key), part.get(key)
            if one is None or two is None or not _is_close(one, two):
                texts = ["no site" if each is None else f"{each:g} nats" for each in (one, two)]
                self._refuse(f"{key[0]} site '{key[1]}', in no plate of the rows,", *texts)

    def _refuse(self, what: str, one: str, two: str) -> None:
        raise ValueError(
            f"Processes cannot share a batch: {what} depends on its rows: {one} with {self.rows}, "
            f"{two} with {self.part_rows}. Add a pyro.plate of the rows."
        )


def _sizes(site: Site) -> tuple[int, int]:
    """Return the entries and the full size of a plate's minibatch."""
    return len(site["value"]), site["fn"].size


def _is_close(one: float, two: float) -> bool:
    # The computation is the same; accelerators may sum in another order.
    return math.isclose(one, two, rel_tol=1e-5, abs_tol=1e-6) or (one != one and two != two)


class RowCounts(Messenger):
    """Records the sites of a step's loss, and finds a plate that takes the batch for all data.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 5):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(5))
        >>> with RowCounts() as counts:
        ...     model()
        >>> counts.misled(rows=5), counts.misled(rows=4)
        (('data', 'mean'), None)
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[bool, dict[str, Any], float | None]] = {}  # of the last run

    def _pyro_sample(self, msg: Any) -> None:
        # As an outer handler it comes after the plates and scales of the program.
        helper = msg["infer"].get("is_auxiliary") or msg["infer"].get("_deterministic")
        if not site_is_subsample(msg) and not helper:
            self.seen[msg["name"]] = msg["is_observed"], plates_of(msg), own_scale(msg)

    def misled(self, rows: int) -> tuple[str, str] | None:
        """Return a plate of so many rows and a latent outside of it; None if there are none.

        The plate has an observed site of the latent's own scale, and no other plate around it is
        subsampled: programs with `poutine.scale` or such a plate weight the rows themselves.
        """
        for observed, plates, scale in self.seen.values():
            own = [name for name, frame in plates.items() if full_size(frame) == rows]
            others = (frame for name, frame in plates.items() if name not in own)
            if not observed or not own or any(full_size(f) > f.size for f in others):
                continue
            for name, (is_data, around, other_scale) in self.seen.items():
                outside = not is_data and rows not in map(full_size, around.values())
                if outside and scale is not None and scale == other_scale:
                    return own[0], name
        return None

    def warn(self, rows: int, total: int, stacklevel: int) -> None:
        """Warn where a batch of some of the data's rows is taken for all of them."""
        found = self.misled(rows) if rows < total else None
        if found is not None:
            plate, latent = found
            warnings.warn(
                f"Plate '{plate}' has {rows} rows, those of a batch, of {total}: the prior of "
                f"latent '{latent}' outside it counts {total / rows:.3g} times too much. Write "
                f"pyro.plate('{plate}', {total}, subsample=x) in model and guide.",
                stacklevel=stacklevel + 1,
            )
