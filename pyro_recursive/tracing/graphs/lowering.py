"""Rewrites of a traced graph, with the same values, of which a CPU's compiler makes faster kernels.

They are for steps of a few microseconds, in which a call of ATen's between two kernels, or a loop
over 3 entries that is not vectorised, costs more than all else.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

ATEN = torch.ops.aten
FEW = 8  # entries of a dimension, at most, that loops over another one are better than over it
MANY = 8  # times as many has the other one, at least
MIN_REPEATS = 16  # of a small tensor in a larger one, from which on it is stored
SCANNED = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
REDUCTIONS = [
    *(ATEN.logsumexp.default, ATEN._softmax.default, ATEN._softmax_backward_data.default),
    *(ATEN._log_softmax.default, ATEN._log_softmax_backward_data.default),
]
BY_STRIDES = {ATEN.as_strided.default, ATEN.as_strided_scatter.default, ATEN.view.dtype}
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default}
VIEWS = {ATEN.view.default, ATEN._unsafe_view.default}
Decomposition = Callable[..., Any]


def _scan(combine: Callable[[Tensor, Tensor], Tensor]) -> Decomposition:
    """Return a cumulative operator over a few entries, without a call of ATen's."""

    def scan(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        is_known = x.device.type == "cpu" and x.dtype in SCANNED and dtype in (None, *SCANNED)
        if not is_known or x.dim() == 0 or not 0 < x.shape[dim] <= FEW:
            return NotImplemented
        default = x.dtype if x.dtype.is_floating_point else torch.int64
        first, *rest = x.to(dtype or default).split(1, dim)
        results = [first]
        for each in rest:
            results.append(combine(results[-1], each))
        return torch.cat(results, dim)

    return scan


def _over_few(decomposition: Decomposition) -> Decomposition:
    """Return the parts of an operator for a tensor ``[..., many, few]``: `lower` turns them."""

    def parts(x: Tensor, *args: Any) -> Any:
        if x.device.type == "cpu" and _is_long_and_narrow(x.shape):
            return decomposition(x, *args)
        return NotImplemented

    return parts


DECOMPOSITIONS: dict[Any, Decomposition] = {  # for `make_fx`
    ATEN.cumsum.default: _scan(torch.add),
    ATEN.cumprod.default: _scan(torch.mul),
    **{each: _over_few(own) for each, own in get_decompositions(REDUCTIONS).items()},
}


def lower(module: GraphModule) -> None:
    """Rewrite a graph that was traced with `DECOMPOSITIONS` and fake tensors, in place."""
    nodes = module.graph.nodes
    if not any(node.target in BY_STRIDES for node in nodes):
        values = (node.meta.get("val") for node in nodes)
        (mode, *_) = (each.fake_mode for each in values if isinstance(each, FakeTensor))
        with torch.no_grad(), mode:
            repeat_results(module)
            turn_narrow(module)
            for node in nodes:  # strides are others now
                if node.target in VIEWS:
                    node.target = ATEN.reshape.default
                if node.op == "call_function":
                    node.meta["val"] = _value(node.target, node.args, node.kwargs)
            flush_factors(module)
            store_repeated(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def repeat_results(module: GraphModule) -> None:
    """Compute once what is computed from expanded tensors, and expand the result."""
    for node in _pointwise(module):
        shape = node.meta["val"].shape
        bases = {each: _unexpanded(each) for each in node.all_input_nodes}
        small = torch.broadcast_shapes(*(each.meta["val"].shape for each in bases.values()))
        if small.numel() < shape.numel():
            with module.graph.inserting_before(node):
                args, kwargs = map_arg((node.args, node.kwargs), bases.__getitem__)
                result = _call(module, node.target, *args, **kwargs)
                _replace(node, _call(module, ATEN.expand.default, result, list(shape)))


def turn_narrow(module: GraphModule) -> None:
    """Compute what has the shape ``[..., many, few]`` as ``[..., few, many]``, in vectors.

    That is done where all inputs of this size are turned, too.
    """
    turned: dict[Node, Node] = {}
    for node in _pointwise(module):
        shape, inputs = node.meta["val"].shape, node.all_input_nodes
        whole = [each for each in inputs if _size(_unexpanded(each)) == shape.numel()]
        if not _is_long_and_narrow(shape) or not all(each in turned for each in whole):
            continue
        with module.graph.inserting_before(node):
            given = {each: turned.get(each) or _transposed(module, each) for each in inputs}
            args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
            result = _call(module, node.target, *args, **kwargs)
            back = _call(module, ATEN.transpose.int, result, -1, -2)
        turned[back] = result
        _replace(node, back)


def flush_factors(module: GraphModule) -> None:
    """Give matrix products zeros for denormal numbers, which make them several times slower.

    Gradients of particles have them, whose weights are next to none.
    """
    for node in _pointwise(module):
        users = [user for user in node.users if _is_in_product(user)]
        if not users or not (kind := node.meta["val"].dtype).is_floating_point:
            continue
        with module.graph.inserting_after(node):
            size = _call(module, ATEN.abs.default, node)
        with module.graph.inserting_after(size):
            tiny = _call(module, ATEN.lt.Scalar, size, torch.finfo(kind).tiny)
        with module.graph.inserting_after(tiny):
            flushed = _call(module, ATEN.masked_fill.Scalar, node, tiny, 0.0)
        for user in users:
            user.replace_input_with(node, flushed)


def _is_in_product(node: Node) -> bool:
    """Whether a node is a product of matrices, or a view of a factor."""
    is_view = node.op == "call_function" and _is_alias(node.target)
    return node.target in PRODUCTS or (is_view and any(map(_is_in_product, node.users)))


def store_repeated(module: GraphModule) -> None:
    """Store small tensors that larger ones have many times, not to be computed at each place."""
    found: dict[Node, None] = {}
    for node in module.graph.nodes:
        for small in node.all_input_nodes if node.op == "call_function" else ():
            if 0 < _size(small) * MIN_REPEATS <= _size(node):
                found[_base(small)] = None
    for node in found:
        value = node.meta.get("val")
        if node.op != "call_function" or _is_changed(node) or not isinstance(value, Tensor):
            continue
        if value.device.type == "cpu" and value.is_contiguous():
            with module.graph.inserting_after(node):  # which has the compiler store it
                given = node, list(value.shape), list(value.stride()), 0
                stored = _call(module, ATEN.as_strided.default, *given)
            for user in list(node.users):
                if user is not stored:
                    user.replace_input_with(node, stored)


def _is_long_and_narrow(shape: torch.Size) -> bool:
    return len(shape) > 1 and 1 < shape[-1] <= FEW and shape[-2] >= MANY * shape[-1]


def _pointwise(module: GraphModule) -> Iterator[Node]:
    """Yield calls on a CPU whose results have entries that are computed one by one."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        tags, schema = node.target.tags, node.target._schema
        if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
            continue
        values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
        if len(values) == 1 or not all(isinstance(each, Tensor) for each in values):
            continue
        if all(each.device.type == "cpu" for each in values) and not (
            _is_alias(node.target) or schema.is_mutable or _is_changed(node)
        ):
            yield node


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _unexpanded(node: Node) -> Node:
    while node.target == ATEN.expand.default:
        node = node.all_input_nodes[0]
    return node


def _base(node: Node) -> Node:
    """Return the tensor that a node is a view of."""
    while node.op == "call_function" and _is_alias(node.target) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_alias(operator: Any) -> bool:
    if not isinstance(operator, OpOverload):
        return False
    return any(each.alias_info is not None for each in operator._schema.returns)


def _is_changed(node: Node) -> bool:
    """Whether a tensor, or a view of it, is changed in place."""
    for user in node.users:
        if isinstance(user.target, OpOverload) and user.target._schema.is_mutable:
            return True
        if _is_alias(user.target) and _is_changed(user):
            return True
    return False


def _transposed(module: GraphModule, node: Node) -> Node:
    """Return a tensor to be broadcast with those that have the last two dimensions swapped."""
    if node.meta["val"].dim() == 0:
        return node
    if node.meta["val"].dim() == 1:
        return _call(module, ATEN.unsqueeze.default, node, -1)
    return _call(module, ATEN.transpose.int, node, -1, -2)


def _call(module: GraphModule, operator: Any, *args: Any, **kwargs: Any) -> Node:
    node = module.graph.call_function(operator, args, kwargs)
    node.meta["val"] = _value(operator, args, kwargs)
    return node


def _value(operator: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = map_arg((args, kwargs), lambda each: each.meta["val"])
    return operator(*args, **kwargs)


def _replace(node: Node, new: Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
