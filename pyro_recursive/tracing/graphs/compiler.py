"""Each graph is compiled once: what was compiled is found again in this process or in a folder."""

import hashlib
import os
import platform
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from pyro_recursive.tracing.graphs.artifacts import (
    ArtifactFolder,
    Libraries,
    forget_instructions,
    recorded_libraries,
)
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.terminal import stderr_is_watched

Compiled = Callable[..., Any]
# The processor's vector instructions are not tested one by one, for 2 seconds each.
ASSUME_VEC_ISA = {"cpp.vec_isa_ok": True} if platform.machine() in ("x86_64", "AMD64") else {}
Artifact = tuple[Compiled, Callable[[], Libraries]]  # and what is saved with it
MAX_KEPT = 64  # graphs
LOCK = RLock()  # of the compiler, and of what it generated while its calls are recorded
_kept: OrderedDict[str, Artifact] = OrderedDict()  # by key, the last one used at the end


class NotCompiled(Exception):
    """The graph was not compiled; no engine can run it."""


class NoCompiler(Unsupported, NotCompiled):
    """There is no C++ compiler."""


class NotWorthCompiling(NotCompiled):
    """A graph would have to be compiled, and has not enough steps to come."""

    def __init__(self, operations: int) -> None:
        super().__init__(f"a graph of {operations} operations is not worth compiling")
        self.operations = operations


class CompilePolicy(NamedTuple):
    """Where artifacts are saved, whether to compile a graph of n operations, whether to print."""

    folder: ArtifactFolder | None = None
    is_worth: Callable[[int], bool] = lambda operations: True
    shows: bool = False


_policy: ContextVar[CompilePolicy] = ContextVar("compile_policy")


@contextmanager
def compile_policy(policy: CompilePolicy) -> Iterator[None]:
    """Compile the graphs of the block under a policy."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def is_any_known() -> bool:
    """Whether any graph was compiled in this process."""
    return bool(_kept)


def compiled_once(
    module: GraphModule,
    tensors: Sequence[Tensor],
    options: dict[str, Any],
    compile: Callable[[dict[str, Any]], Compiled],
) -> Compiled:
    """Return the compiled form of a graph: the one that there is, or that of ``compile(options)``.

    Raises NoCompiler, or NotWorthCompiling under a policy.
    """
    with LOCK:
        policy, key = _policy.get(CompilePolicy()), _key(module, tensors, options)
        if key is None:
            return _new(module, tensors, options, compile, policy)[0]
        folder, known = policy.folder, _kept.pop(key, None)
        if known is None and folder is not None and (loaded := folder.load(key)) is not None:
            compiled, libraries = loaded
            known = compiled, lambda: libraries
        elif known is None or (folder is not None and not folder.has(key)):
            known = known or _new(module, tensors, options, compile, policy)
            if folder is not None and hasattr(known[0], "serialize"):  # the code of loops has not
                folder.save(key, *known)
        _kept[key] = known
        if len(_kept) > MAX_KEPT:
            _kept.popitem(last=False)
        return known[0]


def _new(
    module: GraphModule,
    tensors: Sequence[Tensor],
    options: dict[str, Any],
    compile: Callable[[dict[str, Any]], Compiled],
    policy: CompilePolicy,
) -> Artifact:
    """Compile a graph, if that is worth it."""
    operations = count_operations(module)
    if not policy.is_worth(operations):
        raise NotWorthCompiling(operations)
    options = {**options, **_compiler(tensors)}
    if policy.shows and stderr_is_watched():
        text = f"Compiling a graph of {operations:,} operations, for some seconds ..."
        tqdm.write(text, file=sys.stderr)
    with recorded_libraries() as libraries:
        try:
            return compile({**options, **ASSUME_VEC_ISA}), libraries
        except Exception as error:
            # The C++ compiler may be too old for the processor's instructions.
            if not (ASSUME_VEC_ISA and _is_of_cpp_compiler(error)):
                raise
            forget_instructions()
            return compile(options), libraries


def _is_of_cpp_compiler(error: BaseException | None) -> bool:
    """Whether the C++ compiler refused the code; torch wraps its error."""
    from torch._inductor.exc import CppCompileError

    while error is not None and not isinstance(error, CppCompileError):
        error = getattr(error, "inner_exception", None)
    return error is not None


def count_operations(module: GraphModule) -> int:
    """Return the number of operators in a graph and in those that it calls."""
    graphs = [each.graph for each in module.modules() if isinstance(each, GraphModule)]
    return sum(node.op == "call_function" for graph in graphs for node in graph.nodes)


def _compiler(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return the option that names a C++ compiler where it is not torch's; raise without one."""
    import torch._inductor.config as config

    if sys.platform == "win32" or any(each.is_cuda for each in tensors):
        return {}  # torch looks for its own
    wanted = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else [config.cpp.cxx]
    if any(shutil.which(name) for name in wanted if name):
        return {}
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return {"cpp.cxx": (None, name)}
    raise NoCompiler("no C++ compiler was found; install g++ or set CXX")


def _key(module: GraphModule, tensors: Sequence[Tensor], options: dict[str, Any]) -> str | None:
    """Return a digest of all that compiled code depends on; None for a graph with constants."""
    import torch._inductor.config as config

    code = _code(module)
    if code is None:
        return None
    storages = [each.untyped_storage().data_ptr() for each in tensors]
    forms = [
        (
            *(tuple(t.shape), t.stride(), str(t.dtype), str(t.device)),
            t.is_cuda and t.data_ptr() % 16 == 0,
            # where it is a view of the same memory as an earlier one
            (first, t.storage_offset()) if (first := storages.index(place)) < n else None,
        )
        for n, (t, place) in enumerate(zip(tensors, storages, strict=True))
    ]
    devices = sorted({torch.cuda.get_device_name(t.device) for t in tensors if t.is_cuda})
    machine = [
        *(torch.__version__, sys.version, platform.machine(), _processor(), devices),
        *(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        *(config.get_hash().hex(), os.environ.get("CXX")),
    ]
    text = repr((code, forms, sorted(options.items()), machine))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _processor() -> str:
    """Return what tells processors apart whose machine code may differ."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model", "flags", "Features"))}))
    return platform.processor()


def _code(module: torch.nn.Module) -> str | None:
    """Return the text of a graph and of the graphs in it; None where it holds tensors."""
    if not isinstance(module, GraphModule):
        return None
    parts = [module.code]
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            owner, _, name = str(node.target).rpartition(".")
            inner = _code(getattr(module.get_submodule(owner), name, None))  # type: ignore[arg-type]
            if inner is None:
                return None
            parts.append(inner)
    return "\n".join(parts)
