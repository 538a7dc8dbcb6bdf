"""Finds plates that take a minibatch for all data, although there are global latents."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.tracing.sites import plates_of, subsample_scale
from pyro_recursive.training.shares import full_size_of

__all__ = ["RowCounts"]


@dataclass(frozen=True)
class _Seen:
    """A site: whether it is observed, the sizes of its plates, and its scale without them."""

    is_observed: bool
    plates: dict[str, tuple[int, int]]  # how many entries there are, and how many there are here
    scale: float | None  # None where it differs between rows

    def plates_of(self, rows: int) -> list[str]:
        """Return the plates that say there are so many entries."""
        return [name for name, (full, _) in self.plates.items() if full == rows]

    def is_subsampled_beside(self, names: list[str]) -> bool:
        """Whether a plate of another name has fewer entries than it says there are."""
        return any(full > size for n, (full, size) in self.plates.items() if n not in names)


class RowCounts(Messenger):
    """Notes the sites of a step's loss, to tell afterwards whether they count the rows right.

    It only looks, so that the step is what it would be without.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", 5):
    ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=dist.Normal(0.0, 1.0).sample((5,)))
    >>> with RowCounts() as counts:
    ...     model()
    >>> counts.misled(rows=5), counts.misled(rows=4)
    (('data', 'mean'), None)
    """

    def __init__(self) -> None:
        """Start with no site seen."""
        super().__init__()
        self.seen: dict[str, _Seen] = {}  # of the last run: a guide's are overwritten by a model's

    def _pyro_sample(self, msg: Any) -> None:
        # As an outer handler it comes after the plates and scales of the program.
        helper = msg["infer"].get("is_auxiliary") or msg["infer"].get("_deterministic")
        if site_is_subsample(msg) or helper:
            return
        plates = plates_of(msg)
        sizes = {name: (full_size_of(frame), frame.size) for name, frame in plates.items()}
        scale = msg["scale"] / math.prod(map(subsample_scale, plates.values()))
        one = not isinstance(scale, Tensor) or scale.numel() == 1
        self.seen[msg["name"]] = _Seen(msg["is_observed"], sizes, float(scale) if one else None)

    def misled(self, rows: int) -> tuple[str, str] | None:
        """Return a plate that is the rows, and a latent of which it sees those alone; or None.

        A plate is the rows if it has observed values, and their number, where no other plate around
        them is subsampled. A program that weights them itself, `poutine.scale`, is trusted.
        """
        # Of two plates at one site, rows and pixels perhaps, a latent of the rows is in either.
        latents = {
            name: site
            for name, site in self.seen.items()
            if not site.is_observed and not site.plates_of(rows)
        }
        for site in self.seen.values():
            own = site.plates_of(rows)
            if not site.is_observed or not own or site.is_subsampled_beside(own):
                continue
            for name, latent in latents.items():
                if None not in (site.scale, latent.scale) and site.scale == latent.scale:
                    return own[0], name
        return None

    def warn(self, rows: int, total: int, stacklevel: int) -> None:
        """Warn where a batch of so many of the data's rows is taken for all of them."""
        found = self.misled(rows) if rows < total else None
        if found is None:
            return
        plate, latent = found
        warnings.warn(
            f"Plate '{plate}' says that there are {rows} rows, those of a batch, and fit has "
            f"{total}: latent '{latent}', outside of that plate, gets the posterior of {rows} "
            f"rows, as its prior counts {total / rows:.3g} times too much. Write "
            f"pyro.plate('{plate}', {total}, subsample=x), in model and guide.",
            stacklevel=stacklevel + 1,
        )
