"""What must hold of a table's numbers, and how log-weights become rows."""

import torch
from torch import Tensor

__all__ = [
    "check_index",
    "check_numbers",
    "check_rows",
    "check_weights",
    "normalised",
    "own_components",
]


def check_index(index: Tensor, num_components: int) -> None:
    """Raise ValueError unless rows ``[N, k]`` are different components, from 0 to M - 1."""
    if index.dim() != 2 or not index.numel() or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [N, k], got {index.dtype} {list(index.shape)}")
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= num_components:
        raise ValueError(
            f"index goes from {low} to {high}, and there are {num_components} components"
        )
    ascending = index.sort(1).values
    twice = (ascending[:, 1:] == ascending[:, :-1]).any(1)
    if twice.any():
        raise ValueError(
            f"row {int(twice.nonzero()[0])} of index holds a component twice: add its weights up "
            "first, by logsumexp"
        )


def check_rows(index: Tensor, log_q: Tensor) -> None:
    """Raise ValueError unless log q are of the index's shape, descending and normalised."""
    if log_q.shape != index.shape or not log_q.is_floating_point():
        raise ValueError(
            f"log_q must be floating-point numbers of shape {list(index.shape)} as the index, got "
            f"{log_q.dtype} {list(log_q.shape)}"
        )
    # "Not all are right", as comparisons with nan are false.
    if not (log_q[:, 1:] <= log_q[:, :-1]).all():
        raise ValueError("log_q must descend in each row; Table.from_neighbours sorts")
    tolerance = max(1e-6, 8 * index.shape[1] * torch.finfo(log_q.dtype).eps)
    if not (log_q.double().logsumexp(1).abs() <= tolerance).all():
        raise ValueError("log_q must be normalised in each row; Table.from_neighbours normalises")


def check_weights(log_weights: Tensor) -> None:
    """Raise ValueError for log-weights ``[N, k]`` that are no weights of a distribution."""
    best = log_weights.amax(1)  # nan where there is one
    wrong = ~best.isfinite()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row} of the log-weights has {float(best[row])} as its largest: each row must "
            "have a finite number, and neither nan nor +inf"
        )


def normalised(log_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of log-weights, float64 ``[N, k]``, normalised, in a dtype."""
    return (log_weights - log_weights.logsumexp(1, keepdim=True)).to(dtype)


def own_components(rows: int, components: int, device: torch.device) -> Tensor | None:
    """Return each row's own component ``[N]`` where there are as many; None otherwise."""
    return torch.arange(rows, device=device) if rows == components else None


def check_numbers(index: Tensor, rows: int) -> None:
    """Raise unless ``[B]`` are numbers of rows: negative ones would count from the end unseen."""
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"rows are asked for by integers [B], got {index.dtype} {list(index.shape)}"
        )
    if not index.numel():
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= rows:
        raise IndexError(f"rows {low} to {high} were asked for, and the table has {rows}")
