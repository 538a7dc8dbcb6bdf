"""What an amortised posterior loses, for each row: by its family, and by its encoder."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.evidence import WeightSums, particles_per_chunk
from pyro_recursive.evaluation.search import Noise, Search
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.semi_amortized.guide import SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import check_match, check_subsampling
from pyro_recursive.tracing.isolation import SharedNoise, isolated, random_state, set_random_state
from pyro_recursive.tracing.plates import layout_of
from pyro_recursive.tracing.program import Program, rows_needed
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import plates_of, sites

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CLEAR = 3  # standard errors by which another candidate must be better than the guide's


class Gaps(NamedTuple):
    """Bounds for each row in nats, float64 ``[*rows]``, and the gaps between them.

    ``elbo`` is L[q], ``best`` L[q*], and ``start`` the ELBO before refinement, None where the guide
    does not refine. ``ess`` is the effective sample size of ``log_marginal``, as in `Evidence`. The
    ``..._error`` are Monte Carlo standard errors of single rows.
    """

    log_marginal: Tensor
    elbo: Tensor
    best: Tensor
    start: Tensor | None
    log_marginal_error: Tensor
    elbo_error: Tensor
    best_error: Tensor
    amortization_error: Tensor
    ess: Tensor

    @property
    def inference(self) -> Tensor:
        """The inference gap, log p(x) - L[q]: the sum of the other two."""
        return self.log_marginal - self.elbo

    @property
    def approximation(self) -> Tensor:
        """The approximation gap, log p(x) - L[q*]: the loss by the family."""
        return self.log_marginal - self.best

    @property
    def amortization(self) -> Tensor:
        """The amortisation gap, L[q*] - L[q]: the loss by the encoder."""
        return self.best - self.elbo

    @property
    def closed(self) -> Tensor | None:
        """The share of the encoder's amortisation gap that refinement closes, None without it.

        ``(L[q] - L[q_0]) / (L[q*] - L[q_0])`` with the encoder's own q_0; noisy where the
        denominator is about 0.
        """
        return None if self.start is None else (self.elbo - self.start) / (self.best - self.start)

    @classmethod
    def join(cls, parts: Sequence["Gaps"]) -> "Gaps":
        """Concatenate the gaps of several minibatches along the first plate of the rows."""
        columns = zip(*parts, strict=True)
        return cls._make(None if None in column else torch.cat(column) for column in columns)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the mean over the rows, its standard error, and quantiles of each quantity.

        The mean of ``closed`` is a ratio of means. A single row has no standard error (nan).
        """
        names = ("log_marginal", "elbo", "best", "inference", "approximation", "amortization")
        table = {name: _summary(getattr(self, name)) for name in names}
        if self.start is not None and self.closed is not None:
            gained, possible = self.elbo - self.start, self.best - self.start
            share = gained.mean() / possible.mean()
            rest = _summary((gained - share * possible) / possible.mean())
            error = {"standard error": rest["standard error"]}
            table["start"] = _summary(self.start)
            table["closed"] = {**_summary(self.closed), "mean": share.item(), **error}
        return table

    def __str__(self) -> str:
        """Return the summary as a table."""
        table = self.summary()
        lines = [f"{'nats':14}" + "".join(f"{name:>15}" for name in table["elbo"])]
        for name, row in table.items():
            lines.append(f"{name:14}" + "".join(f"{value:15.4f}" for value in row.values()))
        return "\n".join(lines)


def gaps(
    model: Callable,
    guide: LatentGuide,
    *args: Any,
    num_particles: int = 5000,
    chunk_size: int | None = None,
    search: Search | None = None,
    **kwargs: Any,
) -> Gaps:
    """Measure, for each row of the data, what a guide's posterior loses and why.

        log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q])                  (nats)
        inference gap       approximation gap      amortisation gap

    L is the ELBO, q the guide's posterior of the row, and q* the best member of the same family
    that a search from q and from a normal around zero finds. log p(x) is estimated by importance
    sampling from q and q* in equal parts. Both are estimates from below (docs: mathematics/gaps).

    Rows are those of one minibatch, without subsample scale; without a plate of rows the whole data
    set is one datum, and the result a scalar. No parameter, buffer or gradient changes. Modules
    stay in their mode: call ``.eval()`` first. Pass large data in minibatches, and `Gaps.join`.

    Args:
        model: a Pyro model.
        guide: `AmortizedGuide`, `FlowGuide`, `MixtureGuide` or `RecursiveMixtureGuide` of those, or
            `SemiAmortizedGuide`; over the latents of the rows alone, or over all jointly.
        num_particles: the draws for each of the bounds that are reported.
        chunk_size: how many of them run at once; by default about 5,000 rows of draws.
        search: the settings of the search for q*.
        args, kwargs: those of the model and the guide.

    Raises:
        NotImplementedError: the model has latents that the guide has not.
        TypeError: the guide, or a component of it, is not one of this package.
        ValueError: there are global and local latents; rows depend on each other.

    Reference: 'Inference Suboptimality in Variational Autoencoders' (Cremer et al., arXiv
    1801.03558).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive import AmortizedGuide
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
    >>> guide = AmortizedGuide(model, torch.nn.Linear(1, 2))
    >>> found = gaps(model, guide, torch.tensor([[0.0], [2.0]]), search=Search(steps=400, lr=0.1))
    >>> bool((found.approximation.abs() < 0.1).all())  # the posterior is a Gaussian
    True
    """
    check_at_least(1, num_particles=num_particles, chunk_size=chunk_size)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gaps takes gradients: use torch.no_grad() at most.")
    _check_guide(guide)
    shared = SharedNoise()
    with guide.rollback_first_call(), rows_needed(args, kwargs), torch.no_grad():
        latents, call = _rows(guide, args, kwargs)
        program = Program(model, guide, args, kwargs)
        with isolated(noise=shared):
            outside = _outside(program, latents)
        if chunk_size is None:
            with isolated(noise=shared):
                chunk_size = particles_per_chunk(program)
        family, own = guide.row_family(latents), _own(guide, latents, call, shared)
        target = LocalBound(model, latents, call, family, guide.nesting, shared_noise=shared)
        noise, search = Noise(own.device), search or Search()
        state = random_state()  # runs of the model set it back
        _check_rows(target, own[0], noise, outside)
        starts = (own[0], family.start(own.new_zeros(*own.shape[1:-1], latents.size)))
        found = torch.stack([*own, *(search(target, start, noise) for start in starts)])
        best = Scores(target, found, noise).draw(num_particles, chunk_size).best()
        shown = torch.stack([own[0], best, *own[1:]])
        scores = Scores(target, shown, noise).draw(num_particles, chunk_size, evidence=True)
        set_random_state(state)
    return _gaps(scores, call.sizes(latents))


def _check_guide(guide: Any) -> None:
    if not isinstance(guide, LatentGuide):
        name = getattr(guide, "__name__", type(guide).__name__)
        raise TypeError(
            f"gaps needs a guide of this package, got {name}. Use AmortizedGuide(model, encoder) "
            "or AmortizedGuide(model, plate=...)."
        )


def _rows(guide: LatentGuide, args: tuple, kwargs: dict[str, Any]) -> tuple[LatentBlock, GuideCall]:
    """Return the group of latents that is measured, and the call with its minibatch."""
    guide.prepare(*args, **kwargs)
    if len(guide.groups) > 1:
        shared, local = ([slot.name for slot in latents.slots] for latents in guide.groups)
        raise ValueError(
            f"The rows share the latents {shared}: the gaps of {local} are not defined row by row. "
            "Fix them with pyro.poutine.condition, or use a joint guide, without encoder or plate=."
        )
    with poutine.block():
        return guide.groups[0], guide.new_call(args, kwargs)


def _outside(program: Program, latents: LatentBlock) -> list[str]:
    """Check that model and guide match; return the model's sites outside the rows' plates."""
    particles, runs = run_particles(program, 1, 2)
    layout = layout_of(particles, [run.table for run in runs])
    check_match(runs[0].table, layout.max_plate_nesting)
    check_subsampling(runs[0].table, layout)
    rows = {frame.name for frame in latents.rows}
    return [site["name"] for site in sites(runs[0].model) if not rows <= set(plates_of(site))]


def _own(guide: LatentGuide, latents: LatentBlock, call: GuideCall, shared: SharedNoise) -> Tensor:
    """Return the guide's parameters, ``[1, *batch, P]``; before refinement, too: ``[2, ...]``."""
    guides = [guide, guide.guide] if isinstance(guide, SemiAmortizedGuide) else [guide]
    # Each from the same random state: the encoder's dropout is the same.
    found = []
    for each in guides:
        with isolated(noise=shared):
            found.append(each.variational_params(latents, call))
    batch = latents.expand_rows(torch.empty(*call.sizes(latents), 1)).shape[:-1]
    return torch.stack([params.detach().expand(*batch, -1) for params in found])


def _check_rows(target: LocalBound, params: Tensor, noise: Noise, outside: list[str]) -> None:
    """Raise where a row's density depends on another row's latents.

    The derivatives of a weighted sum over independent rows are weighted, each by its own row's.
    """
    with torch.enable_grad():  # at draws: at a mode there are no derivatives
        u = target.family.draw(params, noise(target, params, 2)).detach().requires_grad_()
        rows = target.log_joint(u)
        # Powers of 2 multiply without rounding.
        exponent = torch.arange(rows[0, 0].numel(), device=rows.device) % 13
        weights = (2.0**exponent).to(rows).view_as(rows[0, 0])
        plain = torch.autograd.grad(rows.sum(), u, retain_graph=True)[0]
        weighted = torch.autograd.grad((weights * rows).sum(), u)[0]
    excess = (weighted / weights.unsqueeze(-1) - plain).abs().max()
    if bool(excess > torch.finfo(u.dtype).eps ** 0.5 * plain.abs().max()):
        cause = f" (the sites {outside} are outside the rows' plates)" if outside else ""
        raise ValueError(
            f"The log-density of a row depends on the latents of other rows{cause}. Put all sites "
            "into the plates, call .eval(), or use a joint guide, without encoder or plate=."
        )


class Moments:
    """The mean of independent terms that come in chunks, ``[s, *any]``, and its standard error."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, terms: Tensor) -> None:
        """Add a chunk."""
        self.count += len(terms)
        self.first = self.first.to(terms) + terms.sum(0)
        self.second = self.second.to(terms) + terms.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean, ``[*any]``."""
        return self.first / self.count

    @property
    def error(self) -> Tensor:
        """The standard error of the mean, ``[*any]``."""
        variance = (self.second / self.count - self.mean.square()).clamp_min(0)
        return (variance / max(1, self.count - 1)).sqrt()


class ScoreDraws(NamedTuple):
    """Draws of a candidate: ``[S, J, *batch, D]``, ``[S, J, *batch]`` twice, ``[J, *batch]``."""

    u: Tensor
    log_p: Tensor
    log_q: Tensor
    log_shares: Tensor

    @property
    def elbo(self) -> Tensor:
        """The ELBO's estimate from each draw of all parts, ``[S, *batch]``."""
        return (self.log_shares.exp() * (self.log_p - self.log_q)).sum(1)


class Scores:
    """Bounds of C candidates ``[C, *batch, P]``, all from the same noise.

    ``elbo`` are their ELBOs, and ``gain`` the differences to that of the first, ``[C, *batch]``.
    """

    def __init__(self, target: LocalBound, candidates: Tensor, noise: Noise) -> None:
        self.target, self.candidates, self.noise = target, candidates, noise
        self.elbo, self.gain, self.weights = Moments(), Moments(), WeightSums()

    def draw(self, total: int, size: int, evidence: bool = False) -> "Scores":
        """Draw ``total`` times, ``size`` at once; for the evidence, too, from the first two."""
        parts = self.target.family.parts
        count, chunk = math.ceil(total / parts), max(1, size // parts)
        for begin in range(0, count, chunk):
            noise = self.noise(self.target, self.candidates[0], min(chunk, count - begin))
            drawn = [self._drawn(params, noise) for params in self.candidates]
            elbos = torch.stack([each.elbo for each in drawn], 1)
            self.elbo.add(elbos)
            self.gain.add(elbos - elbos[:, :1])
            if evidence:
                self.weights.add(self._log_weights(drawn))
        return self

    def _drawn(self, params: Tensor, noise: Tensor) -> ScoreDraws:
        family = self.target.family
        u, log_q = family.scored_draw(params, noise)
        log_p = self.target.log_joint(u)
        return ScoreDraws(u, log_p.double(), log_q.double(), family.log_weights(params).double())

    def _log_weights(self, drawn: Sequence[ScoreDraws]) -> Tensor:
        """Return log-weights for draws from q and q* in equal parts, ``[S, *batch]``."""
        terms = []
        for own, params in zip(drawn[:2], self.candidates[:2].flip(0), strict=True):
            other = self.target.family.log_prob(params, own.u).double()
            mixed = torch.logaddexp(own.log_q, other) - math.log(2)
            terms.append((own.log_p - mixed + own.log_shares).logsumexp(1))
        # The two share their noise, and a draw has one of each part: one term of the mean.
        return torch.logaddexp(*terms) - math.log(2)

    def best(self) -> Tensor:
        """Return the best candidate of each row: the first, unless another is clearly better."""
        gain, error = self.gain.mean, self.gain.error
        gain = torch.where((gain > CLEAR * error) | gain.isposinf(), gain, 0.0)
        most, index = gain.max(0)
        index = torch.where(most > 0, index, 0)
        return self.candidates.take_along_dim(index[None, ..., None], 0)[0]


def _gaps(scores: Scores, rows: tuple[int, ...]) -> Gaps:
    """Return the gaps from the scores of q, q* and, if there is one, the start of a refinement."""
    elbo, error = scores.elbo.mean, scores.elbo.error
    evidence = scores.weights.evidence()
    found = (
        evidence.log_marginal,
        elbo[0],
        elbo[1],
        elbo[2] if len(elbo) > 2 else None,
        evidence.standard_error,
        error[0],
        error[1],
        scores.gain.error[1],
        evidence.ess,
    )
    return Gaps._make(None if each is None else each.reshape(rows) for each in found)


def _summary(values: Tensor) -> dict[str, float]:
    values = values.flatten()
    one = values.numel() == 1
    error = values.new_tensor(torch.nan) if one else values.std() / values.numel() ** 0.5
    quantiles = values.nanquantile(values.new_tensor(QUANTILES))
    names = ("mean", "standard error", *(f"{q:.0%}" for q in QUANTILES))
    return dict(zip(names, [values.mean().item(), error.item(), *quantiles.tolist()], strict=True))
