"""Classical models with awkward posteriors: Gaussians, mixtures and flows beside NUTS.

Three models whose evidence is known by quadrature, so that ``log p(x) - ELBO`` is the divergence
KL(q || p) of each guide:

- ``labels``: the means of a mixture of three normals, exchangeable: 3! equal modes in 3 dimensions;
- ``square``: ``z ~ N(0, 5), x ~ N(z^2, 1)``: two equal modes in 1 dimension;
- ``schools``: eight schools, not centred: one mode and a funnel, in 10 dimensions.

Every guide takes the same number of training steps, with 8 draws of it, or of each component of a
mixture; a mixture that grows shares its steps out to its components. ``boosting`` has the residual
ELBO, a line search for each weight, and no training of all components at the end. NUTS runs chains
from starts as dispersed as the prior. ``modes`` counts the modes with at least a tenth of their
share of the draws, ``parts`` the components.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, MCMC, NUTS, Trace_ELBO
from torch.distributions import biject_to
from tqdm import tqdm

from benchmarks.posterior_report import REFERENCE, plot, report
from benchmarks.report import Results, finish, hardware, write_json
from benchmarks.run import base_parser, parse
from benchmarks.tasks.posteriors import PROBLEMS, Draws, Problem, sample_sites
from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
    log_marginal,
)

DRAWS = 8  # of the guide in each training step


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    steps: int
    samples: int
    elbo_draws: int
    chains: int
    warmup: int
    kept: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """How a guide is made and which loss trains it."""

    guide: Callable[[Problem, int], Any]
    loss: Callable[[Problem], ELBO]
    rate: float = 0.05  # of Adam


def _plain(problem: Problem) -> ELBO:
    return Trace_ELBO(DRAWS, vectorize_particles=True, max_plate_nesting=1)


def _recursive(joint: float, **options: str) -> Method:
    """Return a mixture grown one by one, with a share of the steps for all components together."""

    def guide(problem: Problem, steps: int) -> RecursiveMixtureGuide:
        each = max(4, int((1 - joint) * steps) // problem.components)
        schedule = Schedule(
            first=each,
            propose=each // 3,
            refine=each - each // 3,
            joint=max(1, steps - problem.components * each) if joint else 0,
        )
        return RecursiveMixtureGuide(problem.model, problem.components, schedule=schedule)

    def loss(problem: Problem) -> ELBO:
        return RecursiveMixture_ELBO(DRAWS, update="guide", **options)

    return Method(guide, loss)


METHODS: dict[str, Method] = {
    "mean field": Method(lambda p, steps: AmortizedGuide(p.model), _plain),
    "full rank": Method(lambda p, steps: AmortizedGuide(p.model, family="full"), _plain),
    "mixture": Method(
        lambda p, steps: MixtureGuide(p.model, p.components),
        lambda p: Stratified_ELBO(DRAWS, estimator="stl"),
    ),
    "recursive": _recursive(joint=0.2),
    "boosting": _recursive(0.0, objective="relbo", proposal="relbo", weights="line_search"),
    "coupling flow": Method(lambda p, steps: FlowGuide(p.model, "coupling"), _plain, 0.005),
    "spline flow": Method(lambda p, steps: FlowGuide(p.model, "spline"), _plain, 0.005),
}


def main(arguments: list[str]) -> None:
    """Fit every guide to every model, run NUTS; print tables, write JSON and pictures."""
    parser = base_parser("posteriors", __doc__)
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each guide")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="pictures: the first")
    options = parse(parser, arguments)
    if options.smoke:
        settings = Settings(12, 100, 200, chains=2, warmup=5, kept=5, seeds=(options.seeds[0],))
    else:
        settings = Settings(options.steps, 5000, 20_000, 4, 200, 300, tuple(options.seeds))
    folder, reports, pictures = Path(options.output), [], []
    results: Results = {"settings": asdict(settings), "hardware": hardware(), "models": {}}
    for name in options.models:
        problem = PROBLEMS[name]()
        found, draws = _run(problem, options.methods, settings)
        results["models"][name] = found
        write_json(folder / "results.json", results)
        reports.append(report(found, problem))
        pictures.append(folder / f"{name}.png")
        plot(problem, found, draws, pictures[-1])
    finish(results, folder / "results.json", "\n\n".join(reports), pictures)


def _run(problem: Problem, methods: list[str], settings: Settings) -> tuple[dict, dict]:
    """Return the numbers of a model, and its draws of the first seed."""
    found: dict[str, Any] = {"title": problem.title, "log_evidence": problem.log_evidence}
    found["guides"], draws = {}, {}
    for name in tqdm(methods, desc=problem.title):
        runs = [_fit(problem, METHODS[name], settings, seed) for seed in settings.seeds]
        found["guides"][name], draws[name] = [numbers for numbers, _ in runs], runs[0][1]
    found["nuts"], draws[REFERENCE] = _nuts(problem, settings)
    return found, draws


def _fit(problem: Problem, method: Method, settings: Settings, seed: int) -> tuple[dict, Draws]:
    """Train a guide and judge it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = method.guide(problem, settings.steps)
    start = time.perf_counter()
    train(problem.model, guide, method.loss(problem), settings.steps, method.rate)
    seconds = time.perf_counter() - start
    pyro.set_rng_seed(seed + 1000)
    elbo, error = _elbo(problem.model, guide, settings.elbo_draws)
    evidence = log_marginal(problem.model, guide, num_particles=settings.samples, diagnostics=True)
    draws = _draws(guide, settings.samples)
    numbers = {
        "elbo": elbo,
        "elbo_error": error,
        "kl": problem.log_evidence - elbo,
        "log_marginal": evidence.log_marginal.item(),
        "standard_error": evidence.standard_error.item(),
        "ess": evidence.ess.item(),
        "modes": _shares(problem, draws),
        "components": len(getattr(guide, "members", (0,))),
        "seconds": seconds,
    }
    return numbers, draws


def train(model: Callable[[], None], guide: Any, loss: ELBO, steps: int, rate: float) -> None:
    """Train with a new Adam in each stage; in its second half the rate falls to a twentieth."""
    guide.prepare()
    stage, optimizer = None, torch.optim.Adam(guide.parameters(), lr=rate)
    for step in range(steps):
        now = getattr(guide, "stage", None)
        if now != stage or (now is not None and guide.steps_taken == 0):
            stage, optimizer = now, torch.optim.Adam(guide.parameters(), lr=rate)
        done = step / steps if now is None else guide.steps_taken / max(now.steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.05 ** min(1.0, max(0.0, 2 * done - 1))
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide)
        optimizer.step()


def _elbo(model: Callable[[], None], guide: Any, draws: int) -> tuple[float, float]:
    """Return the ELBO and its standard error."""
    loss = Trace_ELBO(draws // 20, vectorize_particles=True, max_plate_nesting=1)
    values = -torch.tensor([loss.loss(model, guide) for _ in range(20)])
    return values.mean().item(), values.std().item() / 20**0.5


@torch.no_grad()
def _draws(guide: Any, count: int) -> Draws:
    """Return draws of every site, ``[count, ...]``."""
    with pyro.plate("draws", count, dim=-2):
        found = guide()
    return {n: value.squeeze(1) if value.shape[1] == 1 else value for n, value in found.items()}


def _shares(problem: Problem, draws: Draws) -> list[float]:
    """Return the share of the draws in each mode."""
    count = torch.bincount(problem.mode_of(draws), minlength=problem.modes)
    return (count / count.sum()).tolist()


def _nuts(problem: Problem, settings: Settings) -> tuple[dict[str, Any], Draws]:
    """Run chains from starts that are dispersed as the prior."""
    pyro.set_rng_seed(settings.seeds[0])
    start = time.perf_counter()
    chains = [_chain(problem, settings) for _ in range(settings.chains)]
    seconds = time.perf_counter() - start
    draws = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    views = torch.stack([problem.view(chain) for chain in chains])
    return {
        "modes": _shares(problem, draws),
        "modes_by_chain": [_shares(problem, chain) for chain in chains],
        "r_hat": [pyro.ops.stats.split_gelman_rubin(v).item() for v in views.unbind(-1)],
        "seconds": seconds,
    }, draws


def _chain(problem: Problem, settings: Settings) -> Draws:
    trace = poutine.trace(problem.model).get_trace()
    starts = {
        site["name"]: biject_to(site["fn"].support).inv(site["value"])
        for site in sample_sites(trace)
        if not site["is_observed"]
    }
    kernel = NUTS(problem.model, target_accept_prob=0.9, max_tree_depth=6)
    sampler = MCMC(
        kernel,
        num_samples=settings.kept,
        warmup_steps=settings.warmup,
        initial_params=starts,
        disable_progbar=True,
    )
    sampler.run()
    return sampler.get_samples()
