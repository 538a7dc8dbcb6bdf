"""Names for the dims of draws: chain, draw, plates by name, event dims; and their coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.draws.drawn import Drawn

__all__ = ["Labels"]

SAMPLE = ("chain", "draw")


@dataclass(frozen=True)
class Labels:
    """Makes labelled arrays of draws, ``[chain, draw, *plates, *event]``.

    ``coords`` has values of dims, ``dims`` names of the event dims of sites; ``minibatch`` tells
    which entries of a subsampled plate there are.
    """

    coords: Mapping[str, Sequence] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    minibatch: poutine.Trace = field(default_factory=poutine.Trace)
    chains: int = 1

    def draws(self, sites: Mapping[str, Drawn]) -> xr.Dataset:
        """Return draws of sites."""
        return self._dataset(
            {n: (self._names(n, s), self._split(s.value)) for n, s in sites.items()}
        )

    def first(self, sites: Mapping[str, Drawn]) -> xr.Dataset:
        """Return the first draw of sites, without dims of chain and draw: data."""
        return self._dataset(
            {n: (self._names(n, s)[2:], _array(s.value[0])) for n, s in sites.items()}
        )

    def numbers(self, values: Mapping[str, Tensor], plates: Sequence[str]) -> xr.Dataset:
        """Return numbers of each draw, ``[S, *plates]``."""
        dims = (*SAMPLE, *plates)
        return self._dataset({name: (dims, self._split(value)) for name, value in values.items()})

    def _names(self, name: str, site: Drawn) -> tuple[str, ...]:
        count = len(site.event_shape)
        event = tuple(self.dims.get(name, ())) if count else ()
        event = event or tuple(f"{name}_dim_{number}" for number in range(count))
        if len(event) != count:
            raise ValueError(
                f"dims names {len(event)} event dims of site '{name}', {list(event)}, and it has "
                f"{count}, {tuple(site.event_shape)}. Its plates {list(site.plates)} are named."
            )
        names = (*SAMPLE, *site.plates, *event)
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two dims of site '{name}' have one name: {list(names)}. Rename a plate, or an "
                "event dim with dims=."
            )
        return names

    def _split(self, value: Tensor) -> np.ndarray:
        return _array(value.unflatten(0, (self.chains, -1)))

    def _dataset(self, arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]]) -> xr.Dataset:
        sizes = {
            dim: size
            for dims, array in arrays.values()
            for dim, size in zip(dims, array.shape, strict=True)
        }
        coords = {dim: self._coord(dim, size) for dim, size in sizes.items()}
        return xr.Dataset(dict(arrays), coords, attrs={"inference_library": "pyro_recursive"})

    def _coord(self, dim: str, size: int) -> Any:
        plate = self.minibatch.nodes.get(dim)
        index = None if plate is None else [int(i) for i in plate["value"]]
        values = self.coords.get(dim)
        if values is None:
            return np.arange(size) if index is None else np.asarray(index)
        if index is not None and len(values) == plate["fn"].size:
            values = [values[i] for i in index]
        if len(values) != size:
            raise ValueError(
                f"coords has {len(values)} values for dim '{dim}', and it has {size} entries."
            )
        return list(values)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
