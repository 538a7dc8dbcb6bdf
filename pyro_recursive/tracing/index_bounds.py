"""Indices out of range raise on every device.

On a GPU such an operation only fails an assertion on the device, after which all its calls fail.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALONG_A_DIM = {"index_select", "gather"}  # (self, dim, index)
OF_ENTRIES = {"index", "index_put", "index_put_"}  # (self, indices)


class IndexBounds(TorchDispatchMode):
    """Raises IndexError before an operation with an index out of range; asking waits for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            for index, size in _indices(func.overloadpacket.__name__, args):
                _check(index, size)
        return func(*args, **(kwargs or {}))


def _indices(name: str, args: Sequence[Any]) -> Iterator[tuple[Tensor, int]]:
    """Yield each tensor of indices of an operation, and the size of what it indexes."""
    if name in ALONG_A_DIM and args[0].dim():
        yield args[2], args[0].shape[args[1]]
    elif name == "embedding":
        yield args[1], len(args[0])
    elif name == "take":
        yield args[1], args[0].numel()
    elif name in OF_ENTRIES:
        dim = 0
        for index in args[1]:
            is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            if index is not None and not is_mask:
                yield index, args[0].shape[dim]
            dim += index.dim() if is_mask else 1


def _check(index: Tensor, size: int) -> None:
    if index.numel():
        low, high = (int(end) for end in index.aminmax())
        if high >= size or low < -size:
            wrong = high if high >= size else low
            raise IndexError(f"index {wrong} is out of bounds for a dimension of size {size}")
