"""Samplers inside `torch.vmap`: each particle has noise of its own, also under shared parameters.

Most distributions of Pyro fill new tensors with noise, which `torch.vmap` allows for tensors that
differ between particles. The others (`Beta`, `Dirichlet`, `LKJ`, `VonMises`, ...) are drawn one by
one, outside of it.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_recursive.tracing.sites import tensors_of

NEW = frozenset(
    {
        *(torch.empty, torch.zeros, torch.ones, torch.full),
        *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
        *(Tensor.new, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
    }
)


class OwnDraws(Messenger):
    """Draws what a program samples under `torch.vmap`; ``index`` is the number of the particle."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index, self.memory = index, _OwnMemory(index)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["done"] and not site_is_subsample(msg):
            fn, args, kwargs = msg["fn"], msg["args"], msg["kwargs"]
            try:
                with self.memory:
                    msg["value"] = fn(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # not every sampler runs under `torch.vmap`
                msg["value"] = _drawn_outside(fn, self.index)
            msg["done"] = True


class _OwnMemory(TorchFunctionMode):
    """Makes new tensors differ between particles: what is drawn into them does, too."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.zeros = {index.device: 0 * index}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.clamp_:  # `torch.vmap` warns that it is slow
            return args[0].copy_(torch.clamp(*args, **kwargs))
        result = func(*args, **kwargs)
        return result + self._zero(result.device).to(result.dtype) if func in NEW else result

    def _zero(self, device: torch.device) -> Tensor:
        if device not in self.zeros:
            self.zeros[device] = next(iter(self.zeros.values())).to(device)
        return self.zeros[device]


def _drawn_outside(fn: Any, index: Tensor) -> Tensor:
    """Return a draw of each particle from a distribution whose parameters may differ."""
    tensors = list({id(each): each for each in tensors_of(fn)}.values())

    def draw(*values: Tensor) -> Tensor:
        pairs = zip(tensors, values, strict=True)
        return deepcopy(fn, {id(tensor): value for tensor, value in pairs})()

    return _Outside.apply(draw, index, *tensors)


class _Outside(torch.autograd.Function):
    """A function of each particle's tensors outside of `torch.vmap`, with its derivatives."""

    @staticmethod
    def forward(function: Callable, index: Tensor, *tensors: Tensor) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: `torch.vmap` calls the rule below alone."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Callable, index: Tensor, *tensors: Tensor) -> Any:
        columns = (
            [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        )
        rows = zip(range(info.batch_size), *columns, strict=True)
        return torch.stack([function(*row) for _, *row in rows]), 0
