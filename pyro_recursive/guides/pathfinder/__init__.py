"""Gaussians along the paths of an optimiser: normal approximations without training."""
