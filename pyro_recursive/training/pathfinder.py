"""Normal approximations along the paths of an optimiser, as a mixture guide without training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.gaussian_families import Family, FamilyName, family_of, scale_tril_of
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.mixture import MixtureGuide
from pyro_recursive.guides.pathfinder.gaussians import Gaussians
from pyro_recursive.guides.pathfinder.mixture import PathMixture, PathReport, mixture_of_paths
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.param_store import claim_name, free_name


class PathfinderGuide(MixtureGuide):
    """The mixture of Gaussians that `pathfinder` returns: any loss may train it further.

    ``report`` says what was found; it stays as it is when the guide is trained.
    """

    report: PathReport | None = None

    @property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        """The first component, that of the best path: for ``whiten=`` of another guide.

        Location ``[D]`` and Cholesky factor of the covariance, ``[D, D]``, unconstrained.
        """
        every = self.gaussians
        return every.loc[0], every.scale_tril[0]

    @property
    def gaussians(self) -> Gaussians:
        """All components, unconstrained."""
        (latents,) = self.groups
        parameters = torch.stack([component.free_global.detach() for component in self.components])
        members = self.component(0).family(parameters, latents.size)
        return Gaussians(members.mean, scale_tril_of(members))

    def set_gaussians(self, gaussians: Gaussians, log_weights: Tensor) -> None:
        """Set all components, and the logarithms of their weights, ``[M]``."""
        (latents,) = self.groups
        for m, component in enumerate(self.components):
            component.set_gaussian(latents, gaussians.loc[m], gaussians.scale_tril[m])
        self.weights.set_shared(log_weights)
        self.is_computed = True

    def extra_repr(self) -> str:
        """Return how many paths found each component, ELBO, k-hat and the number of gradients."""
        r = self.report
        if r is None:
            return ""
        pairs = zip(r.weights, r.num_paths, strict=True)
        parts = ", ".join(f"{weight:.2f} by {count} of {r.paths} paths" for weight, count in pairs)
        return (
            f"components: {parts}; k-hat={r.pareto_k:.2f}, "
            f"ELBO={r.elbo:.2f}±{r.standard_error:.2f}, gradients={r.num_gradients}"
        )


def pathfinder(
    model: Callable,
    *args: Any,
    paths: int = 8,
    family: FamilyName | Family = "full",
    name: str | None = None,
    **kwargs: Any,
) -> PathfinderGuide:
    """Return a mixture of Gaussians that L-BFGS finds on its way to the modes, without training.

    From each of several starts the optimiser's own estimates of the curvature give a Gaussian at
    each point of its path, and exact second derivatives one at the end. The one with the highest
    ELBO is the answer of a path. Equal answers are merged; weights follow from importance weights
    of draws against the whole mixture, and a single Gaussian is returned where it has the higher
    ELBO. All paths run at once. ``print`` shows how many found each component, and k-hat: above 0.7
    the guide is a start for training, not an approximation to trust.

    Args:
        model: with continuous latents; flat priors and enumerated latents are allowed.
        args, kwargs: the model's arguments: all data, not a minibatch.
        paths: how many. Of M modes of one size, about M (log M + 2) paths find all
            with probability 0.87 or more.
        family: of the Gaussians: ``"full"``, ``"diagonal"``, or a
            `pyro_recursive.guides.gaussian_families.Family` such as ``LowRank(2)``.
        name: as in `AmortizedGuide`; by default ``PathfinderGuide``, with a number where a living
            guide has that name.

    Raises:
        ValueError: a plate is subsampled, no start has a finite density, or no path a Gaussian with
            a finite ELBO.
        NotImplementedError: a latent has no unconstrained coordinates.

    `Pathfinder: Parallel quasi-Newton variational inference` (Zhang et al., arXiv 2108.03782).

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)
    >>> guide = pathfinder(model, torch.tensor([3.9, 4.2]))
    >>> len(guide.components), guide.report.pareto_k < 0.7
    (2, True)
    """
    check_at_least(1, paths=paths)
    family = family_of(family)
    density = LogDensity(model, args, kwargs, StartSearch(model, args, kwargs).trace)
    return guide_of_paths(density, mixture_of_paths(density, paths, family), family, name)


def guide_of_paths(
    density: LogDensity, found: PathMixture, family: Family, name: str | None
) -> PathfinderGuide:
    """Return a mixture as a guide of a density's model, which starts at the first component."""
    model, args, kwargs = density.program.model, density.program.args, density.program.kwargs
    gaussians, log_weights, _, report = found
    at = density.values(gaussians.loc[0])
    slots = {slot.name: slot for slot in density.block.slots}

    def init_loc_fn(site: Any) -> Tensor:
        return slots[site["name"]].of(site["fn"]).transform(at[site["name"]])

    components = [AmortizedGuide(model, family=family) for _ in log_weights]
    own_name = name or free_name(PathfinderGuide.__name__)
    guide = PathfinderGuide(model, components, init_loc_fn=init_loc_fn, name=own_name)
    if name is None:
        claim_name(guide)
    guide.prepare(*args, **kwargs)
    guide.set_gaussians(gaussians, log_weights)
    guide.init_loc_fn = None  # which a pickle could not hold
    guide.report = report
    return guide
