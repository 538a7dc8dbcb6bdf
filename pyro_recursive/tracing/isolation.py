"""Runs of programs that leave no trace: none in handlers, random state, or modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook


def torch_state() -> list[Tensor]:
    """Return the state of the CPU's generator and, where CUDA is in use, the current device's."""
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else state


def set_torch_state(state: list[Tensor]) -> None:
    """Go back to what `torch_state` returned."""
    torch.set_rng_state(state[0])
    for cuda_state in state[1:]:
        torch.cuda.set_rng_state(cuda_state)


def outline(
    model: Callable, args: tuple, kwargs: dict[str, Any], *, grad: bool = False
) -> poutine.Trace:
    """Run a model once, leaving no trace elsewhere, and the random state alone."""
    state = torch_state()
    with poutine.block(), torch.set_grad_enabled(grad):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    set_torch_state(state)
    return trace


class Unnoticed:
    """Runs a function several times as if it had run once, and as if nobody had.

    No handler around sees its sites; what modules keep in training (the statistics of a batch norm)
    stays as it was; and each run has the same random state, so that dropout leaves out the same.

    With ``twice`` the run is to be differentiated twice. cuDNN's recurrent networks and fused
    attention cannot be, and the former not even once in eval mode: torch's plain ones take over.
    """

    def __init__(self, twice: bool = False) -> None:
        self.twice = twice
        self._state: list[Tensor] | None = None

    def __call__(self, run: Callable[[], Any]) -> Any:
        """Return what a run of the function returns."""
        if self._state is None:
            self._state = torch_state()
        else:
            set_torch_state(self._state)
        attention = sdpa_kernel(SDPBackend.MATH) if self.twice else nullcontext()
        with poutine.block(), _unchanged_modules(self.twice), attention:
            return run()


@contextmanager
def _unchanged_modules(twice: bool) -> Iterator[None]:
    """Give each module that runs copies of its buffers, and back its own at the end.

    They are swapped, not overwritten: the graphs of other runs may need them.
    """
    kept: dict[nn.Module, dict[str, Tensor]] = {}
    cudnn = torch.backends.cudnn.enabled

    def meet(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.RNNBase) and (twice or not module.training):
            torch.backends.cudnn.enabled = False
        if module.training and module not in kept:
            own = dict(module.named_buffers(recurse=False))
            if own:
                kept[module] = own
                for name, buffer in own.items():
                    setattr(module, name, buffer.clone())

    hook = register_module_forward_pre_hook(meet)
    try:
        yield
    finally:
        hook.remove()
        torch.backends.cudnn.enabled = cudnn
        for module, own in kept.items():
            for name, buffer in own.items():
                setattr(module, name, buffer)
