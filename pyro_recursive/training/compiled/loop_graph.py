"""Many steps as one graph: a loop around the graph of a step."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

UNDECLARED = {"running_mean", "running_var"}  # batch norms change these, as no schema says


def changed_inputs(module: GraphModule) -> list[int]:
    """Return the numbers of the inputs that a graph of ATen operators changes in place."""
    inputs = list(module.graph.find_nodes(op="placeholder"))
    sources: dict[Node, Node] = {node: node for node in inputs}  # of what is a view of an input
    changed = set[Node]()
    for node in module.graph.nodes:
        if node.target is operator.getitem and node.args[0] in sources:
            sources[node] = sources[node.args[0]]
        schema = getattr(node.target, "_schema", None)
        arguments = schema.arguments if schema else ()
        given = dict(zip((each.name for each in arguments), node.args, strict=False)) | node.kwargs
        for argument in arguments:
            alias, is_undeclared = argument.alias_info, argument.name in UNDECLARED
            reached = [each for each in tree_leaves(given.get(argument.name)) if each in sources]
            for source in (sources[each] for each in reached):
                if alias is not None:
                    sources[node] = source
                if is_undeclared or (alias is not None and alias.is_write):
                    changed.add(source)
    return [number for number, node in enumerate(inputs) if node in changed]


def loop_graph(step: GraphModule, tensors: Sequence[Tensor], index: int) -> GraphModule:
    """Return ``graph(count, *tensors)``, which runs the graph of a step in place, again and again.

    ``index`` is the number of the input that counts the steps, ``[1]``, from zero: they end when it
    is ``count``, ``[1]``.
    """
    changed = changed_inputs(step)
    kept = [number for number in range(len(tensors)) if number not in changed]
    counter = changed.index(index)

    def is_left(*state: Tensor) -> Tensor:
        return (state[counter] < state[len(changed)]).view(())

    def body(*state: Tensor) -> tuple[Tensor, ...]:
        moved = [each.clone() for each in state[: len(changed)]]
        given = dict(zip(changed, moved, strict=True))
        given |= zip(kept, state[len(changed) + 1 :], strict=True)
        step(*(given[number] for number in range(len(tensors))))
        return tuple(moved)

    def run(count: Tensor, *tensors: Tensor) -> list[Tensor]:
        carried = tuple(tensors[number].clone() for number in changed)
        others = count, *(tensors[number] for number in kept)
        results = torch.ops.higher_order.while_loop(is_left, body, carried, others)
        for number, result in zip(changed, results, strict=True):
            tensors[number].copy_(result)
        return []

    with torch.no_grad():
        return make_fx(run, tracing_mode="fake")(torch.ones_like(tensors[index]), *tensors)
