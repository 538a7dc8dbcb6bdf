"""`MultiSampleELBO`: any bound with any gradient estimator; and losses named after their bound."""

from typing import Any, Unpack

from pyro_recursive import bounds
from pyro_recursive.losses.base import LogWeightELBO, LossOptions, SampleOptions


class MultiSampleELBO(LogWeightELBO):
    """Any multi-sample bound with any gradient estimator, for any Pyro model and guide.

    With log-weights ``log p(x, z) - log q(z)`` of shape ``[M, K, *plates]``, where ``plates``
    enclose every sample site, the loss is ``-scale * bound(log_weights).sum()`` in nats: each datum
    has its own weights, and minibatches are unbiased.

    Args:
        bound: a `pyro_recursive.bounds.Bound`.
        estimator: an `Estimator`, or a name in `bounds.estimators.ESTIMATORS`: ``"pathwise"``,
            ``"dreg"``, ``"stl"`` (biased for K > 1); ``"vimco"`` and ``"score"`` for sites that are
            not reparameterised (others stay pathwise, or DReG with ``"dreg+vimco"``); ``"rws"`` and
            ``"rws-dreg"``, wake-phase updates of the guide (biased).
        num_estimates, num_particles: M, and K, the samples inside each logarithm.
        max_plate_nesting: the number of plate dims of the model; found by one run if not given.
        vectorize_particles: True or ``"auto"`` runs all samples in one pass, under one more plate
            on the left or, for programs that do not fit it, `torch.vmap`, and loops where neither
            is right; ``"vmap"`` leaves out the plate of the model, False loops.
        global_latents: ``"joint"`` puts all latents into the weights; ``"elbo"`` gives those
            outside the data's plates the ELBO and the others the bound: unbiased if subsampled.
        num_globals: S, the global samples in one logarithm under ``"elbo"``, each with K local ones
            for each datum: for IWAE on all data, ``"pathwise"`` or ``"dreg"``.

    Raises:
        ValueError: a subsampled plate does not enclose every site, its entries depend on each
            other, or S > 1; under ``"elbo"`` a global density depends on local latents; model and
            guide differ in sites or plates, or share a parameter under PIWAE; data are not finite.
        NotImplementedError: the estimator has no gradient for a site; the model branches on one
            that it enumerates; the guide enumerates one given a sampled site, for K > 1.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_recursive import bounds
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> loss = MultiSampleELBO(bounds.renyi(0.5), estimator="dreg", num_particles=8)
    >>> loss.loss(model, AutoNormal(model), torch.zeros(3)) > 0
    True
    """

    def _options(self) -> dict[str, Any]:
        is_named = type(self) is not MultiSampleELBO
        return super()._options() if is_named else {"bound": self._bound, **super()._options()}


class IWAE_ELBO(MultiSampleELBO):
    """``log mean_k w_k``: a bound that tightens with K.

    `Importance Weighted Autoencoders` (Burda et al., arXiv 1509.00519). The pathwise gradient of
    the guide gets noisier as K grows; ``estimator="dreg"`` repairs that. Options and errors are
    those of `MultiSampleELBO`.

    >>> IWAE_ELBO(64, estimator="dreg").num_particles
    64
    """

    def __init__(self, num_particles: int, **options: Unpack[SampleOptions]) -> None:
        super().__init__(bounds.iwae, num_particles=num_particles, **options)


class MIWAE_ELBO(MultiSampleELBO):
    """The mean of M independent importance-weighted bounds with K samples each.

    `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537).
    The same bound as `IWAE_ELBO(K)` in expectation, with gradients of 1/M the variance.

    >>> MIWAE_ELBO(8, 8).num_estimates
    8
    """

    def __init__(
        self, num_estimates: int, num_particles: int, **options: Unpack[LossOptions]
    ) -> None:
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

    def __init__(
        self, num_estimates: int, num_particles: int, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(
            bounds.piwae, num_estimates=num_estimates, num_particles=num_particles, **options
        )
