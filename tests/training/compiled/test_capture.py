"""Which steps are captured as a CUDA graph; a GPU is not needed to know that."""

from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_recursive.tracing.graphs.gradients import trace_gradients
from pyro_recursive.tracing.graphs.kernels import NotRecordable
from pyro_recursive.training.compiled import capture
from pyro_recursive.training.compiled.capture import captured, check_capturable, without_checks
from pyro_recursive.training.compiled.flat import Owners, flat_groups
from pyro_recursive.training.compiled.step_graph import MinibatchTable, StepGraph

GPU = torch.device("cuda", 1)


def traced(function: Callable[..., Tensor], *others: torch.device | str) -> GraphModule:
    """Return the graph of a function of matrices, the first one on a GPU."""
    with FakeTensorMode():
        matrices = [torch.empty(4, 3, 3, device=device) for device in (GPU, *others)]
    return make_fx(function, tracing_mode="fake")(*matrices)


REFUSED = {
    "input": (lambda: traced(lambda x, y: x + y.to(x), "cpu"), "an input is on cpu, the step on"),
    "constant": (lambda: traced(lambda x: x + torch.ones(())), "aten.ones.default is on cpu"),
    "copy": (lambda: traced(lambda x: x.cpu()), "aten._to_copy.default is on cpu"),
    "check": (lambda: traced(torch.linalg.cholesky), "check_errors.default waits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_steps_that_no_cuda_graph_can_hold(case: str) -> None:
    graph, reason = REFUSED[case]
    with pytest.raises(NotRecordable, match=reason):
        check_capturable(graph(), GPU)


def factors(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(x) + torch.linalg.inv(x)


def test_failed_factorisations_on_a_gpu_are_nan() -> None:
    """They wait for no check; on a CPU they raise, as they do in an eager step."""
    torch.manual_seed(0)
    root = torch.randn(4, 3, 3)
    x = root @ root.mT + torch.eye(3)
    expected = factors(x)
    x[1], expected[1] = -1.0, torch.nan
    module = traced(factors)
    without_checks(module)
    module.recompile()
    check_capturable(module, GPU)
    torch.testing.assert_close(module(x), expected, equal_nan=True)
    on_cpu = make_fx(factors)(expected[2:])
    without_checks(on_cpu)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        on_cpu(x[:2])


def test_a_step_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CUDA has a stand-in: the stream and the mode are as before, no capture is begun."""
    cuda = MagicMock()
    cuda.device.return_value.__exit__.return_value = False
    cuda.stream.return_value.__exit__.return_value = False
    monkeypatch.setattr(capture, "cuda", cuda)
    calls = []

    def compiled(*tensors: Tensor) -> None:
        calls.append(cuda.set_sync_debug_mode.call_args)
        if len(calls) == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    index = torch.zeros(1)
    with pytest.raises(NotRecordable, match=r"cannot hold the step \(called a synchronizing"):
        captured(make_fx(torch.exp)(index), compiled, [index], index)
    (mode,), (before,) = (call.args for call in cuda.set_sync_debug_mode.call_args_list)
    assert calls[0] is None and mode == "error" and before is cuda.get_sync_debug_mode.return_value
    assert cuda.stream.return_value.__exit__.called and not cuda.graph.called
    assert cuda.current_stream.return_value.wait_stream.called


def step_of(
    loss: Callable[[Tensor], Tensor],
    batch: tuple[Tensor, ...] = (),
    data: tuple[Tensor, ...] = (),
    table: MinibatchTable | None = None,
) -> StepGraph:
    """Return the step of a parameter that is not on the CPU."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.Adam([parameter])
    loss(parameter).backward()
    optimizer.step()
    gradients = trace_gradients(lambda: loss(parameter), batch, lambda: None, [parameter])
    groups = flat_groups([parameter], Owners(lambda: optimizer))
    return StepGraph(gradients, groups, data, table=table, clip_norm=1.0, is_guarded=True)


LITERALS: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda x: (x * torch.tensor(2.0)).sum(),
    "copied": lambda x: (x * torch.tensor([1.0, 2.0, 3.0]).to(x)).sum(),
    "index": lambda x: x[torch.arange(2)].sum(),
    "both": lambda x: x.sum() * (torch.tensor([1.0, 2.0]) + torch.arange(2)).sum(),
}


@pytest.mark.parametrize("name", LITERALS)
def test_numbers_of_the_program_are_where_the_step_is(name: str) -> None:
    step = step_of(LITERALS[name])
    check_capturable(step.module, torch.device("meta"))


def test_numbers_stay_where_data_on_the_cpu_need_them() -> None:
    data = torch.ones(3)
    step = step_of(lambda x: (x * (data * torch.tensor([1.0, 2.0, 3.0])).to(x)).sum())
    assert {each.device.type for each in step.gradients.constants} == {"cpu"}
    with pytest.raises(NotRecordable, match="an input is on cpu"):
        check_capturable(step.module, torch.device("meta"))


def test_tables_of_data_on_the_cpu_are_where_the_step_is() -> None:
    batch, rows = torch.ones(2, 3), torch.tensor([0, 1])
    table = MinibatchTable(rows[None], 1, is_numbered=True)

    def loss(x: Tensor) -> Tensor:
        return (x * (batch * rows[:, None]).to(x)).sum()

    step = step_of(loss, (batch, rows), (torch.ones(5, 3),), table)
    assert step.table is not None and step.table.index.is_meta
    assert step.groups[0].values.is_meta and not step.inputs[0].is_meta
