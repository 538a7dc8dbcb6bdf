"""Guides that are maps of standard normals, in the form that `NeuTraReparam` of Pyro takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock, PackedSite, Values


class NeutraGuide(AutoContinuous):
    """A guide as the argument of `pyro.infer.reparam.NeuTraReparam`; see `LatentGuide.neutra`.

    The map from standard normals is that of the guide when this was made: train no further while it
    is in use. `values` maps draws of the normals to values of the model's sites.
    """

    def __init__(
        self,
        model: Callable,
        latents: LatentBlock,
        transform: Transform,
        call: GuideCall,
        zero: Tensor,
    ) -> None:
        super().__init__(model)
        self._latents, self._transform, self._call, self._zero = latents, transform, call, zero
        self.latent_dim = latents.size
        self.prototype_trace = poutine.Trace()
        for slot in latents.slots:
            self.prototype_trace.add_node(slot.name, name=slot.name, type="sample")
            if slot.is_angle:
                raise NotImplementedError(
                    f"Latent site '{slot.name}' is an angle, and NeuTraReparam has it on the whole "
                    "real line. Use nuts_start."
                )
        self.plates = {frame.name: frame for slot in latents.slots for frame in slot.frames}

    def get_base_dist(self) -> Any:
        """Return standard normals, event ``[D]``."""
        return dist.Normal(self._zero, torch.ones_like(self._zero)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the map from standard normals to packed latents, ``[..., D]`` to ``[..., D]``."""
        return self._transform

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Yield sites and their unconstrained values, ``[*batch, D]`` to ``[*batch, *shape]``.

        `NeuTraReparam` calls this and has no public name for it.
        """
        for slot, u in self._unpacked(latent):
            yield {"name": slot.name, "fn": _Supported(self, slot, latent)}, u

    def _unpacked(self, latent: Tensor) -> Iterator[tuple[PackedSite, Tensor]]:
        batch, nesting = latent.shape[:-1], self._latents.nesting
        rows = latent.reshape(-1, *[1] * nesting, self.latent_dim)
        unconstrained = self._latents.unflatten(rows)
        for slot in self._latents.slots:
            u, lead = unconstrained[slot.name], list(batch)
            own = u.shape[1 + nesting - slot.nesting :]
            for _ in range(slot.nesting):  # dims that the caller leaves for the model's plates
                if lead and lead[-1] == 1:
                    lead.pop()
            yield slot, u.reshape([*lead, *own])

    @torch.no_grad()
    def values(self, latent: Tensor) -> Values:
        """Return values of the sites, ``[S, *shape]``, at draws of the normals ``[S, D]``.

        Each with the supports that it has there.
        """
        shape = [1] * self._latents.nesting + [self.latent_dim]
        points = [u.reshape(shape) for u in self._transform(latent)]
        found = [self._call.block_at(self._latents, u).unpack(u) for u in points]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def support_of(self, slot: PackedSite, latent: Tensor) -> constraints.Constraint:
        """Return the support of a site where it is the same at all points ``[*batch, D]``."""
        if slot.is_fixed:
            return slot.support
        points = latent.reshape(-1, *[1] * self._latents.nesting, self.latent_dim)
        try:
            block = self._call.shared_block(self._latents, (points[0], points[-1]))
        except NotImplementedError as error:
            raise NotImplementedError(
                f"The bounds of '{slot.name}' or another site depend on other latents. Use "
                "values() of the NeutraGuide in place of transform_sample()."
            ) from error
        return next(each.support for each in block.slots if each.name == slot.name)


@dataclass
class _Supported:
    """In the place of a site's distribution: its support at these points."""

    guide: NeutraGuide
    slot: PackedSite
    latent: Tensor

    @property
    def support(self) -> constraints.Constraint:
        return self.guide.support_of(self.slot, self.latent)


def affine_map(gaussian: Any) -> Transform:
    """Return the map from standard normals ``[D]`` to a Gaussian over vectors, of any batch."""
    loc = gaussian.mean.reshape(-1).clone()  # not the parameter, which may change
    scale_tril = getattr(gaussian, "scale_tril", None)
    if scale_tril is None:
        return dist.transforms.AffineTransform(loc, gaussian.stddev.reshape(-1), event_dim=1)
    return dist.transforms.LowerCholeskyAffine(loc, scale_tril.reshape(len(loc), len(loc)))
