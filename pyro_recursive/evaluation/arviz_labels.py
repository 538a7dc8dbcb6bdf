"""Names for the dims of draws: chain, draw, plates by name, event dims; and their coordinates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.draws import SiteDraws

SAMPLE = ("chain", "draw")


@dataclass(frozen=True)
class Entries:
    """The indices of a plate's entries in a minibatch, and the size of the whole plate."""

    index: list[int]
    size: int


def entries_of(minibatch: poutine.Trace, *arguments: Any) -> dict[str, Entries]:
    """Return the entries of plates in a minibatch, where they are known.

    ``pyro.plate(..., subsample=x)`` may have the data themselves: arguments of the call, or values
    that are no indices, give no entries.
    """
    given = list(_nested(arguments))
    return {
        name: Entries([int(i) for i in site["value"]], site["fn"].size)
        for name, site in minibatch.nodes.items()
        if _is_index(site["value"], site["fn"].size)
        and not any(site["value"] is each for each in given)
    }


def _nested(argument: Any) -> Iterator[Any]:
    """Yield an argument and its items."""
    yield argument
    if isinstance(argument, list | tuple | Mapping):
        for each in argument.values() if isinstance(argument, Mapping) else argument:
            yield from _nested(each)


def _is_index(value: Any, size: int) -> bool:
    if isinstance(value, list | tuple | range):
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor) or value.dim() != 1 or not value.numel():
        return False
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    inside = bool(((value >= 0) & (value < size)).all())
    return inside and len(value.unique()) == len(value)


@dataclass(frozen=True)
class Labels:
    """Makes labelled arrays of draws, ``[chain, draw, *plates, *event]``.

    ``coords`` has values of dims, ``dims`` names of the event dims of sites, ``entries`` the
    entries of plates.
    """

    coords: Mapping[str, Sequence] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    entries: Mapping[str, Entries] = field(default_factory=dict)
    chains: int = 1

    def draws(self, found: Mapping[str, SiteDraws]) -> xr.Dataset:
        """Return draws of sites."""
        return self._dataset(
            {n: (self._names(n, s), self._split(s.value)) for n, s in found.items()}
        )

    def first(self, found: Mapping[str, SiteDraws]) -> xr.Dataset:
        """Return the first draw of sites, without dims of chain and draw: data."""
        return self._dataset({n: (self._names(n, s)[2:], s.value[0]) for n, s in found.items()})

    def numbers(self, values: Mapping[str, Tensor], plates: Sequence[str]) -> xr.Dataset:
        """Return numbers of each draw, ``[S, *plates]``."""
        dims = (*SAMPLE, *plates)
        return self._dataset({name: (dims, self._split(value)) for name, value in values.items()})

    def check_used(self, groups: Mapping[str, xr.Dataset]) -> None:
        """Raise if `coords` names no dim of the groups, or `dims` no site with event dims."""
        known = {str(dim) for group in groups.values() for dim in group.dims}
        if unknown := sorted(self.coords.keys() - known):
            raise ValueError(f"coords has values for {unknown}; the dims are {sorted(known)}.")
        for name, event in self.dims.items():
            found = [group[name].dims for group in groups.values() if name in group.data_vars]
            if not any(set(event) <= set(dims) for dims in found):
                cause = "has no event dims" if found else "is not there"
                names = sorted({str(n) for group in groups.values() for n in group.data_vars})
                raise ValueError(
                    f"dims names event dims {list(event)} of site '{name}', which {cause}; the "
                    f"sites are {names}."
                )

    def _names(self, name: str, site: SiteDraws) -> tuple[str, ...]:
        count = len(site.event_shape)
        event = tuple(self.dims.get(name, ())) if count else ()
        event = event or tuple(f"{name}_dim_{i}" for i in range(count))
        if len(event) != count:
            raise ValueError(
                f"dims names {len(event)} event dims of site '{name}', {list(event)}; it has "
                f"{count}, {tuple(site.event_shape)}."
            )
        names = (*SAMPLE, *site.plates, *event)
        if len(set(names)) < len(names):
            raise ValueError(
                f"Dims of site '{name}' share one name: {list(names)}. Use dims= or rename a plate."
            )
        return names

    def _split(self, value: Tensor) -> Tensor:
        return value.unflatten(0, (self.chains, -1))

    def _dataset(self, tensors: Mapping[str, tuple[tuple[str, ...], Tensor]]) -> xr.Dataset:
        arrays = {name: (dims, t.detach().cpu().numpy()) for name, (dims, t) in tensors.items()}
        sizes = {
            dim: size
            for dims, array in arrays.values()
            for dim, size in zip(dims, array.shape, strict=True)
        }
        coords = {dim: self._coord(dim, size) for dim, size in sizes.items()}
        return xr.Dataset(arrays, coords, attrs={"inference_library": "pyro_recursive"})

    def _coord(self, dim: str, size: int) -> Any:
        entries, values = self.entries.get(dim), self.coords.get(dim)
        if values is None:
            return np.arange(size) if entries is None else np.asarray(entries.index)
        if entries is not None and len(values) == entries.size:
            values = [values[i] for i in entries.index]
        if len(values) != size:
            raise ValueError(
                f"coords has {len(values)} values for dim '{dim}', and it has {size} entries."
            )
        return list(values)
