"""The random state of torch: cheap enough to note in each step, and no wait for a device."""

import torch
from torch import Tensor

__all__ = ["set_torch_state", "torch_state"]


def torch_state() -> list[Tensor]:
    """Return the state of the CPU's generator and, where CUDA is in use, the current device's."""
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else state


def set_torch_state(state: list[Tensor]) -> None:
    """Go back to what `torch_state` returned."""
    torch.set_rng_state(state[0])
    for cuda_state in state[1:]:
        torch.cuda.set_rng_state(cuda_state)
