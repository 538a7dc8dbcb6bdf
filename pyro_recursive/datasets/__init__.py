"""What there is to try a method on: real images, and sequences of which everything is known.

:func:`load` returns images; :func:`lstm_sequences` draws synthetic sequences, of which
:func:`sequence_evidence` knows the exact log p(x).
"""

from pyro_recursive.datasets.idx import DatasetError
from pyro_recursive.datasets.images import Dataset, dynamic_binarize, fixed_binarize, load
from pyro_recursive.datasets.sequence_decoder import SequenceDecoder
from pyro_recursive.datasets.sequences import Sequences, lstm_sequences, sequence_evidence

__all__ = [
    "Dataset",
    "DatasetError",
    "SequenceDecoder",
    "Sequences",
    "dynamic_binarize",
    "fixed_binarize",
    "load",
    "lstm_sequences",
    "sequence_evidence",
]
