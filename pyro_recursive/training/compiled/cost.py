"""From how many steps on compiling pays."""

import math

# Measured on eight schools, ... on one core; both grow alike on a slower one.
SECONDS, SECONDS_EACH = 4.0, 0.01  # to compile a graph, and each operation in it
GAIN_EACH = 1e-5  # seconds that an operation takes less in each step
FEWEST = math.ceil(SECONDS_EACH / GAIN_EACH)  # steps that earn any graph back


def steps_to_earn(operations: int) -> int:
    """Return after how many steps compiling a graph has taken less time than it saves."""
    return math.ceil((SECONDS + SECONDS_EACH * operations) / (GAIN_EACH * max(operations, 1)))
