# ruff: noqa: F401
"""The table of small Pyro models that the tests of every loss and every guide run over.

A `Row` is one way to write a Pyro program; it says what must work on it and what must be refused.
A `Refusal` is a program that no multi-sample bound can be right for. The guides are neither exact
nor far off: their log-weights vary, so that a scale, a mask or a plate in the wrong place changes
values. Rows with ``evidence`` are the exception: their guide is the exact posterior. `small` has
models for tests of one thing.
"""

from tests.models import data_plate, parameters, plates, ragged
from tests.models.data_plate import local, local_guide, subsampled
from tests.models.parameters import Decoder, Encoder, Net, mixed, mixed_global, mixed_global_guide
from tests.models.plates import (
    exact_groups,
    hierarchy,
    hierarchy_guide,
    joint_evidence,
    sequential,
    sequential_guide,
)
from tests.models.refusals import REFUSALS
from tests.models.row import INDEX, Programs, Refusal, Row, data, mask, normal, observe, real

ROWS = [*data_plate.ROWS, *plates.ROWS, *parameters.ROWS, *ragged.ROWS]

# Guides with a scale of their own: their log q is not the density that they draw from.
SCALED = {"annealed", "tensor_scale", "tempered", "unequal_scales", "ragged"}
SCALED |= {"annealed_discrete", "annealed_mixed"}
