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

from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.training.compiled.draws import DrawPlan, DrawRecorder


@dataclass
class GradientGraph:
    """``graph(*parameters, *inputs, *draws, *constants)`` returns the loss and the gradients.

    ``draws`` are rows ``[size]`` of the pools of `plan`. Only parameters that the loss reaches are
    among `parameters`. `constants` are tensors that model and guide have from elsewhere than their
    arguments: data of closures, buffers, literals.
    """

    graph: GraphModule
    parameters: list[Tensor]
    plan: DrawPlan
    constants: list[Tensor]

    def __call__(
        self,
        parameters: Sequence[Tensor],
        inputs: Sequence[Tensor],
        draws: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, *gradients = self.graph(*parameters, *inputs, *draws, *constants)
        return loss, tuple(gradients)


def trace_gradients(loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> GradientGraph:
    """Trace a loss that reads ``inputs``, the very objects; it runs three times.

    The random state is restored; what the runs change in place, as buffers, is not.
    """
    before = random_state()
    recorder = DrawRecorder()
    try:
        with validation_enabled(False):
            loss()  # finds the structure of the program, by runs of its own
            set_random_state(before)
            with recorder, poutine.trace(param_only=True) as captured:
                value = loss()
            parameters = _leaves(captured.trace)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            parameters = [p for p, g in zip(parameters, found, strict=True) if g is not None]
            set_random_state(before)
            plan = DrawPlan(recorder)
            rows = [buffer[0] for buffer in plan.empty(1)]
            for draw, out in plan.slices([row.unsqueeze(0) for row in rows]):
                draw.fill(out)
            set_random_state(before)

            def run(*tensors: Tensor) -> list[Tensor]:
                with plan.replaced(tensors[len(tensors) - len(rows) :] if rows else ()):
                    value = loss()
                    return [value.detach(), *torch.autograd.grad(value, parameters)]

            tracer = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)
            graph = tracer(*parameters, *inputs, *rows)
    finally:
        set_random_state(before)
    constants = _hoist(graph)
    return GradientGraph(graph, parameters, plan, constants)


def _leaves(trace: poutine.Trace) -> list[Tensor]:
    """Return the unconstrained parameters of a trace that need a gradient, each once."""
    found: dict[int, Tensor] = {}
    for site in trace.nodes.values():
        value = site["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if leaf.requires_grad:
            found[id(leaf)] = leaf
    return list(found.values())


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
    graph.set_codegen(CodeGen())
    module.recompile()
    return list(constants.values())
