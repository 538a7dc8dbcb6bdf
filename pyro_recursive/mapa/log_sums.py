"""Sums over codes that do not underflow.

`pyro.infer.TraceEnum_ELBO` sums products of factors, each divided by its own largest entry. Where
the code that one factor prefers is one that another excludes, every product underflows: -inf where
the sum is not 0, as soon as they are 88 nats apart in float32. Factors that are added up before the
sum, as logarithms, have one largest entry.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import Any

from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.ops import packed
from torch import Tensor

from pyro_recursive.tracing.sites import Site, same_scale, sites

__all__ = ["IndexELBO", "merge_factors"]


class IndexELBO(TraceEnum_ELBO):
    """`pyro.infer.TraceEnum_ELBO` for a model with an index of codes, without underflow."""

    def __init__(self, index: str, **options: Any) -> None:
        super().__init__(**options)
        self.index = index

    def _get_traces(
        self, model: Callable, guide: Callable, args: Any, kwargs: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Merge the factors of the index in each pair of traces."""
        for model_trace, guide_trace in super()._get_traces(model, guide, args, kwargs):
            merge_factors(model_trace, self.index)
            yield model_trace, guide_trace


def merge_factors(trace: poutine.Trace, index: str) -> None:
    """Add up the factors that depend on an enumerated index, in place, in a packed model trace.

    With inner plates summed, they become the index's own factor, but for those of other enumerated
    sites, and those with dims that the largest has not: merged, it would grow.
    """
    own = trace.nodes[index]
    symbol, plates = own["infer"].get("_enumerate_symbol"), _plates(trace, own)
    terms = {}
    for site in sites(trace):
        enumerated = site["infer"].get("_enumerate_dim") is not None and site is not own
        term = _log_prob(site)
        if symbol in _dims(term) and not enumerated and same_scale(site, own):
            inner = _plates(trace, site) - plates
            if _plates(trace, site) >= plates and not _enumerates_in(trace, inner):
                terms[site["name"]] = _summed(term, inner)
    if not terms:
        return  # one code: nothing is summed
    dims = max((_dims(term) for term in terms.values()), key=len)
    fitting = [name for name, term in terms.items() if set(_dims(term)) <= set(dims)]
    merged = reduce(add, packed.broadcast_all(*(terms[name] for name in fitting), dims=dims))
    for name in fitting:
        _set(trace.nodes[name], _named(merged.new_zeros(()), ""))
    _set(own, _named(merged, dims))


def _enumerates_in(trace: poutine.Trace, plates: frozenset[str]) -> bool:
    """Whether another site is enumerated for each entry of some plates."""
    return any(
        site["infer"].get("_enumerate_dim") is not None and plates & _plates(trace, site)
        for site in sites(trace)
    )


def _plates(trace: poutine.Trace, site: Site) -> frozenset[str]:
    """Return the symbols of a site's plates."""
    frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
    return frozenset(trace.plate_to_symbol[frame.name] for frame in frames)


def _log_prob(site: Site) -> Tensor:
    """Return what stands inside of the logarithm: the density with its mask, without its scale."""
    tensors = site["packed"]
    if site["infer"].get("_enumerate_dim") is not None:
        return tensors["unscaled_log_prob"]
    return packed.scale_and_mask(tensors["unscaled_log_prob"], mask=tensors["mask"])


def _summed(term: Tensor, inner: frozenset[str]) -> Tensor:
    """Sum a factor over inner plates."""
    dims = _dims(term)
    places = [place for place, symbol in enumerate(dims) if symbol in inner]
    left = "".join(symbol for symbol in dims if symbol not in inner)
    return _named(term.sum(places), left) if places else term


def _set(site: Site, term: Tensor) -> None:
    tensors = site["packed"]
    tensors["log_prob"] = tensors["unscaled_log_prob"] = tensors["masked_log_prob"] = term
    tensors["mask"] = None


def _dims(term: Tensor) -> str:
    return term._pyro_dims  # type: ignore[attr-defined]  # how Pyro names packed dims


def _named(term: Tensor, dims: str) -> Tensor:
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term
