"""Points around curves: their formulas, and log p(x) against other quadrature rules."""

import math
import pickle

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from pyro_recursive.datasets import CURVES, Curve, curve, curve_evidence

pytestmark = pytest.mark.slow  # integrals on fine grids

# From the grid of 200,001 even nodes, which no step of these curves is too short for.
ROW_ERROR = dict.fromkeys(CURVES, 2e-4) | {"spiral-dots": 5e-3}


def small(name: str, rows: int = 20, **options: object) -> Curve:
    sizes = {"validation_rows": 7, "test_rows": 30, "dtype": torch.float64} | options
    return curve(name, rows, **sizes)  # type: ignore[arg-type]


def even_evidence(data: Curve, x: Tensor, nodes: int, bound: float = 9.0) -> Tensor:
    """Return log p(x) by the plain trapezoid rule with even nodes."""
    z = torch.linspace(-bound, bound, nodes)
    normal = torch.distributions.Normal(0.0, 1.0)
    log_weights = normal.log_prob(z) + math.log(2 * bound / (nodes - 1))
    noise = torch.distributions.Normal(data.decoder(z[:, None]), data.scale)
    return torch.stack([torch.logsumexp(noise.log_prob(row).sum(-1) + log_weights, 0) for row in x])


# The curves


@pytest.mark.parametrize("name", CURVES)
def test_points_are_decoded_latents_with_noise(name: str) -> None:
    data = curve(name, 5000, validation_rows=5000, test_rows=5000, dtype=torch.float64)
    for x, z in (
        (data.train, data.train_latents),
        (data.validation, data.validation_latents),
        (data.test, data.test_latents),
    ):
        assert x.shape == (5000, 2) and z.shape == (5000, 1)
        noise = (x - data.decoder(z)) / data.scale
        for standard in (z, noise):
            count = standard.numel()
            assert standard.mean().abs() < 4 / math.sqrt(count)
            assert (standard.square().mean() - 1).abs() < 4 * math.sqrt(2 / count)
        assert (z * noise).mean(0).abs().max() < 4 / math.sqrt(5000)


def test_absolute_values_map_two_latents_to_one_point() -> None:
    data, z = small("absolute-value"), torch.linspace(-3, 3, 61)[:, None]
    torch.testing.assert_close(data.decoder(z), data.decoder(-z))
    heights = data.decoder(z[31:])[:, 0]
    assert (heights.diff() > 0).all() and data.decoder(z[30:31]).abs().max() < 1e-12


def test_circle_is_covered_once() -> None:
    points = small("circle").decoder(torch.linspace(-8, 8, 1001)[:, None])
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(1001))
    length = points.diff(dim=0).norm(dim=-1).sum().item()
    assert length == pytest.approx(2 * math.pi, rel=1e-4)


def test_figure_8_is_most_of_a_lemniscate() -> None:
    x, y = small("figure-8").decoder(torch.linspace(-8, 8, 1001)[:, None]).unbind(-1)
    # With x scaled back by 2 it is Bernoulli's: (x^2 + y^2)^2 = 2 (x^2 - y^2).
    wide = 2 * x
    torch.testing.assert_close((wide**2 + y**2) ** 2, 2 * (wide**2 - y**2), rtol=0, atol=1e-12)
    assert wide.min() < -1.41 and wide.max() > 1.41
    assert ((x[1:] > 0) != (x[:-1] > 0)).sum() == 1, "it goes through the middle once"


@pytest.mark.parametrize("name, places", [("clusters", 4), ("spiral-dots", 7)])
def test_stairs_have_as_many_places_as_they_should(name: str, places: int) -> None:
    z = torch.linspace(-3, 3, 20_001)[:, None]
    angles = torch.arange(places) * (4.0 if name == "clusters" else 2.0)
    radii = torch.ones(places) if name == "clusters" else angles
    expected = torch.stack([radii * angles.cos(), radii * angles.sin()], -1)
    near = torch.cdist(small(name).decoder(z), expected) < 0.05
    assert near.any(0).all(), "each place is reached"
    still = near.any(1).float().mean()
    assert still > 0.7, "and between them the curve is fast"


# The draws


def test_seeds_sizes_and_dtypes() -> None:
    before = torch.get_rng_state()
    data = small("clusters", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(small("clusters", seed=3).train, data.train)
    assert not torch.isclose(small("clusters", seed=4).test, data.test).any()
    larger = small("clusters", 50, seed=3)
    assert torch.equal(larger.test, data.test) and torch.equal(larger.validation, data.validation)
    assert torch.equal(small("clusters", validation_rows=9, seed=3).test, data.test)
    single = small("clusters", seed=3, dtype=torch.float32)
    assert single.train.dtype == single.train_latents.dtype == torch.float32
    torch.testing.assert_close(single.train, data.train.float())
    quiet = small("clusters", seed=3, scale=0.1)
    noise = quiet.train - quiet.decoder(quiet.train_latents)
    ratio = noise / (data.train - data.decoder(data.train_latents))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1 / math.sqrt(0.2)))
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(copied.decoder(data.test_latents), data.decoder(data.test_latents))
    assert repr(data) == "Curve('clusters', train=[20, 2], validation=[7, 2], test=[30, 2])"
    with pytest.raises(ValueError, match=r"name must be one of .*'square'"):
        curve("square")


# The exact evidence


@pytest.mark.parametrize("name", CURVES)
def test_evidence_is_as_accurate_as_stated(name: str) -> None:
    data = curve(name, 0, validation_rows=0, test_rows=1000, dtype=torch.float64)
    found, expected = data.evidence(data.test), data.evidence(data.test, nodes=64_001)
    error = found - expected
    assert error.abs().max() < ROW_ERROR[name] and error.mean().abs() < 3e-5
    coarse = data.evidence(data.test, nodes=2001) - expected
    assert 2 < coarse.abs().max() / error.abs().max() < 8, "of second order"
    error = found[:60] - even_evidence(data, data.test[:60], 200_001)
    assert error.abs().max() < ROW_ERROR[name] and error.mean().abs() < ROW_ERROR[name] / 5


def test_adaptive_quadrature_agrees() -> None:
    data = small("spiral-dots")

    def integrand(z: float, row: Tensor) -> float:
        point = data.decoder(torch.tensor([z]))
        log_p = torch.distributions.Normal(point, data.scale).log_prob(row).sum()
        return (log_p - 0.5 * z**2).exp().item() / math.sqrt(2 * math.pi)

    for row, latent in zip(data.test[:5], data.test_latents[:5], strict=True):
        at = latent.item()
        edges = [at - 0.5, at - 0.05, at + 0.05, at + 0.5]
        expected, _ = quad(integrand, -7, 7, args=(row,), points=edges, limit=500)
        found = data.evidence(row[None]).item()
        assert found == pytest.approx(math.log(expected), abs=2e-3)


def test_evidence_of_a_linear_decoder_in_many_dimensions() -> None:
    line, x = torch.randn(1, 7), torch.randn(20, 7)
    covariance = line.T @ line + 0.3**2 * torch.eye(7)
    exact = torch.distributions.MultivariateNormal(torch.zeros(7), covariance).log_prob(x)
    found = curve_evidence(lambda z: z @ line, x, torch.tensor(0.3))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_a_constant_decoder_and_a_jump() -> None:
    x = torch.randn(10, 2)
    constant = curve_evidence(lambda z: z.new_ones(len(z), 2), x, 0.5)
    noise = torch.distributions.Normal(torch.ones(2), 0.5)
    torch.testing.assert_close(constant, noise.log_prob(x).sum(-1), rtol=0, atol=1e-9)
    found = curve_evidence(lambda z: (z > 0.3).double().expand(-1, 2), x, 0.5)
    upper = 1 - torch.special.ndtr(torch.tensor(0.3))
    both = torch.stack([1 - upper, upper]).log()[:, None] + torch.stack(
        [torch.distributions.Normal(level, 0.5).log_prob(x).sum(-1) for level in (0.0, 1.0)]
    )
    torch.testing.assert_close(found, both.logsumexp(0), rtol=0, atol=1e-3)


def test_chunks_single_precision_and_no_rows() -> None:
    data = small("figure-8")
    expected = data.evidence(data.test, nodes=501)
    for chunk_size in (1, 1200):
        found = data.evidence(data.test, nodes=501, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    single = data.evidence(data.test.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, data.evidence(data.test), rtol=0, atol=1e-4)
    assert data.evidence(data.test[:0]).shape == (0,)


def test_what_has_no_evidence_is_refused() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"floating-point numbers, got torch.int64"):
        curve_evidence(lambda z: z.expand(-1, 2), x.long(), 0.1)
    with pytest.raises(ValueError, match=r"returned \[.*, 2\] for .* latents and x \[3, 5\]"):
        curve_evidence(lambda z: z.expand(-1, 2), torch.zeros(3, 5), 0.1)
    with pytest.raises(ValueError, match="The decoder is not finite up to 8"):
        curve_evidence(lambda z: z.expand(-1, 2).log(), x, 0.1)
