"""The search for the best member of a family for each row, all rows at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.tracing.arguments import check_at_least

DECAYS = (0.9, 0.99)  # of Adam's moments
EPSILON = 1e-8


class Noise:
    """Standard normals from a generator of its own: runs of the model set back the common one."""

    def __init__(self, device: torch.device) -> None:
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, target: LocalBound, params: Tensor, draws: int) -> Tensor:
        """Return noise for draws of all rows and parts, ``[S, J, *batch, n]``."""
        family, batch = target.family, params.shape[:-1]
        return torch.randn(
            (draws, family.parts, *batch, family.noise_dim),
            generator=self.generator,
            dtype=params.dtype,
            device=params.device,
        )


@dataclass(frozen=True)
class Search:
    """Stochastic gradient ascent on the ELBO of each row, with averages over windows of steps.

    Adam. After each window, the average of a row's parameters in it is compared to its best so far,
    on 20 S draws that stay the same. Where it is no better by the tolerance, the row goes back to
    its best, and its step size is halved; after ``patience`` such windows in a row, it stops.

    Args:
        draws: S, the draws of z in each step (from each component, for mixtures).
        steps: the largest number of steps.
        window: the steps of a window.
        patience: how many windows without improvement a row may have.
        lr: the first step size, in units of the parameters: unconstrained latents, logarithms.
        tolerance: the smallest improvement, in nats.

    >>> Search(steps=400, lr=0.1)
    Search(draws=10, steps=400, window=50, patience=5, lr=0.1, tolerance=0.001)
    """

    draws: int = 10
    steps: int = 5000
    window: int = 50
    patience: int = 5
    lr: float = 0.05
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        """Check the numbers that would end the search at once."""
        counts = ("draws", "steps", "window", "patience")
        check_at_least(1, **{name: getattr(self, name) for name in counts})
        if not (self.lr > 0 and self.tolerance > 0):
            raise ValueError(f"lr and tolerance must be above 0, got {self.lr}, {self.tolerance}.")

    def __call__(self, target: LocalBound, params: Tensor, noise: Noise) -> Tensor:
        """Return the best parameters found from a start, ``[*batch, P]`` both."""
        judge = noise(target, params, 20 * self.draws).split(5 * self.draws)
        best, value = params, _value(target, params, judge)
        adam, lr = _Adam(params), torch.full_like(value, self.lr)
        failures = torch.zeros_like(value)
        for done in range(0, self.steps, self.window):
            window = min(self.window, self.steps - done)
            average = torch.zeros_like(params)
            for _ in range(window):
                gradient = target.gradient(params, noise(target, params, self.draws))
                params = params + lr.unsqueeze(-1) * adam.direction(gradient)
                average = average + params / window
            found = _value(target, average, judge)
            better = found > value + self.tolerance  # not where it is not a number
            best = torch.where((found > value).unsqueeze(-1), average, best)
            value = torch.where(found > value, found, value)
            params = torch.where(better.unsqueeze(-1), params, best)
            failures = torch.where(better, 0.0, failures + 1)
            lr = torch.where(better, lr, lr / 2)
            lr = torch.where(failures < self.patience, lr, 0.0)
            if not bool(lr.any()):  # one look at the device in a window
                break
        return best


def _value(target: LocalBound, params: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """Return the ELBO of each row on draws in equal parts, ``[*batch]``."""
    return torch.stack([target.value(params, noise) for noise in noises]).mean(0)


class _Adam:
    """The moments of a gradient ``[*batch, P]``, each coordinate by itself."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.count = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Add a gradient; return a step of about length 1 in each coordinate."""
        gradient = torch.where(gradient.isfinite(), gradient, 0.0)
        self.count += 1
        self.first = self.first.lerp(gradient, 1 - DECAYS[0])
        self.second = self.second.lerp(gradient.square(), 1 - DECAYS[1])
        first = self.first / (1 - DECAYS[0] ** self.count)
        second = self.second / (1 - DECAYS[1] ** self.count)
        return first / (second.sqrt() + EPSILON)
