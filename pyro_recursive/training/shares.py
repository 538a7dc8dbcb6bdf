"""A minibatch that several processes share: which plates are its rows, and what a share stands for.

A share is a random minibatch of the whole batch. In a plate that knows the size N of the data,
``pyro.plate("data", N, subsample=x)``, it counts as one already: the process's loss estimates that
of all data. A plate that is the batch, ``pyro.plate("data", len(x))``, has no more rows than the
share; here it becomes a subsample of the whole batch. So each process's loss estimates the whole
batch's, also where there are global latents, and their mean, weighted by rows, is that loss.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.program import Program
from pyro_recursive.sites import Site, plates_of, sites, subsample_scale
from pyro_recursive.training.minibatches import Batch, rows_of

__all__ = ["Share", "row_plates"]


class Share(Messenger):
    """Turns plates that are the rows of a share into subsamples of the whole batch.

    :param plates: their names, from `row_plates`
    :param rows: how many rows the share has; plates of another size are left alone
    :param total: how many the whole batch has

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
        # As an outer handler it comes after the plates, which have put down their frames.
        if site_is_subsample(msg):
            return
        frames = []
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.plates and _full(frame) == self.rows:
                frame = frame._replace(full_size=self.total)
                msg["scale"] = msg["scale"] * self.total / self.rows
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)


def row_plates(model: Callable, guide: Callable, batch: Batch) -> frozenset[str]:
    """Return the plates that are as large as the batch, whatever its size.

    Runs guide and model on the batch and on a part of it. Random states and the buffers of modules
    are the caller's to keep.

    :raises ValueError: a part of the batch has a loss that is no estimate of the batch's
    """
    rows, other = rows_of(batch), _other(batch)
    try:
        with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
            whole, part = (_sites(Program(model, guide, each)) for each in (batch, other))
    except Exception as error:
        raise ValueError(
            f"Several processes share a batch, and model or guide do not run with {rows_of(other)} "
            f"rows after {rows} ({type(error).__name__}: {error}). Use an AmortizedGuide instead "
            "of parameters for each row of a batch; or a plate that knows the size N of the data, "
            "pyro.plate(name, N, subsample=index)."
        ) from error
    pairs = [(site, part[key]) for key, site in whole.items() if key in part]
    found = {
        name
        for one, two in pairs
        for name, frame in plates_of(one).items()
        if name in plates_of(two)
        if _full(frame) == rows and _full(plates_of(two)[name]) == rows_of(other)
    }
    for check in (_check_plates, _check_shape, _check_scale):
        for one, two in pairs:
            check(one, two, found)
    return frozenset(found)


def _sites(program: Program) -> dict[tuple[str, str], Site]:
    guide = program.run_guide()
    traces = {"guide": guide, "model": program.run_model(guide)}
    return {(kind, site["name"]): site for kind, trace in traces.items() for site in sites(trace)}


def _other(batch: Batch) -> Batch:
    """Return about half of a batch; twice a small one, as a batch norm needs two rows."""
    rows = rows_of(batch)
    if not batch or not isinstance(batch[0], Tensor) or not batch[0].dim():
        raise ValueError(
            "Several processes share a batch by its rows, those of its first tensor; this one "
            f"begins with {type(batch[0]).__name__ if batch else 'nothing'}. Return a tuple of "
            "tensors from the DataLoader or the transform."
        )

    def cut(column: Any) -> Any:
        if not isinstance(column, Tensor) or not column.dim() or len(column) != rows:
            return column
        return column[: -(-rows // 2)] if rows > 3 else torch.cat([column, column])

    return tuple(map(cut, batch))


def _full(frame: Any) -> int:
    return frame.size if frame.full_size is None else frame.full_size


def _check_plates(whole: Site, part: Site, found: set[str]) -> None:
    """Raise where a plate is the rows at another site, and keeps its size at this one."""
    before, after = plates_of(whole), plates_of(part)
    for name in sorted(found & before.keys() & after.keys()):
        if _full(before[name]) == _full(after[name]):
            raise ValueError(
                f"Several processes share a batch, and plate '{name}' of site '{whole['name']}' "
                f"keeps its {_full(before[name])} rows for another batch. Use an AmortizedGuide "
                "instead of parameters for each row of a batch, or the same plate in model and "
                "guide."
            )


def _check_shape(whole: Site, part: Site, found: set[str]) -> None:
    """Raise where a value has the rows of the batch, and is in no plate of them."""
    before, after = plates_of(whole), plates_of(part)
    moving = {n for n in before.keys() & after.keys() if before[n].size != after[n].size}
    if whole["value"].shape != part["value"].shape and not moving:
        raise ValueError(
            f"Several processes share a batch, and the value of site '{whole['name']}' changes "
            f"from {tuple(whole['value'].shape)} to {tuple(part['value'].shape)} for another, in "
            "no plate: the density of a part is no share of the whole. Put it into a pyro.plate."
        )


def _check_scale(whole: Site, part: Site, found: set[str]) -> None:
    """Raise where the user's scale is a function of the rows."""
    one, other = (_own_scale(site) for site in (whole, part))
    if one is not None and other is not None and not math.isclose(one, other, rel_tol=1e-6):
        raise ValueError(
            f"Several processes share a batch, and site '{whole['name']}' has a scale of its own "
            f"that depends on the rows: {one:g}, and {other:g} for another batch. Let the plate "
            "scale it, pyro.plate(name, N, subsample=x), or make the scale a constant."
        )


def _own_scale(site: Site) -> float | None:
    """Return a site's scale without that of its plates; None where it differs between rows."""
    scale = site["scale"] / math.prod(map(subsample_scale, plates_of(site).values()))
    if isinstance(scale, Tensor):
        return scale.item() if scale.numel() == 1 else None
    return float(scale)
