"""Pyro's own examples: every guide and loss that applies, what works and what is refused.

Each model has a small data set. A cell is the loss after training, in nats: the mean over the last
quarter of the steps; all losses use 8 samples, Trace_ELBO one. Where latents are enumerated,
TraceEnum_ELBO stands for Trace_ELBO. Where a combination is refused, the sentence stands below the
table.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import ClippedAdam
from tqdm import tqdm

from benchmarks.report import Results, finish, hardware, table, write_json
from benchmarks.run import base_parser, parse
from benchmarks.tasks import classical_examples, deep_examples
from benchmarks.tasks.example import Example
from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    log_marginal,
)

EXAMPLES = classical_examples.EXAMPLES | deep_examples.EXAMPLES
LOSSES: dict[str, Callable[[], ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "IWAE dreg": lambda: IWAE_ELBO(8, estimator="dreg"),
    "IWAE dreg+vimco": lambda: IWAE_ELBO(8, estimator="dreg+vimco"),
    "MIWAE": lambda: MIWAE_ELBO(2, 4),
    "PIWAE": lambda: PIWAE_ELBO(2, 4),
    "CIWAE": lambda: CIWAE_ELBO(8, beta=0.5),
}

REFUSALS = NotImplementedError, TypeError, ValueError


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    seed: int
    steps: int
    samples: int


def main(arguments: list[str]) -> None:
    """Train every guide of every example with every loss; print a table and the refusals."""
    parser = base_parser("examples", __doc__)
    parser.add_argument("--models", nargs="+", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--steps", type=int, default=200, help="training steps of each guide")
    parser.add_argument("--seed", type=int, default=0)
    options = parse(parser, arguments)
    settings = Settings(options.seed, options.steps, samples=1000)
    if options.smoke:
        settings = Settings(options.seed, steps=4, samples=10)
    results: Results = {"settings": asdict(settings), "hardware": hardware(), "models": {}}
    path = Path(options.output) / "results.json"
    for name in tqdm(options.models):
        results["models"][name] = run_example(EXAMPLES[name], settings)
        write_json(path, results)
    finish(results, path, report(results))


def run_example(make: Callable[[], Example], settings: Settings) -> dict[str, dict[str, Any]]:
    """Return a cell for each guide and loss."""
    found: dict[str, dict[str, Any]] = {}
    for guide in make().guides:
        found[guide] = {loss: train(make, guide, loss, settings) for loss in LOSSES}
        for cell in found[guide].values():
            cell.pop("losses", None)  # all of them would be much to keep
    return found


def train(
    make: Callable[[], Example], guide_name: str, loss_name: str, settings: Settings
) -> dict[str, Any]:
    """Train one guide with one loss: its losses and log p(x), or the sentence of a refusal."""
    pyro.clear_param_store()
    pyro.set_rng_seed(settings.seed)
    example = make()
    model, args, loss = example.model, example.args, LOSSES[loss_name]()
    if example.enumerated and loss_name == "Trace_ELBO":
        loss = TraceEnum_ELBO()
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            guide = example.guides[guide_name]()
            svi = SVI(model, guide, ClippedAdam({"lr": example.rate, "clip_norm": 1.0}), loss)
            losses = [svi.step(*args) for _ in range(settings.steps)]
            last = losses[-max(1, len(losses) // 4) :]
            found |= {"losses": losses, "loss": sum(last) / len(last)}
            evidence = log_marginal(model, guide, *args, num_particles=settings.samples)
            found["log_marginal"] = evidence.sum().item()
        except REFUSALS as error:
            found["log_marginal refused" if found else "refused"] = str(error)
    return found | {"warnings": sorted({str(each.message) for each in caught})}


# The report.


def report(results: Results) -> str:
    """Return the table of losses, and below it every sentence of a refusal with who got it."""
    rows, refusals = [], dict[str, list[str]]()
    for model, guides in results["models"].items():
        for guide, cells in guides.items():
            row = [f"{model}: {guide}"]
            for loss, cell in cells.items():
                if "refused" in cell:
                    refusals.setdefault(cell["refused"], []).append(f"{model}, {guide}, {loss}")
                    number = list(refusals).index(cell["refused"]) + 1
                    row.append(f"({number})")
                else:
                    row.append(f"{cell['loss']:.1f}")
            rows.append(row)
    notes = [
        f"({number}) {sentence}\n    {'; '.join(cells)}"
        for number, (sentence, cells) in enumerate(refusals.items(), 1)
    ]
    return "\n\n".join([table(["example: guide", *LOSSES], rows), *notes])
