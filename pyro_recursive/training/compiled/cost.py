"""From how many steps on compiling pays."""

import math

# On one core of an AMD EPYC, models of 280 to 3,700 operations: seconds to compile a graph, and for
# each of its operations; seconds of an eager step for each. On a slower core, all are longer.
SECONDS, SECONDS_EACH, EAGER_EACH = 4.0, 8e-3, 7e-6
TRACING = 200  # eager steps that take as long as tracing a graph, to see whether it is known
FEWEST = math.ceil(SECONDS_EACH / EAGER_EACH)  # steps that a graph of any size needs


def steps_to_earn(operations: int) -> int:
    """Return how many eager steps take as long as compiling a graph, whose steps take no time."""
    each = max(operations, 1)
    return math.ceil((SECONDS + SECONDS_EACH * each) / (EAGER_EACH * each))
