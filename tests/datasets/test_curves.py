"""Points around curves: their formulas, and log p(x) against other quadrature rules."""

import math
import pickle

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from pyro_recursive.datasets import CURVES, Curve, curve, curve_evidence

pytestmark = pytest.mark.slow  # integrals on fine grids

ALL = [*CURVES, "absolute-value-unbounded"]
# From the grid of 200,001 even nodes, which no step of these curves is too short for.
ROW_ERROR = dict.fromkeys(ALL, 2e-4) | {"spiral-dots": 5e-3, "absolute-value-unbounded": 5e-3}


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


def test_names() -> None:
    assert CURVES == ("absolute-value", "circle", "clusters", "figure-8", "spiral-dots")


@pytest.mark.parametrize("name", ALL)
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


@pytest.mark.parametrize("name", ["absolute-value", "absolute-value-unbounded"])
def test_absolute_values_map_two_latents_to_one_point(name: str) -> None:
    data, z = small(name), torch.linspace(-3, 3, 61)[:, None]
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


def test_gradients_of_all_decoders() -> None:
    z = torch.tensor([[-0.7], [0.4]], requires_grad=True)
    for name in ALL:
        assert torch.autograd.gradcheck(small(name).decoder, (z,))


# The draws


def test_seeds_sizes_and_the_global_generator() -> None:
    before = torch.get_rng_state()
    data = small("circle", seed=3)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    again, larger, other = (
        small("circle", seed=3),
        small("circle", 50, seed=3),
        small("circle", seed=4),
    )
    torch.testing.assert_close(again.train, data.train, rtol=0, atol=0)
    torch.testing.assert_close(larger.test, data.test, rtol=0, atol=0)
    torch.testing.assert_close(larger.validation, data.validation, rtol=0, atol=0)
    assert not torch.isclose(other.test, data.test).any()
    more = small("circle", validation_rows=9, seed=3)
    torch.testing.assert_close(more.test, data.test, rtol=0, atol=0)


def test_dtype_scale_and_pickle() -> None:
    data = small("clusters")
    single = small("clusters", dtype=torch.float32)
    assert single.train.dtype == single.train_latents.dtype == torch.float32
    torch.testing.assert_close(single.train, data.train.float())
    quiet = small("clusters", scale=0.1)
    torch.testing.assert_close(quiet.train_latents, data.train_latents)
    ratio = (quiet.train - quiet.decoder(quiet.train_latents)) / (
        data.train - data.decoder(data.train_latents)
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1 / math.sqrt(0.2)))
    copied = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(copied.decoder(data.test_latents), data.decoder(data.test_latents))
    assert repr(data) == "Curve('clusters', train=[20, 2], validation=[7, 2], test=[30, 2])"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "square"}, "name must be one of .*'square'"),
        ({"rows": -1}, "rows must be an integer >= 0, got -1"),
        ({"test_rows": 2.5}, "test_rows must be an integer"),
        ({"scale": 0.0}, "scale must be finite and positive"),
    ],
)
def test_wrong_arguments_of_the_draws(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve(**{"name": "circle", **options})


# The exact evidence


@pytest.mark.parametrize("name", ALL)
def test_evidence_is_that_of_a_finer_even_grid(name: str) -> None:
    data = small(name, test_rows=60)
    found, expected = data.evidence(data.test), even_evidence(data, data.test, 200_001)
    assert (found - expected).abs().max() < ROW_ERROR[name]
    assert (found - expected).mean().abs() < ROW_ERROR[name] / 5


@pytest.mark.parametrize("name", ALL)
def test_evidence_is_as_accurate_as_stated(name: str) -> None:
    data = curve(name, 0, validation_rows=0, dtype=torch.float64)
    expected = data.evidence(data.test, nodes=64_001)
    error = data.evidence(data.test) - expected
    assert error.abs().max() < ROW_ERROR[name] and error.mean().abs() < 3e-5
    coarse = data.evidence(data.test, nodes=2001) - expected
    assert 2 < coarse.abs().max() / error.abs().max() < 8, "of second order"


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


@pytest.mark.parametrize("name", ["absolute-value", "figure-8", "clusters"])
def test_density_integrates_to_one(name: str) -> None:
    data, width = small(name), 4.0 if name == "clusters" else 2.5
    axis = torch.linspace(-width, width, 161)
    x = torch.cartesian_prod(axis, axis)
    total = data.evidence(x, nodes=1001).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-4)


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
    for chunk_size in (1, 1200, 10**9):
        found = data.evidence(data.test, nodes=501, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    single = data.evidence(data.test.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, data.evidence(data.test), rtol=0, atol=1e-4)
    assert data.evidence(data.test[:0]).shape == (0,)


def test_a_network_gets_no_gradient() -> None:
    net = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(4, 2)
    found = curve_evidence(net, x, 0.2)
    finer = curve_evidence(net, x, 0.2, nodes=40_001)
    assert not found.requires_grad
    torch.testing.assert_close(found, finer, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"x": torch.zeros(3)}, ValueError, r"x must be \[rows, D >= 1\], got \[3\]"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"decoder returned \[.*, 2\] .* \[.*, 5\]"),
        ({"decoder": lambda z: z.expand(-1, 2).log()}, ValueError, "not finite"),
        ({"scale": -1.0}, ValueError, "scale must be"),
        ({"nodes": 1}, ValueError, "nodes must be an integer >= 2"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer >= 1"),
        ({"bound": math.inf}, ValueError, "bound must be"),
    ],
)
def test_wrong_arguments_of_the_evidence(options: dict, error: type, message: str) -> None:
    arguments = {"decoder": lambda z: z.expand(-1, 2), "x": torch.zeros(3, 2), "scale": 0.1}
    with pytest.raises(error, match=message):
        curve_evidence(**{**arguments, **options})
