"""Gaussian guides: by an encoder for each row of the data, or with parameters of their own."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn

from pyro_recursive.guides.base import GuideCall, LatentGuide
from pyro_recursive.guides.encoder import check_numbers, encoding
from pyro_recursive.guides.gaussian_families import Family, family_of
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.row_families import GaussianRows, RowFamily
from pyro_recursive.guides.tables import rows_of
from pyro_recursive.tracing.arguments import check_module

__all__ = ["AmortizedGuide"]


class AmortizedGuide(LatentGuide):
    """An autoguide whose Gaussians come from an encoder: ``q(z_i | x_i) = N(encoder(x_i))``.

    All latents inside the data's plate are packed into one unconstrained vector a row, of length
    D; an encoder maps the rows ``[*rows, ...]`` of the data to ``[*rows, num_parameters]`` numbers
    of a Gaussian over it, constrained supports getting their Jacobians. Latents outside the plate
    have one joint Gaussian with free parameters; without an encoder all latents have, and inside a
    ``plate=`` every row has its own. `num_parameters` says what an encoder must return.

    Arguments:
        model: a Pyro model with continuous latents; hide discrete ones with `pyro.poutine.block`.
        encoder: a module from the inputs' rows to the parameters of the Gaussians.
        family: ``"diagonal"`` (2 D numbers: locations, then logarithms of scales), ``"full"``, or a
            `pyro_recursive.guides.gaussian_families.Family` such as ``LowRank(2)``.
        plate: the name of the data's plate, found if an encoder is given: the plate around all
            observed sites. Its rows may be minibatches, subsampled in the model or before it.
        inputs: a function from the model's arguments to the encoder's inputs, a tensor with the
            plate's rows first; the first argument if not given.
        init_scale: the scale of the Gaussians that have free parameters.
        create_plates: as in Pyro's autoguides: makes the plates, for models with ``subsample=``.
        name: tells the parameters in Pyro's store from another guide's.

    Raises:
        NotImplementedError: a latent site is discrete.
        TypeError: the encoder is a function or a class, and no module.
        ValueError: the encoder's output has the wrong size; no latent is in the plate.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...         pyro.sample("x", dist.Poisson(rate), obs=x)
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> guide = AmortizedGuide(lambda x: model(x[:, 0]), nn.Linear(1, 2))
    >>> svi = SVI(lambda x: model(x[:, 0]), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> svi.step(x) > 0
    True
    >>> guide(x[:2])["rate"].shape  # data of another size
    torch.Size([2])
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module | None = None,
        *,
        family: str | Family = "diagonal",
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        check_module("encoder", encoder)
        super().__init__(model, plate=plate, inputs=inputs, create_plates=create_plates, name=name)
        self.family = family_of(family)
        self.encoder: Any = encoder
        self.init_scale = init_scale

    def num_parameters(self, latents: LatentBlock) -> int:
        """Return how many numbers describe the Gaussian of a group (one row of it)."""
        return self.family.num_parameters(latents.size)

    def build(self, latents: LatentBlock, place: Tensor, raw: Any) -> None:
        """Create the free parameters of a group that no encoder serves, around a point."""
        if latents.local and self.by_row:
            return
        sizes = [frame.full_size or frame.size for frame in latents.rows]
        loc = place.reshape(*(frame.size for frame in latents.rows), latents.size)
        if loc.shape[:-1] != torch.Size(sizes):  # a minibatch: its first row for all
            loc = loc[(0,) * len(sizes)].expand(*sizes, -1)
        self.restart(latents, loc, self.init_scale)

    def restart(self, latents: LatentBlock, loc: Tensor, scale: float | Tensor) -> None:
        """Put the free Gaussians of a group at ``loc``, ``[*rows, D]``."""
        initial = self.family.initial(loc, scale)
        free = getattr(self, _free(latents), None)
        if free is None:
            setattr(self, _free(latents), PyroParam(initial.clone()))
        else:
            with torch.no_grad():
                free.copy_(initial)

    def scatter(self, latents: LatentBlock, other: "AmortizedGuide", spread: float) -> None:
        """Put the free Gaussians at random around another guide's, some of its scales away."""
        theirs = getattr(other, _free(latents)).detach()
        loc, log_scale = theirs[..., : latents.size], theirs[..., latents.size : 2 * latents.size]
        scale = log_scale.exp()
        self.restart(latents, loc + spread * scale * torch.randn_like(loc), scale)

    def parameters_of(self, latents: LatentBlock, call: GuideCall, *extra: Any) -> Tensor:
        """Return the parameters of a group's Gaussians, ``[*batch, num_parameters]``.

        ``extra`` are further inputs of the encoder.
        """
        if not (latents.local and self.by_row):
            return latents.expand_rows(rows_of(getattr(self, _free(latents)), latents, call))
        inputs = call.rows(latents)
        with encoding("The encoder", latents, inputs):
            found = self.encoder(inputs, *extra)
        return self.placed(latents, call, found)

    def placed(self, latents: LatentBlock, call: GuideCall, found: Tensor) -> Tensor:
        """Check an encoder's output, and put its rows where Pyro has the plates."""
        expected = self.num_parameters(latents)
        rows = call.sizes(latents)
        if found.shape != (*rows, expected):
            raise ValueError(
                f"The encoder returned shape {tuple(found.shape)}, and the latents "
                f"{[slot.name for slot in latents.slots]} in plate '{latents.rows[-1].name}' need "
                f"{(*rows, expected)}: for each row {expected} parameters of a {self.family} over "
                f"{latents.size} unconstrained numbers. The encoder's inputs have the rows first; "
                "inputs= selects them from the model's arguments."
            )
        check_numbers("The encoder", latents, found, call.rows(latents))
        return latents.expand_rows(found)

    @torch.no_grad()
    def keep_rows(self, latents: LatentBlock, call: GuideCall, numbers: Tensor) -> None:
        """Put numbers ``[*batch, P]`` into the table, if there is one, for the minibatch's rows.

        Of several particles, each with global latents of its own, the mean.
        """
        if self.by_row:
            return
        table, sizes = getattr(self, _free(latents)), call.sizes(latents)
        rows = numbers.reshape(-1, *sizes, numbers.shape[-1]).mean(0)
        places = [call.plates[frame.name].indices.to(table.device) for frame in latents.rows]
        table[torch.meshgrid(*places, indexing="ij")] = rows

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the parameters of a group's Gaussians."""
        return self.parameters_of(latents, call)

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the Gaussians that a row may have."""
        return GaussianRows(self.family, latents.size)

    def posterior(self, latents: LatentBlock, call: GuideCall) -> Any:
        """Return the Gaussian of a group, batch ``[*batch]`` and event ``[D]``."""
        return self.family(self.parameters_of(latents, call), latents.size)


def _free(latents: LatentBlock) -> str:
    return "free_local" if latents.local else "free_global"
