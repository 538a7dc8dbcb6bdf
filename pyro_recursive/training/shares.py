"""A minibatch that several processes share: which plates are its rows, and what a share stands for.

A share is a random minibatch of the whole batch. In a plate that knows the size N of the data,
``pyro.plate("data", N, subsample=x)``, it counts as one already: the process's loss estimates that
of all data. A plate that is the batch, ``pyro.plate("data", len(x))``, has no more rows than the
share; here it becomes a subsample of the whole batch. So each process's loss estimates the whole
batch's, also where there are global latents, and their mean, weighted by rows, is that loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.tracing.isolation import set_torch_state, torch_state
from pyro_recursive.tracing.program import Program
from pyro_recursive.training.minibatches import Batch, rows_of
from pyro_recursive.training.share_checks import Comparison, Traces, full_size_of

__all__ = ["Share", "full_size_of", "row_plates"]


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
            if frame.name in self.plates and full_size_of(frame) == self.rows:
                frame = frame._replace(full_size=self.total)
                msg["scale"] = msg["scale"] * self.total / self.rows
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)


def row_plates(model: Callable, guide: Callable, batch: Batch) -> frozenset[str]:
    """Return the plates that are as large as the batch, whatever its size.

    Runs guide and model on the batch, and twice on a part of it. Random states and the buffers of
    modules are the caller's to keep.

    :raises ValueError: a part of the batch has a loss that is no estimate of the batch's
    """
    rows, other = rows_of(batch), _other(batch)
    run = partial(_run, model, guide, state=torch_state())
    with _naming(rows, rows_of(other)):
        found = Comparison(run(batch), run(other), rows, rows_of(other))
    found.check_sites()
    with _naming(rows, rows_of(other)):
        densities = found.densities(run(other, given=found.common_values()))
    found.check_densities(*densities)
    return found.row_plates


def _run(
    model: Callable,
    guide: Callable,
    batch: Batch,
    state: list[Tensor],
    given: poutine.Trace | None = None,
) -> Traces:
    """Trace guide and model, with random draws from one state and the values of given sites."""
    program = Program(model, guide, batch)
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
        set_torch_state(state)
        traced = program.run_guide(given)
        values = traced.copy()
        for name, site in given.nodes.items() if given else ():
            if name not in traced:
                values.add_node(name, **site)
        set_torch_state(state)
        return Traces(traced, program.run_model(values))


@contextmanager
def _naming(rows: int, other: int) -> Iterator[None]:
    """Say what a run was for where it fails."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Several processes share a batch, and model or guide do not run with {other} rows "
            f"after {rows} ({type(error).__name__}: {error}). Use an AmortizedGuide instead of "
            "parameters for each row of a batch; or a plate that knows the size N of the data, "
            "pyro.plate(name, N, subsample=index)."
        ) from error


def _other(batch: Batch) -> Batch:
    """Return about half of a batch; a small one and as many of its first row, for a batch norm."""
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
        return (
            column[: -(-rows // 2)]
            if rows > 3
            else torch.cat([column, column[:1].expand_as(column)])
        )

    return tuple(map(cut, batch))
