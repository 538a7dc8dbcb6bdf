"""The model's masks of a guide's latents, read in each call by a run of the model."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.placement import Placement
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.masks import check_not_mixed, unused_latents
from pyro_recursive.tracing.sites import Site, latent_sites, mask_of


class ModelMasks:
    """Which latents have masks, and of which of them no density depends on the masked entries.

    ``is_needed`` says whether calls read masks at all: whether a run for some form of the arguments
    had any.
    """

    def __init__(self) -> None:
        self.is_needed = False
        self.unused: dict[str, bool | None] = {}  # by latent, once it has masked entries

    def look(self, trace: poutine.Trace) -> None:
        """Find out whether the model masks latents."""
        self.is_needed |= any(mask_of(site) is not None for site in latent_sites(trace))

    def read(
        self, model: Callable, groups: Sequence[LatentBlock], call: GuideCall, like: Tensor
    ) -> None:
        """Set the masks of a call, and the entries of its latents that keep their densities.

        ``like`` has the dtype and device of the latents.
        """
        slots = {slot.name: slot for latents in groups for slot in latents.slots}

        def run(values: Values) -> poutine.Trace:
            given = SubstituteByName({**call.fixed_values, **values})
            return poutine.trace(given(model)).get_trace(*call.args, **call.kwargs)

        def place() -> dict[str, Site]:
            """Run the model at random coordinates; return the latents."""
            with ExitStack() as placements:
                for latents in groups:
                    rows = like.new_empty(*call.sizes(latents), latents.size)
                    u = 0.1 * torch.randn_like(latents.expand_rows(rows))
                    placements.enter_context(Placement(latents, u))
                found = latent_sites(run({}))
            return {site["name"]: site for site in found if site["name"] in slots}

        def draw() -> Values:
            return {name: site["value"] for name, site in place().items()}

        with isolated(), torch.no_grad(), pyro.validation_enabled(False):
            sites = place()
        masks = {name: mask_of(site) for name, site in sites.items()}
        call.masks = {name: mask for name, mask in masks.items() if mask is not None}
        if any(not bool(m.all()) for n, m in call.masks.items() if n not in self.unused):
            self.unused |= unused_latents(draw, run)
        for name, mask in call.masks.items():
            if name in self.unused:
                check_not_mixed(name, self.unused[name])
                if self.unused[name]:
                    call.kept[name] = slots[name].flags(mask, sites[name]["value"].shape)
