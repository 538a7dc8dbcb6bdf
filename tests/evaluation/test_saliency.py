"""The saliency of observed entries, compared with derivatives in closed form."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_recursive.evaluation import saliency

WEIGHTS = torch.tensor([[1.5, 0.0, -0.5], [2.0, 0.0, 0.3]], dtype=torch.float64)  # [latent, T]


def linear(x: Tensor) -> None:
    """Two latents a row and one of all, whose gradient is none of a row's."""
    shift = pyro.sample("shift", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(len(x)), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        locs = torch.stack([a, b[..., 0]], -1) @ WEIGHTS + shift
        previous = torch.cat([x.new_zeros(len(x), 1), x[:, :-1]], -1)
        pyro.sample("x", dist.Normal(locs + 0.7 * previous, 0.8).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    pyro.sample("shift", dist.Delta(x.new_full((1,), 0.2)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Delta(0.3 * x[:, 0]))
        pyro.sample("b", dist.Normal(x[:, :1], 0.5).to_event(1))


def test_closed_form() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    pyro.set_rng_seed(0)
    noise, weight = torch.randn(100_000, 1, 1, dtype=torch.float64), WEIGHTS
    previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], -1)
    b = x[:, :1] + 0.5 * noise
    locs = 0.3 * x[:, :1] * weight[0] + b * weight[1] + 0.2 + 0.7 * previous
    norms = ((x - locs) / 0.8**2).abs() * weight.norm(dim=0)  # of the gradient in (a, b)
    draws = 100
    found = saliency(linear, guide, x, num_draws=draws)
    assert found.shape == x.shape
    assert (found[:, 1] == 0).all()  # no weight
    error = (norms.var(0) / draws + norms.var(0) / len(noise)).sqrt()
    assert ((found - norms.mean(0)).abs() < 4 * error + 1e-12).all()


def test_symbols_and_what_is_refused() -> None:
    table = torch.randn(2, 5, dtype=torch.float64)

    def symbols(x: Tensor, y: Any = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=table.dtype), 1.0))
            logits = (z[:, None, None] * table).expand(len(x), 2, 5)
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def at(x: Tensor, y: Any = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.full((len(x),), 0.4, dtype=table.dtype)))

    x = torch.tensor([[0, 3], [4, 1]])
    means = ((0.4 * table).softmax(-1) * table).sum(-1)  # d log softmax = table - its mean
    expected = (table[torch.arange(2), x] - means).abs()
    assert torch.allclose(saliency(symbols, at, x, num_draws=1), expected)
    y = torch.zeros(2)
    assert torch.equal(saliency(symbols, at, x, y, site="y"), torch.zeros(2))
    with pytest.raises(ValueError, match=r"Give one of \['x', 'y'\]"):
        saliency(symbols, at, x, y)

    def no_rows(x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="needs latents of each row"):
        saliency(no_rows, pyro.poutine.block(no_rows, hide=["x"]), torch.zeros(2))


def test_discrete_latents_and_computed_sites_count_for_nothing() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            switch = pyro.sample("switch", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            loc = pyro.deterministic("loc", 2 * z + 5 * switch)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def at(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.new_zeros(len(x))))
            pyro.sample("switch", dist.Delta(x.new_ones(len(x))))

    x = torch.tensor([1.0, 7.0], dtype=torch.float64)
    assert torch.allclose(saliency(model, at, x), 2 * (x - 5).abs())
