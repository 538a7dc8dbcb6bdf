"""The training loop `fit`, with its record, schedules and checkpoints; `SVI.step` works as well."""

from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.minibatch import MinibatchRows
from pyro_recursive.training.aggressive import Aggressive
from pyro_recursive.training.automatic import PosteriorApproximation, StageReport, fit_or_sample
from pyro_recursive.training.checkpoint import CheckpointError
from pyro_recursive.training.compiled.svi import CompiledSVI
from pyro_recursive.training.history import History, burda_schedule
from pyro_recursive.training.loop import fit
from pyro_recursive.training.nan_search import NonFiniteError
from pyro_recursive.training.nuts import NUTSStart, PackedNUTS, nuts_start
from pyro_recursive.training.one_optim import OneOptim
from pyro_recursive.training.pathfinder import PathfinderGuide, PathReport, pathfinder

__all__ = [
    "Aggressive",
    "CheckpointError",
    "CompiledSVI",
    "History",
    "KLWarmup",
    "MinibatchRows",
    "NUTSStart",
    "NonFiniteError",
    "OneOptim",
    "PackedNUTS",
    "PathReport",
    "PathfinderGuide",
    "PosteriorApproximation",
    "StageReport",
    "burda_schedule",
    "fit",
    "fit_or_sample",
    "nuts_start",
    "pathfinder",
]
