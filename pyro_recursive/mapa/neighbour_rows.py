"""The kernel of a model's likelihood, and the rows of a table for the data of a call."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.mapa.empirical_model import Plate
from pyro_recursive.mapa.kernels import Kernel, kernel_for
from pyro_recursive.mapa.table import Rows, Table
from pyro_recursive.tracing.compatibility import check_finite
from pyro_recursive.tracing.sites import plates_of, sites


class NeighbourRows:
    """Finds the rows of a table for the rows of a plate.

    By the indices that ``indices_of`` returns for a call's arguments, if any; else by the plate's
    indices, where the inputs are the ``data`` of the table (or the model takes none); else by the
    table's kernel.
    """

    def __init__(
        self, table: Table, data: Tensor | None, indices_of: Callable[..., Tensor] | None
    ) -> None:
        self.table, self.indices_of = table, indices_of
        self.data = table.reference if data is None else data
        if self.data is None and indices_of is None:
            raise ValueError("A table does not identify rows: give its data, or rows=.")

    def __call__(self, raw: Any, plate: Plate, args: tuple, kwargs: dict[str, Any]) -> Rows:
        """Return the rows for inputs ``raw``, those of the minibatch or of all data."""
        if self.indices_of is not None:
            indices = self.indices_of(*args, **kwargs)
            if indices is not None:
                return self.table.rows(_of_minibatch(torch.as_tensor(indices), plate, "rows="))
        if self._is_data(raw, plate):
            return self.table.rows(_indices(plate))
        return self.table.for_data(_of_minibatch(raw, plate, "inputs="))

    def _is_data(self, raw: Any, plate: Plate) -> bool:
        """Whether the inputs are the rows of the data at the plate's indices."""
        data = self.data
        if plate.full_size != len(self.table):
            return False
        if raw is None or raw is data:  # a model without arguments has its own data
            return True
        if not isinstance(raw, Tensor) or data is None or len(data) != len(self.table):
            return False
        indices = _indices(plate)
        rows = raw[indices.to(raw.device)] if raw.shape == data.shape else raw
        return _same(rows, data[indices.to(data.device)])


def _indices(plate: Plate) -> Tensor:
    return torch.arange(plate.size) if plate.indices is None else plate.indices


def _of_minibatch(rows: Any, plate: Plate, what: str) -> Tensor:
    length = len(rows) if isinstance(rows, Tensor) and rows.dim() else None
    if length == plate.size:
        return rows
    if length == plate.full_size:
        return rows[_indices(plate).to(rows.device)]
    got = type(rows).__name__ if length is None else f"{length} rows"
    raise ValueError(f"{what} gives {got}; the plate has {plate.size} of {plate.full_size}.")


def kernel_of_model(trace: poutine.Trace, site: str, raw: Any, number: int, k: int) -> Kernel:
    """Return the kernel of the one observed site of a model's trace, if it observes the inputs."""
    observed = [each for each in sites(trace) if each["is_observed"]]
    if len(observed) != 1:
        raise ValueError("The model must observe one site: give kernel= or table=.")
    (seen,) = observed
    check_finite(seen)
    (frame,) = plates_of(trace.nodes[site]).values()
    value = seen["value"].detach()
    rows = raw
    if isinstance(raw, Tensor) and frame.name in trace.nodes and len(raw) != frame.size:
        rows = raw[trace.nodes[frame.name]["value"].to(raw.device)]
    if raw is not None and not (isinstance(rows, Tensor) and _same(rows, value)):
        raise ValueError(f"Site '{seen['name']}' does not observe the inputs: give kernel=.")
    return kernel_for(seen["fn"], value, number, k)


def _same(rows: Tensor, value: Tensor) -> bool:
    """Whether two tensors have the same numbers, whatever their shapes."""
    same_size = len(rows) and rows.numel() == value.numel()
    return bool(same_size and (rows.to(value).flatten() == value.flatten()).all())
