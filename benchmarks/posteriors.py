"""Classical models with awkward posteriors: Gaussians, mixtures and flows beside NUTS.

Three models whose evidence is known by quadrature, so that ``log p(x) - ELBO`` is the divergence
KL(q || p) of each guide:

- ``labels``: the means of a mixture of three normals, exchangeable: 3! equal modes in 3 dimensions;
- ``square``: ``z ~ N(0, 5), x ~ N(z^2, 1)``: two equal modes in 1 dimension;
- ``schools``: eight schools, not centred: one mode and a funnel, in 10 dimensions.

Every guide takes the same number of training steps, 8 draws in each (a mixture's are shared out to
its components), with Adam whose rate decays within each stage of training. NUTS runs chains from
dispersed starts. ``modes`` counts the modes with at least a tenth of their share of the draws.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, MCMC, NUTS, Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from tqdm import tqdm

from benchmarks.report import hardware, table, write_json
from pyro_recursive import (
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
    log_marginal,
)
from pyro_recursive.guides.flow import FlowGuide

DRAWS = 8  # of the guide in each training step
CLUSTERS = 3
POINTS_PER_CLUSTER = 8
EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
CHUNK = 100_000  # points of a grid evaluated at once
Draws = dict[str, Tensor]


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
class Problem:
    """A model with what is known about its posterior.

    ``mode_of`` tells in which of ``modes`` each draw lies; ``view`` gives what is drawn, one or two
    coordinates, and ``reference`` the log-density of those over a grid (up to a constant).
    """

    title: str
    model: Callable[[], None]
    components: int
    modes: int
    log_evidence: float
    mode_of: Callable[[Draws], Tensor]
    view: Callable[[Draws], Tensor]
    axes: tuple[tuple[str, float, float], ...]
    reference: Tensor


def labels() -> Problem:
    """The means of three clusters, which no prior tells apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([-3.0, 0.0, 3.0]).repeat(POINTS_PER_CLUSTER)
    x = centres + torch.randn(len(centres), generator=generator)

    def model() -> None:
        means = pyro.sample("means", dist.Normal(torch.zeros(CLUSTERS), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            clusters = dist.Categorical(logits=torch.zeros(CLUSTERS))
            pyro.sample("x", dist.MixtureSameFamily(clusters, dist.Normal(means, 1.0)), obs=x)

    orders = {order: i for i, order in enumerate(permutations(range(CLUSTERS)))}

    def mode_of(draws: Draws) -> Tensor:
        return torch.tensor([orders[tuple(o)] for o in draws["means"].argsort(-1).tolist()])

    axis = torch.linspace(-9, 9, 110)
    grid = torch.cartesian_prod(*[axis] * CLUSTERS)
    log_p = log_joint(model, {"means": grid}).reshape([len(axis)] * CLUSTERS)
    step = (axis[1] - axis[0]).item()
    return Problem(
        title="label switching: means of 3 clusters",
        model=model,
        components=math.factorial(CLUSTERS),
        modes=math.factorial(CLUSTERS),
        log_evidence=log_p.logsumexp((0, 1, 2)).item() + CLUSTERS * math.log(step),
        mode_of=mode_of,
        view=lambda draws: draws["means"][:, :2],
        axes=(("mean 1", -9.0, 9.0), ("mean 2", -9.0, 9.0)),
        reference=log_p.logsumexp(2),
    )


def square() -> Problem:
    """A square has two roots."""
    x = torch.tensor([4.5, 3.2, 4.3])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    axis = torch.linspace(-4, 4, 2001)
    log_p = log_joint(model, {"z": axis})
    return Problem(
        title="x ~ N(z², 1)",
        model=model,
        components=2,
        modes=2,
        log_evidence=log_p.logsumexp(0).item() + math.log((axis[1] - axis[0]).item()),
        mode_of=lambda draws: (draws["z"] > 0).long(),
        view=lambda draws: draws["z"][:, None],
        axes=(("z", -4.0, 4.0),),
        reference=log_p,
    )


def schools() -> Problem:
    """The eight schools of Rubin (1981), with effects in units of tau."""
    effects, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(effects)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, errors), obs=effects)

    log_tau, mu = torch.linspace(-9, 8, 1701), torch.linspace(-25, 30, 551)
    tau = log_tau.exp()[:, None, None]
    given = dist.Normal(mu[:, None], (errors.square() + tau.square()).sqrt())  # without theta
    log_p = given.log_prob(effects).sum(-1) + dist.Normal(0.0, 5.0).log_prob(mu)
    log_p = log_p + (dist.HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau)[:, None]
    cell = (mu[1] - mu[0]).item() * (log_tau[1] - log_tau[0]).item()
    return Problem(
        title="eight schools, not centred",
        model=model,
        components=4,
        modes=1,
        log_evidence=log_p.logsumexp((0, 1)).item() + math.log(cell),
        mode_of=lambda draws: torch.zeros(len(draws["mu"]), dtype=torch.long),
        view=lambda draws: torch.stack([draws["tau"].log(), draws["mu"]], -1),
        axes=(("log tau", -9.0, 8.0), ("mu", -25.0, 30.0)),
        reference=log_p,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "labels": labels,
    "square": square,
    "schools": schools,
}


@torch.no_grad()
def log_joint(model: Callable[[], None], points: Draws) -> Tensor:
    """Return log p(x, z) at points ``[count, *event]`` of each site, ``[count]``."""
    parts = []
    (name, values), *_ = points.items()
    for chunk in values.split(CHUNK):
        at = poutine.condition(model, {name: chunk[:, None]})
        with pyro.plate("points", len(chunk), dim=-2):
            trace = poutine.trace(at).get_trace()
        trace.compute_log_prob()
        terms = [site["log_prob"] for site in _sites(trace)]
        parts.append(sum(term.expand(len(chunk), -1).sum(-1) for term in terms))
    return torch.cat(parts)


def _sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    samples = (site for site in trace.nodes.values() if site["type"] == "sample")
    return [site for site in samples if not site_is_subsample(site)]


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
        each = max(2, int((1 - joint) * steps) // problem.components)
        schedule = Schedule(
            first=each,
            propose=each // 3,
            refine=each - each // 3,
            joint=steps - problem.components * each if joint else 0,
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
REFERENCE = "NUTS"


def main(arguments: list[str]) -> None:
    """Fit every guide to every model, run NUTS; print tables, write JSON and pictures."""
    options = _parse(arguments)
    settings, folder = _settings(options), Path(options.output)
    results: dict[str, Any] = {"settings": asdict(settings), "hardware": hardware(), "models": {}}
    for name in options.models:
        problem = PROBLEMS[name]()
        found, draws = _run(problem, options.methods, settings)
        results["models"][name] = found
        write_json(folder / "results.json", results)
        print(f"\n{report(found, problem)}\n")
        plot(problem, found, draws, folder / f"{name}.png")
    print(f"Wrote {folder / 'results.json'} and {', '.join(f'{n}.png' for n in options.models)}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks posteriors", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each guide")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="pictures: the first")
    parser.add_argument("--output", help="folder; default: runs/posteriors")
    parser.add_argument("--smoke", action="store_true", help="seconds: does everything run?")
    options = parser.parse_args(arguments)
    options.output = options.output or f"runs/posteriors{'-smoke' * options.smoke}"
    return options


def _settings(options: argparse.Namespace) -> Settings:
    if options.smoke:
        return Settings(12, 100, 200, chains=2, warmup=5, kept=5, seeds=(options.seeds[0],))
    seeds = tuple(options.seeds)
    return Settings(options.steps, 5000, 20_000, chains=4, warmup=200, kept=500, seeds=seeds)


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
    """Climb with Adam, afresh in each stage; in its second half the rate falls to a twentieth."""
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
        for site in _sites(trace)
        if not site["is_observed"]
    }
    kernel = NUTS(problem.model, target_accept_prob=0.9, max_tree_depth=7)
    sampler = MCMC(
        kernel,
        num_samples=settings.kept,
        warmup_steps=settings.warmup,
        initial_params=starts,
        disable_progbar=True,
    )
    sampler.run()
    return sampler.get_samples()


def report(found: dict[str, Any], problem: Problem) -> str:
    """Return the table of a model; over several seeds, means ± standard deviations."""
    header = ["guide", "ELBO", "KL(q||p)", "log p(x)", "± error", "ESS", "modes", "parts", "s"]
    rows = [_row(name, runs, problem) for name, runs in found["guides"].items()]
    nuts = found["nuts"]
    modes = f"{_covered(nuts['modes'], problem)} of {problem.modes}"
    rows.append([REFERENCE, "", "", "", "", "", modes, "", f"{nuts['seconds']:.0f}"])
    each = [str(_covered(shares, problem)) for shares in nuts["modes_by_chain"]]
    r_hat = ", ".join(f"{value:.2f}" for value in nuts["r_hat"])
    title = f"{found['title']}: log p(x) = {found['log_evidence']:.3f} by quadrature"
    ending = f"NUTS: modes in each chain {', '.join(each)}; split R-hat of what is drawn {r_hat}"
    return f"{title}\n{table(header, rows)}\n{ending}"


def _row(name: str, runs: list[dict[str, Any]], problem: Problem) -> list[str]:
    modes = sorted({_covered(run["modes"], problem) for run in runs})
    parts = sorted({run["components"] for run in runs})
    return [
        name,
        _over_seeds(runs, "elbo"),
        _over_seeds(runs, "kl"),
        _over_seeds(runs, "log_marginal"),
        f"{max(run['standard_error'] for run in runs):.3f}",
        f"{min(run['ess'] for run in runs):.0f}",
        f"{'-'.join(map(str, modes))} of {problem.modes}",
        "-".join(map(str, parts)),
        f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
    ]


def _over_seeds(runs: list[dict[str, Any]], key: str) -> str:
    values = torch.tensor([run[key] for run in runs])
    spread = f" ± {values.std().item():.3f}" if len(runs) > 1 else ""
    return f"{values.mean().item():.3f}{spread}"


def _covered(shares: list[float], problem: Problem) -> int:
    return sum(share >= 0.1 / problem.modes for share in shares)


def plot(problem: Problem, found: dict[str, Any], draws: dict[str, Draws], path: Path) -> None:
    """Draw the posterior, and over it the draws of NUTS and of each guide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [REFERENCE, *(name for name in draws if name != REFERENCE)]
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(13, 3.1 * rows), sharex=True, sharey=True, layout="constrained"
    )
    for number, (panel, name) in enumerate(zip(axes.flat, names, strict=False)):
        _panel(panel, problem, problem.view(draws[name]), f"C{number}")
        modes = "" if problem.modes == 1 else f", modes {_modes(name, found, problem)}"
        kl = "" if name == REFERENCE else f": KL {found['guides'][name][0]['kl']:.2f}"
        panel.set_title(f"{name}{kl}{modes}", fontsize=10)
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"{problem.title}: the posterior by quadrature (grey) and draws")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _modes(name: str, found: dict[str, Any], problem: Problem) -> str:
    run = found["nuts"] if name == REFERENCE else found["guides"][name][0]
    return f"{_covered(run['modes'], problem)}/{problem.modes}"


def _panel(panel: Any, problem: Problem, draws: Tensor, color: str) -> None:
    density = (problem.reference - problem.reference.max()).exp()
    points = [
        torch.linspace(low, high, size)
        for (_, low, high), size in zip(problem.axes, density.shape, strict=True)
    ]
    if draws.shape[-1] == 1:
        _, low, high = problem.axes[0]
        mass = density / (density.sum() * (points[0][1] - points[0][0]))
        panel.fill_between(points[0], mass, color="0.75")
        panel.hist(
            draws[:, 0].numpy(), 120, (low, high), density=True, histtype="step", color=color
        )
        panel.set_xlabel(problem.axes[0][0])
        return
    levels = _levels(density)
    panel.contourf(*points, density.T, levels=[*levels, 2.0], colors=["0.9", "0.8", "0.65"])
    shown = draws[:: max(1, len(draws) // 1000)]
    panel.plot(*shown.T, ".", markersize=1.5, color=color, alpha=0.7)
    box = [_extent(density, points, axis, levels[0]) for axis in (0, 1)]
    panel.set(xlim=box[0], ylim=box[1], xlabel=problem.axes[0][0], ylabel=problem.axes[1][0])


def _levels(density: Tensor, masses: tuple[float, ...] = (0.99, 0.9, 0.5)) -> list[float]:
    """Return the heights of the regions of highest density that hold so much of the mass."""
    heights = density.flatten().sort(descending=True).values
    held = heights.cumsum(0) / heights.sum()
    return [heights[int((held < mass).sum())].item() for mass in masses]


def _extent(density: Tensor, points: list[Tensor], axis: int, level: float) -> tuple[float, ...]:
    inside = points[axis][(density > level).any(1 - axis)]
    margin = 0.25 * (inside[-1] - inside[0]).item()
    return inside[0].item() - margin, inside[-1].item() + margin
