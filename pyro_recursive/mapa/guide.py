"""MAPA: a posterior over the codes of the training data, computed from the data before training."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.nn import pyro_method
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall, copied_plate, plate_devices
from pyro_recursive.guides.joint_site import emit, inside
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.starts import InitLocFn, StartSearch
from pyro_recursive.mapa.candidates import Plan
from pyro_recursive.mapa.code_posterior import CodeMixture, at_rows, index_posterior
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
from pyro_recursive.mapa.kernels import kernel_of_model
from pyro_recursive.mapa.recover import recover_prior, with_prior
from pyro_recursive.mapa.table import NeighbourRows, Rows, Table, neighbours
from pyro_recursive.tracing.handlers import (
    ComponentIndex,
    FlatPriors,
    SubstituteByName,
    is_dry_run,
)
from pyro_recursive.tracing.isolation import OUTSIDE_OF_GRAPHS, eval_mode, isolated, outline
from pyro_recursive.tracing.param_store import is_of_another, load_from_store
from pyro_recursive.tracing.plates import outer_shape
from pyro_recursive.tracing.sites import nesting_of, plates_of, sites, subsample_sites

_ENCODED_AT_ONCE = 4096


class Passes(NamedTuple):
    """How many codes were decoded in the last evaluation of the loss, and for how many rows."""

    codes: int
    rows: int


class MAPAGuide(LatentGuide):
    """A posterior over the codes of an empirical prior, computed from distances between data.

    The prior of one local latent is replaced by M codes, ``p(z) = sum_i w_i delta(z - c_i)``, by
    default ``c_i = g(x_i)`` and ``w_i = 1/N``. A fixed table ``q(i | n)``, proportional to a kernel
    of x_n and x_i, chooses the codes to decode in training with `pyro_recursive.MAPA_ELBO`. Other
    calls give each row, known or new, the posterior over its nearest codes.

    Args:
        model: any Pyro model with a latent ``site`` in the one vectorised plate of the data.
        codes: `pyro_recursive.mapa.Codes`, or an encoder of ``data`` to vectors ``[n, D]``.
        data: the training data ``[N, *x]``, as ``inputs`` gives them.
        kernel: a `pyro_recursive.mapa.kernels` member or any function of rows ``[Q, *x]`` and
            ``[R, *x]`` to ``[Q, R]`` nats; by default that of the observed site's distribution.
        table: a `pyro_recursive.mapa.Table`. Without table and data the sum is over all codes.
        neighbours: how many codes a row of the table keeps.
        top, samples, share, replace: the `pyro_recursive.mapa.Plan` of a step.
        warm_up: how many training steps of an autoencoder (top=1, samples=0) come first.
        site: the latent site; optional where only one is inside a plate.
        rest: a guide for other latents; by default `AmortizedGuide` (``init_loc_fn, init_scale``).
        rows: a function from the model's arguments to the rows' indices in the data ``[B]``.
        cache, cache_key: as in `pyro_recursive.mapa.neighbours`.
        plate, inputs, create_plates, name: as in `AmortizedGuide`.

    Raises:
        NotImplementedError: the site is discrete or not in one plate.
        ValueError: several sites could be meant; codes, table and site do not fit.

    Source: `Towards Model-Agnostic Posterior Approximation` (Yacoby et al., arXiv 2403.08941).

    >>> import pyro.distributions as dist
    >>> encoder, decoder = torch.nn.Linear(2, 1), torch.nn.Linear(1, 2)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)
    >>> guide = MAPAGuide(model, encoder, torch.randn(50, 2), top=1, samples=4)
    >>> guide(torch.randn(3, 2))["z"].shape  # new data
    torch.Size([3, 1])
    """

    can_be_component: ClassVar[bool] = False
    steps_to_warm_up: Tensor
    # That buffer and its version, once it is 0. Of the class, for pickles that lack it.
    _warm: tuple[Tensor, int] | None = None

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
        init_loc_fn: InitLocFn | None = None,
        init_scale: float = 0.1,
        rows: Callable[..., Tensor] | None = None,
        cache: str | Path | None = None,
        cache_key: str | None = None,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        if kernel is not None and (table is not None or data is None):
            raise ValueError("kernel= makes the table from data: give data, and no table=.")
        if not isinstance(codes, Codes):
            if data is None:
                raise ValueError("An encoder needs the training data as third argument.")
            codes = EncodedCodes(codes, data)
        super().__init__(model, plate=plate, inputs=inputs, create_plates=create_plates, name=name)
        self.codes: Any = codes
        self.site, self.kernel, self.rest = site, kernel, rest
        self._of_rest: dict[str, Any] = {"init_loc_fn": init_loc_fn, "init_scale": init_scale}
        self.num_neighbours, self.cache, self.cache_key = neighbours, cache, cache_key
        self.plan = Plan(top, samples, share, replace)
        self._data, self._indices_of = (data,), rows  # in a tuple: no part of the guide's state
        self._neighbour_rows: NeighbourRows | None = None
        self.table = table
        self.register_buffer("steps_to_warm_up", torch.tensor(warm_up))
        self.passes: Passes | None = None

    def attach(self, model: Callable) -> None:
        """Set the guide's model, also of the guide of the other latents; see `LatentGuide`."""
        super().attach(model)
        if isinstance(self.rest, LatentGuide) and self.site is not None:
            self.rest.attach(poutine.block(model, hide=[self.site]))

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
            raise ValueError(f"The table is not over the {len(self.codes)} codes.")
        data = self._data[0]
        if data is None and isinstance(self.codes, EncodedCodes):
            data = self.codes.inputs
        self._neighbour_rows = NeighbourRows(table, data, self._indices_of)

    def inspect_model(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once, build the table of neighbours, and create all parameters."""
        model = self.own_model()
        raw = self.inputs(*args, **kwargs)
        if _asks_for_the_prior(raw, args, kwargs):
            raise ValueError("The first call of a MAPAGuide, or prepare(), needs data.")
        trace = outline(model, args, kwargs, grad=True)  # learned scales require gradients
        self.site = self.site or local_site(trace)
        check_latent(trace, self.site)
        super().inspect_model(*args, **kwargs)
        self.nesting = nesting_of(trace)
        data = self._data[0]
        if self.table is None and data is not None:
            self._build_table(data, trace, raw, args, kwargs)
        if self.table is None and int(self.steps_to_warm_up):
            raise ValueError("warm_up= takes each row's nearest code, and there is no table.")
        others = [s for s in sites(trace) if self._is_other(s) and not s["infer"].get("enumerate")]
        if others and self.rest is None:
            others_alone = poutine.block(model, hide=[self.site])
            self.rest = AmortizedGuide(others_alone, **self._of_rest)
        with isolated(), torch.no_grad():
            self._check_broadcasting(self.new_call(args, kwargs))

    def create_parameters(
        self, groups: tuple[LatentBlock, ...], search: StartSearch, raw: Any
    ) -> None:
        """Take the latents: codes have no start."""
        self.groups = groups

    def served_model(self) -> Callable:
        """Return the model with the latent that has codes, the others hidden."""
        return poutine.block(FlatPriors()(super().served_model()), hide_fn=self._is_other)

    def _check_broadcasting(self, call: GuideCall) -> None:
        """Run the model on more codes than rows; a wrong reshape could pass on equal numbers."""
        (latents,) = self.groups
        (rows,) = call.sizes(latents)
        shape = (rows, 2) if self.plan.share == "pair" else (rows + 1,)
        index = torch.zeros(shape, dtype=torch.long, device=self.codes.logits.device)
        with eval_mode(self.codes):  # a batch norm cannot train on a single code
            decoded = self._decoded(index, torch.zeros_like(index), noisy=False)
        try:
            index_posterior(self, call, decoded)
        except NotImplementedError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"The model fails with site '{self.site}' at many codes at once: count dims from "
                f"the right, or use share='pair'. The error was: {error}"
            ) from error

    @pyro_method
    def others(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latents that have no codes."""
        self.get_ready(args, kwargs)
        _ = self.codes  # registers its parameters with Pyro
        return None if self.rest is None else self.rest(*args, **kwargs)

    def empiricalized(self, model: Callable) -> Callable:
        """Return the model with the codes of a training step, chosen anew in each run."""

        def on_codes(*args: Any, **kwargs: Any) -> Any:
            def select_codes(plate: Plate) -> DecodedCodes:
                return self._step(self._rows_of(plate, args, kwargs), plate)

            with OnCodes(str(self.site), select_codes):
                return model(*args, **kwargs)

        return on_codes

    def explain(self, *args: Any, **kwargs: Any) -> Rows:
        """Return the posterior over the codes of each row's neighbours, ``[B, k]``.

        It is by the decoder's likelihood, given one draw of the other latents.
        """
        self.get_ready(args, kwargs)
        with poutine.block(), torch.no_grad():
            call = self.new_call(args, kwargs)
            index, decoded = self._neighbours(call)
            log_q = index_posterior(self, call, decoded)
        plate = _plate_of(self.groups[0], call)
        return Rows(index.expand(plate.size, -1), log_q.reshape(plate.size, -1))

    def recovered(self, kind: str = "auto", **options: Any) -> Callable:
        """Return the model with a continuous prior, fitted to the codes, encoded in eval mode.

        An ordinary Pyro model, with the prior as its ``prior``. Arguments and errors are those of
        `pyro_recursive.mapa.recover_prior`; ``"auto"`` is the exact prior of codes with a scale.

        Raises:
            RuntimeError: the guide has not seen its model, and has no ``site``.
        """
        if self.site is None:
            raise RuntimeError("The guide has not seen its model. Call guide.prepare(*args) first.")
        if self.groups:
            self.take_stored((), {})
        elif not (self.is_loaded or is_of_another(self)):
            load_from_store(self, self._pyro_name)
        with torch.no_grad(), eval_mode(self.codes):
            index = torch.arange(len(self.codes), device=self.codes.logits.device)
            codes = torch.cat([self.codes(part) for part in index.split(_ENCODED_AT_ONCE)])
            log_weights, scale = self.codes.log_weights, self.codes.scale
        if kind == "auto" and scale is not None:
            kind, options = "kernels", {"scale": scale.item(), **options}
        prior = recover_prior(codes, kind, log_weights=log_weights.detach(), **options)
        return with_prior(self.own_model(), self.site, prior)

    def posterior(self, latents: LatentBlock, call: GuideCall) -> CodeMixture:
        """Return the posterior over the codes of each row: batch ``[*batch]``, event ``[D]``."""
        _, decoded = self._neighbours(call)
        if _asks_for_the_prior(call.raw, call.args, call.kwargs):
            prior = at_rows(decoded.log_weights, latents, call)
            return CodeMixture(prior, decoded.codes, self.codes.scale)
        codes = decoded.codes
        if codes.dim() == 3:
            codes = latents.expand_rows(codes.flatten(1)).unflatten(-1, codes.shape[1:])
        with torch.no_grad():
            log_weights = index_posterior(self, call, decoded)
        return CodeMixture(log_weights, codes, self.codes.scale)

    def sample_from(self, posterior: Any, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample a code for each row, then the site."""
        with inside(latents.rows, call.plates):
            choice = ComponentIndex(logits=posterior.log_weights)
            index = pyro.sample(f"{self.site_prefix}_code", choice, infer={"is_auxiliary": True})
        shape = torch.broadcast_shapes(outer_shape(), posterior.batch_shape)
        keep, u = latents.keep(call.kept), posterior.draw(index.expand(shape))

        def density(u: Tensor, volume: Tensor) -> Tensor:
            return log_density(posterior, u, keep) - volume

        return emit(latents, call, u, density)

    def make_plate(self, frame: Any, latents: LatentBlock, call: GuideCall) -> Any:
        """Make a plate as the model's; without data its size is found by running the model."""
        if call.raw is not None:
            return super().make_plate(frame, latents, call)
        trace = outline(self.own_model(), call.args, call.kwargs)
        frame = plates_of(trace.nodes[str(self.site)])[frame.name]
        return copied_plate(frame, plate_devices(trace).get(frame.name))

    def new_call(self, args: tuple, kwargs: dict[str, Any]) -> GuideCall:
        """Sample the other latents, and return the call with plates of the same minibatch."""
        if self.rest is None:
            return super().new_call(args, kwargs)
        trace = poutine.trace(self.rest).get_trace(*args, **kwargs)
        minibatch = {name: site["value"] for name, site in subsample_sites(trace).nodes.items()}
        with poutine.block(hide=list(minibatch)), SubstituteByName(minibatch):
            call = super().new_call(args, kwargs)
        call.given.update({s["name"]: s["value"] for s in sites(trace) if not s["is_observed"]})
        return call

    def _step(self, rows: Rows | None, plate: Plate) -> DecodedCodes:
        if rows is None:
            self.passes = Passes(len(self.codes), plate.size)
            return all_of(self.codes)
        plan = self.plan
        if is_dry_run():  # no draws: only such runs can be compared
            plan = replace(plan, top=2, samples=0)
        elif torch.is_grad_enabled() and self._warms_up():  # an autoencoder
            plan = Plan(1, 0, "pair" if plan.share == "pair" else "shared")
        chosen = plan(rows.index, rows.log_q, len(self.codes))
        self.passes = Passes(chosen.codes.numel(), plate.size)
        return self._decoded(chosen.codes, chosen.log_weights)

    def end_step(self) -> None:
        """Count a training step."""
        if not self._is_warm():
            self.steps_to_warm_up.sub_(1).clamp_(min=0)

    def _is_warm(self) -> bool:
        """Whether the warm-up is known to be over; a graph depends on the buffer's value."""
        if self._warm is None or OUTSIDE_OF_GRAPHS.get() is not None:
            return False
        steps, version = self._warm
        return steps is self.steps_to_warm_up and steps._version == version

    def _warms_up(self) -> bool:
        """Whether the warm-up goes on; this waits for the device until it is over."""
        if self._is_warm():
            return False
        steps = self.steps_to_warm_up
        left = int(steps)
        if not left and OUTSIDE_OF_GRAPHS.get() is None:
            self._warm = steps, steps._version
        return left > 0

    def _neighbours(self, call: GuideCall) -> tuple[Tensor, DecodedCodes]:
        """Return all codes that the table keeps for the rows, with the prior's weights."""
        rows = self._rows_of(_plate_of(self.groups[0], call), call.args, call.kwargs)
        if rows is None:
            index = torch.arange(len(self.codes), device=self.codes.logits.device)
            return index, DecodedCodes(self.codes(), self.codes.log_weights)
        padding = torch.zeros_like(rows.log_q).masked_fill(rows.log_q.isneginf(), -math.inf)
        return rows.index, self._decoded(rows.index, padding, noisy=False)

    def _decoded(self, index: Tensor, log_weights: Tensor, noisy: bool = True) -> DecodedCodes:
        """Decode ``[U]`` or ``[B, K]`` indices, each code once; add the prior's log-weights."""
        prior = self.codes.log_weights
        if index.dim() == 1:
            codes = self.codes(index)
        else:
            unique, inverse = index.unique(return_inverse=True)
            codes = self.codes(unique)[inverse]
        if noisy:
            codes = with_noise(codes, self.codes.scale)
        return DecodedCodes(codes, prior[index] + log_weights.to(prior))

    def _rows_of(self, plate: Plate, args: tuple, kwargs: dict[str, Any]) -> Rows | None:
        """Return the table's rows for the rows of a plate; None where all codes are candidates."""
        raw = self.inputs(*args, **kwargs)
        if self._neighbour_rows is None or _asks_for_the_prior(raw, args, kwargs):
            return None
        device = self.codes.logits.device
        index, log_q = self._neighbour_rows(raw, plate, args, kwargs)
        return Rows(index.to(device), log_q.to(device))

    def _build_table(
        self, data: Tensor, trace: poutine.Trace, raw: Any, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        kernel, site, width = self.kernel, str(self.site), min(self.num_neighbours, len(data))
        if kernel is None:
            kernel = kernel_of_model(trace, site, raw, len(data), width)
            with isolated():
                torch.rand(8)  # advance the random state: the next run draws another z
                again = outline(self.own_model(), args, kwargs, grad=True)
            if kernel_of_model(again, site, raw, len(data), width) != kernel:
                raise ValueError("The likelihood's scale depends on other latents: give kernel=.")
        self.table = neighbours(data, kernel, width, cache=self.cache, cache_key=self.cache_key)

    def _is_other(self, site: Any) -> bool:
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            return False
        return site["name"] != self.site


def _asks_for_the_prior(raw: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the data are None; a call without arguments is one of a model that holds its data."""
    return raw is None and bool(args or kwargs)


def _plate_of(latents: LatentBlock, call: GuideCall) -> Plate:
    plate = call.plates[latents.rows[0].name]
    return Plate(plate.size, plate.subsample_size, plate.indices)
