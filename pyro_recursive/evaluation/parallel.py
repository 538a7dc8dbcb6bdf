"""Evaluation whose rows several processes share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_recursive.evaluation.processes import ProcessGroup
from pyro_recursive.tracing.counts import check_at_least

__all__ = ["evaluate_in_parallel"]

Found = TypeVar("Found")


def evaluate_in_parallel(
    function: Callable[..., Found], *rows: Tensor, batch_size: int | None = None
) -> Found:
    """Return ``function(*rows)`` in every process, each of which computes its share of the rows.

    For what has a value for each row: `pyro_recursive.log_marginal`, `gaps`, log-likelihoods. Where
    `torch.distributed` is initialised all its processes must call this with the same rows; the
    first process takes the first ones, and so on. A process alone computes all. The result is that
    of one process if the function is deterministic; with random draws it is another estimate of the
    same, provided that processes draw different numbers: ``pyro.set_rng_seed(seed + rank)``.

    :param function: called with some of the rows; returns a tensor whose first dim is these rows,
        or a tuple, a NamedTuple (`Evidence`, `Gaps`) or a dict of such tensors, numbers and None
        being the same for all rows. Bind all else with `functools.partial`
    :param rows: tensors whose rows go together; each process needs to hold them all
    :param batch_size: how many rows one call of the function has at most; None is the whole share
    :return: the rows of all processes in their order, on the device of the first of ``rows``
    :raises ValueError: no rows, tensors of different lengths, a batch size that is no integer of at
        least 1, a result without these rows
    :raises RuntimeError: the function has failed in another process

    >>> evaluate_in_parallel(lambda x: x.sum(-1), torch.eye(3), batch_size=2)
    tensor([1., 1., 1.])
    """
    count = _count(rows)
    check_at_least(1, batch_size=batch_size)
    with ProcessGroup.joined() as processes:
        own = processes.share(count)
        starts = range(own.start, own.stop, batch_size or count)
        parts = [(start, min(start + starts.step, own.stop)) for start in starts]
        found = [_evaluated(function, [column[slice(*part)] for column in rows]) for part in parts]
        everyone = processes.gather(found, "an evaluation")
    joined = _join([part for parts in everyone for part in parts])
    return _mapped(joined, lambda tensor: tensor.to(rows[0].device))


def _count(rows: Sequence[Tensor]) -> int:
    """Return the number of rows, at least one."""
    lengths = [len(column) if column.dim() else None for column in rows]
    if not lengths or lengths[0] in (0, None) or len(set(lengths)) > 1:
        raise ValueError(f"rows must be tensors of one length, at least 1, got lengths {lengths}.")
    return len(rows[0])


def _mapped(found: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors of a result."""
    if isinstance(found, Tensor):
        return function(found)
    if isinstance(found, dict):
        return {key: _mapped(value, function) for key, value in found.items()}
    if isinstance(found, tuple):
        return _like(found, [_mapped(value, function) for value in found])
    return found


def _like(found: tuple, values: list[Any]) -> tuple:
    """Return a tuple, or a NamedTuple of the same class."""
    return found._make(values) if hasattr(found, "_make") else tuple(values)


def _evaluated(function: Callable, rows: Sequence[Tensor]) -> Any:
    """Return a result on the CPU; raise where a tensor in it has no place for each row."""
    count = len(rows[0])

    def check(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != count:
            raise ValueError(
                f"The function returned a tensor of shape {tuple(tensor.shape)} for {count} rows, "
                "which are to be its first dim. Return values of each row, to be averaged "
                "afterwards; a plate of the rows must be the leftmost."
            )
        return tensor.detach().cpu()

    return _mapped(function(*rows), check)


def _join(parts: Sequence[Any]) -> Any:
    """Put results together row by row; what is no tensor must be the same in all."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {key: _join([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return _like(first, [_join(column) for column in zip(*parts, strict=True)])
    if any(part != first for part in parts):
        raise ValueError(
            f"Values that are no tensors differ between the parts of the rows: {parts}"
        )
    return first
