"""Graphs of runs become machine code that does the same, by interfaces of torch that may change."""

import copy
import gc
import threading
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pyro_recursive.tracing.graphs import compiler
from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.graphs.host_reads import HostReads, ReadValues
from pyro_recursive.tracing.graphs.kernels import (
    KernelCalls,
    NotRecordable,
    _recording,
    compile_graph,
)
from pyro_recursive.tracing.graphs.python_state import PythonState, undone_runs
from pyro_recursive.tracing.graphs.references import Entry, read_copy
from pyro_recursive.tracing.graphs.run_graph import recorded, trace_run
from pyro_recursive.tracing.graphs.unsupported import Unsupported

P = torch.linspace(0.1, 0.9, 24, dtype=torch.float64).view(6, 4)


def graph_of(function: Callable[..., Any], *tensors: Tensor) -> GraphModule:
    return make_fx(function)(*tensors)


def results(function: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    """Return the results from seed 2, and the next random number."""
    torch.manual_seed(2)
    with torch.no_grad():
        return [*function(*tensors), torch.rand(())]


# Random numbers: what takes tensors stays in a graph, and draws in it what an eager step draws.

SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda p: torch.empty_like(p).bernoulli_(p),
    "bernoulli_ of a number": lambda p: torch.empty_like(p).bernoulli_(0.3),
    "normal": lambda p: torch.normal(p, p),
    "normal_": lambda p: torch.empty_like(p).normal_(),
    "uniform_": lambda p: torch.empty_like(p).uniform_(),
    "poisson": lambda p: torch.poisson(3 * p),
    "gamma": lambda p: torch._standard_gamma(3 * p),
    "dirichlet": lambda p: torch._sample_dirichlet(3 * p),
    "binomial": lambda p: torch.binomial(torch.full_like(p, 9.0), p),
    "multinomial": lambda p: torch.multinomial(p, 7, True).double(),
    "multinomial without replacement": lambda p: torch.multinomial(p, 2, False).double(),
    "geometric_": lambda p: torch.empty_like(p).geometric_(0.4),
    "cauchy_": lambda p: torch.empty_like(p).cauchy_(),
    "exponential_": lambda p: torch.empty_like(p).exponential_(),
    "log_normal_": lambda p: torch.empty_like(p).log_normal_(),
    "random_": lambda p: torch.empty_like(p).random_(7),
    "randperm": lambda p: torch.randperm(9).double(),
    "randint": lambda p: torch.randint(3, 9, (5,)).double(),
    "rand": lambda p: torch.rand(5),
    "randn": lambda p: torch.randn(5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "dropout": lambda p: torch.dropout(p, 0.4, True),
    "rrelu": lambda p: torch.nn.functional.rrelu(p - 0.5, training=True),
}


def check_stream(names: list[str]) -> None:
    samplers = [SAMPLERS[name] for name in names]

    def draw(p: Tensor) -> list[Tensor]:
        return [own(each) + 0.5 for own in samplers for each in (p, p.flip(0))]

    graph = graph_of(draw, P)
    expected, found = results(graph, P), results(compile_graph(graph, [P]), P)
    labels = [*(name for name in names for _ in range(2)), "the next number"]
    for one, other, name in zip(expected, found, labels, strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, own=name: f"{own}: {text}")


def test_bernoulli_draws_are_atens() -> None:
    check_stream(["bernoulli"])


@pytest.mark.slow
def test_random_operators_in_machine_code_draw_what_aten_draws() -> None:
    check_stream(list(SAMPLERS))


# Values that torch reads without an operator.

COUNTS = torch.tensor([4, 3, 2])


def packed(network: nn.Module) -> Callable[..., Any]:
    return lambda p, counts: network(PackedSequence(p[:9], counts))[0].data


READERS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "rnn": (packed(nn.RNN(4, 3, dtype=P.dtype)), torch.tensor([4, 4, 1])),
    "relu": (packed(nn.RNN(4, 3, nonlinearity="relu", dtype=P.dtype)), torch.tensor([4, 4, 1])),
    "gru": (packed(nn.GRU(4, 3, dtype=P.dtype)), torch.tensor([4, 4, 1])),
    "lstm": (packed(nn.LSTM(4, 3, dtype=P.dtype)), torch.tensor([4, 4, 1])),
    "split": (lambda p, counts: torch.tensor_split(p, counts)[0], torch.tensor([2, 3, 4])),
    "method": (lambda p, counts: p.tensor_split(counts, 1)[1], torch.tensor([1, 3, 2])),
    "dlpack": (lambda p, counts: p * float(np.from_dlpack(counts).max()), torch.tensor([2, 3, 2])),
}


@pytest.mark.parametrize(("reader", "other"), READERS.values(), ids=READERS)
def test_values_that_torch_reads_without_an_operator_are_compared(
    reader: Callable[..., Any], other: Tensor
) -> None:
    data = torch.cat([P, P])
    recorder, expected = recorded(lambda: reader(data, COUNTS))
    inputs = [data, COUNTS]
    traced = trace_run(lambda: [reader(data, COUNTS)], recorder, inputs, 0, lambda: None)
    found = traced.graph(*inputs, *traced.constants)
    torch.testing.assert_close(found[0], expected)
    assert traced.reads.hold([*inputs, *traced.constants])
    assert not traced.reads.hold([data, other, *traced.constants])


def test_values_on_a_gpu_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    graph.output(tuple(graph.placeholder(name) for name in ("one", "other")))
    values = ReadValues(graph, [P, COUNTS])
    assert values.device is None
    values.device = P.device  # as if it were one
    monkeypatch.delattr(torch, "equal")  # each call of which waits for a GPU
    for tensors, is_same in (
        ([P.clone(), COUNTS.clone()], True),
        ([P, COUNTS + 1], False),
        ([P, COUNTS[:1]], False),
    ):
        assert values.hold(tensors) is is_same


def test_packing_by_lengths_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"pack_padded_sequence .* \(test_graphs.py:\d+\)"):
        recorded(lambda: pack_padded_sequence(P[:, :3, None], COUNTS))


# Interfaces of torch that are private.


def updated(index: Tensor, total: Tensor, data: Tensor) -> list[Tensor]:
    total.copy_(total + data.index_select(0, index).view(-1) @ data.t())
    index.copy_(index + 1)
    return []


def state() -> list[Tensor]:
    return [torch.zeros(1, dtype=torch.int64), torch.zeros(6, dtype=torch.float64), P]


def test_recorded_kernels_repeat_what_the_code_does() -> None:
    graph, (expected, found) = graph_of(updated, *state()), (state(), state())
    with torch.no_grad():
        for _ in range(5):
            graph(*expected)
    calls = KernelCalls(compile_graph(graph, state()), found)
    calls.repeat(4)
    assert found[0].item() == 5
    torch.testing.assert_close(found, expected)
    assert {each.data_ptr() for each in found[:2]} <= calls.pointers()


@pytest.mark.parametrize("release", ["without standalone_compile", "without its aot"])
def test_torch_compile_serves_where_graphs_cannot_be_compiled_by_themselves(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if release == "without its aot":
        monkeypatch.setattr("torch._inductor.standalone_compile", lambda module, inputs: None)
    else:
        monkeypatch.delattr("torch._inductor.standalone_compile")
    monkeypatch.setattr(compiler, "_kept", OrderedDict())
    graph, (expected, found) = graph_of(updated, *state()), (state(), state())
    compiled = compile_graph(graph, found)
    with torch.no_grad():
        graph(*expected)
        compiled(*found)
    torch.testing.assert_close(found, expected)
    with pytest.raises(NotRecordable, match="no generated code was found"):
        KernelCalls(compiled, found)


def test_an_error_of_the_compiler_is_not_taken_for_another_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any, aot: bool = False, **kwargs: Any) -> None:
        raise TypeError("in a lowering")

    monkeypatch.setattr("torch._inductor.standalone_compile", failing)
    monkeypatch.setattr(compiler, "_kept", OrderedDict())
    with pytest.raises(TypeError, match="in a lowering"):
        compile_graph(graph_of(lambda p: [p * 3], P), [P])


def test_calls_of_other_threads_are_not_recorded() -> None:
    module, calls = types.ModuleType("generated"), list[Any]()
    names: Any = vars(module)
    names.update(
        cpp_fused_0=lambda n: n, extern_kernels=types.SimpleNamespace(mm=torch.mm), torch=torch
    )

    def run() -> None:
        names["cpp_fused_0"](1)
        names["extern_kernels"].mm(P, P.t())
        names["torch"].ops.aten.exp.default(P)

    with _recording(module, calls):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert calls == []
        run()
    assert len(calls) == 3


@pytest.mark.parametrize("kind", [tuple, list])
def test_an_operator_with_one_result_in_a_sequence_is_repeated(kind: type) -> None:
    calls: list[Any] = []
    call = _recording(types.ModuleType("generated"), calls)._fallback(lambda x: kind([2 * x]))
    source = torch.ones(2)
    (result,) = call(source)
    source += 1.0
    again, args, kwargs = calls[0]
    again(*args, **kwargs)
    assert result.tolist() == [4.0, 4.0]


def _doubled(x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(x, 2.0, out=out)


@pytest.mark.parametrize("has_buffer", [True, False])
def test_kernels_of_libraries_are_repeated_on_what_changes(has_buffer: bool) -> None:
    """They write to a buffer that they are given, or to a new one in each call."""
    module, calls, source = types.ModuleType("generated"), list[Any](), torch.ones(2)
    names: Any = vars(module)
    names.update(extern_kernels=types.SimpleNamespace(kernel=_doubled), torch=torch)
    with _recording(module, calls):
        options = {"out": torch.empty(2)} if has_buffer else {}
        result = names["extern_kernels"].kernel(source, **options)
    source += 1.0
    kernel, args, kwargs = calls[0]
    kernel(*args, **kwargs)
    assert result.tolist() == [4.0, 4.0]
    assert (kernel is _doubled) == has_buffer  # nothing is copied where it need not be


def test_files_in_folders_named_as_libraries_are_the_users() -> None:
    name = "/home/own/torch/pyro/infer/own.py"
    with HostReads() as reads:
        exec(compile("value = x.sum().item()", name, "exec"), {"x": P})
    assert len(reads.tensors) == 1
    assert "(own.py:1)" in reads.places[0]


def test_keys_hold_the_objects_that_they_are_made_from() -> None:
    class Option:
        pass

    option = Option()
    key, same, other = (Call((P, each), {}).key for each in (option, option, Option()))
    assert key == same and hash(key) == hash(same) and key != other
    held = weakref.ref(option)
    del option, same
    gc.collect()
    assert held() is not None  # so that no new object has its id
    del key
    gc.collect()
    assert held() is None


class Owner:
    scale = 2.0

    def model(self) -> float:
        return self.scale


def test_bound_methods_are_compared_in_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    state = PythonState({"model": owner.model})
    state.settle()

    def slow() -> list[Any]:
        raise AssertionError("the slow way")

    with monkeypatch.context() as patch:
        patch.setattr(state, "changing", slow)
        assert state.changed() is None
    owner.scale = 3.0
    assert "scale" in str(state.changed())


CHANGED: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "new key": ({"a": 1}, lambda kept: kept.setdefault(len(kept), 2)),
    "moved key": ({"a": 1, "b": 2}, lambda kept: kept.update(c=3, a=kept.pop("a"))),
    "key less": ({"a": 1, "b": 2}, lambda kept: kept.pop("a")),
    "attribute": (types.SimpleNamespace(a=1), lambda kept: setattr(kept, "b", 2)),
    "longer list": ([1, 2], lambda kept: kept.extend([3, 4])),
    "shorter list": ([1, 2, 3], lambda kept: kept.pop(0)),
    "empty list": ([1, 2, 3], lambda kept: kept.clear()),
    "list of many": (list(range(70)), lambda kept: kept.append(1)),
    "longer deque": (deque([1, 2]), lambda kept: kept.appendleft(3)),
    "full deque": (deque([1, 2], maxlen=2), lambda kept: kept.append(3)),
    "shorter deque": (deque([1, 2, 3]), lambda kept: kept.popleft()),
    "set": ({1, 2}, lambda kept: kept.symmetric_difference_update({2, 3})),
    "ndarray": (np.arange(3.0), lambda kept: kept.__iadd__(1.0)),
    "bytearray": (bytearray(b"ab"), lambda kept: kept.append(1)),
    "array": (array("d", [1.0, 2.0]), lambda kept: kept.append(3.0)),
}


@pytest.mark.parametrize(("kept", "change"), CHANGED.values(), ids=CHANGED)
def test_what_a_run_changes_in_containers_is_undone(
    kept: Any, change: Callable[[Any], Any]
) -> None:
    def model() -> None:
        change(kept)

    before = copy.deepcopy(kept)
    state = PythonState({"model": model})
    with pytest.raises(Unsupported, match="changes in each run"), undone_runs(state):
        model()
    assert np.array_equal(kept, before) if isinstance(kept, np.ndarray) else kept == before


def test_arrays_are_compared_without_a_copy() -> None:
    class Uncopied(np.ndarray):
        def copy(self, order: Any = "C") -> Any:
            raise AssertionError("a copy")

    array, old = np.ones(3).view(Uncopied), np.ones(3).view(Uncopied)
    entry = Entry(read_copy, array, None, old, "array", False)
    assert entry.is_same
    array[1] = 2.0
    assert not entry.is_same


def test_machine_code_of_a_graph_can_be_made_without_a_guard_on_its_inputs() -> None:
    from torch._inductor import standalone_compile

    options = {"config_patches": {"fallback_random": True}}
    compiled = standalone_compile(
        graph_of(lambda p: [p * 2], P), [P], dynamic_shapes="from_example_inputs", options=options
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(P)[0], 2 * P)


def test_a_block_can_be_left_out_of_all_modes() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    class Seen(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        P.exp()
        with _disable_current_modes():
            P.log()
    assert Seen.names == ["aten.exp.default"]


def test_a_block_out_of_a_graph_has_the_default_device() -> None:
    with HostReads() as reads, torch.device("meta"), reads.outside():
        assert torch.zeros(1).is_meta
        assert P.tolist() == P.detach().numpy().tolist()
    assert not reads.tensors


def test_pyro_keeps_its_parameters_and_handlers_where_they_are_read() -> None:
    value = pyro.param("own", torch.ones(2))
    assert vars(pyro.get_param_store())["_params"]["own"] is value.unconstrained()
    with pyro.poutine.block() as handler:
        assert handler in pyro.poutine.runtime._PYRO_STACK
