"""The effect handler: a latent site whose prior is a choice among codes.

At the site, inside its plate, a model that runs under `OnCodes` gets an index to enumerate,
``<site>_index``, and the value of its code; its own prior is gone. So `pyro.infer.TraceEnum_ELBO`
takes the logarithm of a sum over codes for each row, beside whatever else is enumerated, and inside
of any subsample scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_recursive.guides.packing import plain_support
from pyro_recursive.mapa.codes import Codes
from pyro_recursive.mapa.slots import CodeIndex
from pyro_recursive.priors.pairwise import pairwise
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.sites import Site, plates_of, same_scale, sites

__all__ = [
    "DecodedCodes",
    "Empiricalized",
    "OnCodes",
    "Plate",
    "all_of",
    "check_latent",
    "index_site",
    "local_site",
    "with_noise",
]


class Plate(NamedTuple):
    """The plate of the site: its full size, its size in this run, and the indices of its rows."""

    full_size: int
    size: int
    indices: Tensor | None


class DecodedCodes(NamedTuple):
    """Codes that are decoded, and the log-weights of the terms they stand for, in nats.

    For all rows ``codes`` ``[U, D]`` and ``log_weights`` ``[B, U]`` (or ``[U]``); or for each row
    of its own ``codes`` ``[B, K, D]`` and ``log_weights`` ``[B, K]``. Log-weights may also stand
    where Pyro has the plates, and have those around the model too: ``[*batch, K]``.
    """

    codes: Tensor
    log_weights: Tensor


def index_site(site: str) -> str:
    """Return the name of the site that chooses among codes."""
    return f"{site}_index"


class OnCodes(Messenger):
    """Replaces the prior of a latent site by a choice among codes.

    The innermost handler of the model. ``place`` says for the rows of a plate which codes there
    are. Rows that a mask takes out of the model get a choice of total weight one, so that they
    count nothing whatever was drawn; ``certain_where_masked=False`` leaves their weights alone.

    Raises NotImplementedError for a discrete site, and for one that is not in exactly one
    vectorised plate; ValueError where codes have another length than the site.
    """

    def __init__(
        self, site: str, place: Callable[[Plate], DecodedCodes], certain_where_masked: bool = True
    ) -> None:
        super().__init__()
        self.site, self.place = site, place
        self.certain_where_masked = certain_where_masked
        self._rows: dict[str, Tensor] = {}
        self._shared_dim: int | None = None  # the plate's, once the rows share codes

    def __enter__(self) -> "OnCodes":
        """Forget the minibatch of an earlier run."""
        self._rows, self._shared_dim = {}, None
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and self._shared_dim is not None:
            msg["fn"] = pairwise(msg["fn"], self._shared_dim)
        if msg["name"] != self.site or msg["is_observed"]:
            return
        frame = check_site(msg)
        if "_markov_scope" in msg["infer"]:
            raise NotImplementedError(
                f"Latent site '{self.site}' is inside pyro.markov, where no site can be enumerated "
                "in its place. Sample the latent of the whole series before the loop."
            )
        plate = Plate(frame.full_size or frame.size, frame.size, self._rows.get(frame.name))
        placed = self.place(plate)
        log_weights = _at_plate(placed.log_weights, frame.dim)
        if self.certain_where_masked:
            log_weights = _certain(log_weights, msg["mask"])
        slot = pyro.sample(
            index_site(self.site),
            CodeIndex(log_weights),
            infer={"enumerate": "parallel"},
        )
        value = _value(msg["fn"], _chosen(placed.codes, slot, frame.dim), self.site)
        event_dim = msg["fn"].event_dim
        batch = torch.broadcast_shapes(
            value.shape[: value.dim() - event_dim], msg["fn"].batch_shape
        )
        msg["fn"] = _Known(value, event_dim=event_dim).expand(batch)
        msg["value"], msg["is_observed"] = value, True
        self._shared_dim = frame.dim if placed.codes.dim() == 2 else None

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._rows[msg["name"]] = msg["value"]


class _Known(dist.Delta):
    """A value with density 1, without a look at it: the prior is in the weights of the index."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros."""
        return self.v.new_zeros(()).expand(self.batch_shape)


class Empiricalized:
    """A model whose local latent site has an empirical prior: ``p(z) = sum_i w_i delta(z - c_i)``.

    Called like the model. The choice is a discrete site ``<site>_index`` inside the site's plate,
    marked for enumeration: `pyro.infer.TraceEnum_ELBO` with an empty guide gives the exact sum over
    all codes (with `GridCodes`, a generative topographic mapping), its ``compute_marginals`` the
    posterior of the index, and `pyro.infer.Predictive` draws from the codes. Codes with a scale are
    points with noise, one draw for each code and run, so that the ELBO is a bound of its evidence.

    Arguments:
        model: any Pyro model.
        codes: `pyro_recursive.mapa.Codes`; they are registered under ``name``.
        site: the latent site; not needed where only one is inside a plate.

    Raises as `OnCodes` does, and ValueError where it is not clear which site is meant.

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby, Pan & Doshi-Velez, arXiv 2403.08941).

    >>> from pyro.infer import SVI, TraceEnum_ELBO
    >>> from torch import nn
    >>> from pyro_recursive.mapa import GridCodes
    >>> decoder = nn.Linear(1, 2)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)
    >>> topographic = Empiricalized(model, GridCodes(9))
    >>> loss = TraceEnum_ELBO(max_plate_nesting=1)
    >>> svi = SVI(topographic, lambda x: None, pyro.optim.Adam({"lr": 0.01}), loss)
    >>> svi.step(torch.randn(5, 2)) > 0
    True
    """

    def __init__(
        self, model: Callable, codes: Codes, site: str | None = None, *, name: str = "codes"
    ) -> None:
        self.model, self.codes, self.site, self.name = model, codes, site, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on codes."""
        pyro.module(self.name, self.codes)
        if self.site is None:
            self.site = local_site(outline(self.model, args, kwargs))
        with OnCodes(self.site, lambda plate: all_of(self.codes)):
            return self.model(*args, **kwargs)


def all_of(codes: Codes) -> DecodedCodes:
    """Return all codes with their prior weights, with noise where they have a scale."""
    return DecodedCodes(with_noise(codes(), codes.scale), codes.log_weights)


def with_noise(places: Tensor, scale: Tensor | None) -> Tensor:
    """Return draws around codes ``[..., D]``, the codes themselves without a scale."""
    return places if scale is None else places + scale * torch.randn_like(places)


def local_site(trace: poutine.Trace) -> str:
    """Return the name of the one latent site of a model's trace that is inside a plate.

    Raises ValueError where there is none, or several.
    """
    found = [
        site["name"]
        for site in sites(trace)
        if not site["is_observed"]
        and not site["infer"].get("enumerate")
        and any(frame.vectorized for frame in plates_of(site).values())
        and not _discrete(site)
    ]
    if len(found) != 1:
        which = (
            "no continuous latent site inside a vectorised pyro.plate" if not found else f"{found}"
        )
        raise ValueError(f"Which site gets the codes? The model has {which}; name one with site=.")
    return found[0]


def check_site(site: Site) -> Any:
    """Return the frame of the one plate that a site is in, or raise."""
    name = site["name"]
    if _discrete(site):
        raise NotImplementedError(
            f"Latent site '{name}' is discrete ({type(site['fn']).__name__}), and codes are "
            "vectors of real numbers: choose a continuous site, and enumerate the discrete one."
        )
    frames = list(plates_of(site).values())  # the model's own: others are around its handlers
    if len(frames) != 1 or not frames[0].vectorized:
        where = ", ".join(f"'{frame.name}'" for frame in frames) or "no plate"
        raise NotImplementedError(
            f"Latent site '{name}' is in {where}, and a code stands for one row of the data: the "
            "site has to be in one vectorised plate. Entries of inner plates belong into the "
            "site's event, with .to_event()."
        )
    return frames[0]


def check_latent(trace: poutine.Trace, name: str) -> None:
    """Raise where a site of a model's trace cannot have codes.

    In addition to `check_site`: where the model has no such latent, or its scale is not that of the
    observations in its plate.
    """
    latent = {site["name"]: site for site in sites(trace) if not site["is_observed"]}
    if name not in latent:
        raise ValueError(f"The model has no latent site '{name}'; there are {sorted(latent)}.")
    frame, own = check_site(latent[name]), latent[name]
    for site in sites(trace):
        seen = site["is_observed"] and frame.name in plates_of(site)
        if seen and not same_scale(own, site):
            raise ValueError(
                f"Latent site '{name}' has scale {own['scale']}, and '{site['name']}' has "
                f"{site['scale']}. The prior of '{name}' is replaced by codes, so that there is "
                "nothing to scale: leave poutine.scale out, or put it around the whole model."
            )


def _discrete(site: Site) -> bool:
    return bool(getattr(site["fn"].support, "is_discrete", False))


def _at_plate(log_weights: Tensor, dim: int) -> Tensor:
    """Put rows where Pyro has the plate: ``[B, K]`` to ``[B, 1, ..., K]``; others stay."""
    if log_weights.dim() != 2:
        return log_weights
    return log_weights.reshape(len(log_weights), *[1] * (-dim - 1), log_weights.shape[-1])


def _chosen(codes: Tensor, slot: Tensor, dim: int) -> Tensor:
    """Return the code of each slot, ``[*slots, D]``."""
    if codes.dim() == 2:
        return codes[slot]
    rows = torch.arange(len(codes), device=codes.device).reshape(-1, *[1] * (-dim - 1))
    return codes[rows, slot]


def _value(fn: Any, u: Tensor, name: str) -> Tensor:
    """Return the site's value at unconstrained vectors ``[*batch, D]``."""
    transform = biject_to(plain_support(fn.support))
    shape = transform.inverse_shape(fn.event_shape)
    if u.shape[-1] != shape.numel():
        raise ValueError(
            f"Codes are vectors of length {u.shape[-1]}, and latent site '{name}' has event shape "
            f"{tuple(fn.event_shape)}: {shape.numel()} unconstrained numbers."
        )
    return transform(u.reshape(u.shape[:-1] + shape))


def _certain(log_weights: Tensor, mask: Any) -> Tensor:
    """Normalise the weights of the rows that a mask leaves out."""
    if mask is None or mask is True:
        return log_weights
    ones = log_weights.log_softmax(-1)
    return ones if mask is False else torch.where(mask[..., None], log_weights, ones)
