"""Classical models with awkward posteriors: Gaussians, mixtures and flows beside NUTS.

Three models whose evidence is known by quadrature, so that ``log p(x) - ELBO`` is the divergence
KL(q || p) of each guide:

- ``labels``: the means of a mixture of three normals, exchangeable: 3! equal modes in 3 dimensions;
- ``square``: ``z ~ N(0, 5), x ~ N(z^2, 1)``: two equal modes in 1 dimension;
- ``schools``: eight schools, not centred: one mode and a funnel, in 10 dimensions.

Every guide takes the same number of training steps, with 8 draws of it, or of each component of a
mixture; a mixture that grows shares its steps out to its components, and ends with its schedule.
``recursive`` grows from noise, ``from paths`` has components from `pathfinder`'s paths first.
``boosting`` has the residual ELBO, a line search for each weight, and no training of all components
at the end. ``gradients`` counts those of the model's density, one for each draw. NUTS runs chains
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
from pyro.infer import ELBO, MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import init_to_sample
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import Results, figure, finish, hardware, spread, table, write_json
from benchmarks.run import base_parser, parse
from benchmarks.tasks.posteriors import PROBLEMS, Draws, Problem
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
from pyro_recursive.evaluation import importance_weights, posterior_draws
from pyro_recursive.guides.base import LatentGuide

DRAWS = 8  # of the guide in each training step
REFERENCE = "NUTS"


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    seeds: tuple[int, ...]
    steps: int
    samples: int = 5000
    elbo_draws: int = 20_000
    chains: int = 4
    warmup: int = 200
    kept: int = 300


@dataclass(frozen=True)
class Method:
    """How a guide is made and which loss trains it."""

    guide: Callable[[Problem, int], Any]
    loss: Callable[[], ELBO]
    rate: float = 0.05  # of Adam


def _plain() -> ELBO:
    return Trace_ELBO(DRAWS, vectorize_particles=True, max_plate_nesting=1)


def _recursive(joint: float, paths: int | None = 0, **options: Any) -> Method:
    """Return a mixture grown one by one, with a share of the steps for all components together."""

    def guide(problem: Problem, steps: int) -> RecursiveMixtureGuide:
        each = max(4, int((1 - joint) * steps) // problem.components)
        schedule = Schedule(
            first=each,
            propose=each // 3,
            refine=each - each // 3,
            joint=max(1, steps - problem.components * each) if joint else 0,
        )
        own: dict[str, Any] = {"schedule": schedule, "paths": paths}
        return RecursiveMixtureGuide(problem.model, problem.components, **own)

    return Method(guide, lambda: RecursiveMixture_ELBO(DRAWS, update="guide", **options))


METHODS: dict[str, Method] = {
    "mean field": Method(lambda p, steps: AmortizedGuide(p.model), _plain),
    "full rank": Method(lambda p, steps: AmortizedGuide(p.model, family="full"), _plain),
    "mixture": Method(
        lambda p, steps: MixtureGuide(p.model, p.components),
        lambda: Stratified_ELBO(DRAWS, estimator="stl"),
    ),
    "recursive": _recursive(joint=0.2),
    "from paths": _recursive(joint=0.2, paths=None),
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
    settings = Settings(tuple(options.seeds), options.steps)
    if options.smoke:
        settings = Settings((options.seeds[0],), 12, 100, 200, chains=2, warmup=5, kept=5)
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


def _fit(problem: Problem, method: Method, settings: Settings, seed: int) -> tuple[dict, Any]:
    """Train a guide and judge it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = method.guide(problem, settings.steps)
    start = time.perf_counter()
    gradients = train(problem.model, guide, method.loss(), settings.steps, method.rate)
    seconds = time.perf_counter() - start
    pyro.set_rng_seed(seed + 1000)
    weights = importance_weights(problem.model, guide, num_particles=settings.elbo_draws)
    elbo = weights.log_weights.mean().item()
    evidence = log_marginal(problem.model, guide, num_particles=settings.samples, diagnostics=True)
    draws = posterior_draws(problem.model, guide, num_draws=settings.samples)
    numbers = {
        "elbo": elbo,
        "elbo_error": weights.log_weights.std().item() / settings.elbo_draws**0.5,
        "kl": problem.log_evidence - elbo,
        "log_marginal": evidence.log_marginal.item(),
        "standard_error": evidence.standard_error.item(),
        "ess": evidence.ess.item(),
        "modes": _shares(problem, draws),
        "components": len(getattr(guide, "members", (0,))),
        "gradients": gradients,
        "seconds": seconds,
    }
    return numbers, draws


def train(model: Callable[[], None], guide: Any, loss: ELBO, steps: int, rate: float) -> int:
    """Train with a new Adam in each stage; in its second half the rate falls to a twentieth.

    Return how many gradients of the model's density that took.
    """
    guide.prepare() if isinstance(guide, LatentGuide) else guide()  # creates its parameters
    gradients = 0
    stage, optimizer = None, torch.optim.Adam(guide.parameters(), lr=rate)
    for step in range(steps):
        now = getattr(guide, "stage", None)
        if step > 0 and now is not None and guide.steps_left == 0:
            break
        if now != stage or (now is not None and guide.steps_taken == 0):
            stage, optimizer = now, torch.optim.Adam(guide.parameters(), lr=rate)
        done = step / steps if now is None else guide.steps_taken / max(now.steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.05 ** min(1.0, max(0.0, 2 * done - 1))
        is_alone = (
            now is not None and now.kind in ("first", "propose") and now.component is not None
        )
        gradients += DRAWS * (1 if is_alone else len(getattr(guide, "members", (0,))))
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide)
        optimizer.step()
    report = getattr(guide, "report", None)
    return gradients + (0 if report is None else report.num_gradients)


def _shares(problem: Problem, draws: Any) -> list[float]:
    """Return the share of the draws in each mode."""
    count = torch.bincount(problem.mode_of(draws), minlength=problem.modes)
    return (count / count.sum()).tolist()


def _nuts(problem: Problem, settings: Settings) -> tuple[dict[str, Any], Any]:
    """Run chains from starts that are dispersed as the prior."""
    pyro.set_rng_seed(settings.seeds[0])
    start, chains = time.perf_counter(), []
    for _ in range(settings.chains):
        options = {"target_accept_prob": 0.9, "max_tree_depth": 6}
        kernel = NUTS(problem.model, init_strategy=init_to_sample, **options)
        sampler = MCMC(kernel, settings.kept, warmup_steps=settings.warmup, disable_progbar=True)
        sampler.run()
        chains.append(sampler.get_samples())
    seconds = time.perf_counter() - start
    draws = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    views = torch.stack([problem.view(chain) for chain in chains])
    return {
        "modes": _shares(problem, draws),
        "modes_by_chain": [_shares(problem, chain) for chain in chains],
        "r_hat": [pyro.ops.stats.split_gelman_rubin(v).item() for v in views.unbind(-1)],
        "seconds": seconds,
    }, draws


# The report.


def report(found: dict[str, Any], problem: Problem) -> str:
    """Return the table of a model; over several seeds, means ± standard deviations."""
    header = [
        "guide",
        "ELBO",
        "KL(q||p)",
        "log p(x)",
        "± error",
        "ESS",
        "modes",
        "parts",
        "gradients",
        "s",
    ]
    rows = [_row(name, runs, problem) for name, runs in found["guides"].items()]
    nuts = found["nuts"]
    modes = f"{_covered(nuts['modes'], problem)} of {problem.modes}"
    rows.append([REFERENCE, "", "", "", "", "", modes, "", "", f"{nuts['seconds']:.0f}"])
    each = [str(_covered(shares, problem)) for shares in nuts["modes_by_chain"]]
    r_hat = ", ".join(f"{value:.2f}" for value in nuts["r_hat"])
    title = f"{found['title']}: log p(x) = {found['log_evidence']:.3f} by quadrature"
    ending = f"NUTS: modes in each chain {', '.join(each)}; split R-hat of what is drawn {r_hat}"
    return f"{title}\n{table(header, rows)}\n{ending}"


def _row(name: str, runs: list[dict[str, Any]], problem: Problem) -> list[str]:
    modes = sorted({_covered(run["modes"], problem) for run in runs})
    parts = sorted({run["components"] for run in runs})
    keys = ("elbo", "kl", "log_marginal")
    return [
        name,
        *(spread(torch.tensor([run[key] for run in runs]), digits=3) for key in keys),
        f"{max(run['standard_error'] for run in runs):.3f}",
        f"{min(run['ess'] for run in runs):.0f}",
        f"{'-'.join(map(str, modes))} of {problem.modes}",
        "-".join(map(str, parts)),
        f"{sum(run['gradients'] for run in runs) / len(runs):,.0f}",
        f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
    ]


def _covered(shares: list[float], problem: Problem) -> int:
    return sum(share >= 0.1 / problem.modes for share in shares)


def plot(problem: Problem, found: dict[str, Any], draws: dict[str, Draws], path: Path) -> None:
    """Draw the posterior, and over it the draws of NUTS and of each guide."""
    names, columns = [REFERENCE, *(name for name in draws if name != REFERENCE)], 4
    rows = -(-len(names) // columns)
    options = {"figsize": (13, 3.1 * rows), "sharex": True, "sharey": True}
    with figure(path, rows, columns, 80, **options) as (drawn, axes):
        for number, (panel, name) in enumerate(zip(axes.flat, names, strict=False)):
            _panel(panel, problem, problem.view(draws[name]), f"C{number}")
            modes = "" if problem.modes == 1 else f", modes {_modes(name, found, problem)}"
            kl = "" if name == REFERENCE else f": KL {found['guides'][name][0]['kl']:.2f}"
            panel.set_title(f"{name}{kl}{modes}", fontsize=10)
        for panel in axes.flat[len(names) :]:
            panel.set_visible(False)
        drawn.suptitle(f"{problem.title}: the posterior by quadrature (grey) and draws")


def _modes(name: str, found: dict[str, Any], problem: Problem) -> str:
    run = found["nuts"] if name == REFERENCE else found["guides"][name][0]
    return f"{_covered(run['modes'], problem)}/{problem.modes}"


def _panel(panel: Any, problem: Problem, draws: Tensor, color: str) -> None:
    density = (problem.reference - problem.reference.max()).exp()
    names, lows, highs = zip(*problem.axes, strict=True)
    points = [torch.linspace(*axis) for axis in zip(lows, highs, density.shape, strict=True)]
    panel.set_xlabel(names[0])
    if draws.shape[-1] == 1:
        mass = density / (density.sum() * (points[0][1] - points[0][0]))
        panel.fill_between(points[0], mass, color="0.75")
        options = {"density": True, "histtype": "step", "color": color}
        panel.hist(draws[:, 0].numpy(), 120, (lows[0], highs[0]), **options)
        return
    levels = [0.01, 0.1, 0.5, 1.01]  # of the highest density
    panel.contourf(*points, density.T, levels=levels, colors=["0.9", "0.8", "0.65"])
    shown = draws[:: max(1, len(draws) // 1000)]
    panel.plot(*shown.T, ".", markersize=1.5, color=color, alpha=0.7)
    x, y = (points[axis][(density > 1e-3).any(1 - axis)] for axis in (0, 1))
    panel.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), ylabel=names[1])
