"""Masked latents of a model: entries without a density there, and what the guide's is then.

Where no other density depends on such an entry, it is left out of log q as well: its prior is then
the guide itself, and log p(x) is that of the other entries. Where another density does depend on
it, its prior is flat (density 1), and log q keeps its density.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_recursive.tracing.handlers import DryRun, Leaves
from pyro_recursive.tracing.isolation import SharedNoise, isolated, outside_of_graphs
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import (
    MODEL_MASK,
    PACKED,
    Site,
    SiteRecord,
    SiteTable,
    is_delta,
    latent_sites,
    mask_of,
    subsample_sites,
)

Values = dict[str, Tensor]
SUFFIX = "_unconstrained"  # Pyro's AutoNormal samples "z_unconstrained", and computes "z"


def without_events(mask: Tensor, event_dim: int) -> Tensor | None:
    """Return the mask of whole events, None where it differs inside of one."""
    if event_dim == 0:
        return mask
    mask = mask.reshape((1,) * (event_dim - mask.dim()) + mask.shape)
    flat = mask.flatten(-event_dim)
    if flat.shape[-1] != 1 and bool((flat != flat[..., :1]).any()):
        return None
    return flat[..., 0]


def partly_masked(masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the masks that leave anything out; this waits for the device once."""
    if not masks:
        return []
    found = [(~mask).any() for mask in masks.values()]
    flags = torch.stack([each.to(found[0].device) for each in found]).tolist()
    return [name for name, flag in zip(masks, flags, strict=True) if flag]


def differentiable(values: Any) -> Any:
    """Copy tensors of inference mode, also in tuples, lists and dicts: they take no derivatives."""
    return tree_map_only(Tensor, lambda each: each.clone() if each.is_inference() else each, values)


def on_leaves(
    run: Callable[[], poutine.Trace], names: Container[str], noise: SharedNoise
) -> tuple[poutine.Trace, Values]:
    """Run a model with leaves of the graph as the values of latents; return its trace, and these.

    Under `torch.inference_mode(False)`.
    """
    leaves = Leaves(names)
    with isolated(noise=noise), torch.enable_grad(), leaves:
        return run(), leaves.values


def unused_latents(
    trace: poutine.Trace, leaves: Values, second: Values, again: Callable[[Values], poutine.Trace]
) -> dict[str, bool | None]:
    """Return, for each latent with masked entries, whether no density depends on these.

    None where some matter and others do not. ``trace`` is that of a run `on_leaves`, ``second`` are
    other values of the latents, and ``again`` runs the model with the same noise on such.
    Derivatives in the first run show what matters, and second values in the place of the rest show
    dependence without a derivative. The answer holds for one call: another may mask other
    densities, or mix the rows in another way.
    """
    with torch.enable_grad():
        total = torch.as_tensor(trace.log_prob_sum())
    sites = [site for site in latent_sites(trace) if site["name"] in leaves]
    masks = {site["name"]: m for site in sites if (m := mask_of(site)) is not None}
    masked = {n: ~masks[n].expand(leaves[n].shape) for n in partly_masked(masks)}
    smooth = [name for name in masked if leaves[name].requires_grad]
    found: dict[str, bool | None] = dict.fromkeys(masked)
    grads: tuple[Tensor | None, ...] = (None,) * len(smooth)
    if smooth and total.requires_grad:
        values = [leaves[name] for name in smooth]
        grads = torch.autograd.grad(total, values, allow_unused=True)
    moved = {name: value.detach() for name, value in leaves.items()}
    for name, grad in zip(smooth, grads, strict=True):
        where = masked[name]
        matters = torch.zeros_like(where) if grad is None else grad.nan_to_num(0.0) != 0
        found[name] = not bool(matters[where].any())
        if found[name]:
            moved[name] = torch.where(where, second[name], moved[name])
        elif not bool(matters[where].all()):
            found[name] = None
    with torch.no_grad():
        after = torch.as_tensor(again(moved).log_prob_sum())
    if not torch.allclose(after, total.detach(), rtol=1e-5, atol=1e-6, equal_nan=True):
        found = {name: None if unused else unused for name, unused in found.items()}
    return found


def is_unused(name: str, found: dict[str, bool | None]) -> bool:
    """Return what `unused_latents` found of a latent; raise where its masked entries differ."""
    if name not in found:
        raise ValueError(
            f"Latent site '{name}' has another mask in each run of the model. Make the mask depend "
            "on the arguments and the minibatch alone."
        )
    unused = found[name]
    if unused is None:
        raise ValueError(
            f"Some masked entries of latent site '{name}' enter other densities. Mask those "
            "densities, or mask the guide's site as well."
        )
    return unused


def leave_out_masked(tables: Iterable[SiteTable], program: Program) -> None:
    """Leave masked entries of the model's latents out of the densities of the guide's records.

    The tables are those of one minibatch. A mask of the guide's own that covers them stays as it
    is. Guides that read the model's masks themselves note them under `MODEL_MASK`.
    """
    unused: dict[str, bool | None] = {}
    for table in tables:
        guide, masks = {record.name: record for record in table.guide}, {}
        for record in table.model:
            if not record.is_masked or record.site["is_observed"] or record.name not in guide:
                continue
            mask, own = mask_of(record.site), guide[record.name].site
            if mask is None:
                continue
            if PACKED in own["infer"]:
                _check_read(record.name, own["infer"].get(MODEL_MASK), mask)
            else:
                masks[record.name] = mask
        for name in partly_masked({n: _or_left_out(guide[n].site, m) for n, m in masks.items()}):
            if name not in unused:
                with outside_of_graphs(*masks.values()):
                    unused |= _look(table, program)
            if is_unused(name, unused):
                _mask(guide[name], guide, masks[name])


def _check_read(name: str, read: Tensor | None, mask: Tensor) -> None:
    """Raise where the mask that a guide read is not that of the model in this run."""
    if not is_validation_enabled():
        return
    if bool((read != mask).any()) if read is not None else not bool(mask.all()):
        raise ValueError(
            f"Latent site '{name}' has another mask here than in the guide's own model. Make the "
            "guide of the masked model, and of masks that depend on no latent."
        )


def _or_left_out(site: Site, mask: Tensor) -> Tensor:
    """Return a model's mask, True also where a guide's site leaves the entry out by itself."""
    own = mask_of(site)
    return mask if own is None else mask | ~own


def _look(table: SiteTable, program: Program) -> dict[str, bool | None]:
    """Return `unused_latents` of a program, on the minibatch of its run."""
    minibatch = subsample_sites(table.traces[1], table.traces[0])
    with isolated(), DryRun(), pyro.validation_enabled(False), torch.inference_mode(False):
        for name, site in minibatch.nodes.items():
            minibatch.nodes[name] = {**site, "value": differentiable(site["value"])}
        args, kwargs = differentiable(program.args), differentiable(program.kwargs)
        program = replace(program, args=args, kwargs=kwargs)
        with torch.no_grad():
            guides = [program.run_guide(minibatch) for _ in range(2)]

        def run(values: Values) -> poutine.Trace:
            trace = guides[0].copy()
            for name, value in values.items():
                trace.nodes[name] = {**trace.nodes[name], "value": value}
            for name, site in minibatch.nodes.items():
                if name not in trace:
                    trace.add_node(name, **site)
            return program.run_model(trace)

        noise, second = SharedNoise(), {s["name"]: s["value"] for s in latent_sites(guides[1])}
        trace, leaves = on_leaves(lambda: run({}), second.keys(), noise)
        with isolated(noise=noise):
            return unused_latents(trace, leaves, second, run)


def _mask(own: SiteRecord, guide: dict[str, SiteRecord], mask: Tensor) -> None:
    """Mask the density of a latent in the guide; raise where it is part of a joint one."""
    unconstrained = guide.get(f"{own.name}{SUFFIX}")
    if is_delta(own.site) and unconstrained is None:
        others = (r for r in guide.values() if r.group != "jacobian")
        joint = next((r for r in others if r.site["infer"].get("is_auxiliary")), None)
        if joint is not None:
            raise NotImplementedError(
                f"Latent site '{own.name}' has masked entries, and '{joint.name}' has one density "
                "for all latents. Use AutoNormal or AmortizedGuide."
            )
    for record in (own, unconstrained):
        if record is not None:
            fn = _masked(record.site["fn"], mask, own.name)
            record.site, record.is_masked = {**record.site, "fn": fn}, True


def _masked(fn: dist.TorchDistribution, mask: Tensor, name: str) -> dist.TorchDistribution:
    """Return a distribution whose density leaves out masked entries."""
    if isinstance(fn, dist.Independent):
        return _masked(fn.base_dist, mask, name).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _masked(fn.base_dist, mask, name).mask(fn._mask)
    of_events = without_events(mask, fn.event_dim)
    if of_events is None:
        if isinstance(fn, dist.Delta) and not bool(torch.as_tensor(fn.log_density).any()):
            return fn
        raise NotImplementedError(
            f"Latent site '{name}' is masked inside an event, for which the guide has one density. "
            "Use Normal(...).to_event() or AmortizedGuide."
        )
    return fn.mask(of_events)
