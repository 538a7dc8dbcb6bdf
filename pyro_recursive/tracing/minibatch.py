"""Which rows of the data a call of model and guide is given, for guides with parameters by row.

A context variable, not an effect handler: `pyro.poutine.block` would hide a handler from the runs
that find the structure of a program.
"""

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.sites import plates_of, sites

_CURRENT: ContextVar["MinibatchRows | None"] = ContextVar("minibatch_rows", default=None)


class MinibatchRows:
    """Says which rows of the data model and guide are given inside the block.

    For ``pyro.plate("data", len(x))`` and a guide with parameters for each row, such as
    ``AmortizedGuide(model, plate="data")``: it creates them for all rows at its first call, and
    uses those of the rows in ``index``. `pyro_recursive.fit` does this by itself for tensors.

    Args:
        index: the numbers of the rows, ``[rows]``; None for all rows in order.
        total: how many rows the data have; None where the rows are unknown, so that parameters by
            row raise a ValueError.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive import AmortizedGuide
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> guide = AmortizedGuide(model, plate="data")
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    >>> x = torch.randn(10)
    >>> for index in torch.randperm(10).split(5):
    ...     with MinibatchRows(index, len(x)):
    ...         loss = svi.step(x[index])
    >>> guide.free_local.shape
    torch.Size([10, 2])
    """

    def __init__(self, index: Tensor | None, total: int | None) -> None:
        self.index, self.total = index, total
        self._tokens: list[Token] = []

    def __enter__(self) -> "MinibatchRows":
        self._tokens.append(_CURRENT.set(self))
        return self

    def __exit__(self, *error: Any) -> None:
        _CURRENT.reset(self._tokens.pop())

    @property
    def is_all(self) -> bool:
        """Whether all rows are given, in order."""
        return self.index is None and self.total is not None

    @property
    def count(self) -> int:
        """How many rows the call has."""
        assert self.index is not None
        return len(self.index)

    def check_known(self, name: str) -> None:
        """Raise where the rows are unknown, and each row of a plate has parameters."""
        if self.index is None:
            raise ValueError(
                f"The guide has parameters for each row of plate '{name}', and which rows these "
                "are is unknown. Give fit tensors, or use an encoder."
            )

    def index_of(self, plate: Any, entries: int) -> Tensor:
        """Return which of the ``entries`` of a table a plate of the rows has."""
        self.check_known(plate.name)
        name, index = plate.name, self.index
        assert index is not None
        if entries != self.total:
            raise ValueError(
                f"The guide has parameters for {entries} rows of plate '{name}', and the data have "
                f"{self.total}. Make a new guide."
            )
        if len(index) not in (plate.size, plate.subsample_size):
            raise ValueError(
                f"Plate '{name}' has {plate.subsample_size} of {plate.size} entries, and "
                f"MinibatchRows {len(index)}."
            )
        if plate.subsample_size < plate.size == len(index):  # a minibatch of the rows
            return index[plate.indices.to(index.device)]
        return index


def minibatch_rows() -> MinibatchRows | None:
    """Return what is known of the rows of this call; None where nothing is said."""
    return _CURRENT.get()


def plates_of_rows(
    model: Callable, args: tuple, kwargs: dict[str, Any], rows: int, total: int | None = None
) -> frozenset[str]:
    """Return the plates with as many entries as the arguments have rows, and not by chance.

    Their size is another one in a second run of the model, on a part of the rows, or their full
    size is the ``total`` of the data.
    """

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != rows:
            return value
        return value[: -(-rows // 2)] if rows > 1 else torch.cat([value, value])

    def frames(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        found = [plates_of(site) for site in sites(outline(model, args, kwargs))]
        return {name: frame for plates in found for name, frame in plates.items()}

    alike = {name: f for name, f in frames(args, kwargs).items() if f.size == rows}
    try:
        other = frames(*tree_map(part, (tuple(args), kwargs)))
    except Exception:  # a model that fits this number of rows alone
        return frozenset(alike)
    return frozenset(
        name
        for name, frame in alike.items()
        if name not in other or other[name].size != rows or frame.full_size == total != rows
    )
