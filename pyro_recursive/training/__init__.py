"""The training loop that people otherwise rewrite; it stands beside loops of `SVI.step`."""

from pyro_recursive.training.checkpoint import CheckpointError
from pyro_recursive.training.loop import History, fit
from pyro_recursive.training.non_finite import NonFiniteError
from pyro_recursive.training.schedules import burda_schedule
from pyro_recursive.warmup import KLWarmup

__all__ = ["CheckpointError", "History", "KLWarmup", "NonFiniteError", "burda_schedule", "fit"]
