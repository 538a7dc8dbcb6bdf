"""Values of a block's sites in a run of the model, by the supports that the sites have there.

A support may depend on data, on parameters and on latents that the model has met before. With ``T``
the transform of a site's support in this run, ``T(u)`` is its value when the model reaches it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.guides.packing import LatentBlock, PackedSite, Values
from pyro_recursive.tracing.isolation import isolated
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
        self.unread = set(latents.moving)

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


def check_order(blocks: Sequence[LatentBlock], model: Callable, args: tuple, kwargs: Any) -> None:
    """Raise where a support depends on latents of a block that the guide samples later."""
    for number, latents in enumerate(blocks[:-1]):
        if not latents.moving:
            continue
        later = {slot.name for block in blocks[number + 1 :] for slot in block.slots}
        with isolated(), torch.enable_grad(), (leaves := _Leaves(later)):
            model(*args, **kwargs)
        for name, fn in leaves.fns.items():
            if name in latents.moving and (found := leaves.needed_by(fn)):
                raise NotImplementedError(
                    f"The bounds of latent site '{name}' depend on '{found}', which the guide "
                    "samples later. Leave out plate= and encoder for a joint guide."
                )


class _Leaves(Messenger):
    """Makes the values of some latents leaves of the graph, and notes the distributions."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.leaves, self.fns = names, dict[str, Tensor](), dict[str, Any]()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.fns[msg["name"]] = msg["fn"]
        if msg["name"] in self.names:
            self.leaves[msg["name"]] = msg["value"] = msg["value"].detach().requires_grad_()

    def needed_by(self, fn: Any) -> str | None:
        """Return a leaf that the support of a distribution is a function of."""
        bounds = [b for b in vars(bare_support(fn.support)).values() if isinstance(b, Tensor)]
        moving = [bound.sum() for bound in bounds if bound.requires_grad]
        if not moving:
            return None
        found = torch.autograd.grad(moving, list(self.leaves.values()), allow_unused=True)
        pairs = zip(self.leaves, found, strict=True)
        return next((name for name, gradient in pairs if gradient is not None), None)
