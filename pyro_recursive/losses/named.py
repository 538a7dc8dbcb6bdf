"""The losses that are named after their bound."""

from typing import Any

from pyro_recursive import bounds
from pyro_recursive.losses.multi_sample import MultiSampleELBO


class IWAE_ELBO(MultiSampleELBO):
    """``log mean_k w_k``: a bound that tightens with K.

    `Importance Weighted Autoencoders` (Burda et al., arXiv 1509.00519). The signal-to-noise ratio
    of the pathwise gradient of the guide falls as K grows; ``estimator="dreg"`` repairs that.
    Arguments and errors are those of `MultiSampleELBO`.

    >>> IWAE_ELBO(64, estimator="dreg").num_particles
    64
    """

    def __init__(self, num_particles: int, **options: Any) -> None:
        super().__init__(bounds.iwae, num_particles=num_particles, **options)


class MIWAE_ELBO(MultiSampleELBO):
    """The mean of M independent importance-weighted bounds with K samples each.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    The same bound as `IWAE_ELBO(K)` in expectation, with gradients of 1/M the variance.

    >>> MIWAE_ELBO(8, 8).num_estimates
    8
    """

    def __init__(self, num_estimates: int, num_particles: int, **options: Any) -> None:
        super().__init__(
            bounds.miwae, num_estimates=num_estimates, num_particles=num_particles, **options
        )


class PIWAE_ELBO(MultiSampleELBO):
    """The model climbs IWAE over all M * K samples, the guide MIWAE(M, K) on the same samples.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    One backward pass gives both gradients; the value is minus the model's bound. A parameter that
    model and guide share raises ValueError: it would have two objectives.

    >>> PIWAE_ELBO(8, 8, estimator="dreg").num_estimates
    8
    """

    def __init__(self, num_estimates: int, num_particles: int, **options: Any) -> None:
        super().__init__(
            bounds.piwae, num_estimates=num_estimates, num_particles=num_particles, **options
        )
