"""A loss and its gradients as one graph of ATen operators, of which all tensors are inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pyro import poutine, validation_enabled
from torch import Tensor
from torch.fx import GraphModule

from pyro_recursive.tracing.graphs.draws import DrawPlan
from pyro_recursive.tracing.graphs.host_reads import ReadValues
from pyro_recursive.tracing.graphs.run_graph import recorded, trace_run
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.isolation import restored_random_state
from pyro_recursive.tracing.param_store import parameters_in


@dataclass
class GradientGraph:
    """``graph(*parameters, *inputs, *draws, *constants)`` returns the loss and the gradients.

    ``draws`` are rows ``[size]`` of the pools of `plan`. Parameters that the loss does not reach
    are among `parameters` where they have a gradient, which an optimiser takes for zero, and
    `no_gradient` where they have none. `constants` are tensors that model and guide have from
    elsewhere than their arguments: data of closures, buffers, literals. The graph is right where
    the values of `reads` are the same.
    """

    graph: GraphModule
    parameters: list[Tensor]
    no_gradient: list[Tensor]
    plan: DrawPlan
    constants: list[Tensor]
    reads: ReadValues

    def __call__(
        self,
        parameters: Sequence[Tensor],
        inputs: Sequence[Tensor],
        draws: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, *gradients = self.graph(*parameters, *inputs, *draws, *constants)
        return loss, tuple(gradients)

    def is_valid(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the traced reads and set of trained parameters still hold."""
        for parameter in self.parameters:
            if not parameter.requires_grad or _has_hooks(parameter):
                return False
        for parameter in self.no_gradient:
            if parameter.grad is not None or not parameter.requires_grad:
                return False
        return self.reads.hold([*inputs, *self.constants])


def trace_gradients(
    loss: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    site: Callable[[], str | None],
    others: Sequence[Tensor],
) -> GradientGraph:
    """Trace a loss that reads ``inputs``, the very objects; it runs three times.

    ``site`` returns the name of the site that a run has reached, ``others`` are parameters that the
    optimiser has beside those of the runs. The random state is restored; what the runs change in
    place, as buffers, is not.
    """
    with restored_random_state(), validation_enabled(False):
        loss()  # finds the structure of the program, by runs of its own
    # Checkpoints run parts of the loss again for the gradients: with the same checks of arguments.
    with validation_enabled(False), poutine.trace(param_only=True) as captured:
        recorder, value = recorded(loss)
        known = [*parameters_in(captured.trace).values(), *others]
        parameters, zero_gradient, no_gradient = _leaves(known, value)

    def run() -> list[Tensor]:
        value = loss()
        found = torch.autograd.grad(value, parameters)
        return [value.detach(), *found, *map(torch.zeros_like, zero_gradient)]

    changing = [*parameters, *zero_gradient]
    traced = trace_run(run, recorder, [*changing, *inputs], len(changing), site)
    _check_memory(changing, [*inputs, *traced.constants])
    return GradientGraph(
        traced.graph, changing, no_gradient, traced.plan, traced.constants, traced.reads
    )


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _leaves(
    tensors: Sequence[Tensor], loss: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the parameters that a loss reaches, and others with and without a gradient."""
    leaves = list({id(each): each for each in tensors if each.requires_grad}.values())
    if not (leaves and loss.requires_grad):
        raise Unsupported("no parameter has a gradient")
    if any(map(_has_hooks, leaves)):
        raise Unsupported("a parameter has hooks, which see each gradient")
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    reached = [p for p, gradient in zip(leaves, found, strict=True) if gradient is not None]
    rest = [p for p, gradient in zip(leaves, found, strict=True) if gradient is None]
    zero_gradient = [p for p in rest if p.grad is not None]
    return reached, zero_gradient, [p for p in rest if p.grad is None]


def _check_memory(parameters: list[Tensor], others: list[Tensor]) -> None:
    """Raise where parameters, which will move to other memory, share theirs with tensors."""
    if any(each.layout is not torch.strided for each in others):
        raise Unsupported("a sparse tensor is used")
    spans = [(*_span(each), False) for each in others] + [(*_span(p), True) for p in parameters]
    end, is_parameter = 0, False
    for first, last, is_own in sorted(each for each in spans if each[0] < each[1]):
        if first < end and (is_own or is_parameter):
            raise Unsupported("the memory of a parameter is also that of another tensor")
        if last > end:
            end, is_parameter = last, is_own


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first entry and of the end of the last."""
    if not tensor.numel():
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
