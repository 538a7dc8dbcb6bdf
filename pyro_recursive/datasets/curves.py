"""Points around curves in the plane: one latent each, and a decoder of a known form."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.datasets.quadrature import check_scale, curve_evidence

__all__ = ["CURVES", "Curve", "curve"]


def _absolute_value(z: Tensor) -> Tensor:
    height = (2 * torch.special.ndtr(z) - 1).abs()
    return torch.cat([height, height], -1)


def _absolute_value_unbounded(z: Tensor) -> Tensor:
    return torch.cat([z.abs(), z.abs()], -1)


def _circle(z: Tensor) -> Tensor:
    angle = 2 * math.pi * torch.special.ndtr(z)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _clusters(z: Tensor) -> Tensor:
    angle = 2 * _stairs(2 * math.pi * torch.sigmoid(math.pi / 2 * z))
    return torch.cat([angle.cos(), angle.sin()], -1)


def _figure_8(z: Tensor) -> Tensor:
    u = math.pi * (0.6 + 1.8 * torch.special.ndtr(z))
    across = math.sqrt(2) * u.cos() / (u.sin() ** 2 + 1)
    return torch.cat([across / 2, across * u.sin()], -1)


def _spiral_dots(z: Tensor) -> Tensor:
    angle = _stairs(4 * math.pi * torch.sigmoid(math.pi / 2 * z))
    return torch.cat([angle * angle.cos(), angle * angle.sin()], -1)


def _stairs(u: Tensor) -> Tensor:
    """Return a smooth staircase: level 2 k from 2 k - 1 to 2 k + 1, with a width of 0.1 a step."""
    stair = (u / 2).floor()
    return torch.tanh(10 * (u - 2 * stair - 1)) + 2 * stair + 1


class _Formula(NamedTuple):
    """The variance of the noise, and the curve: latents ``[..., 1]`` to points ``[..., 2]``."""

    variance: float
    decoder: Callable[[Tensor], Tensor]


_FORMULAS = {
    "absolute-value": _Formula(0.01, _absolute_value),
    "circle": _Formula(0.01, _circle),
    "clusters": _Formula(0.2, _clusters),
    "figure-8": _Formula(0.02, _figure_8),
    "spiral-dots": _Formula(0.01, _spiral_dots),
    "absolute-value-unbounded": _Formula(0.01, _absolute_value_unbounded),
}
CURVES = tuple(name for name in _FORMULAS if name != "absolute-value-unbounded")


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """Points around a curve, ``x = decoder(z) + scale * noise``, with ``z`` and noise N(0, 1).

    ``train``, ``validation`` and ``test`` are points ``[rows, 2]``, the three ``*_latents``
    ``[rows, 1]``; ``scale`` is the noise's standard deviation. See :func:`curve`.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    train_latents: Tensor
    validation_latents: Tensor
    test_latents: Tensor
    scale: float

    def decoder(self, z: Tensor) -> Tensor:
        """Return the points of the curve, ``[..., 1]`` to ``[..., 2]``, of any dtype."""
        return _FORMULAS[self.name].decoder(z)

    def evidence(self, x: Tensor, **options: Any) -> Tensor:
        """Return the true log p(x) in nats, float64 ``[rows]``: see :func:`curve_evidence`."""
        return curve_evidence(self.decoder, x, self.scale, **options)

    def __repr__(self) -> str:
        """Show the shapes instead of the numbers."""
        train, validation, test = (list(x.shape) for x in (self.train, self.validation, self.test))
        return f"Curve({self.name!r}, train={train}, validation={validation}, test={test})"


def curve(
    name: str,
    rows: int = 500,
    *,
    validation_rows: int = 500,
    test_rows: int = 5000,
    scale: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Curve:
    """Draw points around one of five curves in the plane, with one latent each.

    ``z ~ N(0, 1)`` and ``x ~ N(f(z), s2 I)``, with ``f`` of a known form. Phi is the normal
    distribution function, ``sg`` the logistic sigmoid:

    - ``"absolute-value"`` (s2 = 0.01): ``|2 Phi(z) - 1| (1, 1)``, a segment covered twice, by z and
      by -z;
    - ``"circle"`` (0.01): ``(cos u, sin u)``, ``u = 2 pi Phi(z)``, which z covers once, so that the
      two ends of the latent's line meet;
    - ``"clusters"`` (0.2): ``(cos 2t, sin 2t)``, with ``u = 2 pi sg(pi z / 2)`` and a smooth
      staircase ``t = tanh(10 u - 20 floor(u / 2) - 10) + 2 floor(u / 2) + 1``: four places on a
      circle, at angles of 0, 4, 8 and 12, steps as wide as 0.04 in z, and so much noise that the
      first and the last of the clusters look like one;
    - ``"figure-8"`` (0.02): ``sqrt(2) cos u / (sin(u)**2 + 1) (1/2, sin u)`` and
      ``u = pi (0.6 + 1.8 Phi(z))``: nine tenths of a lemniscate, which crosses itself;
    - ``"spiral-dots"`` (0.01): ``(t cos t, t sin t)``, with the staircase t of
      ``u = 4 pi sg(pi z / 2)``: seven dots on a spiral, at t = 0, 2, ..., 12, and some points on
      their way from one to the next.

    ``CURVES`` has these names. ``"absolute-value-unbounded"`` (0.01) is ``(|z|, |z|)``.

    The curves are those of the source below as far as we know: formulas, variances and numbers of
    rows are all unverified. Clusters and spiral dots are the least certain. The absolute value is
    certainly not what we remember, ``(|Phi(z)|, |Phi(z)|)``, which is no absolute value of
    anything; both readings here map z and -z to the same point.

    The same for the same ``seed``: all is drawn on the CPU in float64, by a generator of its own,
    and moved to ``dtype`` and ``device`` then. Torch's global generator is left alone. Test points
    do not depend on the other numbers of rows, nor validation points on ``rows``; another ``scale``
    has the same latents and the same noise, of another size.

    Arguments:
        name: one of the above.
        rows, validation_rows, test_rows: how many points, 0 or more.
        scale: the noise's standard deviation, the root of the variance above if not given.
        seed: of the draws.
        dtype, device: of the tensors.

    Raises ValueError for an unknown name, negative numbers of rows, and a ``scale`` that is not
    finite and positive.

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby, Pan & Doshi-Velez, arXiv 2403.08941), and `Failure Modes of Variational
    Autoencoders and Their Effects on Downstream Tasks` (of the same, arXiv 2007.07124). There, a
    network fitted to ``f`` takes its place.

    >>> data = curve("figure-8", 100)
    >>> data
    Curve('figure-8', train=[100, 2], validation=[500, 2], test=[5000, 2])
    >>> noise = data.test - data.decoder(data.test_latents)
    >>> bool(abs(noise.square().mean() / data.scale**2 - 1) < 0.05)
    True
    >>> data.evidence(data.test[:3]).dtype
    torch.float64
    """
    if name not in _FORMULAS:
        raise ValueError(f"name must be one of {list(_FORMULAS)}, got {name!r}")
    if scale is None:
        scale = math.sqrt(_FORMULAS[name].variance)
    check_scale(scale)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = {}
    sizes = {"test_rows": test_rows, "validation_rows": validation_rows, "rows": rows}
    for part, count in sizes.items():  # in this order the test rows do not depend on `rows`
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{part} must be an integer >= 0, got {count!r}")
        numbers = torch.randn(count, 3, generator=generator, dtype=torch.float64, device="cpu")
        z, noise = numbers[:, :1], numbers[:, 1:]
        x = _FORMULAS[name].decoder(z) + scale * noise
        drawn[part] = x.to(device, dtype), z.to(device, dtype)
    test, validation, train = drawn.values()
    return Curve(name, train[0], validation[0], test[0], train[1], validation[1], test[1], scale)
