"""Saliency: how much the likelihood of each symbol, or pixel, depends on the latents of its row."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pyro_recursive.evaluation.calls import measurement
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.sites import latent_sites, sites


@measurement()
def saliency(
    model: Callable,
    guide: Callable,
    *args: Any,
    site: str | None = None,
    num_draws: int = 10,
    **kwargs: Any,
) -> Tensor:
    """Estimate how strongly each observed entry depends on the latents of its row.

        E_q(z | x) ||d log p(x_t | x_<t, z) / dz||

    in nats per unit of the latents, over all latents that have the plates of the observed site.
    Others, and discrete ones, are held at their draws. Low values for all entries of a row mean
    that its likelihood ignores the latents, as after a posterior collapse.

    Args:
        model, guide: any Pyro programs.
        site: the observed site; None where the model has one.
        num_draws: draws of the guide that are averaged.

    Returns:
        ``[*batch, *event]`` of the site, without the dims of a multivariate distribution under it.

    Raises:
        ValueError: there is no such site, or there are several, or no latent for each row.

    Reference: 'Semi-Amortized Variational Autoencoders' (Kim et al., arXiv 1802.02550).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         locs = z.unsqueeze(-1) * torch.tensor([2.0, 0.0])
    ...         pyro.sample("x", dist.Normal(locs, 1.0).to_event(1), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Delta(torch.zeros(len(x))))
    >>> saliency(model, guide, torch.tensor([[1.0, 1.0]]))
    tensor([[2., 0.]])
    """
    check_at_least(1, num_draws=num_draws)
    found = [_of_draw(model, guide, site, args, kwargs) for _ in range(num_draws)]
    return torch.stack(found).mean(0)


def _of_draw(model: Callable, guide: Callable, site: str | None, args: Any, kwargs: Any) -> Tensor:
    """Return the norms of the gradients at one draw of the guide."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    leaves: dict[str, Tensor] = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and node["value"].is_floating_point():
            node["value"] = leaves[name] = node["value"].detach().requires_grad_()
    with torch.enable_grad():
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(*args, **kwargs)
        latents = latent_sites(replayed)
        missing = [n["name"] for n in latents if n["name"] not in trace.nodes]
        if missing:
            raise ValueError(
                f"The guide has no site '{missing[0]}', whose draws saliency needs. Add it there."
            )
        node = _observed(replayed, site)
        base = node["fn"]
        batch = base.batch_shape
        while isinstance(base, Independent):
            base = base.base_dist
        each = base.log_prob(node["value"])
        entries = each.reshape(*batch, -1)
        latent = {n["name"]: n["fn"] for n in latents if not n["fn"].support.is_discrete}
        local = {
            name: leaf
            for name, leaf in leaves.items()
            if name in latent and latent[name].batch_shape == batch
        }
        if not local:
            raise ValueError(
                f"No continuous latent has the plates of site '{node['name']}', {list(batch)}. "
                "saliency needs latents of each row."
            )
        if not each.requires_grad:  # the likelihood reads no latent
            return torch.zeros_like(each)
        norms = []
        for entry in entries.unbind(-1):
            gradients = torch.autograd.grad(
                entry.sum(), list(local.values()), retain_graph=True, materialize_grads=True
            )
            parts = [gradient.reshape(*batch, -1) for gradient in gradients]
            norms.append(torch.cat(parts, -1).norm(dim=-1))
    return torch.stack(norms, -1).reshape(each.shape).detach()


def _observed(trace: poutine.Trace, site: str | None) -> dict[str, Any]:
    """Return the observed site of a name, or the only one."""
    names = [node["name"] for node in sites(trace) if node["is_observed"]]
    if site is None and len(names) == 1:
        site = names[0]
    if site not in names:
        raise ValueError(f"saliency needs one observed site, got {site!r}. Give one of {names}.")
    return trace.nodes[site]
