"""Gaussian guides: by an encoder for each row of the data, or with parameters of their own."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.gaussian_families import Family, FamilyName, family_of
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.neutra import affine_map
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.row_families import GaussianRows, RowFamily
from pyro_recursive.guides.starts import InitLocFn, LastBiases, StartSearch
from pyro_recursive.guides.whitening import Gaussian
from pyro_recursive.tracing.isolation import isolated

DRAWS = 4  # of each row, to compare two starts of an encoder
TRIES = 4  # of a start, with the scales halved after each


class AmortizedGuide(LatentGuide):
    """An autoguide whose Gaussians come from an encoder: ``q(z_i | x_i) = N(encoder(x_i))``.

    All latents inside the data's plate are packed into one unconstrained vector a row, of length D;
    constrained supports add their Jacobians. Latents outside, without an encoder all latents, have
    one joint Gaussian with free parameters; without an encoder in a ``plate=`` each row has one.

    Args:
        model: a Pyro model with continuous latents; hide discrete ones with `pyro.poutine.block`.
        encoder: a module from the inputs' rows ``[*rows, ...]`` to the parameters of the Gaussians.
        family: ``"diagonal"`` (2 D numbers: locations, then logarithms of scales), ``"full"``, or a
            `pyro_recursive.guides.gaussian_families.Family` such as ``LowRank(2)``.
        plate: the name of the data's plate; with an encoder by default the plate around all
            observed sites. Its rows may be minibatches, subsampled in the model or before it.
        inputs: a function from the model's arguments to the encoder's inputs, a tensor with the
            plate's rows first; by default the first argument.
        init_loc_fn: where the Gaussians start: a function of a site as in Pyro's autoguides, values
            by name, ``"mean"``, ``"median"``, ``"sample"``, ``"uniform"``, ``"feasible"``, or
            ``"pathfinder"``, a location near the posterior; ``whiten=True`` takes the covariance
            there, too. By default the median of the prior in closed form, its mean, or zero in
            unconstrained space. An encoder's last linear layer is moved there, if the ELBO is much
            higher.
        init_scale: the scale, in unconstrained space, of the Gaussians that have free parameters.
        whiten: True trains v in ``u = loc + L v``, from N(0, I) instead of ``init_scale``, where
            ``N(loc, L L')`` is Pathfinder's best Gaussian for the first call's arguments: steps of
            an optimiser are in posterior standard deviations. Or any ``(loc, L)`` of unconstrained
            latents, ``[D]`` and ``[D, D]``. Not with an encoder or ``plate=``.
        create_plates: as in Pyro's autoguides: makes the plates, for models with ``subsample=``.
        name: tells the parameters in Pyro's store from another guide's.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...         pyro.sample("x", dist.Poisson(rate), obs=x[:, 0])
    >>> guide = AmortizedGuide(model, nn.Linear(1, 2))
    >>> SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(torch.ones(3, 1)) > 0
    True
    """

    _version = 2  # of the state_dict: since 2 factors are in units of the scales

    has_marginals: ClassVar[bool] = True

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module | None = None,
        *,
        family: FamilyName | Family = "diagonal",
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        init_loc_fn: InitLocFn | None = None,
        init_scale: float = 0.1,
        whiten: bool | Gaussian = False,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        options: dict[str, Any] = {"create_plates": create_plates, "init_loc_fn": init_loc_fn}
        options["whiten"] = whiten
        super().__init__(model, plate=plate, inputs=inputs, name=name, **options)
        self.family = family_of(family)
        self.encoder: Any = encoder
        self.init_scale = init_scale

    def num_parameters(self, latents: LatentBlock) -> int:
        """Return how many parameters the Gaussian of a block has, in each row."""
        return self.family.num_parameters(latents.size)

    def build(self, latents: LatentBlock, start: Tensor, raw: Any) -> None:
        """Create the free parameters of a block without an encoder, around a point."""
        if latents.local and self.by_row:
            return
        sizes = [frame.full_size or frame.size for frame in latents.rows]
        loc = start.reshape(*(frame.size for frame in latents.rows), latents.size)
        if loc.shape[:-1] != torch.Size(sizes):  # a minibatch: its first row for all
            loc = loc[(0,) * len(sizes)].expand(*sizes, -1)
        self.restart(latents, loc, self.init_scale if latents.whitening is None else 1.0)

    def center_outputs(self, search: StartSearch, guide: LatentGuide) -> None:
        """Add the start to the encoder's locations, as those of new networks are around zero.

        Only where the ELBO gains more than a nat for each latent and row; the scales are halved, a
        few times at most, until it does. An encoder that was trained, or moved by another guide,
        stays as it is.
        """
        latents = self.groups[-1]
        if not latents.local or not isinstance(self.encoder, nn.Module):
            return
        start = search.find(self.init_loc_fn)
        loc = latents.flatten(start).reshape(-1, latents.size).mean(0)
        if not bool(loc.any()):
            return
        with isolated():
            call = guide.new_call(search.args, search.kwargs)
        try:
            own = self._elbo(latents, call, search, start)
        except (ValueError, RuntimeError, TypeError):  # a call says what is wrong
            return
        with isolated():
            outputs = LastBiases(self.encoder, call.rows(latents), latents.size)
        outputs.add(0, loc)
        for _ in range(TRIES):
            elbo = self._elbo(latents, call, search, start)
            if math.isfinite(elbo) and not elbo - own <= 1:
                return
            outputs.add(1, torch.full_like(loc, -math.log(2.0)))
        outputs.restore()

    @isolated()
    def _elbo(
        self, latents: LatentBlock, call: GuideCall, search: StartSearch, start: Values
    ) -> float:
        """Estimate the ELBO of a latent and row, with others at a start; each time at one noise."""
        params = self.variational_params(latents, call)
        posterior, total = self.family(params, latents.size), 0.0
        plates = [call.plates[frame.name] for frame in latents.rows]
        scale = math.prod(plate.size / plate.subsample_size for plate in plates)
        minibatch = {name: plate.indices for name, plate in call.plates.items()}
        for _ in range(DRAWS):
            u = posterior.sample()
            log_q = log_density(posterior, u, latents.keep(call.kept)).sum()
            log_p = search.log_density({**start, **latents.unflatten(u)}, minibatch)
            total += log_p / scale - float(log_q)
        return total / DRAWS / u.numel()

    def restart(self, latents: LatentBlock, loc: Tensor, scale: float | Tensor) -> None:
        """Put the free Gaussians of a block at ``loc``, ``[*rows, D]``, in its coordinates."""
        initial = self.family.initial(loc, scale)
        if self.groups:
            with torch.no_grad():
                getattr(self, _free(latents)).copy_(initial)
        else:
            setattr(self, _free(latents), PyroParam(initial.clone()))

    def set_gaussian(self, latents: LatentBlock, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the free Gaussians of a block to the members of the family near these.

        ``[*rows, D]`` and ``[*rows, D, D]``, in unconstrained space. The next call does not replace
        them by what Pyro's store has under the guide's name.
        """
        self.is_computed = True
        with torch.no_grad():
            if latents.whitening is not None:
                loc, scale_tril = latents.whitening.whitened_gaussian(loc, scale_tril)
            getattr(self, _free(latents)).copy_(self.family.from_gaussian(loc, scale_tril))

    def scatter(self, latents: LatentBlock, other: "AmortizedGuide", width: float) -> None:
        """Put the free Gaussians at random around another guide's, ``width`` of its scales away."""
        normal = other.family(getattr(other, _free(latents)).detach(), latents.size)
        loc, scale = normal.mean, normal.stddev
        self.restart(latents, loc + width * scale * torch.randn_like(loc), scale)

    def variational_params(self, latents: LatentBlock, call: GuideCall, *extra: Any) -> Tensor:
        """Return the parameters of a block's Gaussians, ``[*batch, num_parameters]``.

        ``extra`` are further inputs of the encoder.
        """
        table = getattr(self, _free(latents), None)
        if table is None:
            return call.encode(self.encoder, latents, self.num_parameters(latents), *extra)
        return latents.expand_rows(call.table_rows(table, latents))

    @torch.no_grad()
    def keep_rows(self, latents: LatentBlock, call: GuideCall, params: Tensor) -> None:
        """Put ``[*batch, P]`` into the table of parameters for the minibatch's rows, if any.

        Of several particles, each with global latents of its own, the mean.
        """
        if self.by_row:
            return
        table, sizes = getattr(self, _free(latents)), call.sizes(latents)
        rows = params.reshape(-1, *sizes, params.shape[-1]).mean(0)
        found = [call.row_index(f.name, n) for f, n in zip(latents.rows, table.shape, strict=False)]
        indices = [
            torch.arange(n, device=table.device) if index is None else index.to(table.device)
            for index, n in zip(found, table.shape, strict=False)
        ]
        table[torch.meshgrid(*indices, indexing="ij")] = rows

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Load a state; in one of version 1 factors are not in units of the scales."""
        is_scaled = type(self.family).from_unscaled is not Family.from_unscaled
        if is_scaled and metadata.get("version") == 1:
            for latents in self.groups:
                key = f"{prefix}{_free(latents)}_unconstrained"
                if key in state:
                    state[key] = self.family.from_unscaled(state[key], latents.size)
                elif latents.local and self.by_row:
                    rest[-1].append(
                        f"{prefix}encoder was trained for factors without the scales. Load it by "
                        "itself, and apply family.from_unscaled(output, size) to its output."
                    )
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def free_posteriors(self) -> list[Any] | None:
        """Return the Gaussians of all rows of each block, None with an encoder."""
        if self.by_row:
            return None
        return [self.family(getattr(self, _free(b)), b.size) for b in self.groups]

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the Gaussians that a row may have."""
        return GaussianRows(self.family, latents.size)

    def marginals(self, latents: LatentBlock, call: GuideCall) -> tuple[Tensor, Tensor]:
        """Return means and scales of a block's Gaussian in unconstrained space, ``[*batch, D]``."""
        posterior = self.posterior(latents, call)
        if latents.whitening is None:
            return posterior.mean, posterior.stddev
        return latents.whitening.marginals(posterior)

    def transform_of(self, latents: LatentBlock, call: GuideCall) -> Transform:
        """Return the affine map from standard normals to a block without rows."""
        return affine_map(self.posterior(latents, call))

    def posterior(self, latents: LatentBlock, call: GuideCall) -> Any:
        """Return the Gaussian of a block, batch ``[*batch]`` and event ``[D]``."""
        return self.family(self.variational_params(latents, call), latents.size)


def _free(latents: LatentBlock) -> str:
    return "free_local" if latents.local else "free_global"
