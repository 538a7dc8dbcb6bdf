"""A loss and its gradients as one graph of ATen operators, of which all tensors are inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine, validation_enabled
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from pyro_recursive.tracing.graphs.draws import DrawPlan, DrawRecorder
from pyro_recursive.tracing.graphs.host_reads import HostReads, ReadValues, split_reads
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.tracing.param_store import unconstrained


@dataclass
class GradientGraph:
    """``graph(*parameters, *inputs, *draws, *constants)`` returns the loss and the gradients.

    ``draws`` are rows ``[size]`` of the pools of `plan`. Parameters that the loss does not reach
    are among `parameters` where they have a gradient, which an optimiser takes for zero, and
    `idle` where they have none. `constants` are tensors that model and guide have from elsewhere
    than their arguments: data of closures, buffers, literals. The graph is right where the values
    of `reads` are the same.
    """

    graph: GraphModule
    parameters: list[Tensor]
    idle: list[Tensor]
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
        """Whether the graph is that of these inputs, and of the gradients that there are."""
        for parameter in self.parameters:
            if not parameter.requires_grad:
                return False
        for parameter in self.idle:
            if parameter.grad is not None or not parameter.requires_grad:
                return False
        return self.reads.hold([*inputs, *self.constants])


def trace_gradients(
    loss: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    site: Callable[[], str | None] = lambda: None,
    others: Sequence[Tensor] = (),
) -> GradientGraph:
    """Trace a loss that reads ``inputs``, the very objects; it runs three times.

    ``site`` returns the name of the site that a run has reached, ``others`` are parameters that the
    optimiser has beside those of the runs. The random state is restored; what the runs change in
    place, as buffers, is not.
    """
    before = random_state()
    try:
        with validation_enabled(False):
            loss()  # finds the structure of the program, by runs of its own
            set_random_state(before)
            recorder = DrawRecorder()
            with HostReads(), recorder, poutine.trace(param_only=True) as captured:
                value = loss()
            recorder.finish()
            sites = captured.trace.nodes.values()
            known = [*(unconstrained(site["value"]) for site in sites), *others]
            parameters, still, idle = _leaves(known, value)
            set_random_state(before)
            plan = DrawPlan(recorder)
            buffers = plan.empty(1)
            rows = [buffer[0] for buffer in buffers]
            for draw, out in plan.slices(buffers):
                draw.fill(out)
            set_random_state(before)

            def run(*tensors: Tensor) -> list[Tensor]:
                given = tensors[len(tensors) - len(rows) :] if rows else ()
                with reads, plan.replaced(given) as replaced:
                    value = loss()
                    found = torch.autograd.grad(value, parameters)
                aside.extend(replaced.aside)
                zeros = map(torch.zeros_like, tensors[len(parameters) :][: len(still)])
                return [value.detach(), *found, *zeros, *reads.tensors]

            reads, aside = HostReads(site), list[Tensor]()
            tracer = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)
            graph = tracer(*parameters, *still, *inputs, *rows)
    finally:
        set_random_state(before)
    constants = _hoist(graph)
    count = len(parameters) + len(still)
    read = split_reads(graph, reads, count, len(inputs), [*inputs, *constants])
    _finish(graph, constants, aside)
    return GradientGraph(graph, [*parameters, *still], idle, plan, constants, read)


def _leaves(
    tensors: Sequence[Tensor], loss: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the parameters that a loss reaches, and others with and without a gradient."""
    leaves = list({id(each): each for each in tensors if each.requires_grad}.values())
    if not (leaves and loss.requires_grad):
        raise Unsupported("no parameter has a gradient")
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    reached = [p for p, gradient in zip(leaves, found, strict=True) if gradient is not None]
    rest = [p for p, gradient in zip(leaves, found, strict=True) if gradient is None]
    still = [p for p in rest if p.grad is not None]
    return reached, still, [p for p in rest if p.grad is None]


def _finish(graph: GraphModule, constants: list[Tensor], aside: list[Tensor]) -> None:
    """Remove what the outputs do not need; raise where they need a draw that was made aside."""
    graph.graph.eliminate_dead_code()
    graph.graph.set_codegen(CodeGen())
    graph.recompile()
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(arguments[len(arguments) - len(constants) :], constants, strict=True):
        if node.users and any(value is each for each in aside):
            raise Unsupported("the random state is set back after draws that matter")


def _hoist(module: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its last inputs, and return them."""
    graph, constants = module.graph, dict[str, Any]()
    graph.eliminate_dead_code()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[str, Any] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = node.target
        if name not in inputs:
            constants[name] = getattr(module, name)
            with graph.inserting_after(last):
                last = inputs[name] = graph.placeholder(f"constant_{len(constants)}")
            last.meta.update(node.meta)
        node.replace_all_uses_with(inputs[name])
        graph.erase_node(node)
    for name in constants:
        delattr(module, name)
    return list(constants.values())
