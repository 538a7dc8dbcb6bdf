"""The signal-to-noise ratio of a loss's gradient, for any model, guide and ELBO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_recursive.evaluation.gradients.seen_parameters import (
    Groups,
    KeptTensors,
    SeenParameters,
    by_program,
)
from pyro_recursive.evaluation.gradients.signal_to_noise import (
    GradientMoments,
    SignalToNoise,
    log_slope,
)
from pyro_recursive.losses.multi_sample import MultiSampleELBO
from pyro_recursive.losses.recursive_mixture import RecursiveMixture_ELBO, growing_mixture_of
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.isolation import Unnoticed, set_torch_state, torch_state
from pyro_recursive.tracing.program import Program

__all__ = ["SNRSweep", "gradient_snr", "gradient_snr_sweep"]


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

    The gradient is what an optimiser would get: by the unconstrained parameters, at their present
    values, for the minibatch in the arguments; a minibatch that the model itself draws is drawn
    anew each time, and counts as noise. Nothing is trained: parameters, their ``grad``, buffers
    and the random state are left as they were, so that the same call gives the same result; those
    that a first call of model or guide creates are created. Handlers around this call are not seen:
    put them around model and guide.

    :param model: a Pyro model, called like the guide as ``model(*args, **kwargs)``. A keyword with
        the name of one here cannot be passed on
    :param guide: its guide
    :param loss: any `pyro.infer.ELBO`, Pyro's or this package's
    :param num_draws: how many gradients are drawn, at least 10. A ratio r can be told from 0 with
        about ``(3 / r) ** 2 / D`` of them or more, D coordinates being independent
    :param groups: prefixes of parameters' names in Pyro, each the name of a group; or a function
        from a parameter's name to its group, None leaving it out. By default ``"guide"`` and
        ``"model"``, by which program has the parameter; where there are any, ``"shared"`` are in
        both, and ``"loss"`` in none
    :param seed: draws other gradients; the random state is left alone all the same
    :return: a `pyro_recursive.evaluation.gradients.signal_to_noise.SignalToNoise` for each group

    :raises TypeError: ``loss`` is no ELBO
    :raises ValueError: ``num_draws`` is below 10; no parameter has a gradient, or none the prefix
        of a group; a gradient is not finite; the next step of a `RecursiveMixture_ELBO` begins or
        tests a component, and is no step of descent

    Cost: ``num_draws`` steps of training, and 20 float64 vectors of the parameters' length.

    Source: 'Tighter Variational Bounds are Not Necessarily Better' (Rainforth et al., arXiv
    1802.04537).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive import IWAE_ELBO
    >>> def model(x):
    ...     mu = pyro.param("mu", torch.tensor(0.5))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     scale = pyro.param("scale", torch.tensor(1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, scale))
    >>> x = torch.tensor([1.0, 3.0, 2.0])
    >>> found = gradient_snr(model, guide, IWAE_ELBO(8), x, num_draws=30)
    >>> sorted(found), bool(found["model"].detected)
    (['guide', 'model'], True)
    """
    check_at_least(1, num_draws=num_draws)
    _check_loss(loss, guide)
    program, runs, state = Program(model, guide, args, kwargs), Unnoticed(), torch_state()
    seen = SeenParameters(by_program(program, runs), groups)
    before, moments = KeptTensors(model, guide), dict[str, GradientMoments]()
    here = state if seed is None else _state_of(seed)

    def step() -> list[Tensor]:
        set_torch_state(here)  # `runs` has gone back to where the first run began
        with torch.enable_grad(), seen:
            _backward(loss, program)
        return torch_state()

    try:
        for number in range(num_draws):
            here = runs(step)
            before.restore()
            for group, gradient in seen.gradients().items():
                moments.setdefault(group, _after(number, num_draws)).add(gradient.unsqueeze(0))
    finally:
        before.restore()
        seen.restore()
        set_torch_state(state)
    seen.check()
    return {group: moments[group].ratio() for group in sorted(moments)}


@dataclass(frozen=True)
class SNRSweep:
    """Signal-to-noise ratios for M estimates of K samples each: pure numbers.

    ``ratio``, ``error`` and ``detected`` have a ``[number of Ms, number of Ks]`` tensor for each
    group of parameters; what they mean is in `SignalToNoise`.
    """

    num_estimates: tuple[int, ...]
    num_particles: tuple[int, ...]
    ratio: dict[str, Tensor]
    error: dict[str, Tensor]
    detected: dict[str, Tensor]

    def slope(self, group: str, over: str = "K", at: int = 0) -> tuple[float, float]:
        """Return the exponent of the law ``ratio ~ K ** slope``, and its standard error.

        Of the ratios that could be told from 0; nan where there are fewer than two.

        :param over: ``"K"``, or ``"M"`` for the law in M
        :param at: which of the Ms (of the Ks, for ``"M"``) is held
        :raises ValueError: ``over`` is neither
        """
        sizes, ratio, error = self.line(group, over, at)
        return log_slope(sizes, ratio, error)

    def line(self, group: str, over: str = "K", at: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return sizes, ratios and errors, ``[n]`` each; nan where a ratio is not detected."""
        if over not in ("K", "M"):
            raise ValueError(f"over is 'K' or 'M', got {over!r}.")
        place: Any = at if over == "K" else (slice(None), at)
        sizes = self.num_particles if over == "K" else self.num_estimates
        ratio = self.ratio[group].where(self.detected[group], torch.nan)[place]
        at_sizes = torch.tensor(sizes, dtype=ratio.dtype, device=ratio.device)
        return at_sizes, ratio, self.error[group][place]


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
    """Measure `gradient_snr` for losses of M estimates of K samples each, as an `SNRSweep`.

    Theory, at large K: the pathwise gradient of the guide in IWAE has a ratio that falls as
    ``sqrt(M / K)``, that of the model one that grows as ``sqrt(M K)``; DReG repairs the former.

    :param make_loss: returns the loss for M and K: `pyro_recursive.MIWAE_ELBO`, say
    :param num_estimates: the Ms
    :param num_particles: the Ks
    :raises ValueError: there is no M or no K; else as `gradient_snr`, as are the other arguments
        and the source

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
    if not num_estimates or not num_particles:
        raise ValueError("A sweep needs at least one number of estimates and one of particles.")
    sizes = [(m, k) for m in num_estimates for k in num_particles]
    seeds = _seeds(seed, len(sizes))
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


def _check_loss(loss: Any, guide: Callable) -> None:
    if not isinstance(loss, ELBO):
        raise TypeError(f"loss must be a pyro.infer.ELBO, got {type(loss).__name__}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradient_snr takes gradients: call it outside torch.inference_mode().")
    if isinstance(loss, RecursiveMixture_ELBO):
        mixture = growing_mixture_of(guide)
        if mixture.starts_component or mixture.is_trial:
            what = "tests" if mixture.is_trial else "begins"
            raise ValueError(
                f"The next step of RecursiveMixture_ELBO {what} a component, and is no step of "
                "descent. Take it first: loss.loss_and_grads(model, guide, ...)."
            )


def _backward(loss: ELBO, program: Program) -> None:
    """Add a gradient to the parameters' ``grad``, as `SVI` would."""
    model, guide = program.model, program.guide
    if not isinstance(loss, MultiSampleELBO):
        loss.loss_and_grads(model, guide, *program.args, **program.kwargs)
        return
    # No number for the host to wait for.
    value = loss.differentiable_loss(model, guide, *program.args, **program.kwargs)
    if value.requires_grad:
        value.backward()


def _after(number: int, total: int) -> GradientMoments:
    """Return moments of what was not there in the first draws."""
    moments = GradientMoments(total)
    for _ in range(number):
        moments.add(torch.zeros(1, 0))
    return moments


def _state_of(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return torch_state()


def _seeds(seed: int | None, count: int) -> list[int]:
    """Return a seed for each of several measurements, whose noise should not be the same."""
    state = torch_state()
    if seed is not None:
        torch.manual_seed(seed)
    seeds = torch.randint(2**62, (count,), device="cpu").tolist()
    set_torch_state(state)
    return seeds
