"""MAPA: a posterior over the codes of the training data, guessed once from the data alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.nn import pyro_method
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.base import GuideCall, LatentGuide
from pyro_recursive.guides.joint_site import emit, inside, outer_shape
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.mapa.candidates import Plan
from pyro_recursive.mapa.codes import Codes, EncodedCodes
from pyro_recursive.mapa.empirical_model import (
    DecodedCodes,
    OnCodes,
    Plate,
    all_of,
    check_latent,
    local_site,
    with_noise,
)
from pyro_recursive.mapa.index_posterior import CodeMixture, IndexPosterior
from pyro_recursive.mapa.kernels import kernel_for
from pyro_recursive.mapa.neighbour_rows import NeighbourRows
from pyro_recursive.mapa.recover import recover_prior
from pyro_recursive.mapa.replaced_prior import with_prior
from pyro_recursive.mapa.table import Rows, Table, neighbours
from pyro_recursive.tracing.arguments import check_instance, is_count
from pyro_recursive.tracing.compatibility import check_finite
from pyro_recursive.tracing.handlers import ComponentIndex, SubstituteByName
from pyro_recursive.tracing.isolation import isolated, outline
from pyro_recursive.tracing.sites import nesting_of, plates_of, sites, subsample_sites

__all__ = ["MAPAGuide", "Passes"]

_ENCODED_AT_ONCE = 4096


class Passes(NamedTuple):
    """What the last training step cost: how many codes were decoded for how many rows."""

    codes: int
    rows: int


class MAPAGuide(LatentGuide):
    """A posterior over the codes of an empirical prior, guessed once from distances between data.

    The prior of one local latent site is replaced by M codes, ``p(z) = sum_i w_i delta(z - c_i)``
    (what the model's own prior depends on, parameters or covariates, has no effect then), by
    default those of an encoder of the training data, ``c_i = g(x_i)`` and ``w_i = 1/N``. What
    the guide approximates is which code explains a row: a table ``q(i | n)``, proportional to a
    kernel of x_n and x_i, that is computed from the data before training, has no parameters, and
    says which few codes are decoded. Train with `pyro_recursive.MAPA_ELBO`, which climbs

        E log( sum_{i in top} w_i p(x_n | c_i)  +  sum_{drawn i} w_i p(x_n | c_i) / (chance of i) )

    in the model, the codes and the other latents: a lower bound of log p(x_n) under the empirical
    prior, that is exact with all codes, and with top=1 and samples=0, not pooled, the loss of an
    autoencoder.

    Outside of that loss this is an ordinary guide: each row of its data, known or new, gets the
    posterior over its nearest codes by the decoder's likelihood, so that `Predictive` works; with
    None in place of data, codes come from the prior. Points have no density: for that of the latent
    (`log_marginal`, other losses) give the codes a scale, or recover a continuous prior with
    `pyro_recursive.mapa.recover_prior` and train a guide on that model.

    Arguments:
        model: any Pyro model whose latent site ``site`` is in one vectorised plate, that of the
            data. It has to count dims from the right, as for any enumeration. Discrete sites of the
            model may be enumerated beside it.
        codes: an encoder from rows of ``data`` to unconstrained vectors ``[n, D]``, or
            `pyro_recursive.mapa.Codes`: free ones, a grid, pseudo-inputs.
        data: the training data ``[N, *x]``, as ``inputs`` gives them. The table is built from them
            at the first call.
        kernel: how near two data are; `pyro_recursive.mapa.kernels`, or any function of rows
            ``[Q, *x]`` and ``[R, *x]`` to ``[Q, R]`` nats. Found from the observed site's
            distribution if not given.
        table: a `pyro_recursive.mapa.Table` in place of a kernel; its rows are told by
            comparing inputs with ``data``, or by ``rows``. Without table and data the sum is over
            all codes, exact.
        neighbours: k, how many codes a row of the table keeps.
        top, samples: how many of a row's nearest codes are summed, and how many of the others are
            drawn. Keep samples >= 1: the top alone is a loose bound.
        share, replace: ``"pooled"`` lets all rows of a minibatch use each other's codes, which
            makes the bound much tighter at no more decoder passes; ``"shared"`` keeps each row's
            own, decoding each code once; ``"pair"`` decodes for each row by itself, for decoders
            that need more of the row than the code. ``replace`` draws independently, as the paper.
            In a pool without replacement ``samples`` may be a fraction. Pooled, the bound hardly
            cares which code belongs to which row: codes can leave their data, and a row's nearest
            in the data then hold less of its posterior. For what is asked of the guide afterwards,
            let the table keep many ``neighbours``, or train with ``"shared"``.
        warm_up: for so many training steps at first, top=1 and samples=0: an autoencoder. It finds
            codes that differ, where sums over codes can rest for long on a constant decoder.
        site: the latent site; the one continuous site inside a plate if not given.
        rest: a guide for the other latents; a mean-field `AmortizedGuide` if there are some. For
            new data, other latents inside the plate need one with an encoder.
        rows: a function from the model's arguments to the rows' numbers in the data ``[B]``, for
            minibatches that the model does not draw itself, or that are changed (binarised, say).
            Rows that are not known in either way, or for which it returns None, are looked up
            anew in each call. A guide takes its first call's minibatch size for the model's: where
            the model draws minibatches, `prepare` it with all data.
        cache, cache_key: a folder to keep the table in; see `pyro_recursive.mapa.neighbours`.
        plate, inputs, create_plates, name: as in `AmortizedGuide`; ``inputs`` gives the data.

    Attributes:
        passes: codes decoded in the last training step, and its rows.
        plan: a `pyro_recursive.mapa.candidates.Plan` of ``top``, ``samples``, ``share`` and
            ``replace``, which may be replaced during training.

    Raises:
        NotImplementedError: the site is discrete, or not in exactly one vectorised plate; a density
            is asked of points.
        TypeError: ``codes``, ``kernel`` or ``rest`` is a class.
        ValueError: it is not clear which site is meant; codes have another length than the site;
            an argument is out of range; the table and the codes differ in number.

    Cost of a step: U codes are encoded and decoded, at most B (top + samples), and B U likelihoods
    evaluated (``"pair"``: B (top + samples)). Counting U takes one synchronisation with a GPU.

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby, Pan & Doshi-Velez, arXiv 2403.08941). There draws are independent and not
    pooled.

    >>> import pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro_recursive import MAPA_ELBO
    >>> encoder, decoder = nn.Linear(2, 1), nn.Linear(1, 2)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)
    >>> x = torch.randn(50, 2)
    >>> guide = MAPAGuide(model, encoder, x, top=1, samples=4)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=MAPA_ELBO())
    >>> svi.step(x) > 0
    True
    >>> guide(torch.randn(3, 2))["z"].shape  # new data
    torch.Size([3, 1])
    """

    can_be_component: ClassVar[bool] = False
    steps_to_warm_up: Tensor

    def __init__(
        self,
        model: Callable,
        codes: Codes | Callable[..., Any],
        data: Tensor | None = None,
        *,
        kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
        table: Table | None = None,
        neighbours: int = 64,
        top: int = 1,
        samples: float = 4,
        share: str = "pooled",
        replace: bool = False,
        warm_up: int = 0,
        site: str | None = None,
        rest: Callable | None = None,
        rows: Callable[..., Tensor] | None = None,
        cache: str | Path | None = None,
        cache_key: str | None = None,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        if not is_count(neighbours) or neighbours < 1:
            raise ValueError(f"neighbours must be an integer >= 1, got {neighbours!r}")
        if not is_count(warm_up) or warm_up < 0:
            raise ValueError(f"warm_up must be an integer >= 0, got {warm_up!r}")
        for what, value in (("codes", codes), ("kernel", kernel), ("rest", rest)):
            check_instance(what, value)
        if kernel is not None and (table is not None or data is None):
            raise ValueError("kernel= makes the table from data: give data, and no table=")
        super().__init__(model, plate=plate, inputs=inputs, create_plates=create_plates, name=name)
        self.codes: Any = _codes_of(codes, data)
        self.site, self.kernel = site, kernel
        self.num_neighbours, self.cache, self.cache_key = neighbours, cache, cache_key
        self.plan = Plan(top, samples, share, replace)
        self._data, self._numbers = (data,), rows  # in a tuple: no part of the guide's state
        self._neighbour_rows: NeighbourRows | None = None
        if table is not None:
            self.table = table
        self._set_rest(rest)
        self.register_buffer("steps_to_warm_up", torch.tensor(warm_up))
        self.passes: Passes | None = None

    @property
    def by_row(self) -> bool:
        """Each row has a posterior of its own."""
        return True

    @property
    def table(self) -> Table | None:
        """The table q(i | n), which may be replaced during training; None sums over all codes."""
        return None if self._neighbour_rows is None else self._neighbour_rows.table

    @table.setter
    def table(self, table: Table | None) -> None:
        if table is None:
            self._neighbour_rows = None
            return
        if table.num_components != len(self.codes):
            raise ValueError(
                f"The table is over {table.num_components} components, and there are "
                f"{len(self.codes)} codes. Codes that are not one for each datum take a table of "
                "their own, or none, for the exact sum over all."
            )
        data = self._data[0]
        if data is None and isinstance(self.codes, EncodedCodes):
            data = self.codes.inputs
        self._neighbour_rows = NeighbourRows(table, data, self._numbers)

    def look(self, *args: Any, **kwargs: Any) -> None:
        """Look at the model, build the table of neighbours, and create all parameters."""
        model = self.own_model("to see its latents")
        raw = self.inputs(*args, **kwargs)
        if _asks_for_the_prior(raw, args, kwargs):
            raise ValueError("The first call of a MAPAGuide, or prepare(), needs data.")
        trace = outline(model, args, kwargs, grad=True)  # to see what is learned
        self.site = self.site or local_site(trace)
        check_latent(trace, self.site)
        super().look(*args, **kwargs)
        self.nesting = nesting_of(trace)
        self._build_table(trace, raw, args, kwargs)
        if self.table is None and int(self.steps_to_warm_up):
            raise ValueError("warm_up= takes each row's nearest code, and there is no table.")
        others = [s for s in sites(trace) if self._is_other(s) and not s["infer"].get("enumerate")]
        if others and self._rest() is None:
            self._set_rest(AmortizedGuide(poutine.block(model, hide=[self.site])))
        with isolated(), torch.no_grad():
            self._check_broadcasting(self.new_call(args, kwargs))

    def served_model(self) -> Callable:
        """Return the model with the latent that has codes, the others hidden."""
        return poutine.block(super().served_model(), hide_fn=self._is_other)

    def build(self, latents: LatentBlock, place: Tensor, raw: Any) -> None:
        """Check that the codes fit the site."""
        first = self.codes(torch.zeros(1, dtype=torch.long, device=self.codes.logits.device))
        if first.shape[-1] != latents.size:
            raise ValueError(
                f"Codes are vectors of length {first.shape[-1]}, and latent site '{self.site}' "
                f"takes {latents.size} unconstrained numbers."
            )

    def _check_broadcasting(self, call: GuideCall) -> None:
        (latents,) = self.groups
        (rows,) = call.sizes(latents)
        shape = (rows, 2) if self.plan.share == "pair" else (rows + 1,)
        index = torch.zeros(shape, dtype=torch.long, device=self.codes.logits.device)
        is_training = self.codes.training
        self.codes.eval()  # no statistics of a batch norm, say, from this look
        placed = self._placed(index, torch.zeros_like(index), noisy=False)
        self.codes.train(is_training)
        self._index_posterior.check_broadcasting(call, placed)

    @pyro_method
    def others(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latents beside the codes: the guide that `MAPA_ELBO` runs."""
        self.get_ready(args, kwargs)
        _ = self.codes  # so that Pyro meets its parameters
        rest = self._rest()
        return None if rest is None else rest(*args, **kwargs)

    def empiricalized(self, model: Callable) -> Callable:
        """Return the model on the codes of one step, each time other ones: what is trained."""

        def on_codes(*args: Any, **kwargs: Any) -> Any:
            def place(plate: Plate) -> DecodedCodes:
                return self._step(self._rows_of(plate, args, kwargs), plate)

            with OnCodes(str(self.site), place):
                return model(*args, **kwargs)

        return on_codes

    def explain(self, *args: Any, **kwargs: Any) -> Rows:
        """Return which codes explain each row: component numbers and their posterior.

        ``index`` ``[B, k]`` and normalised ``log_q`` ``[B, k]`` in nats, for the rows of a call:
        the neighbours of the table, weighed by the likelihood of what they decode to; given one
        draw of the other latents, where there are some.
        """
        self.prepare(*args, **kwargs)
        with poutine.block(), torch.no_grad():
            call = self.new_call(args, kwargs)
            index, placed = self._neighbours(call)
            log_q = self._index_posterior(call, placed)
        plate = _plate_of(self.groups[0], call)
        return Rows(index.expand(plate.size, -1), log_q.reshape(plate.size, -1))

    def recovered(self, kind: str = "auto", **options: Any) -> Callable:
        """Return the model with a continuous prior, fitted to the codes as they are now.

        An ordinary Pyro model, for `Predictive`, `log_marginal` and guides of any kind. Codes with
        a scale have a continuous prior already, which ``"auto"`` then is. The arguments are those
        of `pyro_recursive.mapa.recover_prior`, the errors too; the prior is its ``prior``.
        """
        with torch.no_grad():
            index = torch.arange(len(self.codes), device=self.codes.logits.device)
            codes = torch.cat([self.codes(part) for part in index.split(_ENCODED_AT_ONCE)])
            log_weights, scale = self.codes.log_weights, self.codes.scale
        if kind == "auto" and scale is not None:
            kind, options = "kernels", {"scale": scale.item(), **options}
        prior = recover_prior(codes, kind, log_weights=log_weights.detach(), **options)
        return with_prior(self.own_model("to replace its prior"), str(self.site), prior)

    def posterior(self, latents: LatentBlock, call: GuideCall) -> CodeMixture:
        """Return the posterior over the codes of each row: batch ``[*batch]``, event ``[D]``."""
        _, placed = self._neighbours(call)
        if _asks_for_the_prior(call.raw, call.args, call.kwargs):
            prior = self._index_posterior.at_rows(placed.log_weights, call)
            return CodeMixture(prior, placed.codes, self.codes.scale)
        codes = placed.codes
        if codes.dim() == 3:
            codes = latents.expand_rows(codes.flatten(1)).unflatten(-1, codes.shape[1:])
        with torch.no_grad():  # a guess: what it guesses from does not learn
            log_weights = self._index_posterior(call, placed)
        return CodeMixture(log_weights, codes, self.codes.scale)

    def sample_from(self, posterior: Any, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample a code for each row, then the site."""
        with inside(latents.rows, call.plates):
            choice = ComponentIndex(logits=posterior.log_weights)
            index = pyro.sample(f"{self.name}_code", choice, infer={"is_auxiliary": True})
        shape = torch.broadcast_shapes(outer_shape(), posterior.batch_shape)
        return emit(latents, call.plates, posterior.draw(index.expand(shape)), posterior.log_prob)

    def _plate(self, frame: Any, latents: LatentBlock, call: GuideCall) -> Any:
        """Make a plate as the model's; without data only the model knows how many rows."""
        if call.raw is not None:
            return super()._plate(frame, latents, call)
        trace = outline(self.own_model("to see its plate"), call.args, call.kwargs)
        found = plates_of(trace.nodes[str(self.site)])[frame.name]
        return pyro.plate(frame.name, found.full_size, subsample_size=found.size, dim=frame.dim)

    def new_call(self, args: tuple, kwargs: dict[str, Any]) -> GuideCall:
        """Sample the other latents, and return the call with plates of the same minibatch."""
        rest = self._rest()
        if rest is None:
            return super().new_call(args, kwargs)
        trace = poutine.trace(rest).get_trace(*args, **kwargs)
        minibatch = {name: site["value"] for name, site in subsample_sites(trace).nodes.items()}
        with poutine.block(hide=list(minibatch)), SubstituteByName(minibatch):
            call = super().new_call(args, kwargs)
        call.given.update({s["name"]: s["value"] for s in sites(trace) if not s["is_observed"]})
        return call

    def _step(self, rows: Rows | None, plate: Plate) -> DecodedCodes:
        """Choose the codes of a training step, and count them."""
        if rows is None:
            self.passes = Passes(len(self.codes), plate.size)
            return all_of(self.codes)
        found = self._next_plan()(rows.index, rows.log_q, len(self.codes))
        self.passes = Passes(found.codes.numel(), plate.size)
        return self._placed(found.codes, found.log_weights)

    def _next_plan(self) -> Plan:
        """Return the plan of a step; that of an autoencoder while there are steps to warm up."""
        if not torch.is_grad_enabled() or int(self.steps_to_warm_up) == 0:
            return self.plan
        return Plan(1, 0, "pair" if self.plan.share == "pair" else "shared")

    def end_step(self) -> None:
        """Count a step of training: `MAPA_ELBO` calls this."""
        self.steps_to_warm_up.sub_(1).clamp_(min=0)

    def _neighbours(self, call: GuideCall) -> tuple[Tensor, DecodedCodes]:
        """Return all codes that the table keeps for the rows, with the prior's weights."""
        rows = self._rows_of(_plate_of(self.groups[0], call), call.args, call.kwargs)
        if rows is None:
            index = torch.arange(len(self.codes), device=self.codes.logits.device)
            return index, DecodedCodes(self.codes(), self.codes.log_weights)
        padding = torch.zeros_like(rows.log_q).masked_fill(rows.log_q.isneginf(), -math.inf)
        return rows.index, self._placed(rows.index, padding, noisy=False)

    def _placed(self, index: Tensor, log_weights: Tensor, noisy: bool = True) -> DecodedCodes:
        """Compute codes, each once, ``[U]`` or ``[B, K]``, and add the prior's weights."""
        prior = self.codes.log_weights
        if index.dim() == 1:
            codes = self.codes(index)
        else:
            once, place = index.unique(return_inverse=True)
            codes = self.codes(once)[place]
        if noisy:
            codes = with_noise(codes, self.codes.scale)
        return DecodedCodes(codes, prior[index] + log_weights.to(prior))

    @property
    def _index_posterior(self) -> IndexPosterior:
        model = self.own_model("to weigh codes")
        return IndexPosterior(model, str(self.site), self.groups[0], self.nesting)

    def _rows_of(self, plate: Plate, args: tuple, kwargs: dict[str, Any]) -> Rows | None:
        """Return the table's rows for the rows of a plate; None where all codes are candidates."""
        raw = self.inputs(*args, **kwargs)
        if self._neighbour_rows is None or _asks_for_the_prior(raw, args, kwargs):
            return None
        found, device = self._neighbour_rows(raw, plate, args, kwargs), self.codes.logits.device
        return Rows(found.index.to(device), found.log_q.to(device))

    def _build_table(
        self, trace: poutine.Trace, raw: Any, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        data = self._data[0]
        if self.table is not None or data is None:
            return
        width, kernel = min(self.num_neighbours, len(data)), self.kernel
        if kernel is None:
            site = str(self.site)
            kernel = _kernel_of(trace, site, raw, len(data), width)
            with isolated():
                torch.rand(8)  # for another draw of the prior
                again = outline(self.own_model("to see its scale"), args, kwargs, grad=True)
            if _kernel_of(again, site, raw, len(data), width) != kernel:
                raise ValueError(
                    "The likelihood has a scale that depends on other latents, so that it does not "
                    "tell how near two data are: give kernel=, such as "
                    "pyro_recursive.mapa.kernels.Gaussian(perplexity=30)."
                )
        self.table = neighbours(data, kernel, width, cache=self.cache, cache_key=self.cache_key)

    def _is_other(self, site: Any) -> bool:
        """Whether a message is of a latent that has no codes."""
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            return False
        return site["name"] != self.site

    def _set_rest(self, rest: Any) -> None:
        """Keep the guide of the other latents; a module's parameters become this guide's."""
        self._function = None if isinstance(rest, nn.Module) else rest
        if isinstance(rest, nn.Module):
            self.rest: Any = rest

    def _rest(self) -> Any:
        return self.rest if self._has("rest") else self._function


def _asks_for_the_prior(raw: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call has None in place of data; without arguments, a model has its own."""
    return raw is None and bool(args or kwargs)


def _codes_of(codes: Any, data: Tensor | None) -> Codes:
    if isinstance(codes, Codes):
        return codes
    if data is None:
        raise ValueError(
            "An encoder makes codes from data: give the training data as third argument, or "
            "pyro_recursive.mapa.EncodedCodes(encoder, inputs) as codes."
        )
    return EncodedCodes(codes, data)


def _kernel_of(trace: poutine.Trace, site: str, raw: Any, number: int, k: int) -> Callable:
    """Return the kernel that fits the one observed site, if that observes the inputs."""
    observed = [each for each in sites(trace) if each["is_observed"]]
    if len(observed) != 1:
        raise ValueError(
            f"The model observes {[each['name'] for each in observed]}, and which of them tells "
            "how near two data are is not clear: give kernel= or table=."
        )
    (seen,) = observed
    check_finite(seen)
    (frame,) = plates_of(trace.nodes[site]).values()
    value = seen["value"].detach()
    rows = raw
    if isinstance(raw, Tensor) and frame.name in trace.nodes and len(raw) != frame.size:
        rows = raw[trace.nodes[frame.name]["value"].to(raw.device)]
    flat = value.reshape(frame.size, -1) if value.numel() % frame.size == 0 else value
    if raw is not None and not (isinstance(rows, Tensor) and _same(rows, flat)):
        raise ValueError(
            f"Site '{seen['name']}' observes other numbers than the inputs, so that its likelihood "
            "does not tell how near two of these are: give kernel=, in the units of the data."
        )
    return kernel_for(seen["fn"], value, number, k)


def _same(rows: Tensor, value: Tensor) -> bool:
    rows = rows.reshape(len(rows), -1)
    return rows.shape == value.shape and bool((rows.to(value) == value).all())


def _plate_of(latents: LatentBlock, call: GuideCall) -> Plate:
    plate = call.plates[latents.rows[0].name]
    return Plate(plate.size, plate.subsample_size, plate.indices)
