"""The loss of MAPA, by sums over codes that do not underflow."""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.ops import packed
from torch import Tensor

from pyro_recursive.mapa.empirical_model import index_site
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.protocols import CodeGuide
from pyro_recursive.tracing.sites import Site, same_scale, sites


class MAPA_ELBO(TraceEnum_ELBO):
    """The loss of a `pyro_recursive.MAPAGuide`: minus a lower bound of log p(x) over codes.

    For each row n the bound is ``log sum_j exp(log_weights[n, j]) w_j p(x_n | c_j)`` over the codes
    of the step, in nats, and beside it the ELBO of the other latents. As in Pyro's `TraceEnum_ELBO`
    other discrete sites can be enumerated, subsample scales and masks apply outside the logarithm,
    and ``num_particles`` draws the other latents (all on the same codes when vectorised). Unlike
    Pyro's, one instance serves several models. Arguments are those of `pyro.infer.TraceEnum_ELBO`.

    Raises:
        TypeError: the guide is no `pyro_recursive.tracing.protocols.CodeGuide`.
        ValueError: sites that depend on the code have different scales.

    Source: `Towards Model-Agnostic Posterior Approximation` (Yacoby et al., arXiv 2403.08941).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_recursive import MAPAGuide
    >>> from pyro_recursive.mapa import FreeCodes
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> x = torch.tensor([0.0, 1.0, 3.0])
    >>> exact = MAPAGuide(model, FreeCodes(x[:, None]))  # no table: the sum over all codes
    >>> loss = MAPA_ELBO().loss(model, exact, x)
    >>> mixture = dist.Normal(x, 1.0).log_prob(x[:, None]).logsumexp(1) - torch.tensor(3.0).log()
    >>> round(loss, 4) == round(-mixture.sum().item(), 4)
    True
    """

    max_plate_nesting: float

    def __repr__(self) -> str:
        """Return the loss with its number of particles."""
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def loss(self, model: Callable, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus the bound, without a graph; not counted as a training step."""
        with torch.no_grad():
            return super().loss(model, guide, *args, **kwargs)

    def _get_traces(
        self, model: Callable, guide: Any, args: Any, kwargs: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Run the guide of the other latents, and the model on codes."""
        if not isinstance(guide, CodeGuide):
            raise TypeError(f"MAPA_ELBO trains a MAPAGuide, got a {type(guide).__name__}.")
        guessed = math.isinf(self.max_plate_nesting)
        if guessed:
            nesting = structure_of(Program(model, guide.others, args, kwargs)).max_plate_nesting
            self.max_plate_nesting = nesting + (self.vectorize_particles and self.num_particles > 1)
        try:
            for traces in super()._get_traces(
                guide.empiricalized(model), guide.others, args, kwargs
            ):
                merge_factors(traces[0], index_site(str(guide.site)))
                yield traces
            if torch.is_grad_enabled():
                guide.end_step()
        finally:
            if guessed:
                self.max_plate_nesting = math.inf


def merge_factors(trace: poutine.Trace, index: str) -> None:
    """Add up the factors that depend on an enumerated index, in place, in a packed model trace.

    Pyro sums products of factors, each divided by its own largest entry: where two factors prefer
    different codes, all products underflow, from 88 nats on in float32. The sum, over inner plates
    too, is the index's factor. Factors with dims that the largest lacks are left as they are.
    """
    own = trace.nodes[index]
    symbol, plates = own["infer"].get("_enumerate_symbol"), _plates(trace, own)
    of_enumerated = [_plates(trace, site) for site in sites(trace) if _is_enumerated(site)]
    terms = {}
    for site in sites(trace):
        term, is_other = _log_prob(site), _is_enumerated(site) and site is not own
        if symbol in _dims(term) and not is_other and same_scale(site, own):
            inner = _plates(trace, site) - plates
            if _plates(trace, site) >= plates and not any(inner & each for each in of_enumerated):
                terms[site["name"]] = _summed(term, inner)
    if not terms:
        return  # one code: nothing is summed
    dims = max((_dims(term) for term in terms.values()), key=len)
    fitting = [name for name, term in terms.items() if set(_dims(term)) <= set(dims)]
    merged = reduce(add, packed.broadcast_all(*(terms[name] for name in fitting), dims=dims))
    for name in fitting:
        _set(trace.nodes[name], _named(merged.new_zeros(()), ""))
    _set(own, _named(merged, dims))


def _plates(trace: poutine.Trace, site: Site) -> frozenset[str]:
    frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
    return frozenset(trace.plate_to_symbol[frame.name] for frame in frames)


def _is_enumerated(site: Site) -> bool:
    return site["infer"].get("_enumerate_dim") is not None


def _log_prob(site: Site) -> Tensor:
    """Return the term inside the logarithm: the density with its mask, without its scale."""
    tensors = site["packed"]
    if _is_enumerated(site):
        return tensors["unscaled_log_prob"]
    return packed.scale_and_mask(tensors["unscaled_log_prob"], mask=tensors["mask"])


def _summed(term: Tensor, inner: frozenset[str]) -> Tensor:
    dims = _dims(term)
    axes = [axis for axis, symbol in enumerate(dims) if symbol in inner]
    left = "".join(symbol for symbol in dims if symbol not in inner)
    return _named(term.sum(axes), left) if axes else term


def _set(site: Site, term: Tensor) -> None:
    tensors = site["packed"]
    tensors["log_prob"] = tensors["unscaled_log_prob"] = tensors["masked_log_prob"] = term
    tensors["mask"] = None


def _dims(term: Tensor) -> str:
    return term._pyro_dims  # type: ignore[attr-defined]  # how Pyro names packed dims


def _named(term: Tensor, dims: str) -> Tensor:
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term
