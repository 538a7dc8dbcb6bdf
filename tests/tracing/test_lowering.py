"""Rewrites of traced graphs: the values stay, and each does what it is for."""

import collections
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_recursive.tracing.graphs.lowering import DECOMPOSITIONS, lower

ATEN = torch.ops.aten
Function = Callable[..., Tensor]


def rewritten(function: Function, *inputs: Tensor) -> GraphModule:
    """Return the lowered graph of a function, compared with the function."""
    expected = function(*(each.clone() for each in inputs))
    module = make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    lower(module)
    given = [each.clone() for each in inputs]
    error = 1e-13 if expected.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(module(*given), expected, rtol=error, atol=error, equal_nan=True)
    return module


def targets(module: GraphModule) -> collections.Counter:
    return collections.Counter(node.target for node in module.graph.nodes)


@pytest.mark.parametrize("operator", [torch.cumsum, torch.cumprod])
@pytest.mark.parametrize("shape", [(3,), (1,), (0,), (), (4, 3), (3, 4, 2), (9,), (2, 0)])
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int32, torch.bool])
def test_scans(operator: Function, shape: tuple, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=torch.float64).mul(3).to(dtype)
    found = targets(rewritten(lambda x: operator(x, dim), x))
    is_few = len(shape) > 0 and 0 < shape[dim] <= 8
    assert (found[ATEN.cumsum.default] + found[ATEN.cumprod.default] == 0) == is_few


def test_scan_of_another_dtype() -> None:
    rewritten(lambda x: x.cumsum(0, dtype=torch.float64), torch.tensor([1, 2, 3]))
    rewritten(lambda x: x.cumsum(0), torch.ones(3, dtype=torch.bfloat16))


def gradient(function: Function) -> Function:
    """Return the function that sums the gradients of a function of vectors."""

    def total(*inputs: Tensor) -> Tensor:
        leaves = [each.detach().requires_grad_() for each in inputs]
        found = torch.autograd.grad(function(*leaves).sum(), leaves)
        return torch.cat([each.detach().reshape(-1) for each in found])

    return total


def test_gradient_of_cumprod_with_zeros() -> None:
    x = torch.tensor([1.5, 0.0, 2.0, -3.0], dtype=torch.float64)
    found = targets(rewritten(gradient(lambda x: x.cumprod(0) ** 2), x))
    assert not found[ATEN.cumprod.default] and not found[ATEN.cumsum.default]


def test_what_is_expanded_is_computed_once() -> None:
    scale = torch.rand(3, dtype=torch.float64)
    module = rewritten(lambda s: s.expand(50, 3).log() + s.expand(50, 3).exp().sqrt(), scale)
    (total,) = (node for node in module.graph.nodes if node.target == ATEN.add.Tensor)
    assert total.meta["val"].shape == (3,)


def test_what_changes_in_place_stays() -> None:
    def change(s: Tensor) -> Tensor:
        wide = s.expand(50, 3).exp()
        wide[7].fill_(0.0)
        return wide.view(-1)

    rewritten(change, torch.rand(3, dtype=torch.float64))


def mixture(x: Tensor, locs: Tensor, shares: Tensor) -> Tensor:
    each = -((x[:, None] - locs) ** 2) + shares.expand(len(x), len(shares)).log_softmax(-1)
    return each.logsumexp(-1) + each.softmax(-1)[:, 0] + each.view(-1).view_as(each)[:, -1]


@pytest.mark.quick(3)
@pytest.mark.parametrize("rows, few", [(200, 3), (200, 1), (64, 8), (63, 8), (8, 8), (90, 9)])
def test_narrow_tensors_are_turned(rows: int, few: int) -> None:
    def function(*inputs: Tensor) -> Tensor:
        return mixture(*inputs)[:, None] * inputs[1].exp()

    inputs = [torch.randn(size, dtype=torch.float64) for size in (rows, few, few)]
    found = rewritten(function, *inputs)
    assert (targets(found)[ATEN.transpose.int] > 0) == (1 < few <= 8 and rows >= 8 * few)
    rewritten(gradient(function), *inputs)


def test_inputs_that_are_narrow_are_left() -> None:
    found = rewritten(lambda x: x.exp().sum(0), torch.randn(100, 3, dtype=torch.float64))
    assert not targets(found)[ATEN.transpose.int]


def test_dimensions_before_the_last_two() -> None:
    def function(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        narrow = x[:, None] * w  # [100, 3]
        return (narrow.exp() + z * narrow + 2.0).sum(0)  # z: [4, 1, 3]

    shapes = (100,), (4, 1, 3), (3,)
    found = rewritten(function, *(torch.randn(each, dtype=torch.float64) for each in shapes))
    assert targets(found)[ATEN.transpose.int]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_have_no_denormal_factors(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[tiny, tiny / 4, -tiny / 4], [1.0, float("nan"), -tiny]], dtype=dtype)

    def function(x: Tensor) -> Tensor:
        half = x * 0.5
        return torch.cat([half.mT @ torch.ones(2, 3, dtype=dtype), half, half.log()])

    module = make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(x)
    lower(module)
    found, plain = module(x), function(x)
    torch.testing.assert_close(found[3:], plain[3:], rtol=0.0, atol=0.0, equal_nan=True)
    expected = torch.tensor([0.5, float("nan"), 0.0], dtype=dtype)  # by columns of x
    torch.testing.assert_close(found[:3, 0], expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert plain[2, 0] != 0.0  # as it is with them


def test_small_tensors_are_stored() -> None:
    def function(x: Tensor, step: Tensor) -> Tensor:
        return x * (1 - 0.9**step).sqrt() + step

    found = rewritten(function, torch.randn(100), torch.ones(1))
    assert targets(found)[ATEN.as_strided.default] == 1  # but not the input


def test_small_tensors_that_change_stay() -> None:
    def function(x: Tensor) -> Tensor:
        small = x[:1].exp()
        wide = small + x
        small.add_(1.0)
        return wide + small

    rewritten(function, torch.randn(100))


def test_graphs_by_strides_stay() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, None] * y).as_strided((3, 100), (100, 1))

    rewritten(function, torch.randn(100), torch.randn(3))


def test_draws_are_not_shared() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.bernoulli(x.expand(1000, 2))

    module = make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(torch.full((2,), 0.5))
    lower(module)
    assert 0.4 < module(torch.full((2,), 0.5)).mean() < 0.6
    assert module(torch.full((2,), 0.5)).std(0).min() > 0.4


def test_compiled_values() -> None:
    inputs = [torch.randn(size, dtype=torch.float64) for size in (200, 3, 3)]
    function = gradient(mixture)
    module = make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    lower(module)
    found = torch.compile(module)(*inputs)
    torch.testing.assert_close(found, function(*inputs), rtol=1e-12, atol=1e-12)
