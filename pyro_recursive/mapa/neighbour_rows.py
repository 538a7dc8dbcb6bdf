"""Which rows of a table of neighbours belong to the data of a call."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.mapa.empirical_model import Plate
from pyro_recursive.mapa.table import Rows, Table

__all__ = ["NeighbourRows"]


class NeighbourRows:
    """Finds the rows of a table for the rows of a plate.

    By the numbers that ``numbers`` returns for a call's arguments, if any; else by the plate's
    indices, where the inputs are the ``data`` of the table (or the model takes none); else anew, by
    the table's kernel.

    Raises ValueError where there is nothing to tell rows by.
    """

    def __init__(
        self, table: Table, data: Tensor | None, numbers: Callable[..., Tensor] | None
    ) -> None:
        self.table, self.numbers = table, numbers
        self.data = table.reference if data is None else data
        self._compared: tuple[Any, ...] = ()  # the inputs last compared with the data, and how
        if self.data is None and numbers is None:
            raise ValueError(
                "Which rows of the table a call has is not known: give the data of the table, to "
                "compare inputs with, or rows=, a function from the model's arguments to numbers."
            )

    def __call__(self, raw: Any, plate: Plate, args: tuple, kwargs: dict[str, Any]) -> Rows:
        """Return the rows for inputs ``raw`` ``[B, *x]``, or those of all data."""
        if self.numbers is not None:
            numbers = self.numbers(*args, **kwargs)
            if numbers is not None:
                rows = _of_minibatch(torch.as_tensor(numbers), plate, "rows=")
                return self.table.rows(rows)
        if self._is_data(raw, plate):
            return self.table.rows(_indices(plate))
        return self.table.for_data(_of_minibatch(raw, plate, "inputs="))

    def _is_data(self, raw: Any, plate: Plate) -> bool:
        """Whether the plate's indices say which rows of the data these are."""
        data = self.data
        if plate.full_size != len(self.table):
            return False
        if raw is None or raw is data:  # without arguments, a model has its own data
            return True
        if data is None or not isinstance(raw, Tensor):
            raise ValueError(
                f"inputs= gives a {type(raw).__name__}, and rows are told by comparing tensors: "
                "let it return one, or give rows=."
            )
        if raw.shape == data.shape:
            return self._is_all_data(raw, data)
        if len(data) != len(self.table):
            return False
        chosen = data[_indices(plate).to(data.device)]
        return raw.shape == chosen.shape and bool((raw.to(data) == chosen).all())

    def _is_all_data(self, raw: Tensor, data: Tensor) -> bool:
        """Compare all data once, until they change."""
        known = self._compared
        if not known or known[0]() is not raw or known[1] != raw._version:
            same = bool((raw.to(data) == data).all())
            self._compared = (weakref.ref(raw), raw._version, same)
        return self._compared[2]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one process."""
        return {**self.__dict__, "_compared": ()}


def _indices(plate: Plate) -> Tensor:
    return torch.arange(plate.size) if plate.indices is None else plate.indices


def _of_minibatch(rows: Any, plate: Plate, what: str) -> Tensor:
    """Return the rows of the minibatch, given these or all."""
    length = len(rows) if isinstance(rows, Tensor) and rows.dim() else None
    if length == plate.size:
        return rows
    if length == plate.full_size:
        return rows[_indices(plate).to(rows.device)]
    got = type(rows).__name__ if length is None else f"{length} rows"
    raise ValueError(
        f"{what} gives {got}, and the plate of the latent site has {plate.size} (of "
        f"{plate.full_size}): a function of the model's arguments, it has to return a row for each."
    )
