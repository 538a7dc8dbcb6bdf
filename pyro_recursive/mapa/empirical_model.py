"""The effect handler that replaces a latent site's prior by a choice among codes.

A model under `OnCodes` has one more enumerated latent in the site's plate, ``<site>_index``. Every
loss of this package, or `pyro.infer.TraceEnum_ELBO`, then sums over codes for each row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.mapa.codes import Codes
from pyro_recursive.priors.pairwise import pairwise
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.sites import Site, plates_of, same_scale, sites, sized_by
from pyro_recursive.tracing.supports import coordinates, is_circular


class Plate(NamedTuple):
    """The site's plate in one run: its full size, its size, and the indices of its rows."""

    full_size: int
    size: int
    indices: Tensor | None


class DecodedCodes(NamedTuple):
    """Codes to decode, and the log-weights of their terms in nats.

    Codes shared by all rows are ``[U, D]``, with log-weights ``[B, U]`` or ``[U]``; codes of each
    row ``[B, K, D]``, with ``[B, K]``. Log-weights may also be ``[*batch, K]`` in Pyro's order of
    plates, including those around the model.
    """

    codes: Tensor
    log_weights: Tensor


class CodeIndex(dist.Categorical):
    """An index of K codes with unnormalised log-weights ``[*batch, K]``.

    Its log-density is the log-weight itself: a sum over K indices may stand for many more codes.
    """

    def __init__(self, logits: Tensor) -> None:
        self.log_weights = logits
        super().__init__(logits=logits, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CodeIndex":
        """Expand the batch."""
        return CodeIndex(self.log_weights.expand(*batch_shape, -1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-weight of an index."""
        return Vindex(self.log_weights)[..., value]


class ChosenCode(dist.Delta):
    """A code as the value of a site, not compared with itself: that takes time and memory."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros."""
        return value.new_zeros(()).expand(self.batch_shape)


def index_site(site: str) -> str:
    """Return the name of the index's site."""
    return f"{site}_index"


class OnCodes(Messenger):
    """Replaces the prior of a latent site by a choice among codes: the model's innermost handler.

    ``select_codes`` returns the codes for a plate of the site. With ``normalise_masked`` the
    weights of rows that a mask leaves out are normalised, so that they contribute nothing.
    """

    def __init__(
        self,
        site: str,
        select_codes: Callable[[Plate], DecodedCodes],
        normalise_masked: bool = True,
    ) -> None:
        super().__init__()
        self.site, self.select_codes = site, select_codes
        self.normalise_masked = normalise_masked
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
        plate = Plate(frame.full_size or frame.size, frame.size, self._rows.get(frame.name))
        decoded = self.select_codes(plate)
        log_weights = _at_plate(decoded.log_weights, frame)
        if self.normalise_masked:
            log_weights = _normalised_where_masked(log_weights, msg["mask"])
        index = pyro.sample(
            index_site(self.site), CodeIndex(log_weights), infer={"enumerate": "parallel"}
        )
        value = _value(msg["fn"], _at_index(decoded.codes, index, frame.dim), self.site)
        event_dim = msg["fn"].event_dim
        batch = torch.broadcast_shapes(
            value.shape[: value.dim() - event_dim], msg["fn"].batch_shape
        )
        msg["fn"] = ChosenCode(value, event_dim=event_dim).expand(batch)
        msg["value"], msg["is_observed"] = value, True
        self._shared_dim = frame.dim if decoded.codes.dim() == 2 else None

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._rows[msg["name"]] = msg["value"]


class Empiricalized:
    """A model whose local latent site has an empirical prior: ``p(z) = sum_i w_i delta(z - c_i)``.

    The index is a discrete site ``<site>_index`` inside the site's plate, marked for enumeration:
    any loss of this package, with a guide of the other latents, sums over all codes (with
    `GridCodes`, a generative topographic mapping). So does `pyro.infer.TraceEnum_ELBO`, whose
    ``compute_marginals`` gives the posterior of the index; in float32 it may lose gradients. Codes
    with a scale have one draw of noise for each code and run, so that the ELBO is a bound of the
    evidence.

    Args:
        model: any Pyro model.
        codes: `pyro_recursive.mapa.Codes`; they are registered under ``name``.
        site: the latent site; optional where only one is inside a plate.

    >>> from pyro_recursive import IWAE_ELBO
    >>> from pyro_recursive.mapa import GridCodes
    >>> decoder = torch.nn.Linear(1, 2)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)
    >>> topographic = Empiricalized(model, GridCodes(9))
    >>> IWAE_ELBO(1).loss(topographic, lambda x: None, torch.randn(5, 2)) > 0
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


def with_noise(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Return draws around codes ``[..., D]``, or the codes if there is no scale."""
    return codes if scale is None else codes + scale * torch.randn_like(codes)


def local_site(trace: poutine.Trace) -> str:
    """Return the name of the one continuous latent site of a model's trace inside a plate."""
    names = [
        site["name"]
        for site in sites(trace)
        if not site["is_observed"]
        and not site["infer"].get("enumerate")
        and any(frame.vectorized for frame in plates_of(site).values())
        and not _is_discrete(site)
    ]
    if len(names) != 1:
        got = f"{names}" if names else "no continuous latent site inside a vectorised pyro.plate"
        raise ValueError(f"The model has {got}; name one with site=.")
    return names[0]


def check_site(site: Site) -> Any:
    """Return the frame of the one plate that a site is in, or raise."""
    name = site["name"]
    if _is_discrete(site):
        raise NotImplementedError(f"Latent site '{name}' is discrete; codes are continuous.")
    if "_markov_scope" in site["infer"]:
        raise NotImplementedError(f"Latent site '{name}' is in pyro.markov: sample it before.")
    frames = list(plates_of(site).values())  # the model's own, not those around its handlers
    if len(frames) != 1 or not frames[0].vectorized:
        where = ", ".join(f"'{frame.name}'" for frame in frames) or "no plate"
        raise NotImplementedError(f"Latent site '{name}' is in {where}, not one vectorised plate.")
    return sized_by(site, frames[0])


def check_latent(trace: poutine.Trace, name: str) -> None:
    """Raise where a site of a model's trace cannot have codes, or has a scale of its own."""
    latent = {site["name"]: site for site in sites(trace) if not site["is_observed"]}
    if name not in latent:
        raise ValueError(f"The model has no latent site '{name}'; there are {sorted(latent)}.")
    frame, own = check_site(latent[name]), latent[name]
    for site in sites(trace):
        if not site["is_observed"] or frame.name not in plates_of(site):
            continue
        if not same_scale(own["scale"], site["scale"]):
            raise ValueError(f"Site '{name}' has its own scale: scale the whole model.")


def _is_discrete(site: Site) -> bool:
    return bool(getattr(site["fn"].support, "is_discrete", False))


def _at_plate(log_weights: Tensor, frame: Any) -> Tensor:
    """Move rows to the plate's dim, ``[B, K]`` to ``[B, 1, ..., K]``; ``[K]`` is for all rows."""
    if log_weights.dim() == 1:
        log_weights = log_weights.expand(frame.size, -1)
    if log_weights.dim() != 2:
        return log_weights
    return log_weights.reshape(len(log_weights), *[1] * (-frame.dim - 1), log_weights.shape[-1])


def _at_index(codes: Tensor, index: Tensor, dim: int) -> Tensor:
    if codes.dim() == 2:
        return codes[index]
    rows = torch.arange(len(codes), device=codes.device).reshape(-1, *[1] * (-dim - 1))
    return codes[rows, index]


def _value(fn: Any, u: Tensor, name: str) -> Tensor:
    """Return the site's value at unconstrained vectors ``[*batch, D]``."""
    transform = coordinates(fn, is_circular(fn))
    shape = transform.inverse_shape(fn.event_shape)
    if u.shape[-1] != shape.numel():
        raise ValueError(f"Site '{name}' takes codes [{shape.numel()}], got [{u.shape[-1]}].")
    return transform(u.reshape(u.shape[:-1] + shape))


def _normalised_where_masked(log_weights: Tensor, mask: Any) -> Tensor:
    if mask is None or mask is True:
        return log_weights
    mask = torch.as_tensor(mask, device=log_weights.device)
    return torch.where(mask[..., None], log_weights, log_weights.log_softmax(-1))
