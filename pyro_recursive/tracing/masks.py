"""Masked latents of a model: entries without a density there, and what the guide's is then.

Where no other density depends on such an entry, it is left out of log q as well: its prior is then
the guide itself, and log p(x) is that of the other entries. Where another density does depend on
it, its prior is flat (density 1), and log q keeps its density.
"""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_recursive.tracing.handlers import DryRun
from pyro_recursive.tracing.isolation import SharedNoise, isolated
from pyro_recursive.tracing.program import Program, memory_of
from pyro_recursive.tracing.sites import (
    MODEL_MASK,
    PACKED,
    Site,
    SiteRecord,
    SiteTable,
    is_delta,
    latent_sites,
    mask_of,
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


def unused_latents(
    draw: Callable[[], Values], run: Callable[[Values], poutine.Trace]
) -> dict[str, bool | None]:
    """Return, for each latent with masked entries, whether no density depends on these.

    None where some matter and others do not. ``draw`` returns values of the latents, ``run`` a
    trace of the model on them. Derivatives show what matters, and a second draw of the rest shows
    dependence without a derivative.
    """
    noise = SharedNoise()

    def log_joint(values: Values) -> tuple[poutine.Trace, Tensor]:
        with isolated(noise=noise):
            trace = run(values)
        return trace, torch.as_tensor(trace.log_prob_sum())

    with isolated(), pyro.validation_enabled(False):
        with torch.no_grad():
            first, second = draw(), draw()
        leaves = {name: value.detach().clone() for name, value in first.items()}
        for value in leaves.values():
            value.requires_grad_(value.is_floating_point())
        with torch.enable_grad():
            trace, total = log_joint(leaves)
        masked = {
            site["name"]: ~mask.expand(site["value"].shape)
            for site in latent_sites(trace)
            if site["name"] in leaves
            and (mask := mask_of(site)) is not None
            and not bool(mask.all())
        }
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
            _, again = log_joint(moved)
        if not torch.allclose(again, total.detach(), rtol=1e-5, atol=1e-6, equal_nan=True):
            found = {name: None if unused else unused for name, unused in found.items()}
    return found


def check_not_mixed(name: str, unused: bool | None) -> None:
    """Raise where only some of the masked entries of a latent enter other densities."""
    if unused is None:
        raise ValueError(
            f"Some masked entries of latent site '{name}' enter other densities. Mask those "
            "densities, or mask the guide's site as well."
        )


def leave_out_masked(table: SiteTable, program: Program) -> None:
    """Leave masked entries of the model's latents out of the densities of the guide's records.

    A mask of the guide's own that covers them stays as it is. Guides that read the model's masks
    themselves note them under `MODEL_MASK`.
    """
    guide = {record.name: record for record in table.guide}
    for record in table.model:
        if not record.is_masked or record.site["is_observed"] or record.name not in guide:
            continue
        mask, own = mask_of(record.site), guide[record.name]
        if mask is None:
            continue
        if PACKED in own.site["infer"]:
            _check_read(record.name, own.site["infer"].get(MODEL_MASK), mask)
        elif not _covers(own.site, mask):
            unused = _is_unused(record.name, program)
            check_not_mixed(record.name, unused)
            if unused:
                _mask(own, guide, mask)


def _check_read(name: str, read: Tensor | None, mask: Tensor) -> None:
    """Raise where the mask that a guide read is not that of the model in this run."""
    if not is_validation_enabled():
        return
    if bool((read != mask).any()) if read is not None else not bool(mask.all()):
        raise ValueError(
            f"Latent site '{name}' has another mask here than in the guide's own model. Make the "
            "guide of the masked model, and of masks that depend on no latent."
        )


def _covers(site: Site, mask: Tensor) -> bool:
    """Whether a guide's site masks at least the entries that the model's does."""
    own = mask_of(site)
    return bool(mask.all()) if own is None else not bool((own & ~mask).any())


def _is_unused(name: str, program: Program) -> bool | None:
    known = memory_of(program).setdefault("unused", {})
    if name not in known:
        traces = []

        def draw() -> Values:
            traces.append(program.run_guide())
            return {site["name"]: site["value"] for site in latent_sites(traces[-1])}

        def run(values: Values) -> poutine.Trace:
            trace = traces[0].copy()
            for site in latent_sites(traces[0]):
                trace.nodes[site["name"]] = {**site, "value": values[site["name"]]}
            return program.run_model(trace)

        with DryRun():
            known.update(unused_latents(draw, run))
    return known.get(name)


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
    if isinstance(fn, dist.Delta) and not bool(torch.as_tensor(fn.log_density).any()):
        return fn
    of_events = without_events(mask, fn.event_dim)
    if of_events is None:
        raise NotImplementedError(
            f"Latent site '{name}' is masked inside an event, for which the guide has one density. "
            "Use Normal(...).to_event() or AmortizedGuide."
        )
    return fn.mask(of_events)
