"""Points around curves in the plane, with one latent each, and their exact log p(x)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FINER = 20  # points at which a curve's length is measured, for each node
CHUNK_PAIRS = 2**21  # of a node and a row at once


def _absolute_value(z: Tensor) -> Tensor:
    height = (2 * torch.special.ndtr(z) - 1).abs()
    return torch.cat([height, height], -1)


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
    """Return a smooth staircase: level 2 k from 2 k - 1 to 2 k + 1, with steps 0.1 wide."""
    stair = (u / 2).floor()
    return torch.tanh(10 * (u - 2 * stair - 1)) + 2 * stair + 1


# The variance of the noise, and the curve from latents [..., 1] to points [..., 2].
_FORMULAS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "absolute-value": (0.01, _absolute_value),
    "circle": (0.01, _circle),
    "clusters": (0.2, _clusters),
    "figure-8": (0.02, _figure_8),
    "spiral-dots": (0.01, _spiral_dots),
}
CURVES = tuple(_FORMULAS)


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
        return _FORMULAS[self.name][1](z)

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
    """Draw points around a curve in the plane, ``z ~ N(0, 1)`` and ``x ~ N(f(z), s2 I)``.

    With Phi the normal distribution function, sg the logistic sigmoid and the smooth staircase
    ``t(u) = tanh(10 u - 20 floor(u / 2) - 10) + 2 floor(u / 2) + 1``, f and s2 are

    - ``"absolute-value"``: ``|2 Phi(z) - 1| (1, 1)``, 0.01; z and -z have the same point;
    - ``"circle"``: ``(cos u, sin u)``, ``u = 2 pi Phi(z)``, 0.01;
    - ``"clusters"``: ``(cos 2t, sin 2t)``, ``u = 2 pi sg(pi z / 2)``, 0.2; four places;
    - ``"figure-8"``: ``sqrt(2) cos u / (sin(u)**2 + 1) (1/2, sin u)``,
      ``u = pi (0.6 + 1.8 Phi(z))``, 0.02; nine tenths of a lemniscate;
    - ``"spiral-dots"``: ``(t cos t, t sin t)``, ``u = 4 pi sg(pi z / 2)``, 0.01; seven dots.

    Args:
        name: one of the above.
        rows, validation_rows, test_rows: how many points; those of ``test`` depend on no others.
        scale: the noise's standard deviation; the root of s2 if None.
        seed, dtype, device: of the draws, which are the same for any dtype and device.

    Reference: 'Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders' (Yacoby, Pan & Doshi-Velez, arXiv 2403.08941), unverified.

    Example:
        >>> curve("figure-8", 100)
        Curve('figure-8', train=[100, 2], validation=[500, 2], test=[5000, 2])
    """
    if name not in _FORMULAS:
        raise ValueError(f"name must be one of {list(_FORMULAS)}, got {name!r}.")
    variance, decoder = _FORMULAS[name]
    scale = math.sqrt(variance) if scale is None else scale
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = []
    for count in (test_rows, validation_rows, rows):  # the test rows do not depend on `rows`
        normal = torch.randn(count, 3, generator=generator, dtype=torch.float64, device="cpu")
        z, noise = normal[:, :1], normal[:, 1:]
        drawn.append([t.to(device, dtype) for t in (decoder(z) + scale * noise, z)])
    test, validation, train = drawn
    return Curve(name, train[0], validation[0], test[0], train[1], validation[1], test[1], scale)


@torch.no_grad()
def curve_evidence(
    decoder: Callable[[Tensor], Tensor],
    x: Tensor,
    scale: float | Tensor,
    *,
    nodes: int = 4001,
    bound: float = 8.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return log p(x) of each row in nats, float64 ``[rows]``, without Monte Carlo error.

    ``p(x) = int N(x; decoder(z), scale**2 I) N(z; 0, 1) dz`` by the trapezoid rule from ``-bound``
    to ``bound``. Half of the nodes are even in z, half along the curve, so that a steep part has
    as many nodes as it needs. The error falls with the square of ``nodes``: with the defaults it is
    below 2e-4 nats a row for the points of `curve` (5e-3 for the spiral dots) and below 3e-5 in the
    mean. For another decoder, compare with more nodes.

    Args:
        decoder: true or learned, from latents ``[n, 1]``, in the dtype of ``x``, to ``[n, D]``;
            each row for itself, so that a module should be in eval mode.
        x: floating-point ``[rows, D]``.
        scale: the standard deviation of the noise.
        nodes: at least 2; 21 times as many latents are decoded.
        bound: where the grid ends; beyond 8 the prior has mass 1e-15.
        chunk_size: pairs of a node and a row at once, two millions if None.

    Example:
        >>> x = torch.tensor([[0.3, -0.2], [2.0, 1.0]])
        >>> line = torch.tensor([[2.0, 1.0]])  # a linear decoder: x is normal
        >>> covariance = line.T @ line + 0.1**2 * torch.eye(2)
        >>> exact = torch.distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
        >>> found = curve_evidence(lambda z: z @ line, x, 0.1)
        >>> bool(torch.allclose(found.to(exact), exact, atol=1e-4))
        True
    """
    if not x.is_floating_point():  # the nodes have its dtype
        raise TypeError(f"x must be floating-point numbers, got {x.dtype}.")
    scale = float(scale)
    z = _nodes(decoder, x, nodes, bound)
    points, gaps = _decoded(decoder, z, x), z.diff()
    width = torch.cat([gaps[:1], gaps[1:] + gaps[:-1], gaps[-1:]]) / 2
    log_weights = width.log() - 0.5 * z**2 - 0.5 * math.log(2 * math.pi)  # times the prior
    log_weights = log_weights - x.shape[1] * math.log(scale * math.sqrt(2 * math.pi))
    found = []
    for rows in x.double().split(max(1, (chunk_size or CHUNK_PAIRS) // nodes)):
        distance = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        log_p = distance.div_(scale).square_().mul_(-0.5).add_(log_weights)
        found.append(log_p.logsumexp(1))
    return torch.cat(found)


def _nodes(decoder: Callable[[Tensor], Tensor], x: Tensor, nodes: int, bound: float) -> Tensor:
    """Return nodes, float64 ``[nodes]``, half of them even in z and half along the curve.

    They are rounded to the dtype of ``x``, in which they are decoded.
    """
    fine = torch.linspace(-bound, bound, FINER * nodes, dtype=torch.float64, device=x.device)
    steps = _decoded(decoder, fine, x).diff(dim=0).norm(dim=-1)
    share = torch.full_like(steps, 1 / len(steps))
    if (length := steps.sum()) > 0:
        share = (share + steps / length) / 2
    # The inverse of the cumulated share, which is piecewise linear, at even steps.
    reached = torch.cat([share.new_zeros(1), share.cumsum(0)])
    wanted = torch.linspace(0, 1, nodes, dtype=torch.float64, device=x.device) * reached[-1]
    after = torch.searchsorted(reached, wanted).clamp(1, len(share))
    part = (wanted - reached[after - 1]) / share[after - 1]
    z = fine[after - 1] + part * (fine[after] - fine[after - 1])
    return z.to(x.dtype).double()


def _decoded(decoder: Callable[[Tensor], Tensor], z: Tensor, x: Tensor) -> Tensor:
    """Return the points of the curve in float64, ``[n, D]``."""
    points = decoder(z[:, None].to(x.dtype))
    if points.shape != (len(z), x.shape[1]):
        raise ValueError(
            f"The decoder returned {list(points.shape)} for {len(z)} latents and x {list(x.shape)}."
        )
    if not points.isfinite().all():
        raise ValueError(f"The decoder is not finite up to {z[-1]:g}. Choose a smaller bound.")
    return points.double()
