"""The signal-to-noise ratio of a loss's gradient, for any model, guide and ELBO."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.evaluation.calls import checked, sampling
from pyro_recursive.losses.recursive_mixture import RecursiveMixture_ELBO, growing_mixture_of
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.isolation import SharedNoise, isolated, restored_random_state
from pyro_recursive.tracing.param_store import parameters_in
from pyro_recursive.tracing.program import Program

FEWEST = 10  # draws of a gradient
CLEAR = 3  # standard errors that a ratio must have to be told from 0


class SignalToNoise(NamedTuple):
    """The signal-to-noise ratio of a gradient: a pure number, without a unit.

    ``ratio`` is the root mean square over the coordinates of ``|mean| / standard deviation``, a
    float64 scalar, and ``detected`` whether it is three standard errors (``error``) above 0.
    ``by_coordinate`` ``[D]`` is infinite without noise, nan where the gradient is always 0;
    ``ratio`` omits both.
    """

    ratio: Tensor
    error: Tensor
    detected: Tensor
    by_coordinate: Tensor

    def __repr__(self) -> str:
        return f"SignalToNoise({self.ratio.item():.3g} ± {self.error.item():.2g})"


@checked
def signal_to_noise(gradients: Tensor) -> SignalToNoise:
    """Return the signal-to-noise ratio of a gradient from n independent draws, ``[n, *shape]``.

    In each coordinate, with mean m and variance v of the draws, the squared ratio is estimated by

        (n - 3) / (n - 1) * m ** 2 / v - 1 / n

    which is unbiased for normal draws. The error is that of the delta method over the draws.

    Raises:
        ValueError: fewer than 10 draws, or values that are not finite.

    Reference: 'Tighter Variational Bounds are Not Necessarily Better' (Rainforth et al.,
    1802.04537).

    >>> found = signal_to_noise(0.5 + torch.randn(1000, 20))
    >>> bool((found.ratio - 0.5).abs() < 4 * found.error), bool(found.detected)
    (True, True)
    """
    draws = gradients.detach().flatten(1).double()
    n, mean = len(draws), draws.mean(0)
    if n < FEWEST:
        raise ValueError(f"A ratio needs at least {FEWEST} draws, got {n}.")
    if not bool(draws.isfinite().all()):
        raise ValueError(
            "The gradient is not finite in some draws. Use torch.autograd.detect_anomaly()."
        )
    deviation = draws - mean
    squares = deviation.square().sum(0)
    noisy = squares > n * (torch.finfo(torch.float32).eps * mean).square()  # more than rounding
    silent = torch.where(mean == 0, math.nan, math.inf).to(squares)
    squared = torch.where(noisy, (n - 3) * mean.square() / squares - 1 / n, silent)
    by_coordinate = squared.clamp_min(0).sqrt()
    ratio = squared[noisy].mean().clamp_min(0).sqrt() if noisy.any() else by_coordinate.nanmean()
    weight = (n * mean / squares)[noisy]  # mean / variance: what the square gains from each draw
    influence = (2 * weight * deviation[:, noisy] - (weight * deviation[:, noisy]).square()).mean(1)
    error = influence.std() / n**0.5 / (2 * ratio)  # infinite where the ratio is 0
    return SignalToNoise(ratio, error, ratio > CLEAR * error, by_coordinate)


def log_slope(sizes: Tensor, ratios: Tensor, errors: Tensor) -> tuple[float, float]:
    """Return the slope of ratios over sizes ``[n]`` in log-log coordinates, and its standard error.

    Weighted least squares over the finite and positive ratios; nan where there are fewer than two.

    >>> sizes = torch.tensor([1.0, 4.0, 16.0])
    >>> round(log_slope(sizes, 3 / sizes.sqrt(), 0.1 * torch.ones(3))[0], 6)
    -0.5
    """
    known = (ratios > 0) & ratios.isfinite() & errors.isfinite()
    if int(known.sum()) < 2:
        return math.nan, math.nan
    x, y, error = (part[known].double().cpu().numpy() for part in (sizes, ratios, errors))
    # A point without any error would have all the weight.
    weight = y / np.maximum(error, 1e-6 * y)
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, w=weight, cov="unscaled")
    return float(slope), float(covariance[0, 0] ** 0.5)


@runtime_checkable
class Loss(Protocol):
    """What has gradients, as every `pyro.infer.ELBO`."""

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        """Add the gradients to the parameters' ``grad``; return the loss."""


@sampling()
def gradient_snr(
    model: Callable,
    guide: Callable,
    loss: Loss,
    *args: Any,
    num_draws: int = 100,
    groups: Sequence[str] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> dict[str, SignalToNoise]:
    """Measure the signal-to-noise ratio of a loss's gradient, for each group of parameters.

    The gradient is an optimiser's: by the unconstrained parameters, for the minibatch in the
    arguments. Parameters, their ``grad``, buffers and the random state are left as they were, so
    that the same call gives the same result. Handlers around this call have no effect.

    Args:
        model, guide, loss: any Pyro programs, and any `pyro.infer.ELBO`.
        num_draws: how many gradients are drawn and kept, at least 10. A ratio r is told from 0 by
            about ``(3 / r) ** 2 / D`` of them, for D independent coordinates.
        groups: prefixes of parameters' names, each the name of a group. By default ``"guide"`` and
            ``"model"``, ``"shared"`` for parameters of both, and ``"loss"`` for those of neither.
        seed: draws other gradients.

    Raises:
        ValueError: no parameter, or none of a group; a gradient is not finite; the next step of a
            `RecursiveMixture_ELBO` begins or tests a component.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(3.0)), 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(x / 2, pyro.param("scale", torch.tensor(1.0))))
    >>> sorted(gradient_snr(model, guide, pyro.infer.Trace_ELBO(), torch.tensor(1.0)))
    ['guide', 'model']
    """
    check_at_least(FEWEST, num_draws=num_draws)
    _check_stage(loss, guide)
    program = Program(model, guide, args, kwargs)
    of_program = _by_program(program)
    with restored_random_state():
        if seed is not None:
            torch.manual_seed(seed)
        names, draws = _draws_of_gradient(loss, program, num_draws)
    members: dict[str, list[Tensor]] = {group: [] for group in groups or ()}
    for parameter, name in names.items():
        group = of_program.get(name, "loss") if groups is None else _prefix_of(name, groups)
        if group is not None and parameter.requires_grad:
            members.setdefault(group, []).append(parameter)
    if not members or not all(members.values()):
        known = list(names.values())
        raise ValueError(f"No parameter in one of the groups {[*members]}: Pyro has {known}.")
    return {
        group: signal_to_noise(torch.stack([_flat(draw, own) for draw in draws]))
        for group, own in sorted(members.items())
    }


def _draws_of_gradient(
    loss: Loss, program: Program, num_draws: int
) -> tuple[dict[Tensor, str], list[dict[Tensor, Tensor]]]:
    """Return the names of the loss's parameters, and draws of their gradients."""
    model, guide = program.model, program.guide
    before = {p: p.grad for _, p in pyro.get_param_store().named_parameters()}
    names: dict[Tensor, str] = {}
    draws: list[dict[Tensor, Tensor]] = []
    seen = poutine.trace(param_only=True)
    try:
        for parameter in before:
            parameter.grad = None
        for _ in range(num_draws):
            with isolated(model, guide, noise=SharedNoise()), torch.enable_grad(), seen:
                loss.loss_and_grads(model, guide, *program.args, **program.kwargs)
            for name, parameter in parameters_in(seen.trace).items():
                names.setdefault(parameter, name)
            draws.append({p: p.grad for p in names if p.grad is not None})
            for parameter in names:
                parameter.grad = None
    finally:
        for parameter in {**before, **names}:
            parameter.grad = before.get(parameter)
    return names, draws


@dataclass(frozen=True)
class SNRSweep:
    """Signal-to-noise ratios for M estimates of K samples each: pure numbers.

    ``ratio``, ``error`` and ``detected`` have a ``[number of Ms, number of Ks]`` tensor for each
    group.
    """

    num_estimates: tuple[int, ...]
    num_particles: tuple[int, ...]
    ratio: dict[str, Tensor]
    error: dict[str, Tensor]
    detected: dict[str, Tensor]

    def slope(self, group: str, over: str = "K", at: int = 0) -> tuple[float, float]:
        """Return the exponent of the law ``ratio ~ K ** slope``, and its standard error.

        Of the ratios that are detected; nan where there are fewer than two. ``over="M"`` is the law
        in M; ``at`` is which of the Ms (of the Ks) is held.
        """
        return log_slope(*self.line(group, over, at))

    def line(self, group: str, over: str = "K", at: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return sizes, ratios and errors, ``[n]`` each; nan where a ratio is not detected."""
        if over not in ("K", "M"):
            raise ValueError(f"over must be 'K' or 'M', got {over!r}.")
        index: Any = at if over == "K" else (slice(None), at)
        sizes = self.num_particles if over == "K" else self.num_estimates
        ratio = self.ratio[group].where(self.detected[group], torch.nan)[index]
        at_sizes = torch.tensor(sizes, dtype=ratio.dtype, device=ratio.device)
        return at_sizes, ratio, self.error[group][index]


@sampling()
def gradient_snr_sweep(
    model: Callable,
    guide: Callable,
    make_loss: Callable[[int, int], ELBO],
    *args: Any,
    num_estimates: Sequence[int] = (1,),
    num_particles: Sequence[int] = (1, 4, 16, 64),
    num_draws: int = 100,
    groups: Sequence[str] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> SNRSweep:
    """Measure `gradient_snr` for losses of M estimates of K samples each.

    Theory, at large K: the pathwise gradient of the guide in IWAE has a ratio that falls as
    ``sqrt(M / K)``, that of the model one that grows as ``sqrt(M K)``; DReG repairs the former.

    Args:
        model, guide, num_draws, groups, seed: as in `gradient_snr`.
        make_loss: returns the loss for M and K, as `pyro_recursive.MIWAE_ELBO` does.
        num_estimates, num_particles: the Ms and the Ks.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive import MIWAE_ELBO
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(3.0)), 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = lambda x: pyro.sample("z", dist.Normal(1.5, 1.0))
    >>> sizes = {"num_particles": (1, 16), "num_draws": 20}
    >>> found = gradient_snr_sweep(model, guide, MIWAE_ELBO, torch.tensor(0.0), **sizes)
    >>> found.slope("model")[0] > 0  # about 0.5
    True
    """
    sizes = [(m, k) for m in num_estimates for k in num_particles]
    with isolated():  # each measurement has noise of its own
        if seed is not None:
            torch.manual_seed(seed)
        seeds = torch.randint(2**62, (len(sizes),), device="cpu").tolist()
    options: dict[str, Any] = {"num_draws": num_draws, "groups": groups, **kwargs}
    found = [
        gradient_snr(model, guide, make_loss(m, k), *args, seed=own, **options)
        for (m, k), own in zip(sizes, seeds, strict=True)
    ]
    shape = (len(num_estimates), len(num_particles))
    ratio, error, detected = (
        {group: torch.stack([f[group][part] for f in found]).view(shape) for group in found[0]}
        for part in range(3)
    )
    return SNRSweep(tuple(num_estimates), tuple(num_particles), ratio, error, detected)


def _check_stage(loss: Loss, guide: Callable) -> None:
    """Raise where the next step of a growing mixture is none of gradients."""
    if isinstance(loss, RecursiveMixture_ELBO):
        mixture = growing_mixture_of(guide)
        if mixture.starts_component or mixture.starts_from_paths or mixture.is_trial:
            raise ValueError(
                "The next step of RecursiveMixture_ELBO begins or tests a component. Take it first."
            )


def _by_program(program: Program) -> dict[str, str]:
    """Run both programs once; return the program of each parameter."""
    with isolated(), torch.no_grad():
        with poutine.trace(param_only=True) as guide_trace:
            trace = program.run_guide()
        with poutine.trace(param_only=True) as model_trace:
            program.run_model(trace)
    of_guide, of_model = set(guide_trace.trace.nodes), set(model_trace.trace.nodes)
    if isinstance(poutine.unwrap(program.guide), Messenger):
        of_guide -= of_model  # it runs the model, too
    found = {**dict.fromkeys(of_guide, "guide"), **dict.fromkeys(of_model, "model")}
    return {**found, **dict.fromkeys(of_guide & of_model, "shared")}


def _prefix_of(name: str, prefixes: Sequence[str]) -> str | None:
    """Return the longest of the prefixes that a name has."""
    return max((p for p in prefixes if name.startswith(p)), key=len, default=None)


def _flat(gradients: dict[Tensor, Tensor], parameters: list[Tensor]) -> Tensor:
    """Return the gradient of some parameters, ``[D]``; 0 where there is none."""
    found = (gradients.get(p, torch.zeros_like(p)) for p in parameters)
    return torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in found])
