"""Real images by `load`, and synthetic sequences and curves whose exact log p(x) is known."""

from pyro_recursive.datasets.curves import CURVES, Curve, curve, curve_evidence
from pyro_recursive.datasets.image_files import DatasetError
from pyro_recursive.datasets.images import Dataset, dynamic_binarize, fixed_binarize, load
from pyro_recursive.datasets.sequences import (
    SequenceDecoder,
    Sequences,
    lstm_sequences,
    sequence_evidence,
)

__all__ = [
    "CURVES",
    "Curve",
    "Dataset",
    "DatasetError",
    "SequenceDecoder",
    "Sequences",
    "curve",
    "curve_evidence",
    "dynamic_binarize",
    "fixed_binarize",
    "load",
    "lstm_sequences",
    "sequence_evidence",
]
