"""A study: what `python -m benchmarks reproduce NAME` trains, measures and shows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.experiment import Evaluate
from benchmarks.report import Results
from benchmarks.run import Methods, Settings, Task
from benchmarks.tasks.images import image_task
from pyro_recursive.training.learner import MakeScheduler


@dataclass(frozen=True)
class Study:
    """Methods, how a trained one is evaluated, and tables and plots of what results there are.

    It runs once for each data set and each size of networks, ``hidden-latent``, those of
    ``own_networks`` for data sets that are named there; the first method is the baseline. Training
    rows to evaluate on are ``train_points``. ``epochs``, ``batch_size`` and ``eval_points`` are
    defaults of the command; an epoch passes over small data sets as often as ``epoch_steps`` steps
    need. With ``patience``, training stops after so many epochs without a
    better validation bound, and the parameters are those of the best epoch. ``scheduler`` is by
    default `burda_schedule` over all epochs; with None the learning rate stays.
    """

    methods: Methods
    evaluate: Evaluate
    report: Callable[[Results], str]
    plot: Callable[[Results, Path], None]
    datasets: tuple[str, ...] = ("mnist", "omniglot")
    networks: tuple[str, ...] = ("200-50",)
    own_networks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    validation_particles: int = 64
    train_points: int = 500
    epochs: int = 3280
    batch_size: int = 20
    eval_points: int = 10_000
    epoch_steps: int = 1
    patience: int | None = None
    scheduler: MakeScheduler | Literal["burda"] | None = "burda"
    settings: type[Settings] = Settings
    task: Callable[[Any, Any, int], Task] = image_task  # of settings, options and train_points

    def sizes(self, dataset: str) -> tuple[str, ...]:
        """Return the sizes of networks for a data set."""
        return self.own_networks.get(dataset, self.networks)


def hours(name: str, results: Results) -> str:
    """Return the hours of training of a method, of all its seeds."""
    runs = results["runs"][name].values()
    return f"{sum(sum(run['history']['seconds']) for run in runs) / 3600:.2f}"


def seconds_per_epoch(name: str, results: Results) -> str:
    """Return the mean seconds of an epoch, validation included."""
    seconds = [s for run in results["runs"][name].values() for s in run["history"]["seconds"]]
    return f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
