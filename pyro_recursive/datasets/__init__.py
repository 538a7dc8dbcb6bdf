"""What there is to try a method on: real images, and synthetic data of which everything is known.

:func:`load` returns images; :func:`lstm_sequences` draws synthetic sequences, of which
:func:`sequence_evidence` knows the exact log p(x); :func:`curve` draws points around a curve in the
plane, and :func:`curve_evidence` is for these and for any decoder of one latent.
"""

from pyro_recursive.datasets.curves import CURVES, Curve, curve
from pyro_recursive.datasets.idx import DatasetError
from pyro_recursive.datasets.images import Dataset, dynamic_binarize, fixed_binarize, load
from pyro_recursive.datasets.quadrature import curve_evidence
from pyro_recursive.datasets.sequence_decoder import SequenceDecoder
from pyro_recursive.datasets.sequences import Sequences, lstm_sequences, sequence_evidence

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
