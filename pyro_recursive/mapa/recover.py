"""From the codes of data to a continuous prior again."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.mapa.flow_prior import FlowPrior
from pyro_recursive.mapa.quantile_map import QuantilePrior
from pyro_recursive.mapa.recovered import RecoveredPrior, weighted_codes
from pyro_recursive.mapa.windows import CodeMixturePrior, KDEPrior

__all__ = ["KINDS", "recover_prior"]

KINDS: dict[str, Callable[..., RecoveredPrior]] = {
    "copula": QuantilePrior,
    "flow": FlowPrior,
    "kde": KDEPrior,
    "kernels": CodeMixturePrior,
}


def recover_prior(
    codes: Tensor,
    kind: str = "auto",
    *,
    log_weights: Tensor | None = None,
    scale: float | Tensor | None = None,
    held_out: float = 0.1,
    trainable: bool = False,
    seed: int = 0,
    **options: Any,
) -> RecoveredPrior:
    """Fit a continuous prior to codes, the places of a latent site's data ``[N, D]``.

    A model whose prior is the empirical one of N codes is that of the training data alone. A prior
    that is near to the codes' distribution, put in its place by
    `pyro_recursive.mapa.with_prior`, gives a model that generates, and
    evaluates, new data. Kinds:

    - ``"copula"`` (D = 1): the quantile function of the codes, after the normal distribution
      function: `QuantilePrior`. Nothing is optimised. Option ``knots``.
    - ``"flow"``: a normalising flow by maximum likelihood, `FlowPrior`, of the extra `flows`.
      Options ``flow`` (``"spline"``, ``"coupling"``, ``"maf"``, ``"iaf"`` or a function), and
      ``transforms``, ``hidden``, ``steps``, ``batch_size``, ``lr``, ``patience``.
    - ``"kde"``: a normal around each code, shaped as all codes are, as wide as leave-one-out
      likelihood wants: `KDEPrior`. Option ``width``, to choose it.
    - ``"kernels"``: ``N(c_i, scale**2 I)`` around each code: `CodeMixturePrior`. Needs ``scale``.
    - ``"auto"``: the copula for D = 1; else a flow where zuko is installed, or ``"kde"``.

    All is drawn by generators of their own: torch's global ones are left alone.

    Arguments:
        codes: unconstrained vectors, ``[N, D]``: of a site with a constrained support those that
            `biject_to` takes there, of a matrix its entries in a row.
        kind: see above.
        log_weights: ``[N]``, logarithms of the codes' weights, which need not sum to one.
        scale: of ``"kernels"``; a number or one for each of D.
        held_out: the share of the codes for `held_out_log_prob`, at random. They are no part of a
            first fit, and part of the second, which is returned; 0 leaves out the first.
        trainable: whether the prior's parameters have gradients. A copula has none.
        seed: of the codes held out, and of fits.
        options: of the kind.

    Raises:
        ImportError: a flow is asked for, and zuko is not installed.
        TypeError: the codes are no floating-point numbers; a kind has no such option.
        ValueError: the codes are not ``[N, D]``, too few, not finite or all equal in a coordinate;
            weights, kind or numbers do not fit.

    Cost: a sort for the copula; ``32 * min(N, 2000) * N`` exponentials for ``"kde"``, and N normals
    for each of its densities; for a flow up to ``steps`` steps, of about 10 ms on one CPU core.
    Twice with codes held out.

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby, Pan & Doshi-Velez, arXiv 2403.08941). There, as far as we know, networks
    are fitted to the map between codes and normals; the quantile map needs no fit.

    >>> codes = torch.cat([torch.randn(200, 1) - 3, torch.randn(200, 1) + 3])
    >>> prior = recover_prior(codes)
    >>> prior.kind, prior.num_codes, prior().event_shape
    ('copula', 400, torch.Size([1]))
    >>> bool((prior().sample((1000,)).abs() > 1).double().mean() > 0.9)
    True
    >>> normal = torch.distributions.Normal(codes.mean(), codes.std())
    >>> recover_prior(codes, "kde").held_out_log_prob > normal.log_prob(codes).mean()
    tensor(True)
    """
    codes, weights = weighted_codes(codes, log_weights)
    kind = _kind(kind, codes.shape[1])
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out}")
    options = options | _shared(kind, scale, trainable, seed)
    prior = KINDS[kind](codes, weights, **options)
    if held_out:
        prior.held_out_log_prob = _held_out(KINDS[kind], codes, weights, held_out, seed, options)
    return prior


def _kind(kind: str, size: int) -> str:
    if kind == "auto":
        if size == 1:
            return "copula"
        return "flow" if importlib.util.find_spec("zuko") else "kde"
    if kind not in KINDS:
        raise ValueError(f"kind must be 'auto' or one of {list(KINDS)}, got {kind!r}")
    return kind


def _shared(kind: str, scale: Any, trainable: bool, seed: int) -> dict[str, Any]:
    """Return those of the arguments that a kind has."""
    if (scale is None) == (kind == "kernels"):
        raise ValueError(
            f"scale is of kind='kernels', which needs it; got kind={kind!r}, scale={scale}"
        )
    if kind == "copula":
        if trainable:
            raise ValueError("kind='copula' has nothing to train: use 'flow', 'kde' or 'kernels'.")
        return {}
    found = {"trainable": trainable}
    return found | ({"scale": scale} if kind == "kernels" else {"seed": seed})


def _held_out(
    build: Callable[..., RecoveredPrior],
    codes: Tensor,
    log_weights: Tensor,
    share: float,
    seed: int,
    options: dict[str, Any],
) -> float:
    """Return the mean log-density of codes under the prior of the others."""
    count = max(1, round(share * len(codes)))
    if len(codes) - count < 2:
        raise ValueError(
            f"{len(codes)} codes are too few to hold {count} out: use more, or held_out=0."
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(codes), generator=generator).to(codes.device)
    out, rest = order[:count], order[count:]
    prior = build(codes[rest], log_weights[rest].log_softmax(0), **options)
    with torch.no_grad():
        return (log_weights[out].softmax(0) @ prior().log_prob(codes[out])).item()
