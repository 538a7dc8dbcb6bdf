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
from pyro_recursive.tracing.masks import (
    differentiable,
    is_unused,
    partly_masked,
    unused_latents,
)
from pyro_recursive.tracing.sites import Site, latent_sites, mask_of


def has_masked_latents(trace: poutine.Trace) -> bool:
    """Whether a run of a model masked latents."""
    return any(mask_of(site) is not None for site in latent_sites(trace))


def read_masks(
    model: Callable, groups: Sequence[LatentBlock], call: GuideCall, like: Tensor
) -> None:
    """Set the masks of a call, and the entries of its latents that keep their densities.

    ``like`` has the dtype and device of the latents.
    """
    slots = {slot.name: slot for latents in groups for slot in latents.slots}

    def run(values: Values) -> poutine.Trace:
        given = SubstituteByName({**fixed, **values})
        return poutine.trace(given(model)).get_trace(*args, **kwargs)

    def place() -> dict[str, Site]:
        """Run the model at random coordinates; return the latents."""
        with ExitStack() as placements:
            for latents in groups:
                rows = like.new_empty(*call.sizes(latents), latents.size)
                u = 0.1 * torch.randn_like(latents.expand_rows(rows))
                placements.enter_context(Placement(latents, u))
            found = latent_sites(run({}))
        return {site["name"]: site for site in found if site["name"] in slots}

    with isolated(), torch.no_grad(), pyro.validation_enabled(False), torch.inference_mode(False):
        fixed = differentiable(dict(call.fixed_values))
        args, kwargs = differentiable(call.args), differentiable(call.kwargs)
        sites = place()
        masks = {name: m for name, site in sites.items() if (m := mask_of(site)) is not None}
        call.masks = masks
        partly = partly_masked(masks)
        if not partly:
            return
        first, second = ({n: s["value"] for n, s in each.items()} for each in (sites, place()))
    unused = unused_latents(first, second, run)
    for name in partly:
        if is_unused(name, unused):
            call.kept[name] = slots[name].flags(masks[name], sites[name]["value"].shape)
