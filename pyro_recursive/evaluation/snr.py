"""The signal-to-noise ratio of a loss's gradient, for any model, guide and ELBO."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyro_recursive.losses.base import LogWeightELBO
from pyro_recursive.losses.recursive_mixture import RecursiveMixture_ELBO, growing_mixture_of
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.isolation import SharedNoise, isolated, random_state, set_random_state
from pyro_recursive.tracing.program import Program

FEWEST = 10  # draws of a gradient
CLEAR = 3  # standard errors that a ratio must have to be told from 0
COORDINATES = 100_000  # of one pass in float64

# Prefixes of parameters' names, or a function from a name to its group (None leaves it out).
Groups = Sequence[str] | Callable[[str], str | None]


class SignalToNoise(NamedTuple):
    """The signal-to-noise ratio of a gradient: a pure number, without a unit.

    ``ratio`` is the root mean square over the coordinates of ``|mean| / standard deviation``, a
    float64 scalar, ``error`` its standard error, and ``detected`` whether it can be told from 0
    (three standard errors): where it is False, more draws are needed. ``by_coordinate``, ``[D]``,
    has the ratio of each.

    Coordinates without noise are left out of ``ratio``: their own is infinite, or nan where the
    gradient is always 0. If there are no others, so is the ratio.
    """

    ratio: Tensor
    error: Tensor
    detected: Tensor
    by_coordinate: Tensor

    def __str__(self) -> str:
        """Return the ratio in words."""
        found = f"{self.ratio.item():.3g} ± {self.error.item():.2g}"
        doubt = "" if self.detected else ", which cannot be told from 0"
        return f"signal-to-noise {found} over {len(self.by_coordinate)} coordinates{doubt}"

    def __repr__(self) -> str:
        """Return the same: a dict of groups is readable then."""
        return str(self)


def signal_to_noise(gradients: Tensor) -> SignalToNoise:
    """Return the signal-to-noise ratio of a gradient from n independent draws, ``[n, *shape]``.

    In each coordinate, with mean m and variance v of the draws, the squared ratio is estimated by

        (n - 3) / (n - 1) * m ** 2 / v - 1 / n

    which is unbiased for normal draws, where ``m ** 2 / v`` is never far below ``1 / n``. The error
    is that of a jackknife over the draws, and allows for coordinates that move together.

    Raises:
        ValueError: fewer than 10 draws, no coordinates, or values that are not finite.

    Reference: 'Tighter Variational Bounds are Not Necessarily Better' (Rainforth et al., arXiv
    1802.04537).

    >>> found = signal_to_noise(0.5 + torch.randn(1000, 20))
    >>> bool((found.ratio - 0.5).abs() < 4 * found.error), bool(found.detected)
    (True, True)
    """
    draws = gradients.detach().flatten(1)
    if len(draws) < FEWEST:
        raise ValueError(f"A ratio needs at least {FEWEST} draws, got {len(draws)}.")
    if not draws.shape[1]:
        raise ValueError("The gradient has no coordinates.")
    if not bool(draws.isfinite().all()):
        raise ValueError(
            "The gradient is infinite or not a number in some of the draws. "
            "torch.autograd.detect_anomaly() finds where that begins."
        )
    columns = zip(*map(_squared_ratios, draws.split(COORDINATES, 1)), strict=True)
    squared, left_out = (list(column) for column in columns)
    by_coordinate = torch.cat(squared)
    noisy = by_coordinate[by_coordinate.isfinite()]
    mean = noisy.mean() if noisy.numel() else by_coordinate.nanmean()
    ratio = mean.clamp_min(0).sqrt()
    left = sum(left_out) / noisy.numel()
    spread = ((len(draws) - 1) * left.var(correction=0)).sqrt()
    error = spread / (2 * ratio)  # infinite where the ratio is 0
    return SignalToNoise(ratio, error, ratio > CLEAR * error, by_coordinate.clamp_min(0).sqrt())


def _squared_ratios(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared ratio of each coordinate, ``[D]``; without each draw, their sum, ``[n]``.

    The sum is over coordinates with noise. One without, once a draw is left out, counts as 0.
    """
    n, mean = len(draws), draws.mean(0, dtype=torch.float64)
    deviation = draws - mean
    squares = deviation.square().sum(0)
    squared = _estimate(n, mean, squares)
    others = _estimate(
        n - 1, mean - deviation / (n - 1), squares - deviation.square() * (n / (n - 1))
    )
    return squared, others[:, squared.isfinite()].nan_to_num(0.0, 0.0).sum(1)


def _estimate(n: int, mean: Tensor, squares: Tensor) -> Tensor:
    """Return the squared ratio; infinite or nan where coordinates vary by rounding at most."""
    estimate = (n - 3) * mean.square() / squares - 1 / n
    silent = torch.where(mean == 0, math.nan, math.inf).to(estimate)
    rounding = (torch.finfo(torch.float32).eps * mean).square()
    return torch.where(squares > n * rounding, estimate, silent)


def log_slope(sizes: Tensor, ratios: Tensor, errors: Tensor) -> tuple[float, float]:
    """Return the slope of ratios over sizes in log-log coordinates, and its standard error.

    Weighted least squares. Points that are not finite and positive are left out; both are nan where
    fewer than two are left.

    Args:
        sizes, ratios: ``[n]``.
        errors: the standard errors of the ratios, ``[n]``.

    >>> sizes = torch.tensor([1.0, 4.0, 16.0])
    >>> log_slope(sizes, 3 / sizes.sqrt(), 0.1 * torch.ones(3))[0]
    -0.5
    """
    known = (ratios > 0) & ratios.isfinite() & errors.isfinite()
    if int(known.sum()) < 2:
        return math.nan, math.nan
    x, y = sizes[known].double().log(), ratios[known].double().log()
    # A point without any error would have all the weight.
    weight = (ratios / errors.clamp_min(1e-6 * ratios))[known].double().square()
    centred = x - (weight * x).sum() / weight.sum()
    information = (weight * centred.square()).sum()
    return ((weight * centred * y).sum() / information).item(), information.rsqrt().item()


def gradient_snr(
    model: Callable,
    guide: Callable,
    loss: ELBO,
    *args: Any,
    num_draws: int = 100,
    groups: Groups | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> dict[str, SignalToNoise]:
    """Measure the signal-to-noise ratio of a loss's gradient, for each group of parameters.

    The gradient is an optimiser's: by the unconstrained parameters, for the minibatch in the
    arguments. Parameters, their ``grad``, buffers and the random state are left as they were, so
    that the same call gives the same result. Handlers around this call have no effect.

    Args:
        model, guide: Pyro programs, called as ``model(*args, **kwargs)``.
        loss: any `pyro.infer.ELBO`, Pyro's or this package's.
        num_draws: how many gradients are drawn and kept, at least 10. A ratio r is told from 0 by
            about ``(3 / r) ** 2 / D`` of them, for D independent coordinates.
        groups: prefixes of parameters' names, each the name of a group; or a function from a name
            to its group, None leaving it out. By default ``"guide"`` and ``"model"``, ``"shared"``
            for parameters of both, and ``"loss"`` for those of neither.
        seed: draws other gradients.

    Raises:
        ValueError: no parameter, or none of a group; a gradient is not finite; the next step of a
            `RecursiveMixture_ELBO` begins or tests a component.

    Reference: 'Tighter Variational Bounds are Not Necessarily Better' (Rainforth et al., arXiv
    1802.04537).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(3.0)), 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(x / 2, pyro.param("scale", torch.tensor(1.0))))
    >>> found = gradient_snr(model, guide, pyro.infer.Trace_ELBO(), torch.tensor(1.0))
    >>> sorted(found), bool(found["model"].detected)
    (['guide', 'model'], True)
    """
    check_at_least(FEWEST, num_draws=num_draws)
    _check_loss(loss, guide)
    program, state = Program(model, guide, args, kwargs), random_state()
    seen = SeenParameters(_by_program(program), groups)
    draws: dict[str, list[Tensor]] = {}
    if seed is not None:
        torch.manual_seed(seed)
    try:
        for number in range(num_draws):
            with isolated(model, guide, noise=SharedNoise()), torch.enable_grad(), seen:
                _backward(loss, program)
            for group, gradient in seen.gradients().items():
                none_yet = [gradient.new_zeros(0)] * number
                draws.setdefault(group, none_yet).append(gradient)
    finally:
        seen.restore()
        set_random_state(state)
    seen.check()
    # The gradient of a parameter that was created late was 0 before.
    return {
        group: signal_to_noise(pad_sequence(own, batch_first=True))
        for group, own in sorted(draws.items())
    }


@dataclass(frozen=True)
class SNRSweep:
    """Signal-to-noise ratios for M estimates of K samples each: pure numbers.

    ``ratio``, ``error`` and ``detected`` have a ``[number of Ms, number of Ks]`` tensor for each
    group of parameters, as in `SignalToNoise`.
    """

    num_estimates: tuple[int, ...]
    num_particles: tuple[int, ...]
    ratio: dict[str, Tensor]
    error: dict[str, Tensor]
    detected: dict[str, Tensor]

    def slope(self, group: str, over: str = "K", at: int = 0) -> tuple[float, float]:
        """Return the exponent of the law ``ratio ~ K ** slope``, and its standard error.

        Of the ratios that are detected; nan where there are fewer than two.

        Args:
            group: a group of parameters.
            over: ``"K"``, or ``"M"`` for the law in M.
            at: which of the Ms (of the Ks, for ``"M"``) is held.
        """
        return log_slope(*self.line(group, over, at))

    def line(self, group: str, over: str = "K", at: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return sizes, ratios and errors, ``[n]`` each; nan where a ratio is not detected."""
        if over not in ("K", "M"):
            raise ValueError(f"over is 'K' or 'M', got {over!r}.")
        index: Any = at if over == "K" else (slice(None), at)
        sizes = self.num_particles if over == "K" else self.num_estimates
        ratio = self.ratio[group].where(self.detected[group], torch.nan)[index]
        at_sizes = torch.tensor(sizes, dtype=ratio.dtype, device=ratio.device)
        return at_sizes, ratio, self.error[group][index]


def gradient_snr_sweep(
    model: Callable,
    guide: Callable,
    make_loss: Callable[[int, int], ELBO],
    *args: Any,
    num_estimates: Sequence[int] = (1,),
    num_particles: Sequence[int] = (1, 4, 16, 64),
    num_draws: int = 100,
    groups: Groups | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> SNRSweep:
    """Measure `gradient_snr` for losses of M estimates of K samples each.

    Theory, at large K: the pathwise gradient of the guide in IWAE has a ratio that falls as
    ``sqrt(M / K)``, that of the model one that grows as ``sqrt(M K)``; DReG repairs the former.

    Args:
        model, guide, num_draws, groups, seed: as in `gradient_snr`, which also has the reference.
        make_loss: returns the loss for M and K, as `pyro_recursive.MIWAE_ELBO` does.
        num_estimates: the Ms.
        num_particles: the Ks.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive import MIWAE_ELBO
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(3.0)), 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(1.5, 1.0))
    >>> sizes = {"num_particles": (1, 16), "num_draws": 20}
    >>> found = gradient_snr_sweep(model, guide, MIWAE_ELBO, torch.tensor(0.0), **sizes)
    >>> found.slope("model")[0] > 0  # about 0.5
    True
    """
    sizes = [(m, k) for m in num_estimates for k in num_particles]
    if not sizes:
        raise ValueError("A sweep needs at least one number of estimates and one of particles.")
    options: dict[str, Any] = {"num_draws": num_draws, "groups": groups, **kwargs}
    found = [
        gradient_snr(model, guide, make_loss(m, k), *args, seed=own, **options)
        for (m, k), own in zip(sizes, _seeds(seed, len(sizes)), strict=True)
    ]
    shape = (len(num_estimates), len(num_particles))
    ratio, error, detected = (
        {group: torch.stack([f[group][part] for f in found]).view(shape) for group in found[0]}
        for part in range(3)
    )
    return SNRSweep(tuple(num_estimates), tuple(num_particles), ratio, error, detected)


def _check_loss(loss: ELBO, guide: Callable) -> None:
    if not isinstance(loss, ELBO):
        raise TypeError(f"loss must be a pyro.infer.ELBO, got {type(loss).__name__}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradient_snr takes gradients: call it outside torch.inference_mode().")
    if isinstance(loss, RecursiveMixture_ELBO):
        mixture = growing_mixture_of(guide)
        if mixture.starts_component or mixture.is_trial:
            what = "tests" if mixture.is_trial else "begins"
            raise ValueError(
                f"The next step of RecursiveMixture_ELBO {what} a "
                "component: it has no gradient. Take it first, by loss_and_grads."
            )


def _backward(loss: ELBO, program: Program) -> None:
    """Add a gradient to the parameters' ``grad``, as `SVI` would."""
    model, guide = program.model, program.guide
    if not isinstance(loss, LogWeightELBO):
        loss.loss_and_grads(model, guide, *program.args, **program.kwargs)
        return
    # The value of the loss stays on its device.
    value = loss.differentiable_loss(model, guide, *program.args, **program.kwargs)
    if value.requires_grad:
        value.backward()


def _seeds(seed: int | None, count: int) -> list[int]:
    """Return a seed for each of several measurements, so that their noise differs."""
    state = random_state()
    if seed is not None:
        torch.manual_seed(seed)
    seeds = torch.randint(2**62, (count,), device="cpu").tolist()
    set_random_state(state)
    return seeds


def _by_program(program: Program) -> Callable[[str], str]:
    """Run both programs once; return a function from a parameter's name to its program."""

    with isolated(), torch.no_grad():
        with poutine.trace(param_only=True) as guide_trace:
            trace = program.run_guide()
        with poutine.trace(param_only=True) as model_trace:
            program.run_model(trace)
    of_guide, of_model = set(guide_trace.trace.nodes), set(model_trace.trace.nodes)
    if isinstance(poutine.unwrap(program.guide), Messenger):
        of_guide -= of_model  # it runs the model, too

    def group_of(name: str) -> str:
        if name in of_guide:
            return "shared" if name in of_model else "guide"
        return "model" if name in of_model else "loss"

    return group_of


class SeenParameters(Messenger):
    """The parameters of a run in groups; their ``grad`` is None from then on, until `restore`."""

    def __init__(self, of_program: Callable[[str], str], groups: Groups | None) -> None:
        super().__init__()
        self.of_program, self.groups = of_program, groups
        self.grads: dict[Tensor, Tensor | None] = {}
        self.names: list[str] = []
        self.members: dict[str, list[Tensor]] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        parameter = msg["value"].unconstrained()
        if parameter in self.grads or not parameter.requires_grad:
            return
        self.grads[parameter] = parameter.grad
        self.names.append(msg["name"])
        parameter.grad = None  # before the backward pass of this very run
        group = self._group_of(msg["name"])
        if group is not None:
            self.members.setdefault(group, []).append(parameter)

    def _group_of(self, name: str) -> str | None:
        if self.groups is None:
            return self.of_program(name)
        if callable(self.groups):
            return self.groups(name)
        return max((p for p in self.groups if name.startswith(p)), key=len, default=None)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of each group, ``[D]``, and remove it."""
        found = {group: torch.cat([_flat(p) for p in own]) for group, own in self.members.items()}
        for parameter in self.grads:
            parameter.grad = None
        return found

    def restore(self) -> None:
        """Give the parameters back their former ``grad``."""
        for parameter, grad in self.grads.items():
            parameter.grad = grad

    def check(self) -> None:
        """Raise where no parameter was seen, or a group has none."""
        known = ", ".join(self.names) or "none"
        if not self.members:
            raise ValueError(f"No parameter to measure the gradient of: Pyro has {known}.")
        prefixes = [] if self.groups is None or callable(self.groups) else self.groups
        for prefix in prefixes:
            if prefix not in self.members:
                raise ValueError(f"No parameter is in group '{prefix}': Pyro has {known}.")


def _flat(parameter: Tensor) -> Tensor:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return grad.to_dense().flatten() if grad.is_sparse else grad.flatten()
