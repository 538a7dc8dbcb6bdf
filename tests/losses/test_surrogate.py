"""Coefficients of cuts in the graph: how a gradient is rescaled on its way to a sample."""

import pytest
import torch

from pyro_recursive.losses.surrogate import _ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_two_coefficients(dtype: torch.dtype) -> None:
    """It is finite, times the denominator it is the numerator, and most denominators stay.

    Only one that is below the square of the rounding error beside the numerator may be replaced:
    weights of samples that are small but count would change otherwise.
    """
    info = torch.finfo(dtype)
    numerator = torch.tensor([1.0, -2.0, 0.0], dtype=dtype).unsqueeze(1)
    sizes = [0.0, info.tiny, 1e-30, info.eps**2 * 4, info.eps**1.5, info.eps / 4, 0.5, 3.0, 1e20]
    before = torch.tensor([*sizes, *[-size for size in sizes]], dtype=dtype).expand(3, -1)
    after, ratio = _ratio(numerator, before)
    assert ratio.isfinite().all()
    torch.testing.assert_close(ratio * after, numerator.expand_as(after))
    kept = before.abs() >= (info.eps**2 * numerator.abs()).clamp_min(info.tiny)
    assert torch.equal(after[kept], before[kept])
    moved = (after - before).abs()[~kept]
    assert (moved <= 2.01 * info.eps**2 * 2).all()
