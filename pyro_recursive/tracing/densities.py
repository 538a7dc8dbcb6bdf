"""Log-densities of traces as ``[M, K, *plates]`` tensors, with ``C`` on the right in some.

The subsample scale of the shared plates is taken out of the log-weights, to be multiplied on after
the bound: inside a logarithm of a mean it would be a power of the weights. A user's own scales and
masks stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_recursive.tracing.compatibility import check_batch_shape, log_prob_of
from pyro_recursive.tracing.enumeration import is_enumerated, marginalised
from pyro_recursive.tracing.handlers import ComponentIndex
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import Site, SiteRecord, own_scale, unmasked


@dataclass(frozen=True)
class Densities:
    """Log-densities in the layout's `whole_shape`, in nats; None for a group without sites.

    ``model`` is log p; ``density``, ``score`` and ``jacobian`` together are log q: of the
    reparameterised sites, of the other sampled ones, and of what is computed from them. Scales and
    masks are in these; ``density_rest`` and ``score_rest`` are what they took away from the density
    that the samples come from. ``values`` is log q of latents that are enumerated in the guide, no
    part of the log-weights, and ``values_rest`` what was taken away there. ``names`` are the sites
    that were asked for, None for all; ``terms`` are the sites' own log-densities where some are
    score-handled. Entries of the ``coupled`` plates depend on each other by the sum over an
    enumerated latent outside.
    """

    layout: PlateLayout
    model: Tensor | None
    density: Tensor | None
    score: Tensor | None
    jacobian: Tensor | None
    density_rest: Tensor | None = None
    score_rest: Tensor | None = None
    values: Tensor | None = None
    values_rest: Tensor | None = None
    names: frozenset[str] | None = None
    terms: "Terms | None" = None
    coupled: frozenset[str] = frozenset()

    @cached_property
    def reparameterized(self) -> Tensor:
        """The log-weights but for the score-handled sites, with their graph."""
        total = torch.zeros(()) if self.model is None else self.model
        for group in (self.density, self.jacobian):
            if group is not None:
                total = total - group
        return total

    @cached_property
    def log_weights(self) -> Tensor:
        """``log p - log q``, without a graph."""
        total = self.reparameterized.detach()
        if self.score is not None:
            total = total - self.score.detach()
        return total.expand(self.layout.whole_shape)

    @property
    def marginal_log_weights(self) -> Tensor:
        """The log-weights ``[M, K, *plates]``, summed over the values enumerated in the guide.

        ``log sum_c p(x, y_c, z) / q(z | y_c)``. Masked values count by their probability.
        """
        if self.values is None:
            return self.log_weights
        rest = 0.0 if self.values_rest is None else self.values_rest.detach()
        return (self.log_weights + rest).logsumexp(-1)


WITH_REST = "density", "score", "values"
GROUPS = ("model", "jacobian", *WITH_REST, *(f"{group}_rest" for group in WITH_REST))
Terms = dict[str, list[list[tuple[Site, Tensor]]]]  # by group and run: sites' log-densities


def densities(
    runs: Sequence[ParticleRun], layout: PlateLayout, only: frozenset[str] | None = None
) -> Densities:
    """Return the log-densities of runs; `only` restricts them to sites of these names."""
    terms: Terms = {group: [[] for _ in runs] for group in GROUPS}
    coupled = frozenset[str]()
    for number, run in enumerate(runs):
        records = run.table.records
        if is_enumerated(run.table):
            ordinary, marginals = marginalised(run.table, layout)
            records = [*ordinary, *run.table.guide]
            for marginal in marginals:
                if only is not None and not marginal.names <= only:
                    marginal.check_apart(only)
                    continue
                terms["model"][number].append((marginal.site, marginal.log_prob))
                coupled |= marginal.reached
        for record in records:
            if only is None or record.name in only:
                _add(record, layout, terms, number)
    tensors = {name: layout.gather(group) if any(group) else None for name, group in terms.items()}
    kept = terms if any(terms["score"]) else None
    return Densities(layout, **tensors, names=only, terms=kept, coupled=coupled)


def _add(record: SiteRecord, layout: PlateLayout, terms: Terms, run: int) -> None:
    """Add a site's log-density to its group, and what scale and mask took away from it."""
    site, group, scale = record.site, record.group, record.site["scale"]
    if record.is_subsampled:
        scale = own_scale(site, layout.names)
    trained = None
    if isinstance(scale, Tensor) and scale.requires_grad and group in ("density", "score"):
        # Estimators that drop the gradient of the density keep that of its scale.
        scale, trained = scale.detach(), scale - scale.detach()
    is_weighted = record.is_masked or isinstance(scale, Tensor) or scale != 1
    if isinstance(site["fn"], ComponentIndex):
        # The mixture's density, without the choice, is what the components are drawn from.
        whole = site["fn"].log_choice(site["value"])
        own = scale_and_mask(whole, scale, site["mask"])
        for name, sign in (("score", 1), ("density", -1)):
            terms[name][run].append((site, sign * own))
            if is_weighted:
                terms[f"{name}_rest"][run].append((site, sign * (whole - own)))
        return
    log_prob = log_prob_of(site, site["fn"])
    own = scale_and_mask(log_prob, scale, site["mask"])
    if trained is not None:
        terms["jacobian"][run].append(
            (site, scale_and_mask(log_prob.detach(), trained, site["mask"]))
        )
    sizes, dim = record.sizes, own.dim()
    if any(n != 1 and sizes.get(d - dim) != n for d, n in enumerate(own.shape)):
        check_batch_shape(site, own.shape)
    terms[group][run].append((site, own))
    if is_weighted and group in WITH_REST:
        whole = log_prob_of(site, unmasked(site["fn"]))
        rest = whole - own
        if group == "values":  # which may have probability 0
            rest = torch.where(whole == own, 0.0, rest)
        terms[f"{group}_rest"][run].append((site, rest))


def weighted(log_prob: Tensor, site: Site, layout: PlateLayout) -> Tensor:
    """Return a log-density with the mask and the user's scale of a site."""
    return scale_and_mask(log_prob, own_scale(site, layout.names), site["mask"])
