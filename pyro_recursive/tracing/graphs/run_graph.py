"""A run of a program as one graph of ATen operators, of which all tensors are inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyro import validation_enabled
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from pyro_recursive.tracing.graphs.draws import DrawPlan, DrawRecorder
from pyro_recursive.tracing.graphs.host_reads import HostReads, ReadValues, split_reads
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.isolation import restored_random_state


@dataclass
class RunGraph:
    """``graph(*inputs, *draws, *constants)`` returns the tensors that a run returns.

    ``draws`` are rows ``[size]`` of the pools of `plan`. `constants` are tensors that the run has
    from elsewhere than its inputs: data of closures, buffers, literals. The graph is right where
    the values of `reads` are the same.
    """

    graph: GraphModule
    plan: DrawPlan
    constants: list[Tensor]
    reads: ReadValues


def recorded(run: Callable[[], Any]) -> tuple[DrawRecorder, Any]:
    """Return the draws of a run and its result; the random state is restored."""
    with restored_random_state():
        recorder = DrawRecorder()
        with validation_enabled(False), HostReads(), recorder:
            result = run()
        recorder.finish()
    return recorder, result


def trace_run(
    run: Callable[[], Sequence[Tensor]],
    recorder: DrawRecorder,
    inputs: Sequence[Tensor],
    num_parameters: int,
    site: Callable[[], str | None],
) -> RunGraph:
    """Trace a run that reads ``inputs``, the very objects, and whose draws are those `recorded`.

    The first ``num_parameters`` inputs may be others in each call, so that the run must not read
    their values in Python. ``site`` returns the name of the site that it has reached. The random
    state is restored; what the run changes in place, as buffers, is not.
    """
    plan = DrawPlan(recorder)
    buffers = plan.empty(1)
    rows = [buffer[0] for buffer in buffers]
    reads, aside = HostReads(site), list[Tensor]()

    def traced(*tensors: Tensor) -> list[Tensor]:
        given = tensors[len(tensors) - len(rows) :] if rows else ()
        with reads, plan.replaced(given) as replaced:
            results = run()
        aside.extend(replaced.aside)
        return [*results, *reads.tensors]

    with restored_random_state():
        for draw, out in plan.slices(buffers):
            draw.fill(out)
    with restored_random_state(), validation_enabled(False):
        tracer = make_fx(traced, tracing_mode="real", _allow_non_fake_inputs=True)
        graph = tracer(*inputs, *rows)
    constants = _hoist(graph)
    count = len(inputs) - num_parameters
    data = [*inputs[num_parameters:], *constants]
    read = split_reads(graph, reads, num_parameters, count, data)
    _finish(graph, constants, aside)
    return RunGraph(graph, plan, constants, read)


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
    last = [graph._root, *(node for node in graph.nodes if node.op == "placeholder")][-1]
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
