"""How good a guide is as a proposal: its importance weights, and what they say of each datum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.evaluation.draws.collected import latent_values
from pyro_recursive.evaluation.draws.model_runs import Run
from pyro_recursive.evaluation.draws.own_scales import scaled_guide
from pyro_recursive.evaluation.evidence import particles_per_chunk, runs_in_chunks
from pyro_recursive.evaluation.psis import PSIS, effective_sample_size, pareto_k_threshold, psis
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import is_delta, sites

__all__ = ["ImportanceWeights", "importance_weights"]


@dataclass(frozen=True)
class ImportanceWeights:
    """Log-weights ``log p(x, z) - log q(z)`` of S draws from a guide, and what they tell.

    ``log_weights`` is ``[S, *plates]`` in nats, float64, one column for each entry of the plates
    that enclose every sample site; ``plates`` are their names, none where one joint weight covers
    everything. ``points`` names the latent sites that the guide has only point estimates of, which
    the weights take as given. ``print`` shows a summary in words.

    Source: `Yes, but Did It Work?: Evaluating Variational Inference` (Yao et al., arXiv
    1802.02538).

    >>> import torch
    >>> print(ImportanceWeights(torch.zeros(1000, 3, dtype=torch.float64), ("data",)))
    1000 draws from the guide, 3 entries of plate 'data'.
    k-hat: at most 0.67 (good) for all 3; the largest is 0.00, at (0,).
    Effective sample size of 1000: median 1000, smallest 1000.
    log p(x): 0.000 nats in all, 0.000 per entry.
    >>> print(ImportanceWeights(torch.zeros(1000, dtype=torch.float64)))
    1000 draws from the guide, one joint weight (no plate encloses every site).
    k-hat: 0.00, at most 0.67 (good).
    Effective sample size: 1000 of 1000.
    log p(x): 0.000 nats.
    """

    log_weights: Tensor
    plates: tuple[str, ...] = ()
    points: tuple[str, ...] = ()

    @cached_property
    def psis(self) -> PSIS:
        """Pareto-smoothed log-weights ``[S, *plates]``, normalised, and k-hat ``[*plates]``."""
        return psis(self.log_weights)

    @property
    def pareto_k(self) -> Tensor:
        """k-hat, ``[*plates]``: how heavy the tail of the weights is; see `psis`."""
        return self.psis.pareto_k

    @property
    def threshold(self) -> float:
        """The largest k-hat to be trusted with so many draws."""
        return pareto_k_threshold(len(self.log_weights))

    @cached_property
    def ess(self) -> Tensor:
        """Effective sample size, ``[*plates]`` in samples, 0 where no sample has any weight."""
        return effective_sample_size(self.log_weights)

    @property
    def log_marginal(self) -> Tensor:
        """The estimate ``log mean_s w_s`` of log p(x), ``[*plates]`` in nats."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))

    def joint(self) -> "ImportanceWeights":
        """Return the weights of all entries together, ``[S]``: the products of single weights.

        They say how good the guide is for quantities of the whole data set, and get worse with
        its size; a mean over the data needs no more than the weights of each datum. Where there
        are no plates, the weights are joint already.
        """
        joint = self.log_weights.reshape(len(self.log_weights), -1).sum(1)
        return ImportanceWeights(joint, (), self.points)

    @classmethod
    def join(
        cls, parts: Sequence["ImportanceWeights"], plate: str | None = None
    ) -> "ImportanceWeights":
        """Put the weights of several minibatches together, along the plate of their rows.

        :param plate: its name; needed where there are several plates
        :raises ValueError: there are no plates, or not the same ones; it is not clear along which;
            others, or the numbers of draws, differ in size
        """
        kinds = {(len(part.log_weights), part.plates) for part in parts}
        if len(kinds) != 1 or not parts[0].plates:
            raise ValueError(
                "Weights can be joined where they have the same plates, at least one, and the same "
                f"number of draws; got (draws, plates) {sorted(kinds)}."
            )
        shapes = [part.log_weights.shape for part in parts]
        dim = 1 + _place_of(plate, parts[0].plates)
        if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) != 1:
            raise ValueError(
                f"Weights joined along plate '{parts[0].plates[dim - 1]}' must have the same other "
                f"dims: got shapes {[tuple(shape) for shape in shapes]}, the draws first, then "
                f"plates {list(parts[0].plates)}."
            )
        log_weights = torch.cat([part.log_weights for part in parts], dim)
        return cls(log_weights, parts[0].plates, parts[0].points)

    def summary(self) -> dict[str, float]:
        """Return what `print` says, as numbers.

        ``high_k`` counts the entries whose k-hat is above ``threshold``.
        """
        return {
            "draws": len(self.log_weights),
            "entries": self.ess.numel(),
            "threshold": self.threshold,
            "high_k": int((self.pareto_k > self.threshold).sum()),
            "largest_k": self.pareto_k.max().item(),
            "median_ess": self.ess.median().item(),
            "smallest_ess": self.ess.min().item(),
            "log_marginal": self.log_marginal.sum().item(),
        }

    def __str__(self) -> str:
        """Return the summary in words."""
        s = self.summary()
        lines = [
            f"{s['draws']} draws from the guide, {self._scope()}.",
            *(_of_one(s) if s["entries"] == 1 else self._of_many(s)),
        ]
        if self.points:
            lines.insert(1, _POINTS.format(list(self.points)))
        return "\n".join(lines)

    def _of_many(self, s: dict[str, float]) -> list[str]:
        """Return what there is to say of several entries, a sentence a line."""
        total, high = int(s["entries"]), int(s["high_k"])
        place = tuple(int(i) for i in torch.unravel_index(self.pareto_k.argmax(), self.ess.shape))
        advice = [f"Where it is higher, {_ADVICE.format('reliable there')}"] if high else []
        return [
            f"{_verdict(total, high, s['threshold'])}; the largest is {s['largest_k']:.2f}, at "
            f"{place}.",
            *advice,
            f"Effective sample size of {s['draws']}: median {s['median_ess']:.0f}, smallest "
            f"{s['smallest_ess']:.0f}.",
            f"log p(x): {s['log_marginal']:.3f} nats in all, "
            f"{s['log_marginal'] / total:.3f} per entry.",
        ]

    def _scope(self) -> str:
        if not self.plates:
            return "one joint weight (no plate encloses every site)"
        named = ", ".join(f"'{name}'" for name in self.plates)
        return f"{self.ess.numel()} entries of plate{'s' if len(self.plates) > 1 else ''} {named}"


_POINTS = (
    "The guide has point estimates of {}: what follows takes them as given, and does not say how "
    "good they are."
)
_ADVICE = (
    "the guide has too little of a part of the posterior: log p(x), effective sample size and "
    "resampled draws are not {}. Train longer, or use a richer guide."
)


def _of_one(s: dict[str, float]) -> list[str]:
    """Return what there is to say of one weight, a sentence a line."""
    high, limit = bool(s["high_k"]), f"{s['threshold']:.2f}"
    verdict = f"above {limit} (not to be trusted)" if high else f"at most {limit} (good)"
    return [
        f"k-hat: {s['largest_k']:.2f}, {verdict}.",
        *([f"So {_ADVICE.format('reliable')}"] if high else []),
        f"Effective sample size: {s['smallest_ess']:.0f} of {s['draws']}.",
        f"log p(x): {s['log_marginal']:.3f} nats.",
    ]


def _place_of(plate: str | None, plates: Sequence[str]) -> int:
    """Return the place of the plate that weights are joined along."""
    if plate is None and len(plates) == 1:
        return 0
    if plate not in plates:
        cause = "plate= is needed" if plate is None else f"there is no plate '{plate}'"
        raise ValueError(f"Along which plate to join is not clear: {cause}, of {list(plates)}.")
    return plates.index(plate)


def _verdict(total: int, high: int, threshold: float) -> str:
    if not high:
        return f"k-hat: at most {threshold:.2f} (good) for all {total}"
    return f"k-hat: above {threshold:.2f} (not to be trusted) for {high} of {total}"


def importance_weights(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 1000,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> ImportanceWeights:
    """Draw from a guide and weigh the draws by the model: ``log p(x, z) - log q(z)`` in nats.

    The weights are ``[S, *plates]`` for the plates that enclose every sample site, so that each
    datum has its own k-hat and effective sample size; one joint weight where no plate does. They
    are those of this minibatch, without any subsample scale. Masks of the user stay, and scales in
    the model: its density with them is what the guide is compared with.

    Draws come in chunks of ``chunk_size``, by default of about 5,000 rows; only the weights are
    kept. Modules are used in the mode they are in: call ``.eval()`` first, if they have dropout or
    batch norm. A keyword of the model that has the name of one here cannot be passed: wrap it.

    :param num_particles: S, more than 20 for a k-hat
    :raises ValueError: a number is out of range; the guide has a scale of its own
        (`poutine.scale`); a subsampled plate does not enclose every site; and as
        `pyro_recursive.MultiSampleELBO` does

    Source: `Yes, but Did It Work?: Evaluating Variational Inference` (Yao et al., arXiv
    1802.02538).

    >>> import pyro, pyro.distributions as dist
    >>> pyro.set_rng_seed(0)
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):  # the posterior has scale 0.71
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, torch.tensor([0.7, 0.2])))
    >>> weights = importance_weights(model, guide, torch.tensor([0.0, 1.0]))
    >>> (weights.pareto_k < weights.threshold).tolist()
    [True, False]
    >>> weights.log_weights.shape, weights.plates
    (torch.Size([1000, 2]), ('data',))
    """
    check_at_least(1, num_particles=num_particles, chunk_size=chunk_size)
    program = Program(model, guide, args, kwargs)
    options: dict[str, Any] = {
        "max_plate_nesting": max_plate_nesting,
        "vectorize": vectorize_particles,
    }
    parts: list[Tensor] = []
    points: tuple[str, ...] = ()
    with torch.no_grad():
        size = chunk_size or particles_per_chunk(program)
        for runs, layout in runs_in_chunks(program, num_particles, size, **options):
            if not parts:
                if reason := scaled_guide(runs[0].guide):
                    raise ValueError(reason)
                points = _points(runs, layout)
            parts.append(densities(runs, layout).log_weights[0].double())
    plates = tuple(frame.name for frame in layout.plates)
    return ImportanceWeights(torch.cat(parts), plates, points)


def _points(runs: Sequence[ParticleRun], layout: PlateLayout) -> tuple[str, ...]:
    """Return the latent sites that the guide computes, to the same value for every draw."""
    run = Run([run.model for run in runs], layout.particles, layout.max_plate_nesting)
    if layout.particles.total == 1:
        return ()
    values = latent_values(run)
    computed = [site["name"] for site in sites(runs[0].guide) if is_delta(site)]
    return tuple(
        name
        for name in computed
        if name in values and bool((values[name].value == values[name].value[:1]).all())
    )
