"""Runs of a model inside a guide: on given values, and without a trace of them anywhere else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_recursive.tracing.random_state import set_torch_state, torch_state

__all__ = ["ModelReference", "SubstituteByName", "Unnoticed"]


class SubstituteByName(Messenger):
    """Gives sites, subsample sites too, values by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"] and msg["value"] is None:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class ModelReference:
    """A model that is neither copied nor pickled with the guide."""

    def __init__(self, model: Callable | None) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> "ModelReference":
        """Refer to the same model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Refer to none."""
        return ModelReference, (None,)


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
