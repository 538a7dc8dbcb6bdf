"""Chains without a run, and what ArviZ's results hold, in both of its versions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Chains:
    """What a run of MCMC tells, without a run."""

    samples: dict[str, Tensor]
    divergences: dict[str, list[int]] | None = None

    def get_samples(self, group_by_chain: bool) -> dict[str, Tensor]:
        assert group_by_chain
        return self.samples

    def diagnostics(self) -> dict[str, Any]:
        return {} if self.divergences is None else {"divergences": self.divergences}


def pointwise(result: Any) -> Tensor:
    """Return elpd_i of ArviZ's result, by its names in both versions."""
    found = result["loo_i"] if "loo_i" in dir(result) else result.elpd_i
    return torch.from_numpy(np.array(found.values))
