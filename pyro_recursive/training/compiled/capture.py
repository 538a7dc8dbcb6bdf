"""CUDA graphs of compiled steps, and which steps have one."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, cuda
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from pyro_recursive.tracing.graphs.draws import is_random
from pyro_recursive.tracing.graphs.gradients import GradientGraph
from pyro_recursive.tracing.graphs.kernels import Compiled, NotRecordable

ATEN = torch.ops.aten
LITERAL = ATEN.lift_fresh_copy.default  # copies numbers of the program, as of ``torch.tensor(1.0)``
CHECK = ATEN._linalg_check_errors.default


def captured(
    module: GraphModule, compiled: Compiled, tensors: Sequence[Tensor], index: Tensor
) -> Callable[[int], None]:
    """Return a function that repeats the step of a graph on a GPU, as a captured CUDA graph.

    The step is taken twice, each time as the first of its block, of which ``index`` is the number:
    at first kernels are compiled, then nothing may wait for the device. Random operators in the
    graph draw anew in each replay, from torch's CUDA generator: a capture registers it.

    Raises NotRecordable.
    """
    check_capturable(module, index.device)
    with torch.no_grad(), cuda.device(index.device):
        graph, stream = cuda.CUDAGraph(), cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        try:
            with cuda.stream(stream):  # is left after a capture that fails, too
                compiled(*tensors)
                index.zero_()
                with _no_waits():
                    compiled(*tensors)
                with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    compiled(*tensors)
        except RuntimeError as error:
            raise NotRecordable(f"a CUDA graph cannot hold the step ({error})") from error
        finally:
            cuda.current_stream().wait_stream(stream)

    def repeat(count: int) -> None:
        for _ in range(count):
            graph.replay()

    return repeat


@contextmanager
def _no_waits() -> Iterator[None]:
    """Raise RuntimeError where the block waits for a GPU."""
    before = cuda.get_sync_debug_mode()
    cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        cuda.set_sync_debug_mode(before)


def on_device(gradients: GradientGraph, device: torch.device) -> GradientGraph:
    """Return a graph that makes its own tensors on a device: literals, ranges, zeros.

    It cannot be traced where the program computes with them on the CPU.
    """
    graph, constants = copy.deepcopy(gradients.graph), list(gradients.constants)
    inputs = graph.graph.find_nodes(op="placeholder")
    own = inputs[len(inputs) - len(constants) :]
    for number, node in enumerate(own):
        if node.users and all(user.target is LITERAL for user in node.users):
            constants[number] = constants[number].to(device)
    for node in graph.graph.nodes:
        is_own = not node.all_input_nodes and not is_random(node.target)
        if is_own and node.kwargs.get("device") == torch.device("cpu"):
            node.update_kwarg("device", device)
    graph.recompile()
    return replace(gradients, graph=graph, constants=constants)


def check_capturable(module: GraphModule, device: torch.device) -> None:
    """Raise NotRecordable where a graph works on another device, or waits for this one.

    This has to be known before a capture: after one that fails, torch's allocator and generator may
    be as during the capture.
    """
    for node in module.graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        name = f"operator {node.target}" if node.op == "call_function" else "an input"
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.device != device:
                raise NotRecordable(f"{name} is on {value.device}, the step on {device}")
        if node.target is CHECK:
            raise NotRecordable(f"{name} waits for the device")


def without_checks(module: GraphModule) -> None:
    """Fill results of failed factorisations on a GPU with NaN, in place of a check that waits."""
    for check in module.graph.find_nodes(op="call_function", target=CHECK):
        info = check.args[0]
        if info.meta["val"].is_cpu:
            continue
        for result in list(info.args[0].users):
            if result.meta["val"].is_floating_point() or result.meta["val"].is_complex():
                _fill_failed(module, result, info)
        module.graph.erase_node(check)


def _fill_failed(module: GraphModule, result: Node, info: Node) -> None:
    """Fill a result, ``[*batch, ...]``, with NaN where ``info``, ``[*batch]``, is not zero."""
    batch, shape = info.meta["val"].shape, result.meta["val"].shape
    last = max(result, info)
    with module.graph.inserting_after(last):
        failed = module.graph.call_function(ATEN.ne.Scalar, (info, 0))
    ones = [1] * (len(shape) - len(batch))
    with module.graph.inserting_after(failed):
        failed = module.graph.call_function(ATEN.view.default, (failed, [*batch, *ones]))
    with module.graph.inserting_after(failed):
        arguments = result, failed, math.nan
        filled = module.graph.call_function(ATEN.masked_fill.Scalar, arguments)
    result.replace_all_uses_with(filled, lambda user: user is not filled)
