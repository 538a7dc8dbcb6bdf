"""CIWAE from different betas: fixed, learned, and learned by the naive rule.

The question of a student reproduction of Rainforth et al. (arXiv 1802.04537): how much does the
choice of beta matter, and does learning it help? "learned" descends the error of the guide's
gradient (`CIWAE_ELBO`); "naive" ascends the bound itself in beta, which falls to 0, as IWAE is
above the ELBO.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pyro.infer import ELBO
from torch import Tensor

from benchmarks.bounds import COLUMNS, evaluate, method
from benchmarks.report import Results, color, draw_values, figure, means, method_table, table
from benchmarks.run import Methods
from benchmarks.studies.study import Study, hours
from pyro_recursive import CIWAE_ELBO
from pyro_recursive.bounds import elbo, iwae
from pyro_recursive.losses.base import Evaluation
from pyro_recursive.losses.multi_sample import MultiSampleELBO

BETAS = (0.05, 0.275, 0.5, 0.725, 0.95)
KINDS = ("fixed", "learned", "naive")


class NaiveCIWAE(CIWAE_ELBO):
    """CIWAE whose beta ascends the bound."""

    def _surrogate(self, evaluation: Evaluation) -> Tensor:
        total = MultiSampleELBO._surrogate(self, evaluation)
        weights = evaluation.local.log_weights.detach()
        assert self._learned is not None
        return total + self._learned() * (elbo(weights) - iwae(weights)).sum()


def loss_of(kind: str, beta: float) -> ELBO:
    """Return the loss of a kind with its first beta."""
    make: Callable[..., ELBO] = NaiveCIWAE if kind == "naive" else CIWAE_ELBO
    return make(64, beta=beta, learn_beta=kind != "fixed")


METHODS: Methods = {
    f"{kind} {beta}": partial(method, make_loss=partial(loss_of, kind, beta))
    for beta in BETAS
    for kind in KINDS
}
TITLES = ("beta", "test log p", "test IWAE-64", "gap (-KL)", "ESS of 64")


def spreads(results: Results) -> dict[str, Tensor]:
    """Return the IWAE-64 of all runs of each kind, ``[runs]``."""
    runs: dict[str, dict[str, Any]] = {}
    for name, seeds in results["runs"].items():
        own = {f"{name} {seed}": run for seed, run in seeds.items()}
        runs.setdefault(name.split()[0], {}).update(own)
    return {kind: means(each, "test", "iwae_64") for kind, each in runs.items()}


def report(results: Results) -> str:
    """Return the table of all runs, and of each kind the spread of IWAE-64 over first betas."""
    columns = {title: COLUMNS[title] for title in TITLES} | {"hours": hours}
    rows = [
        [
            kind,
            str(len(found)),
            f"{found.mean().item():.2f}",
            f"{found.std(correction=int(len(found) > 1)).item():.2f}",
            f"{(found.max() - found.min()).item():.2f}",
        ]
        for kind, found in spreads(results).items()
    ]
    header = ["beta", "runs", "mean IWAE-64", "standard deviation", "range"]
    return f"{method_table('first beta', columns, results)}\n\n{table(header, rows)}"


def plot(results: Results, path: Path) -> None:
    """Draw IWAE-64 and log p(x) of every run, and IWAE-64 over the first beta."""
    with figure(path, 1, 2, 120, figsize=(11, 4.5)) as (_, axes):
        values, lines = axes[0]
        draw_values(values, results, {"o": ("test", "log_p"), "|": ("test", "iwae_64")})
        values.set(xlabel="nats per test image", title="log p(x) (dot), IWAE-64 (bar)")
        for number, kind in enumerate(KINDS):
            known = [beta for beta in BETAS if f"{kind} {beta}" in results["runs"]]
            found = [
                means(results["runs"][f"{kind} {beta}"], "test", "iwae_64").mean().item()
                for beta in known
            ]
            lines.plot(known, found, "o-", color=color(number), label=kind)
        lines.set(xlabel="first beta", ylabel="IWAE-64 (nats per test image)")
        lines.legend()


STUDY = Study(METHODS, evaluate, report, plot, datasets=("mnist",))
