"""The No-U-Turn sampler on the density of all latents at once, and its starts from a guide."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import pyro
import torch
from pyro.infer import NUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.evaluation.calls import sampling
from pyro_recursive.evaluation.draws import Draws, joined
from pyro_recursive.evaluation.importance import (
    effective_sample_size,
    pareto_k_threshold,
    psis,
)
from pyro_recursive.evaluation.model_runs import ModelRuns, run_on_draws
from pyro_recursive.evaluation.predictions import draws_of
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.pathfinder.gaussians import random_starts
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.program import FAILURES, Program
from pyro_recursive.training.potential import Potential

PACKED = "latents"  # the one site of Pyro's kernel
DRAWS = 4000  # of the guide
WARMUP, LONG_WARMUP = 50, 500  # steps, for the step size alone and for the mass matrix, too
ATTEMPTS = 20  # single draws in a row at which a model may raise
PRIOR_DRAWS = 5.0  # that the diagonal of a covariance counts for, as in Stan


class GivenMassMatrix(BlockMassMatrix):
    """A mass matrix that starts at a given inverse, a covariance ``[D, D]``, or variances ``[D]``.

    Pyro's kernels set the unit matrix when they are set up, whatever was assigned before.
    """

    def __init__(self, inverse: Tensor) -> None:
        super().__init__()
        self.inverse = inverse

    def configure(
        self, mass_matrix_shape: Any, adapt_mass_matrix: bool = True, options: Any = None
    ) -> None:
        """Set up Pyro's adaptation, then the given matrix."""
        options = options or {}
        super().configure(mass_matrix_shape, adapt_mass_matrix, options)
        (names,) = mass_matrix_shape
        self.inverse_mass_matrix = {names: self.inverse.to(**options)}


class PackedNUTS(MCMCKernel):
    """A kernel for `pyro.infer.MCMC` in the place of ``pyro.infer.NUTS(model)``.

    It samples the packed vector of `LogDensity`: supports are read in each step, so that they may
    depend on other latents; flat priors and enumerated latents are allowed. The samples of `MCMC`
    are values of the sites, inside of their supports, ``initial_params`` unconstrained values as in
    Pyro. Without these a chain starts between -2 and 2. ``mcmc.diagnostics()`` has the numbers of
    gradients, ``"gradients"`` in all and ``"warm-up gradients"``, beside Pyro's own.

    Args:
        model: with continuous latents, and all data: no plate is subsampled.
        inverse_mass_matrix: a covariance ``[D, D]``, or variances ``[D]``, to begin with, in the
            order of `LogDensity`; by default ones.
        adapt_mass_matrix, full_mass, target_accept_prob, max_tree_depth: as in `pyro.infer.NUTS`.
        compile: gradients are machine code, which takes some seconds to make.

    `The No-U-turn sampler` (Hoffman and Gelman, arXiv 1111.4246).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import MCMC
    >>> def model():
    ...     alpha = pyro.sample("alpha", dist.Uniform(0.0, 1.0))
    ...     pyro.sample("beta", dist.Uniform(0.0, 1.0 - alpha))
    >>> mcmc = MCMC(PackedNUTS(model), num_samples=50, warmup_steps=50, disable_progbar=True)
    >>> mcmc.run()
    >>> bool((mcmc.get_samples()["alpha"] + mcmc.get_samples()["beta"] < 1).all())
    True
    """

    def __init__(
        self,
        model: Callable,
        *,
        inverse_mass_matrix: Tensor | None = None,
        adapt_mass_matrix: bool = True,
        full_mass: bool = False,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        compile: bool = False,
    ) -> None:
        self.model, self.start_matrix, self.compile = model, inverse_mass_matrix, compile
        self.options: dict[str, Any] = {
            "adapt_mass_matrix": adapt_mass_matrix,
            "full_mass": full_mass,
            "target_accept_prob": target_accept_prob,
            "max_tree_depth": max_tree_depth,
        }
        self.transforms: dict[str, Any] = {}  # which MCMC asks for: samples are values already
        self._given = list[Values]()  # where chains start, unconstrained
        self._values: Values = {}
        self._reset()

    def _reset(self) -> None:
        self._density: LogDensity | None = None
        self._potential: Potential | None = None
        self._kernel: NUTS | None = None
        self._steps = self._warmup_steps = self._warmup_gradients = 0

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Make the density of a model's call, and start a chain."""
        self._reset()
        trace = StartSearch(self.model, args, kwargs).trace
        density = self._density = LogDensity(self.model, args, kwargs, trace)
        if self._given:
            start = density.block.flatten(self._given[self._number()]).reshape(density.size)
        else:
            start = random_starts(density, 1)[0]
        start = start.to(density.start)
        potential = self._potential = Potential(density, start, compile=self.compile)
        kernel = self._kernel = NUTS(potential_fn=lambda z: potential(z[PACKED]), **self.options)
        if self.start_matrix is not None:
            kernel.mass_matrix_adapter = GivenMassMatrix(self.start_matrix)
        kernel.initial_params = {PACKED: start}
        kernel.setup(warmup_steps)
        self._values, self._warmup_steps = self._values_at(start), warmup_steps
        self._warmup_gradients = potential.num_gradients

    def _number(self) -> int:
        """Return which of the starts is that of this chain.

        Chains that run one after the other set theirs before. For processes `MCMC` sets all starts
        of the one kernel before it copies that, and gives them the chains' numbers as names.
        """
        name = multiprocessing.current_process().name
        return int(name) if name.isdigit() and int(name) < len(self._given) else -1

    def sample(self, params: Values) -> Values:
        """Take a step of the chain; return the values of the sites."""
        kernel, potential = self._running()
        u = kernel.sample(kernel.initial_params)[PACKED]
        self._steps += 1
        if self._steps <= self._warmup_steps:
            self._warmup_gradients = potential.num_gradients
        self._values = self._values_at(u)
        return self._values

    @torch.no_grad()
    def _values_at(self, u: Tensor) -> Values:
        assert self._density is not None
        return {name: each.detach() for name, each in self._density.values_at(u).items()}

    def _running(self) -> tuple[NUTS, Potential]:
        if self._kernel is None or self._potential is None:
            raise RuntimeError("The kernel is set up by MCMC.run().")
        return self._kernel, self._potential

    @property
    def initial_params(self) -> Values:
        """The sites' values where the chain is; set to unconstrained values for its start."""
        return self._values

    @initial_params.setter
    def initial_params(self, params: Values) -> None:
        self._given.append(params)

    @property
    def inverse_mass_matrix(self) -> Tensor:
        """The inverse mass matrix of the step, ``[D, D]`` or ``[D]``."""
        (matrix,) = self._running()[0].inverse_mass_matrix.values()
        return matrix

    @property
    def step_size(self) -> float:
        """The step size."""
        return self._running()[0].step_size

    def logging(self) -> Any:
        """Return step size and acceptance."""
        return self._running()[0].logging()

    def diagnostics(self) -> dict[str, Any]:
        """Return Pyro's diagnostics and the numbers of gradients."""
        kernel, potential = self._running()
        counts = {
            "gradients": potential.num_gradients,
            "warm-up gradients": self._warmup_gradients,
        }
        return {**kernel.diagnostics(), **counts}

    def cleanup(self) -> None:
        """Forget the chain."""
        self._given = []
        self._reset()


class NUTSStart(TypedDict):
    """Arguments of `pyro.infer.MCMC`."""

    kernel: PackedNUTS
    initial_params: Values
    num_chains: int
    warmup_steps: int


@sampling()
def nuts_start(
    guide: Callable,
    model: Callable,
    *args: Any,
    num_chains: int = 1,
    num_draws: int = DRAWS,
    compile: bool = False,
    **kwargs: Any,
) -> NUTSStart:
    """Return arguments of `pyro.infer.MCMC` for NUTS chains that start from a guide.

    Chains start at different draws of the guide, chosen by their Pareto-smoothed importance
    weights. The inverse mass matrix is the weighted covariance of the draws, and 50 steps of
    warm-up find a step size. With a k-hat of 0.7 or more it is that of the draws alone, and adapted
    in 500 steps. Only values of the density are computed here, no gradients.

    Args:
        guide: any guide that samples all continuous latents of the model.
        model, args, kwargs: the model and its arguments, with all data.
        num_draws: of the guide.
        compile: as in `PackedNUTS`.

    Returns:
        ``kernel``, a `PackedNUTS`, ``initial_params``, ``num_chains`` and ``warmup_steps``. The
        dictionary can be changed before it is used.

    Raises:
        ValueError: no draw has a weight; and as `posterior_draws` does.

    `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import MCMC
    >>> from pyro_recursive import pathfinder
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)
    >>> x = torch.tensor([2.0, 3.0])
    >>> start = nuts_start(pathfinder(model, x), model, x)
    >>> mcmc = MCMC(**start, num_samples=100, disable_progbar=True)
    >>> mcmc.run(x)
    >>> mcmc.get_samples()["z"].shape
    torch.Size([100])
    """
    check_at_least(1, num_chains=num_chains, num_draws=num_draws)
    trace = StartSearch(model, args, kwargs).trace
    density = LogDensity(model, args, kwargs, trace)
    with pyro.validation_enabled(False):  # points outside of a domain have a density of 0
        draws = draws_where_possible(density, guide, num_draws).draws
        return start_from(density, draws, num_chains, compile=compile)


def start_from(
    density: LogDensity, draws: Draws, num_chains: int, *, compile: bool = False
) -> NUTSStart:
    """Return arguments of `pyro.infer.MCMC` from draws of a guide with their weights."""
    u, log_weights = weighted_vectors(density, draws)
    if not bool(log_weights.isfinite().any()):
        raise ValueError(f"None of {len(draws)} draws of the guide has a weight.")
    smoothed = psis(log_weights)
    weights = smoothed.log_weights.exp()
    is_good = smoothed.pareto_k.item() < pareto_k_threshold(len(draws))
    count = int((weights > 0).sum())
    if count < num_chains:
        raise ValueError(
            f"{count} draws of the guide have a weight, and each of {num_chains} chains needs one. "
            "Give more num_draws, or a better guide."
        )
    chosen = torch.multinomial(weights, num_chains)
    equal = log_weights.isfinite().double()
    covariance = weighted_covariance(u, weights if is_good else equal / equal.sum())
    starts = [density.values(point) for point in u[chosen]]
    parameters = {name: torch.stack([each[name] for each in starts]) for name in starts[0]}
    if num_chains == 1:
        parameters = starts[0]
    options: dict[str, Any] = {
        "adapt_mass_matrix": not is_good,
        "full_mass": True,
        "compile": compile,
    }
    kernel = PackedNUTS(density.program.model, inverse_mass_matrix=covariance, **options)
    return {
        "kernel": kernel,
        "initial_params": parameters,
        "num_chains": num_chains,
        "warmup_steps": WARMUP if is_good else LONG_WARMUP,
    }


def weighted_covariance(u: Tensor, weights: Tensor) -> Tensor:
    """Return the covariance of points ``[S, D]`` by normalised weights, shrunk to its diagonal.

    Its diagonal counts as five draws of as many as the weights are worth.
    """
    ess = effective_sample_size(weights.log()).to(u)
    w = weights.to(u)[:, None]
    u = torch.where(w > 0, u, 0.0)
    centred = u - (w * u).sum(0)
    covariance = (w * centred).mT @ centred * ess / (ess - 1).clamp(min=1.0)
    diagonal = covariance.diagonal().clamp(min=torch.finfo(u.dtype).tiny).diag()
    return (ess * covariance + PRIOR_DRAWS * diagonal) / (ess + PRIOR_DRAWS)


class PossibleDraws(NamedTuple):
    """Draws at which a model runs, and whether there were others, at which it raises."""

    draws: Draws
    are_all: bool


def draws_where_possible(density: LogDensity, guide: Callable, count: int) -> PossibleDraws:
    """Return so many draws of a guide at which the model of a density runs.

    Draws at which it raises are left out: if a part of the draws raises, it is drawn again in
    halves. Weights that are not finite are 0.
    """
    call = density.program
    program = Program(call.model, guide, call.args, call.kwargs)
    parts, size, left, attempts, are_all = list[Draws](), count, count, 0, True
    while left:
        size = min(size, left)
        try:
            parts.append(draws_of(program, size, chunk_size=density.chunk))
        except FAILURES:
            attempts += size == 1
            if attempts == ATTEMPTS:
                raise
            size, are_all = max(1, size // 2), False
            # Runs that look at the structure restore the random state: without this they would
            # raise again.
            torch.rand((), device=density.start.device)
        else:
            attempts, left, size = 0, left - size, 2 * size
    draws = parts[0]
    if len(parts) > 1:
        sites = joined([part.sites for part in parts])
        log_p, log_q = map(torch.cat, zip(*(part.log_densities for part in parts), strict=True))
        draws = replace(draws, sites=sites, count=count, log_p=log_p, log_q=log_q)
    log_p, log_q = draws.log_densities
    has_weight = (log_p - log_q).isfinite()
    log_p, log_q = log_p.where(has_weight, -torch.inf), log_q.where(has_weight, 0.0)
    return PossibleDraws(replace(draws, log_p=log_p, log_q=log_q), are_all)


def weighted_vectors(density: LogDensity, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return draws as `packed` does, and their log-weights, ``[S]``: -inf for those not finite."""
    u = packed(density, draws)
    is_finite = u.isfinite().all(-1)
    log_weights = draws.log_weights.reshape(len(draws), -1).sum(-1)
    return torch.where(is_finite[:, None], u, 0.0), log_weights.where(is_finite, -torch.inf)


def packed(density: LogDensity, draws: Draws) -> Tensor:
    """Return draws of a model's latents as unconstrained vectors ``[S, D]``.

    By one run of the model on all draws, for the supports that each of them has.
    """
    block, program = density.block, density.program
    model = _Coordinates(block)(program.model)
    call = model, program.args, program.kwargs
    found = run_on_draws(*call, draws.of_this_call(), ModelRuns.computed, density.chunk)
    values = {
        slot.name: found[_coordinates(slot.name)].with_batch_dims(block.nesting)
        for slot in block.slots
    }
    return block.flatten(values).reshape(len(draws), density.size)


class _Coordinates(Messenger):
    """Adds deterministic sites with the unconstrained values of a block's sites to a model."""

    def __init__(self, block: LatentBlock) -> None:
        super().__init__()
        self.slots = {slot.name: slot for slot in block.slots}

    def _pyro_post_sample(self, msg: Any) -> None:
        slot = self.slots.get(msg["name"])
        if slot is not None:
            u = slot.of(msg["fn"]).transform.inv(msg["value"])
            pyro.deterministic(_coordinates(slot.name), u, event_dim=len(slot.event_shape))


def _coordinates(name: str) -> str:
    return f"{name} unconstrained"
