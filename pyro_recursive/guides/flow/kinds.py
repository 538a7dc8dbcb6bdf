"""The kinds of normalising flows: by name, or any of the zuko library whose inverse is exact.

zuko is an optional dependency, imported only where a flow is built.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
from torch import nn

__all__ = ["FLOWS", "build_flow", "check_flow"]

SLOPE = 0.1


def build_flow(
    flow: str | Callable, size: int, context: int, transforms: int, hidden: Sequence[int]
) -> nn.Module:
    """Build a zuko flow over vectors of length ``size``; those with a name start as the identity.

    Raises:
        NotImplementedError: the flow's numerical inverse is too inexact.
        TypeError: a callable returned something else than a zuko flow.
    """
    zuko = _zuko()
    if isinstance(flow, str):
        built = FLOWS[flow](zuko, size, context, transforms=transforms, hidden_features=hidden)
        _start_as_identity(zuko, built)
        return built
    built = flow(size, context)
    if not isinstance(built, zuko.lazy.Flow):
        raise TypeError(
            f"flow(size={size}, context={context}) returned {type(built).__name__}; it must return "
            "a zuko.flows.Flow, such as zuko.flows.NAF(size, context)."
        )
    inexact = (zuko.flows.GF, zuko.flows.CNF, zuko.flows.FFJTransform)
    for part in built.modules():
        univariate = getattr(part, "univariate", None)
        if isinstance(part, inexact) or univariate is zuko.transforms.GaussianizationTransform:
            raise NotImplementedError(
                f"{type(built).__name__} flows are inverted only to about 1e-4, and importance "
                "weights need log q at the very point that was drawn: bounds would be wrong "
                "without a sign of it. Use 'coupling', 'spline', 'iaf', 'maf' or another zuko flow."
            )
    return built


def check_flow(flow: str | Callable) -> None:
    """Raise where zuko is missing, or no flow has this name."""
    _zuko()
    if not callable(flow) and flow not in FLOWS:
        raise ValueError(
            f"flow must be one of {list(FLOWS)} or a function (size, context) -> zuko flow, "
            f"got {flow!r}"
        )


def _zuko() -> Any:
    try:
        # Importing zuko turns the validation of all distributions off; this restores it.
        with pyro.settings.context(validate_distributions_torch=False):
            import zuko
    except ImportError as error:
        raise ImportError("FlowGuide needs zuko: pip install 'pyro_recursive[flows]'") from error
    return zuko


def _coupling(zuko: Any, size: int, context: int, **options: Any) -> nn.Module:
    options = {"univariate": _affine(zuko), **options}
    return _inverted(zuko, zuko.flows.NICE(size, context, activation=nn.ELU, **options))


def _spline(zuko: Any, size: int, context: int, **options: Any) -> nn.Module:
    univariate, shapes = zuko.transforms.MonotonicRQSTransform, [(8,), (8,), (7,)]
    return _coupling(zuko, size, context, univariate=univariate, shapes=shapes, **options)


def _maf(zuko: Any, size: int, context: int, **options: Any) -> nn.Module:
    univariate = _affine(zuko)
    return zuko.flows.MAF(size, context, activation=nn.ELU, univariate=univariate, **options)


def _affine(zuko: Any) -> Any:
    """Bound a transform's scales by SLOPE and 1 / SLOPE: early steps must not grow wild tails."""
    return partial(zuko.transforms.MonotonicAffineTransform, slope=SLOPE)


def _iaf(zuko: Any, size: int, context: int, **options: Any) -> nn.Module:
    return _inverted(zuko, _maf(zuko, size, context, **options))


FLOWS = {"coupling": _coupling, "spline": _spline, "iaf": _iaf, "maf": _maf}


def _inverted(zuko: Any, flow: Any) -> nn.Module:
    """Turn a flow round: zuko's cheap direction scores, and a guide draws at every step."""
    return zuko.lazy.Flow(flow.transform.inv, flow.base)


def _start_as_identity(zuko: Any, flow: nn.Module) -> None:
    """Zero the last layers: affine and spline transforms with zero parameters are identities."""
    for part in flow.modules():
        if isinstance(part, zuko.nn.MLP | zuko.nn.MaskedMLP):
            last = list(part[-1].parameters())
        elif isinstance(part, nn.ParameterList):
            last = list(part)
        else:
            continue
        for parameter in last:
            nn.init.zeros_(parameter)
