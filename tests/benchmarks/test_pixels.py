"""Likelihoods of pixels, and the autoregressive decoder, against formulas and enumeration."""

import math
from contextlib import nullcontext
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.nn import Linear

from benchmarks import __main__ as command
from benchmarks import guides
from benchmarks.methods.guides import METHODS
from benchmarks.run import OPTIMIZER, Settings
from benchmarks.tasks.images import image_task
from benchmarks.tasks.likelihoods import (
    DequantisedNormal,
    DiscretisedLogistic,
    LocationScale,
    dequantise,
    levels_of,
    likelihood,
)
from benchmarks.tasks.pixelcnn import PixelCNN
from pyro_recursive import fit

SMALL = {"dataset": "digits", "epochs": 1, "batch_size": 20, "hidden": 8, "latent": 3}
SETTINGS = Settings(**SMALL, eval_points=20, eval_samples=10)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def grid(levels: int) -> Tensor:
    return torch.arange(float(levels)) / (levels - 1)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_masses_of_the_discretised_logistic(levels: int) -> None:
    loc = torch.tensor([-0.4, 0.0, 0.31, 1.0, 1.7])[:, None]
    scale = torch.tensor([1e-4, 0.01, 0.2, 3.0])[:, None, None]
    x, edge = grid(levels), 0.5 / (levels - 1)
    found = DiscretisedLogistic(loc.expand(4, 5, levels), scale, levels).log_prob(x)
    assert (found.exp().sum(-1) - 1).abs().max() < 1e-12
    above = ((x + edge - loc) / scale).sigmoid()
    below = ((x - edge - loc) / scale).sigmoid()
    above[..., -1], below[..., 0] = 1.0, 0.0
    usual = above - below > 1e-6  # elsewhere the difference is rounding error
    torch.testing.assert_close(found[usual], (above - below).log()[usual], rtol=1e-9, atol=1e-9)
    assert found.isfinite().all()


def test_gaussian_and_logistic_agree_on_the_bits_of_uniform_levels() -> None:
    # Of a uniform distribution of L levels: log2 L bits, as mass and as density of a level.
    for name, pixels in {"digits": 64, "mnist-omniglot-14": 196, "mnist": 784}.items():
        levels = levels_of(name)
        shown = -math.log(levels) * pixels
        runs = {"VAE": {"0": {"test": {"log_p": [shown]}}}}
        results = {"runs": runs, "settings": {"dataset": name}}
        assert guides.COLUMNS["bits/dim"]("VAE", results) == f"{math.log2(levels):.4f}"
    loc, scale, y = torch.tensor(0.3), torch.tensor(0.2), torch.tensor(0.7)
    density = torch.distributions.Normal(loc, scale).log_prob(y) - math.log(17)
    torch.testing.assert_close(DequantisedNormal(loc, scale, 17).log_prob(y), density)
    # A wide logistic has the mass of a narrow density: that of the Gaussian in units of a level.
    wide = DiscretisedLogistic(loc, torch.tensor(0.5), 256).log_prob(grid(256)[100])
    at = (grid(256)[100] - loc) / 0.5
    logistic = (-at - 2 * torch.nn.functional.softplus(-at)).exp() / 0.5
    assert wide.item() == pytest.approx(math.log(logistic.item() / 255), abs=1e-5)


def test_dequantised_pixels_stay_in_their_levels() -> None:
    x = grid(17).repeat(400, 1)
    y = dequantise(x, 17)
    assert torch.equal((y * 17).floor(), (x * 16).round())
    part = (y * 17).frac()
    assert part.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 / 6800**0.5)
    with pytest.raises(ValueError, match="has not 256 grey levels"):
        likelihood("logistic", "mnist", x)
    fixed = likelihood("gaussian", "digits", x).fixed
    assert torch.equal(fixed(x, seed=3), fixed(x, seed=3))
    assert not torch.equal(fixed(x, seed=3), fixed(x, seed=4))


@pytest.mark.parametrize(
    ("kind", "deviation", "least"),
    [(DequantisedNormal, 1.0, 1.0), (DiscretisedLogistic, math.pi / 3**0.5, 0.1)],
)
def test_scales_start_at_the_spread_of_the_pixels_and_have_a_limit(
    kind: Any, deviation: float, least: float
) -> None:
    rows = torch.rand(50, 4) * torch.tensor([0.0, 0.1, 0.5, 1.0])
    network = torch.nn.Sequential(Linear(2, 4))
    torch.nn.init.zeros_(network[0].weight)
    decoder = LocationScale(network, rows, 17, kind)
    found = decoder(torch.zeros(3, 2))
    torch.testing.assert_close(found.loc, rows.mean(0).expand(3, 4))
    torch.testing.assert_close(
        found.scale * deviation, rows.std(0) + deviation * (0.1 + least) / 17
    )
    torch.nn.init.constant_(decoder.log_scale, -80.0)
    torch.testing.assert_close(decoder(torch.zeros(3, 2)).scale, torch.full((4,), least / 17))


def test_means_of_four_pixels_have_1021_levels() -> None:
    x = torch.randint(256, (50, 4, 196)).sum(1) / 1020
    for name in ("mnist-14", "fashion_mnist-14", "mnist-omniglot-14"):
        assert likelihood("logistic", name, x).levels == 1021
    assert likelihood("logistic", "digits-rotated", grid(17)).levels == 17


def pixelcnn(height: int, width: int) -> PixelCNN:
    decoder = PixelCNN(Linear(2, 16 * height * width), torch.rand(height, width), 16)
    for layer in (decoder.first, *decoder.more, decoder.last):
        torch.nn.init.normal_(layer.weight)
    return decoder


def test_a_pixel_depends_on_those_before_it() -> None:
    decoder, z = pixelcnn(4, 5), torch.randn(1, 2)

    def logits(x: Tensor) -> Tensor:
        return decoder(z, x[None])[0]

    table = torch.autograd.functional.jacobian(logits, torch.rand(20))
    assert torch.equal(table.triu(), torch.zeros(20, 20))
    assert (table.diagonal(-1)[torch.arange(19) % 5 != 4] != 0).all()  # of the one to the left
    assert (table.diagonal(-5) != 0).all()  # and above
    assert (
        torch.autograd.functional.jacobian(lambda z: decoder(z, z.new_ones(1, 20)), z) != 0
    ).all()


def test_all_images_of_six_pixels_have_probability_one() -> None:
    decoder, z = pixelcnn(2, 3), torch.randn(3, 1, 2)  # particles, rows
    images = torch.tensor(list(product([0.0, 1.0], repeat=6)))
    logits = decoder(z.expand(3, 64, 2), images)
    assert logits.shape == (3, 64, 6)
    log_p = torch.distributions.Bernoulli(logits=logits).log_prob(images).sum(-1)
    assert (log_p.exp().sum(-1) - 1).abs().max() < 1e-12
    torch.testing.assert_close(logits[1], decoder(z[1].expand(64, 2), images))


@pytest.mark.parametrize("kind", ["gaussian", "logistic", "pixelcnn"])
def test_particles_at_once_are_those_one_after_another(kind: str) -> None:
    chosen = {"decoder": kind} if kind == "pixelcnn" else {"likelihood": kind}
    settings = Settings(**SMALL, eval_points=20, eval_samples=10, **chosen)  # type: ignore[arg-type]
    task = image_task(settings, Options())  # type: ignore[arg-type]
    vae, x, z = task.make_vae("").double(), task.test.double(), torch.randn(4, 20, 3)

    def log_p(latents: Tensor) -> Tensor:
        with pyro.plate("particles", 4, dim=-2) if latents.ndim > 2 else nullcontext():
            values = pyro.poutine.condition(vae.model, {"z": latents})
            trace = pyro.poutine.trace(values).get_trace(x)
        trace.compute_log_prob()
        return trace.nodes["x"]["log_prob"]

    torch.testing.assert_close(log_p(z), torch.stack([log_p(each) for each in z]))


@pytest.mark.slow
def test_steps_of_a_pixelcnn_as_a_graph() -> None:
    torch.set_default_dtype(torch.float32)
    settings = Settings(**SMALL, eval_points=20, eval_samples=10, decoder="pixelcnn")  # type: ignore[arg-type]
    task = image_task(settings, Options())  # type: ignore[arg-type]
    method = METHODS["mixture 2"](task.make_vae(""), task, settings)
    history = fit(  # a step that is not the graph's is a warning, so an error here
        method.vae.model,
        method.guide,
        task.train[:200],
        loss=method.loss,
        epochs=3,
        optimizer=OPTIMIZER,
        batch_size=20,
        transform=task.transform,
        compile="graph",
        progress=False,
    )
    assert history.loss[-1] < history.loss[0]


class Options:
    download = False


def test_stored_settings_of_binary_images_stay_as_they_were() -> None:
    assert SETTINGS.as_json() == {**SMALL, "eval_points": 20, "eval_samples": 10}
    other = Settings(**SMALL, eval_points=20, eval_samples=10, likelihood="gaussian")  # type: ignore[arg-type]
    assert other.as_json()["likelihood"] == "gaussian"


def test_grey_pixels_are_refused_where_they_have_no_meaning(capsys: Any) -> None:
    binary_only = "reconstruction has binary pixels and the mlp decoder only"
    for message, arguments in (
        ("leave one out", ["recursive", "--likelihood", "gaussian", "--decoder", "pixelcnn"]),
        (binary_only, ["reconstruction", "--likelihood", "logistic"]),
        (binary_only, ["reconstruction", "--decoder", "pixelcnn"]),
    ):
        with pytest.raises(SystemExit):
            command.main(["reproduce", *arguments])
        assert message in capsys.readouterr().err
