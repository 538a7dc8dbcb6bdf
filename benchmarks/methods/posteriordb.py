"""Approximations of a posterior, each from the model alone: guides, Pathfinder and NUTS.

A method gets a `Run` and returns a guide, or draws. Guides without whitening start at the location
that Pathfinder finds on 4 paths (Pyro's autoguides too), with their own default scale, and take
``settings.steps`` steps of Adam with `DRAWS` draws each, of each component of a mixture.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.infer import ELBO, MCMC, Trace_ELBO, autoguide
from pyro.infer.autoguide import init_to_value
from pyro.ops.stats import effective_sample_size
from pyro.poutine.messenger import Messenger
from torch import Tensor

from benchmarks.posteriors import train
from benchmarks.tasks.reference import Model, Posterior, Values
from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    CompiledSVI,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
    fit,
    fit_or_sample,
    nuts_start,
    pathfinder,
)
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.training.nuts import PackedNUTS

DRAWS = 8  # of a guide, or of each component, in each step
NESTING = 1  # of the plates of all models
RATE, RATE_OF_FLOWS, RATE_OF_RULE = 0.02, 0.005, 0.05  # of Adam; the rule halves it
COMPONENTS = 3  # of mixtures, or the number of modes where that is more


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result, beside posterior, method and seed."""

    steps: int
    scored: int = 10_000  # draws of a guide that are compared with the reference
    warmup: int = 500  # of NUTS from cold
    kept: int = 1000  # draws of NUTS
    compiled: bool = False  # its gradients: of seconds alone, so that results of both go together


class Counted:
    """A model that counts points at which its density is evaluated, with a gradient or without.

    Points are the entries of the batch of its first latent, which must lie outside of its plates.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.gradients, self.values = model, 0, 0

    def __call__(self) -> None:
        with _Counter(self):
            self.model()

    def add(self, points: int, with_gradient: bool) -> None:
        if with_gradient:
            self.gradients += points
        else:
            self.values += points


class _Counter(Messenger):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted, self.is_counted = counted, False

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if self.is_counted or msg["is_observed"] or not isinstance(value, Tensor):
            return
        self.is_counted = True
        points = value.shape[: value.dim() - msg["fn"].event_dim].numel()
        self.counted.add(points, torch.is_grad_enabled() and value.requires_grad)


@contextmanager
def counting(counted: Counted) -> Iterator[None]:
    """Count second derivatives at a point as D gradients, one for each backward pass."""
    hessian = LogDensity.hessian

    def counted_hessian(density: LogDensity, u: Tensor) -> Any:
        counted.gradients += density.size * u.shape[:-1].numel()
        return hessian(density, u)

    with patch.object(LogDensity, "hessian", counted_hessian):
        yield


@dataclass(frozen=True)
class Run:
    """A posterior to approximate, by a model that counts, and the settings."""

    posterior: Posterior
    model: Counted
    settings: Settings

    @cached_property
    def start(self) -> Values:
        """The location of the best Gaussian on four paths, in the latents' own space."""
        search = StartSearch(self.model, (), {}, "pathfinder")
        density = LogDensity(self.model, (), {}, search.trace)
        return density.values_at(density.block.flatten(search.find()).reshape(-1))

    @property
    def components(self) -> int:
        return max(COMPONENTS, self.posterior.modes)


@dataclass(frozen=True)
class Sampled:
    """Draws of a sampler ``[S, *shape]``, with what it says about them."""

    draws: Values
    gradients: int
    about: dict[str, Any]


def elbo() -> ELBO:
    return Trace_ELBO(DRAWS, vectorize_particles=True, max_plate_nesting=NESTING)


@dataclass(frozen=True)
class Trained:
    """A method that trains a guide of a run."""

    make: Callable[[Run], Any]
    loss: Callable[[], ELBO] = elbo
    rate: float = RATE

    def __call__(self, run: Run) -> Any:
        guide = self.make(run)
        train(run.model, guide, self.loss(), run.settings.steps, self.rate)
        return guide

    def costs(self, run: Run, steps: int) -> dict[str, float]:
        """Return the processor's milliseconds of steps, eager and compiled, and s of compiling."""
        found = {}
        for name, engine in (("eager", "eager"), ("compiled", "auto")):
            pyro.clear_param_store()
            adam = pyro.optim.Adam({"lr": self.rate})
            options: Any = {"engine": engine, "strict": engine == "auto"}
            svi = CompiledSVI(run.model, self.make(run), adam, self.loss(), **options)
            times = [_processor_seconds()]
            for count in (3, steps):
                svi.run(count)
                times.append(_processor_seconds())
            found[name] = 1e3 * (times[2] - times[1]) / steps
        return found | {"compiling": times[1] - times[0]}


def _processor_seconds() -> float:
    """Return the time of this process and of compilers that it ran."""
    return sum(os.times()[:4])


def _recursive_loss() -> ELBO:
    return RecursiveMixture_ELBO(DRAWS, update="guide")


def _gaussian(run: Run, **options: Any) -> AmortizedGuide:
    return AmortizedGuide(run.model, init_loc_fn=run.start, **options)


def _flow(run: Run, kind: str) -> FlowGuide:
    return FlowGuide(run.model, kind, init_loc_fn=run.start)


def _of_pyro(kind: str, run: Run) -> Any:
    return getattr(autoguide, kind)(run.model, init_loc_fn=init_to_value(values=run.start))


def _laplace(run: Run) -> Any:
    guide = _of_pyro("AutoLaplaceApproximation", run)
    train(run.model, guide, Trace_ELBO(), run.settings.steps, RATE)
    return guide.laplace_approximation()


def _mixture(run: Run) -> MixtureGuide:
    return MixtureGuide(run.model, run.components, init_loc_fn=run.start)


def _recursive(run: Run, **options: Any) -> RecursiveMixtureGuide:
    """Return a mixture to grow: a fifth of the steps is for all components together."""
    steps, count = run.settings.steps, run.components
    each = max(4, steps * 4 // 5 // count)
    schedule = Schedule(
        first=each, propose=each // 3, refine=each - each // 3, joint=max(1, steps - count * each)
    )
    return RecursiveMixtureGuide(run.model, count, schedule=schedule, family="full", **options)


def _stops(run: Run) -> Any:
    """Train a whitened Gaussian until it is within 0.01 nats of its optimum, as `fit` judges."""
    guide = AmortizedGuide(run.model, family="full", whiten=True)
    adam = partial(torch.optim.Adam, lr=RATE_OF_RULE)
    most = 20 * run.settings.steps
    options: Any = {"steps": "auto", "max_steps": most, "optimizer": adam, "progress": False}
    fit(run.model, guide, (), loss=elbo(), **options)
    return guide


def _nuts(run: Run, full_mass: bool) -> Sampled:
    """Run NUTS from a random start, as Stan does."""
    settings = run.settings
    kernel = PackedNUTS(run.model, full_mass=full_mass, compile=settings.compiled)
    return _sampled(MCMC(kernel, settings.kept, settings.warmup, disable_progbar=True), 0)


def _nuts_from_pathfinder(run: Run) -> Sampled:
    guide = pathfinder(run.model, paths=PATHS)
    start = nuts_start(guide, run.model, compile=run.settings.compiled)
    chain = MCMC(**start, num_samples=run.settings.kept, disable_progbar=True)
    return _sampled(chain, run.model.gradients)


def _automatic(run: Run) -> Sampled:
    """Take what `fit_or_sample` gives by default: its number of draws is its own, too."""
    found = fit_or_sample(run.model, compile=run.settings.compiled)
    last = found.stages[-1]
    about: dict[str, Any] = {"stage": last.name, "ess": last.ess, "guide_k": found.pareto_k}
    if found.mcmc is None:
        about |= {"pareto_k": found.pareto_k, "elbo": last.elbo}
    else:
        about |= {"r_hat": last.r_hat, "divergences": last.divergences}
    draws = {name: site.value for name, site in found.draws.sites.items()}
    return Sampled(draws, found.num_gradients, about)


def _sampled(chain: MCMC, gradients: int) -> Sampled:
    """Run a chain that was prepared with so many gradients."""
    chain.run()
    found = chain.diagnostics()
    counts = {name: sum(found[name].values()) for name in ("gradients", "warm-up gradients")}
    draws = chain.get_samples()
    ess = [effective_sample_size(draw[None]).min().item() for draw in draws.values()]
    about = {
        "ess": min(ess),
        "warmup_gradients": counts["warm-up gradients"],
        "divergences": sum(len(each) for each in found["divergences"].values()),
    }
    return Sampled(draws, gradients + counts["gradients"], about)


PATHS = 8
METHODS: dict[str, Callable[[Run], Any]] = {
    "mean field": Trained(_gaussian),
    "mean field, prior median": Trained(lambda run: AmortizedGuide(run.model)),
    "full rank": Trained(partial(_gaussian, family="full")),
    "full rank, IWAE": Trained(partial(_gaussian, family="full"), partial(IWAE_ELBO, DRAWS)),
    "AutoNormal": Trained(partial(_of_pyro, "AutoNormal")),
    "AutoMultivariateNormal": Trained(partial(_of_pyro, "AutoMultivariateNormal")),
    "AutoLowRank": Trained(partial(_of_pyro, "AutoLowRankMultivariateNormal")),
    "AutoLaplace": _laplace,
    "AutoIAF": Trained(partial(_of_pyro, "AutoIAFNormal"), rate=RATE_OF_FLOWS),
    "coupling flow": Trained(partial(_flow, kind="coupling"), rate=RATE_OF_FLOWS),
    "spline flow": Trained(partial(_flow, kind="spline"), rate=RATE_OF_FLOWS),
    "mixture": Trained(_mixture, lambda: Stratified_ELBO(DRAWS, estimator="stl")),
    "recursive from noise": Trained(
        lambda run: _recursive(run, paths=0, init_loc_fn=run.start), _recursive_loss
    ),
    "recursive from paths": Trained(lambda run: _recursive(run, whiten=True), _recursive_loss),
    "Pathfinder 1": lambda run: pathfinder(run.model, paths=1),
    "Pathfinder 8": lambda run: pathfinder(run.model, paths=PATHS),
    "whitened full rank": Trained(
        lambda run: AmortizedGuide(run.model, family="full", whiten=True)
    ),
    "whitened coupling": Trained(
        lambda run: FlowGuide(run.model, "coupling", whiten=True), rate=RATE_OF_FLOWS
    ),
    "whitened, auto stop": _stops,
    "fit_or_sample": _automatic,
    "NUTS dense": partial(_nuts, full_mass=True),
    "NUTS diagonal": partial(_nuts, full_mass=False),
    "NUTS from Pathfinder": _nuts_from_pathfinder,
}
