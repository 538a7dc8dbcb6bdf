"""Values of tensors that a program reads in Python while its graph is made: of masks, of counts.

A graph holds what follows from them as numbers and shapes, so that it is right for these values
alone. They are compared with those of each later call, by a second graph of the same inputs.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import Token
from typing import Any

import pyro.infer
import torch
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import distribution
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_recursive.tracing.graphs.draws import is_random
from pyro_recursive.tracing.graphs.unsupported import SKIPPED, Unsupported
from pyro_recursive.tracing.isolation import OUTSIDE_OF_GRAPHS
from pyro_recursive.tracing.user_warnings import folder_of

# Methods that read memory without an operator, and functions that so read arguments of integers.
UNSEEN = ("tolist", "numpy", "__array__", "__dlpack__")
SIZED = ("lstm", "gru", "rnn_tanh", "rnn_relu", "tensor_split")
PYRO_INFER = folder_of(pyro.infer.__file__)
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class HostReads(TorchDispatchMode):
    """Lets a traced run read values, and notes the tensors and where they were read.

    Indices by a mask are read, too: what they select is fixed in a graph.
    """

    def __init__(self, site: Callable[[], str | None] = lambda: None) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.places: list[str] = []
        self._site, self._methods = site, _Methods(self)
        self._token: Token | None = None

    def __enter__(self) -> "HostReads":
        self._methods.__enter__()
        self._token = OUTSIDE_OF_GRAPHS.set(self.outside)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._token is not None
        OUTSIDE_OF_GRAPHS.reset(self._token)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_pack_padded_sequence":
            text = f"pack_padded_sequence reads lengths in Python{_place(self._site())}"
            raise Unsupported(f"{text}; use padded data and a mask to compile")
        if name == "aten::masked_select":
            return torch.ops.aten.index.Tensor(args[0], self._indices([args[1]]))
        if name in INDEXED:
            args = (args[0], self._indices(args[1]), *args[2:])
        elif torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags
        ):
            return self.read(func, args, kwargs)
        return func(*args, **kwargs)

    def read(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return what a function of tensors returns, a constant of the graph."""
        self.note(*(each for each in args if isinstance(each, Tensor)))
        with _disable_current_modes(), self._methods.paused():
            return func(*args, **kwargs)

    def note(self, *tensors: Tensor) -> None:
        """Note that the graph depends on the values of some tensors."""
        self.tensors += [each.detach() for each in tensors]
        self.places += [_place(self._site())] * len(tensors)

    @contextlib.contextmanager
    def outside(self, *tensors: Tensor) -> Iterator[None]:
        """Leave a block out of the graph: it decides something by the values of these tensors."""
        self.note(*tensors)
        with _disable_current_modes(), self._methods.paused():
            yield

    def _indices(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return indices with masks as the numbers of their entries."""
        found: list[Tensor | None] = []
        for each in indices:
            if each is not None and each.dtype in (torch.bool, torch.uint8):
                found += self.read(torch.nonzero, (each,), {}).unbind(1)
            else:
                found.append(each)
        return found


class _Methods(TorchFunctionMode):
    """Intercepts reads that bypass the dispatcher, and Pyro's reads for logging or validation."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads, self.is_paused = reads, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Intercept nothing in the block; other modes, as of a default device, stay as they are."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.is_paused:
            return func(*args, **kwargs)
        if name in UNSEEN:
            return self.reads.read(func, args, kwargs)
        if name in SIZED:
            self.reads.note(*filter(_is_integer, (*args[1:], *kwargs.values())))
        if name in ("item", "__bool__"):
            caller = sys._getframe(1).f_code
            if name == "item" and caller.co_filename.startswith(PYRO_INFER):
                return args[0].detach()  # a loss, to be reported
            if caller is warn_if_nan.__code__:
                return False
            if caller.co_filename == distribution.__file__:
                return True  # validation, as of a distribution made elsewhere
        return func(*args, **kwargs)


def _is_integer(value: Any) -> bool:
    """Whether a value is a tensor of integers, as sizes of batches."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


class ReadValues:
    """What was read while a graph was made, as a graph of the inputs and constants of that one."""

    def __init__(self, graph: Graph, values: Sequence[Tensor]) -> None:
        self.graph = GraphModule({}, graph)
        self.values = [each.clone() for each in values]
        self.device = next((v.device for v in values if v.device.type != "cpu"), None)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors give the same values; waits for a GPU once."""
        if not self.values:
            return True
        with torch.no_grad():
            found = self.graph(*tensors)
            if self.device is None:
                return all(map(torch.equal, found, self.values))
            pairs = list(zip(found, self.values, strict=True))
            if any(one.shape != other.shape for one, other in pairs):
                return False
            same = [(one == other).all().to(self.device) for one, other in pairs]
            return bool(torch.stack(same).all())


def split_reads(
    module: GraphModule, reads: HostReads, num_parameters: int, num_inputs: int, tensors: list
) -> ReadValues:
    """Take the last outputs of a graph, which were read, out of it; it is not recompiled.

    Its arguments are parameters, inputs, draws and constants; ``tensors`` are inputs and constants.
    Raises Unsupported for values that vary in each step.
    """
    nodes = list(module.graph.nodes)
    (output,) = (node for node in nodes if node.op == "output")
    outputs, count = output.args[0], len(reads.tensors)
    kept, read = outputs[: len(outputs) - count], outputs[len(outputs) - count :]
    output.args = (kept,)
    arguments = [node for node in nodes if node.op == "placeholder"]
    data = arguments[num_parameters : num_parameters + num_inputs]
    data += arguments[len(arguments) - (len(tensors) - num_inputs) :]
    needed: dict[Node, None] = {}
    for node, place in zip(read, reads.places, strict=True):
        _gather(node, needed)
        if any(_varies(each, data) for each in needed):
            raise Unsupported(f"values that vary in each step are read in Python{place}")
    graph, copies = Graph(), dict[Node, Node]()
    for node in data:
        copies[node] = graph.node_copy(node)
    for node in nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in read))
    values = ReadValues(graph, reads.tensors)
    if not values.hold(tensors):
        raise Unsupported(f"values are read in Python that change in the step{reads.places[0]}")
    return values


def _gather(node: Node, needed: dict[Node, None]) -> None:
    """Add a node and all that it is computed from."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed[node] = None
            waiting += node.all_input_nodes


def _varies(node: Node, data: list[Node]) -> bool:
    """Whether a node is a parameter or a draw."""
    return is_random(node.target) or (node.op == "placeholder" and node not in data)


def _place(site: str | None) -> str:
    """Return where the running program is: the site that it has reached, the file and the line."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(SKIPPED):
        frame = frame.f_back
    where = f" after site '{site}'" if site else ""
    if frame is None:
        return where
    return f"{where} ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"
