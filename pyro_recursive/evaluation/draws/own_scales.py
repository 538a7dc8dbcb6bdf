"""Scales of the user's own (`poutine.scale`) at sample sites, beside those of subsampled plates.

They make other densities than those that draws come from, or that leave-one-out is about.
"""

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.tracing.sites import own_scale, sites

__all__ = ["scaled_guide", "scaled_sites"]


def scaled_sites(trace: poutine.Trace) -> list[str]:
    """Return the names of the sites whose own scale is not 1 everywhere."""
    return [site["name"] for site in sites(trace) if not _is_one(own_scale(site))]


def scaled_guide(guide: poutine.Trace) -> str:
    """Return why a guide has no weights, in words, if it is for a scale; else nothing."""
    scaled = scaled_sites(guide)
    if not scaled:
        return ""
    return (
        f"Guide site '{scaled[0]}' has a scale of its own (poutine.scale), and weights need the "
        "density that its draws come from. Take the scale off the guide for evaluation, and off "
        "the model, unless it is part of the posterior that you want."
    )


def _is_one(scale: Any) -> bool:
    if isinstance(scale, Tensor):
        return torch.allclose(scale, torch.ones_like(scale))
    return math.isclose(scale, 1.0, rel_tol=1e-6)  # the plates' scales may round
