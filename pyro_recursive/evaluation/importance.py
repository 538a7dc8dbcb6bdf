"""How good a guide is as a proposal: its importance weights, and a k-hat for each datum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.bounds import pareto
from pyro_recursive.bounds.pareto import PSIS, centred, pareto_k_threshold
from pyro_recursive.evaluation.calls import checked, measurement, shown_as_html
from pyro_recursive.evaluation.evidence import log_weights, results_in_chunks
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import is_delta, own_scale, sites

psis = checked(pareto.psis)


@checked
def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return Kish's effective sample size ``(sum w)^2 / sum w^2``, in samples, ``[*batch]``.

    For log-weights ``[S, *batch]`` in nats, normalised or not. It is between 1 and S, 0 if all
    weights are 0, and overlooks parts of the posterior that have no sample.

    >>> round(effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -float("inf")])).item(), 3)
    3.0
    """
    raw = centred(log_weights)
    return torch.exp(2 * raw.logsumexp(0) - (2 * raw).logsumexp(0)).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class ImportanceWeights:
    """Log-weights ``log p(x, z) - log q(z)`` of S draws from a guide, and diagnostics of them.

    ``log_weights`` is a ``[S, *plates]``-dim tensor in nats, float64, for the ``plates`` that
    enclose every sample site; without any, one joint weight covers all data. ``points`` names the
    latent sites with point estimates, which the weights take as given. ``print`` shows a summary.

    >>> print(ImportanceWeights(torch.zeros(1000, 3, dtype=torch.float64), ("data",)))
    draws                1000
    entries                 3
    threshold        0.666667
    high_k                  0
    largest_k               0
    median_ess           1000
    smallest_ess         1000
    log_marginal            0
    """

    log_weights: Tensor
    plates: tuple[str, ...] = ()
    points: tuple[str, ...] = ()

    @cached_property
    def psis(self) -> PSIS:
        """Pareto-smoothed, normalised log-weights ``[S, *plates]``, and k-hat ``[*plates]``."""
        return psis(self.log_weights)

    @property
    def pareto_k(self) -> Tensor:
        """k-hat, ``[*plates]``, the shape of the tail of the weights; see `psis`."""
        return self.psis.pareto_k

    @property
    def threshold(self) -> float:
        """The largest reliable k-hat for this number of draws."""
        return pareto_k_threshold(len(self.log_weights))

    @cached_property
    def ess(self) -> Tensor:
        """Effective sample size, ``[*plates]`` in samples, 0 where all weights are 0."""
        return effective_sample_size(self.log_weights)

    @property
    def log_marginal(self) -> Tensor:
        """The estimate ``log mean_s w_s`` of log p(x), ``[*plates]`` in nats."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))

    @classmethod
    def join(
        cls, parts: Sequence["ImportanceWeights"], plate: str | None = None
    ) -> "ImportanceWeights":
        """Concatenate the weights of several minibatches along a plate, by default the only one."""
        plates = parts[0].plates
        if plate is None and len(plates) > 1:
            raise ValueError(f"plate= is needed, one of {list(plates)}.")
        if not plates or any(part.plates != plates for part in parts):
            found = [part.plates for part in parts]
            raise ValueError(f"Weights to join need the same plates, got {found}.")
        dim = 1 + (0 if plate is None else plates.index(plate))
        return cls(torch.cat([part.log_weights for part in parts], dim), plates, parts[0].points)

    def summary(self) -> dict[str, float]:
        """Return the numbers of `print`; ``high_k`` counts the k-hats above ``threshold``."""
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

    _repr_html_ = shown_as_html

    def __str__(self) -> str:
        lines = [f"{name:12} {value:12.6g}" for name, value in self.summary().items()]
        if self.points:
            lines.append(f"The weights take the point estimates of {list(self.points)} as given.")
        return "\n".join(lines)


@measurement()
def importance_weights(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 1000,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool | str = True,
    compile: bool = False,
    **kwargs: Any,
) -> ImportanceWeights:
    """Draw from a guide and weigh the draws by the model: ``log p(x, z) - log q(z)`` in nats.

    The weights are those of this minibatch, without any subsample scale, one for each entry of the
    plates that enclose every sample site. A user's masks, and scales of the model, stay in them.
    Modules run in their present mode.

    Args:
        num_particles: S, more than 20 for a k-hat.
        chunk_size, max_plate_nesting, vectorize_particles, compile: as in
            `pyro_recursive.log_marginal`.

    Raises:
        ValueError: the guide has a `poutine.scale`; and as `pyro_recursive.log_marginal` does.

    Reference: `Yes, but Did It Work?: Evaluating Variational Inference` (Yao et al., 1802.02538).

    >>> import pyro, pyro.distributions as dist
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
    """
    check_at_least(1, num_particles=num_particles, chunk_size=chunk_size)
    program = Program(model, guide, args, kwargs)
    run: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "vectorize": vectorize_particles}
    run["by_value"] = True
    parts, points = list[Tensor](), dict[str, Tensor | None]()
    chunks = chunk_size, compile
    found = results_in_chunks(program, num_particles, _weights_and_values, *chunks, **run)
    for (part, values), names in found:
        plates = names
        parts.append(part)
        points = {name: _point(draws, points.get(name, draws[0])) for name, draws in values.items()}
    fixed = [name for name, value in points.items() if value is not None and num_particles > 1]
    return ImportanceWeights(torch.cat(parts), plates, tuple(fixed))


def _weights_and_values(
    runs: Sequence[ParticleRun], layout: PlateLayout
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log-weights of a chunk, and the values of its computed latents.

    These have a row for each draw, or one row for all.
    """
    if reason := scale_problem(runs[0].guide):
        raise ValueError(reason)
    table, found = runs[0].table, dict[str, Tensor]()
    latent = {record.name for record in table.model if not record.site["is_observed"]}
    for site in (r.site for r in table.guide if r.name in latent and is_delta(r.site)):
        values = [run.model.nodes[site["name"]]["value"] for run in runs]
        if len({value.shape for value in values}) > 1:
            continue
        draws = torch.stack(values)
        if layout.particles.dim is not None:  # all draws in one run
            dim = layout.particles.dim - site["fn"].event_dim
            draws = draws[0].movedim(dim, 0) if values[0].dim() >= -dim else draws
        found[site["name"]] = draws
    return log_weights(runs, layout), found


def _point(draws: Tensor, known: Tensor | None) -> Tensor | None:
    """Return the one value of all draws so far, None if there are more."""
    if known is None or known.numel() != draws[0].numel():
        return None
    same = (draws.flatten() == known.flatten().repeat(len(draws))).all()
    return known if bool(same) else None


def scaled_sites(trace: poutine.Trace) -> list[str]:
    """Return the sites with a scale of the user's own (`poutine.scale`) other than 1."""
    scales = ((s["name"], torch.as_tensor(own_scale(s)).double()) for s in sites(trace))
    return [name for name, scale in scales if not scale.allclose(torch.ones_like(scale))]


def scale_problem(guide: poutine.Trace) -> str:
    """Return why draws of a guide with a `poutine.scale` have no weights; nothing without one."""
    scaled = scaled_sites(guide)
    return f"Guide site '{scaled[0]}' has a scale. Take it off for evaluation." if scaled else ""
