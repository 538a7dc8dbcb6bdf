"""Whether the plates of a batch's rows state how many rows the data have.

``pyro.plate("data", N, subsample=x)`` does; ``pyro.plate("data", len(x))`` takes each batch, and
each process's share of a batch, for a data set of its own.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList, AutoMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.minibatch import MinibatchRows, plates_of_rows
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import latent_sites, own_scale, plates_of, sites, sized_by
from pyro_recursive.training.checkpoint import forked_rng
from pyro_recursive.training.data import Batch, rows_of

Run = dict[str, poutine.Trace]  # of "guide" and "model"


@torch.no_grad()
def check_shares(model: Callable, guide: Callable, batch: Batch) -> None:
    """Raise where the mean loss of shares of a batch, weighted by rows, is not the batch's loss.

    Guide and model run on the batch and on a part of it, with the same noise and, where the shapes
    allow it, the same values. Plates must have one full size. Only sites in plates whose minibatch
    has the size of the part may differ, and latents of the guide, which may be amortised.
    """
    rows = rows_of(batch)

    def part(column: Any) -> Any:  # half of the rows; of less than 4 one more, for a batch norm
        if not isinstance(column, Tensor) or not column.dim() or len(column) != rows:
            return column
        return column[: -(-rows // 2)] if rows > 3 else torch.cat([column, column[:1]])

    def run(batch: Batch, values: dict[str, Any]) -> Run:
        program = Program(model, guide, batch)
        with batch.rows, poutine.block(), _SameValues(values):
            with forked_rng():
                guided = program.run_guide()
            with forked_rng():
                return {"guide": guided, "model": program.run_model(guided)}

    batch = batch if isinstance(batch, Batch) else Batch.of(batch)
    rest = Batch.of(
        tree_map(part, tuple(batch)), MinibatchRows(part(batch.rows.index), batch.rows.total)
    )
    if rows_of(rest) == rows:
        kind = type(batch[0]).__name__
        raise ValueError(f"Processes share the rows of a batch, but a {kind} has none.")
    remedy = "subsample=x) with N all rows of the data: several processes share a batch."
    with pyro.validation_enabled(False):
        whole = run(batch, {})
        nodes = [site for trace in whole.values() for site in trace.nodes.values()]
        try:
            other = run(rest, {s["name"]: s["value"] for s in nodes if s["type"] == "sample"})
        except Exception as error:
            raise ValueError(
                f"Model or guide do not run with a part of a batch ({error}). Write "
                f"pyro.plate(name, N, {remedy}"
            ) from error
        one, two = _plate_sizes(whole), _plate_sizes(other)
        for name in one.keys() & two.keys():
            if {full for full, _ in one[name]} != {full for full, _ in two[name]}:
                raise ValueError(
                    f"Plate '{name}' has the size of a batch. Write "
                    f"pyro.plate('{name}', N, {remedy}"
                )
        of_rows = {name for name in one if one[name] != two.get(name)}
        figures = [_figures(each, of_rows) for each in (whole, other)]
    (before, scales), (after, other_scales) = figures
    pairs = {name: (before.get(name), after.get(name)) for name in [*before, *after]}
    pairs |= {name: (scales[name], other_scales[name]) for name in scales.keys() & other_scales}
    for name, pair in pairs.items():
        if None in pair or not _is_close(*pair):
            raise ValueError(f"{name} depends on the rows. Write pyro.plate(name, N, {remedy}")


class _SameValues(Messenger):
    """Gives sites the values that they have in another run, where these have the same shape."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: Any) -> None:
        known = self.values.get(msg["name"])
        if known is not None and not msg["is_observed"] and known.shape == msg["value"].shape:
            msg["value"] = known


def _plate_sizes(run: Run) -> dict[str, set[tuple[int, int]]]:
    """Return the full sizes and the sizes of each plate."""
    found: dict[str, set[tuple[int, int]]] = {}
    for site in sites(*run.values()):
        for name, frame in plates_of(site).items():
            found.setdefault(name, set()).add((frame.full_size or frame.size, frame.size))
    return found


def _figures(run: Run, of_rows: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the log-densities of sites in no plate of the rows, and the scales of the others."""
    densities, scales = {}, {}
    for kind, trace in run.items():
        for site in sites(trace):
            place = f"of {kind} site '{site['name']}'"
            if of_rows & plates_of(site).keys():
                scale = torch.as_tensor(own_scale(site))
                scales.update({f"The scale {place}": scale} if scale.numel() == 1 else {})
            elif kind == "model" or site["is_observed"]:
                trace.compute_log_prob(lambda name, _, own=site["name"]: name == own)
                densities[f"The density {place}, in no plate of the rows,"] = site["log_prob_sum"]
    return densities, scales


def _is_close(one: Any, other: Any) -> bool:
    # The computation is the same; accelerators may sum in another order.
    one, other = (torch.as_tensor(each).double().cpu().squeeze() for each in (one, other))
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=1e-5, atol=1e-6, equal_nan=True
    )


def check_autoguides(model: Callable, guide: Any, batch: Batch) -> None:
    """Raise where an autoguide of Pyro has parameters for the rows of a batch by their place."""
    if batch.rows.is_all:
        return
    count, latent = rows_of(batch), []
    parts = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    for part in parts:
        if isinstance(part, AutoMessenger):
            latent += latent_sites(outline(guide, batch, {}))
        elif isinstance(part, AutoGuide) and not isinstance(part, NO_AUTOGUIDES):
            latent += latent_sites(part.prototype_trace or poutine.Trace())
    frames = {name: frame for site in latent for name, frame in plates_of(site).items()}
    names = {n for n, f in frames.items() if f.size == count and f.full_size in (None, count)}
    for name in names and sorted(names & plates_of_rows(model, batch, {}, count)):
        raise ValueError(
            f"{type(guide).__name__} has parameters for {count} rows of plate '{name}', and each "
            f"batch has other rows. Use AmortizedGuide(model, plate='{name}') or an encoder."
        )


NO_AUTOGUIDES = (AutoCallable, AutoGuideList, LatentGuide)  # parts are checked by themselves


class BatchTakenForData(Messenger):
    """Records the sites of a loss, to warn where a plate takes the rows of a batch for all data."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[bool, dict[str, Any], Any]] = {}  # of the last run

    def _pyro_sample(self, msg: Any) -> None:
        # As an outer handler it comes after the plates and scales of the program.
        helper = msg["infer"].get("is_auxiliary") or msg["infer"].get("_deterministic")
        if not site_is_subsample(msg) and not helper:
            plates = {name: sized_by(msg, frame) for name, frame in plates_of(msg).items()}
            self.seen[msg["name"]] = msg["is_observed"], plates, own_scale(msg)

    def warn(self, model: Callable, batch: Batch, total: int, stacklevel: int) -> None:
        """Warn where data are in a plate of the batch's rows, and a latent is outside of it.

        Programs weight the rows themselves where the scales of both sites differ, or where a plate
        of the data is subsampled. Another plate may be as large as the batch: see `plates_of_rows`.
        """
        rows = rows_of(batch)
        latents = {name: each[1:] for name, each in self.seen.items() if not each[0]}
        data = [
            (plates, scale)
            for observed, plates, scale in self.seen.values()
            if observed and all(frame.full_size in (None, frame.size) for frame in plates.values())
        ]
        alike = {name for plates, _ in data for name, f in plates.items() if f.size == rows}
        if rows >= total or all(alike <= plates.keys() for plates, _ in latents.values()):
            return
        of_rows = plates_of_rows(model, batch, {}, rows, total)
        outside = {
            n: scale for n, (plates, scale) in latents.items() if not of_rows & plates.keys()
        }
        for plates, scale in data:
            plate = next((name for name in plates if name in of_rows), None)
            latent = next((name for name in outside if _is_close(outside[name], scale)), None)
            if plate and latent:
                warnings.warn(
                    f"Plate '{plate}' has {rows} rows, those of a batch, of {total}: the prior of "
                    f"latent '{latent}' outside it counts {total / rows:.3g} times too much. Write "
                    f"pyro.plate('{plate}', {total}, subsample=x) in model and guide.",
                    stacklevel=stacklevel + 1,
                )
                return
