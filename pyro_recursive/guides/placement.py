"""Values of a block's sites in a run of the model, by the supports that the sites have there.

A support may depend on data, on parameters and on latents that the model has met before. With ``T``
the transform of a site's support in this run, ``T(u)`` is its value when the model reaches it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.guides.packing import LatentBlock, PackedSite, Values, same_tensors
from pyro_recursive.tracing.handlers import Leaves, SubstituteByName
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.sites import subsample_sites
from pyro_recursive.tracing.supports import bare_support


class AllRead(Exception):
    """The run has met all sites whose supports are read."""


class Placement(Messenger):
    """Gives the sites of a block the values of ``u``, ``[*batch, D]``, or these ``values``.

    With ``stop`` the run ends by `AllRead` at the last site whose support is not fixed.
    """

    def __init__(
        self,
        latents: LatentBlock,
        u: Tensor | None = None,
        values: Values | None = None,
        stop: bool = False,
    ) -> None:
        super().__init__()
        self.latents, self.values, self.stop = latents, values, stop
        self.unconstrained = {} if u is None else latents.unflatten(u)
        self.slots: dict[str, PackedSite] = {slot.name: slot for slot in latents.slots}
        self.unread = set(latents.varying_supports)

    @property
    def block(self) -> LatentBlock:
        """The block with the supports of the run."""
        if self.unread:
            raise ValueError(
                f"Latent site '{min(self.unread)}' is not in this call of the model, and was in "
                "the first. Make a guide for each structure."
            )
        return self.latents.with_slots(self.slots.values())

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.slots:
            return
        slot = self.slots[name] = self.slots[name].of(msg["fn"])
        self.unread.discard(name)
        if not msg["is_observed"]:
            values, u = self.values, self.unconstrained
            msg["value"] = slot.transform(u[name]) if values is None else values[name]
            msg["done"] = True
        if self.stop and not self.unread:
            raise AllRead


def check_bounds(
    blocks: Sequence[LatentBlock],
    first: poutine.Trace,
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Raise where a support depends on what the guide samples later, or does not sample.

    ``first`` is a trace of a run of the model.
    """
    for number, latents in enumerate(blocks):
        if not latents.varying_supports:
            continue
        own = {slot.name for block in blocks for slot in block.slots}
        later = {slot.name for block in blocks[number + 1 :] for slot in block.slots}
        found = {name: site["value"] for name, site in first.nodes.items() if name in own}
        found |= {name: site["value"] for name, site in subsample_sites(first).nodes.items()}
        leaves, given = Leaves(later), SubstituteByName(found)
        with isolated(), torch.enable_grad(), leaves, given:
            torch.rand(1)  # what the guide does not sample has another value than in `first`
            model(*args, **kwargs)
        for name in latents.varying_supports:
            fn = leaves.fns.get(name, first.nodes[name]["fn"])
            if source := _needed_by(fn, leaves.values):
                raise NotImplementedError(
                    f"The bounds of latent site '{name}' depend on '{source}', which the guide "
                    "samples later. Leave out plate= and encoder for a joint guide."
                )
            if not same_tensors(fn.support, first.nodes[name]["fn"].support):
                raise NotImplementedError(
                    f"The bounds of latent site '{name}' depend on latents that its guide does not "
                    "sample. Let one guide have both."
                )


def _needed_by(fn: Any, leaves: Values) -> str | None:
    """Return a leaf that the support of a distribution is a function of."""
    bounds = [b for b in vars(bare_support(fn.support)).values() if isinstance(b, Tensor)]
    varying = [bound.sum() for bound in bounds if bound.requires_grad]
    if not varying:
        return None
    found = torch.autograd.grad(varying, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return next((name for name, gradient in pairs if gradient is not None), None)
