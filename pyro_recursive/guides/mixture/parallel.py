"""Several modules of one architecture on the same inputs, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

__all__ = ["pays", "run_together", "same_architecture"]


def pays(inputs: object) -> bool:
    """Whether one pass is faster: on an accelerator, where launching kernels costs.

    On a CPU the arithmetic is what costs, and one module after the other is faster.
    """
    return isinstance(inputs, Tensor) and inputs.device.type != "cpu"


def same_architecture(modules: Sequence[nn.Module]) -> bool:
    """Whether modules differ in nothing but their parameters.

    Only torch's own layers without buffers: their descriptions say all that they are.
    """
    return len({_description(module) for module in modules}) == 1 and all(
        type(part).__module__.startswith("torch.nn.modules") and not list(part.buffers())
        for part in modules[0].modules()
    )


def _description(module: nn.Module) -> tuple[str, bool, tuple[tuple[str, torch.Size], ...]]:
    shapes = tuple((name, parameter.shape) for name, parameter in module.named_parameters())
    return str(module), module.training, shapes


def run_together(modules: Sequence[nn.Module], held: Sequence[bool], inputs: Tensor) -> Tensor:
    """Return all outputs, ``[M, *output]``; parameters of modules that are ``held`` are constants.

    The parameters are stacked in each call, which costs a copy, and keeps them separate for
    optimisers and checkpoints.
    """
    stacked = {
        name: torch.stack([_value(m, name, h) for m, h in zip(modules, held, strict=True)])
        for name, _ in modules[0].named_parameters()
    }

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(modules[0], parameters, (inputs,))

    return vmap(run, randomness="different")(stacked)


def _value(module: nn.Module, name: str, held: bool) -> Tensor:
    parameter = module.get_parameter(name)
    return parameter.detach() if held else parameter
