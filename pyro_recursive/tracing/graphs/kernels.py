"""Private interfaces of torch's compiler: a graph to machine code, and the kernels that it calls.

Tried with torch 2.13.
"""

import ast
import copy
import inspect
import logging
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_recursive.tracing.graphs.compiler import LOCK, Compiled, compiled_once

# Random operators that stay in a graph are ATen's own.
OPTIONS = {"fallback_random": True}


class NotRecordable(NotImplementedError):
    """Says which line of the generated code cannot be recorded."""


def compile_graph(module: GraphModule, tensors: Sequence[Tensor], **options: Any) -> Compiled:
    """Return machine code for a graph at fixed shapes; it may be called under `torch.no_grad`."""
    module = _with_samplers_of_aten(module)

    def compile(settings: dict[str, Any]) -> Compiled:
        import torch._inductor as inductor

        standalone_compile = getattr(inductor, "standalone_compile", None)
        names = inspect.signature(standalone_compile).parameters if standalone_compile else ()
        if "aot" not in names:  # a release of torch without this
            return torch.compile(module, fullgraph=True, dynamic=False, options=settings)
        with torch.no_grad(), _quiet(logging.getLogger("torch._inductor.standalone_compile")):
            return inductor.standalone_compile(
                module,
                list(tensors),
                dynamic_shapes="from_example_inputs",
                options={"config_patches": settings},
                aot=all(node.op != "get_attr" for node in module.graph.nodes),  # can be saved
            )

    return compiled_once(module, tensors, {**OPTIONS, **options}, compile)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Log nothing: that the code of a loop cannot be saved is expected."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _with_samplers_of_aten(module: GraphModule) -> GraphModule:
    """Return a copy of a graph in which the compiler leaves Bernoulli draws to ATen's operator.

    It has a sampler of its own for ``torch.bernoulli(p)``, even with `OPTIONS`, but none for the
    operation in place that this calls.
    """
    aten, module = torch.ops.aten, copy.deepcopy(module)
    for part in module.modules():
        if not isinstance(part, GraphModule):
            continue
        for node in part.graph.find_nodes(op="call_function", target=aten.bernoulli.default):
            with part.graph.inserting_before(node):
                empty = part.graph.call_function(aten.empty_like.default, node.args)
                arguments = empty, *node.args
                drawn = part.graph.call_function(aten.bernoulli_.Tensor, arguments, node.kwargs)
            empty.meta, drawn.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(drawn)
            part.graph.erase_node(node)
        part.recompile()
    return module


class KernelCalls:
    """The kernel calls of one run of compiled code, with their buffers, to be repeated."""

    def __init__(self, compiled: Compiled, tensors: Sequence[Tensor]) -> None:
        module = generated_module(compiled)
        check_recordable(module)
        self.calls: list[tuple[Callable, tuple, dict]] = []
        with LOCK, _recording(module, self.calls), torch.no_grad():
            compiled(*tensors)

    def pointers(self) -> set[int]:
        """The addresses of all tensors that the calls are given."""
        return {
            each.data_ptr()
            for _, args, kwargs in self.calls
            for each in (*args, *kwargs.values())
            if isinstance(each, Tensor)
        }

    def repeat(self, count: int) -> None:
        """Make the calls again, a number of times."""
        if len(self.calls) == 1:
            kernel, args, kwargs = self.calls[0]
            if not kwargs:
                for _ in range(count):
                    kernel(*args)
                return
        with torch.no_grad():
            for _ in range(count):
                for kernel, args, kwargs in self.calls:
                    kernel(*args, **kwargs)


def generated_module(compiled: Compiled) -> Any:
    """Return the Python module that the compiler generated for a graph."""
    runner = _find_runner(compiled, set())
    if runner is None:
        raise NotRecordable("no generated code was found")
    return inspect.getmodule(type(runner))


def _find_runner(owner: Any, seen: set[int], depth: int = 0) -> Any:
    """Search closures and attributes for the bound method `Runner.call` of generated code."""
    if id(owner) in seen or depth > 12:
        return None
    seen.add(id(owner))
    if inspect.ismethod(owner):
        return owner.__self__ if type(owner.__self__).__name__ == "Runner" else None
    if inspect.isfunction(owner):
        parts = [c.cell_contents for c in owner.__closure__ or () if _is_filled(c)]
    else:
        parts = list(getattr(owner, "__dict__", {}).values())
    for part in filter(callable, parts):
        if (found := _find_runner(part, seen, depth + 1)) is not None:
            return found
    return None


def _is_filled(cell: Any) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:
        return False


PASSIVE = {"args.clear", "empty_strided_cpu", "empty_strided_cpu_pinned", "reinterpret_tensor"}
PASSIVE |= {"assert_alignment", "assert_nan", "assert_size_stride"}
RECORDED = ("cpp_fused", "extern_kernels.", "torch.ops.")


def check_recordable(module: Any) -> None:
    """Raise NotRecordable where the generated code does more than call kernels on its buffers."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(module.runner).call)))
    for statement in tree.body[0].body:  # type: ignore[attr-defined]
        if not _is_known(statement):
            raise NotRecordable(f"generated line '{ast.unparse(statement)[:80]}' is no kernel call")


def _is_known(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Delete | ast.Return):
        return True
    if isinstance(statement, ast.Assign | ast.Expr):
        value = statement.value
        if isinstance(value, ast.Name | ast.Subscript):
            return True  # the inputs, another name of a buffer, one of several results
        if isinstance(value, ast.Call):
            name = ast.unparse(value.func)
            return name in PASSIVE or name.startswith(RECORDED)
    return False


class _recording:
    """Records the calls of kernels in a generated module by this thread inside the block."""

    def __init__(self, module: Any, calls: list) -> None:
        self.names, self.calls = vars(module), calls
        self.saved: dict[str, Any] = {}
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        kernels = [n for n in self.names if n.startswith("cpp_fused")]
        self.saved = {n: self.names[n] for n in (*kernels, "extern_kernels", "torch")}
        for name in kernels:
            self.names[name] = self._recorded(self.saved[name])
        self.names["extern_kernels"] = _Attributes(self.saved["extern_kernels"], 1, self._fallback)
        self.names["torch"] = _Torch(self._fallback)

    def __exit__(self, *error: Any) -> None:
        self.names.update(self.saved)

    def _recorded(self, kernel: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self.thread:
                self.calls.append((kernel, args, kwargs))
            return kernel(*args, **kwargs)

        return call

    def _fallback(self, operator: Any) -> Callable:
        """Record an operator; repeated, it writes into the results of the first call."""
        if threading.get_ident() != self.thread:
            return operator
        tags = getattr(operator, "tags", ())
        if torch.Tag.dynamic_output_shape in tags:
            raise NotRecordable(f"operator {operator} has results of a size that varies")

        def call(*args: Any, **kwargs: Any) -> Any:
            results = operator(*args, **kwargs)
            kept, given = _sequence(results), (*args, *kwargs.values())

            def again(*args: Any, **kwargs: Any) -> None:
                new = _sequence(operator(*args, **kwargs))
                for old, value in zip(kept, new, strict=True):
                    if isinstance(old, Tensor) and value is not old:
                        old.copy_(value)

            is_new = any(all(each is not own for own in given) for each in kept)
            self.calls.append((again if is_new else operator, args, kwargs))
            return results

        return call


def _sequence(results: Any) -> Sequence[Any]:
    return results if isinstance(results, tuple | list) else (results,)


class _Attributes:
    """Stands for a namespace; functions ``depth`` levels inside it are wrapped."""

    def __init__(self, owner: Any, depth: int, wrap: Callable) -> None:
        self._owner, self._depth, self._wrap = owner, depth, wrap

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._owner, name)
        if self._depth == 1:
            return self._wrap(found)
        return _Attributes(found, self._depth - 1, self._wrap)


class _Torch:
    """Stands for torch; operators in ``torch.ops`` are wrapped."""

    def __init__(self, wrap: Callable) -> None:
        self.ops = _Attributes(torch.ops, 3, wrap)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
