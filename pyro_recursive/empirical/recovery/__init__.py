"""From the codes of data back to a continuous prior, and a model with it."""
