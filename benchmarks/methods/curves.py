"""The methods of the MAPA benchmark on curves."""

from benchmarks.methods.mapa import (
    ALL,
    AUTOENCODER,
    BASELINE,
    KDE,
    Learner,
    Method,
    build,
    independent,
    pooled,
)
from benchmarks.tasks.curves import CurveData, true_table, uniform_table
from pyro_recursive.datasets import Curve

NEIGHBOURS = 128  # that a row of the table keeps

METHODS: dict[str, Method] = {
    BASELINE: Method(1),
    **{f"IWAE {s}": Method(s) for s in (5, 10, 20)},
    **{f"MAPA {s}": independent(s) for s in (1, 5, 10, 20)},
    "pooled .2": pooled(0.2, top=0),
    "pooled .5": pooled(0.5, top=0),
    **{f"pooled {s}": pooled(s) for s in (1, 2)},
    "MAPA-GT 5": independent(5, top=0, refresh=True),
    "MAPA true 5": independent(5, top=0, table=true_table),
    "uniform 5": independent(5, top=0, table=uniform_table),
    "AE": AUTOENCODER,
    "exact sum": pooled(0, top=ALL),
    KDE: Method(),
}


def learner_of(name: str, data: Curve, hidden: int, seed: int) -> Learner:
    """Return a method with the initial networks of a seed."""
    method = METHODS[name]
    neighbours = ALL if method.options.get("top") == ALL else NEIGHBOURS
    return build(method, CurveData(data, hidden), seed, neighbours)
