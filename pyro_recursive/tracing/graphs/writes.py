"""What runs write to tensors in place, undone: data, counters, buffers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class UndoneWrites(TorchDispatchMode):
    """Gives all tensors that a block writes to their values from before, at its end."""

    def __init__(self) -> None:
        super().__init__()
        self._before: list[tuple[Tensor, Tensor]] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self._before):
                tensor.copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            named = func._schema.arguments
            given = [*zip(named, args, strict=False), *((n, kwargs.get(n.name)) for n in named)]
            for argument, value in given:
                if argument.is_write:
                    self._keep(*(value if isinstance(value, list | tuple) else (value,)))
        return func(*args, **kwargs)

    def reaches(self, tensor: Tensor) -> bool:
        """Whether the block has written to the memory of a tensor."""
        place = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == place for each, _ in self._before)

    def _keep(self, *values: Any) -> None:
        with _disable_current_modes(), torch.no_grad():
            for tensor in values:
                if isinstance(tensor, Tensor):
                    self._before.append((tensor.detach(), tensor.detach().clone()))
