"""What an amortised posterior loses, for each row: by its family, and by its encoder."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.calls import measurement, shown_as_html
from pyro_recursive.evaluation.evidence import WeightSums, particles_per_chunk
from pyro_recursive.evaluation.search import Noise, Search
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.semi_amortized.guide import SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.choice import require_plate
from pyro_recursive.tracing.compatibility import check_match, check_subsampling
from pyro_recursive.tracing.isolation import SharedNoise, isolated, restored_random_state
from pyro_recursive.tracing.plates import layout_of
from pyro_recursive.tracing.program import Program, rows_needed, structure_of
from pyro_recursive.tracing.runs import run_particles

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CLEAR = 3  # standard errors by which another candidate must be better than the guide's


class Gaps(NamedTuple):
    """Bounds for each row in nats, float64 ``[*rows]``, and the gaps between them.

    ``elbo`` is L[q], ``best`` L[q*], and ``start`` the ELBO before refinement, None where the guide
    does not refine. ``ess`` is the effective sample size of ``log_marginal``. The ``..._error`` are
    Monte Carlo standard errors of single rows.
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
        """The share of the encoder's amortisation gap that refinement closes, None without it."""
        return None if self.start is None else (self.elbo - self.start) / (self.best - self.start)

    @classmethod
    def join(cls, parts: Sequence["Gaps"]) -> "Gaps":
        """Concatenate the gaps of several minibatches along the first plate of the rows."""
        columns = zip(*parts, strict=True)
        return cls._make(None if None in column else torch.cat(column) for column in columns)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the mean over the rows, its standard error, and quantiles of each quantity.

        The mean of ``closed`` is a ratio of means.
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

    def _repr_html_(self) -> str:
        return shown_as_html(self)

    def __str__(self) -> str:
        table = self.summary()
        lines = [f"{'nats':14}" + "".join(f"{name:>15}" for name in table["elbo"])]
        for name, row in table.items():
            lines.append(f"{name:14}" + "".join(f"{value:15.4f}" for value in row.values()))
        return "\n".join(lines)


@measurement()
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
    set is one datum. No parameter or buffer changes. Modules stay in their mode: call ``.eval()``
    first. Pass large data in minibatches, and `Gaps.join`.

    Args:
        guide: `AmortizedGuide`, `FlowGuide`, `MixtureGuide` or `RecursiveMixtureGuide` of those, or
            `SemiAmortizedGuide`; over the latents of the rows alone, or over all jointly.
        num_particles: the draws for each of the bounds that are reported.
        chunk_size: how many of them run at once; by default about 5,000 rows of draws.
        search: the settings of the search for q*.

    Raises:
        NotImplementedError: the model has latents that the guide has not.
        TypeError: the guide, or a component of it, is not one of this package.
        ValueError: there are global and local latents; rows depend on each other.

    Reference: 'Inference Suboptimality in Variational Autoencoders' (Cremer et al., 1801.03558).

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
    shared = SharedNoise()
    with guide.rollback_first_call(), rows_needed(args, kwargs), torch.no_grad():
        latents, call = _rows(guide, args, kwargs)
        program = Program(model, guide, args, kwargs)
        require_plate(program, structure_of(program, fresh=True))
        with isolated(noise=shared):
            particles, runs = run_particles(program, 1, 2)
            layout = layout_of(particles, [run.table for run in runs])
            check_match(runs[0].table, layout.max_plate_nesting)
            check_subsampling(runs[0].table, layout)
            chunk_size = chunk_size or particles_per_chunk(program)
        family, own = guide.row_family(latents), _own(guide, latents, call, shared)
        target = LocalBound(model, latents, call, family, guide.nesting, shared_noise=shared)
        noise, search = Noise(own.device), search or Search()
        with restored_random_state():  # runs of the model set it to that of their noise
            _check_rows(target, own[0], noise)
            starts = (own[0], family.start(own.new_zeros(*own.shape[1:-1], latents.size)))
            found = torch.stack([*own, *(search(target, start, noise) for start in starts)])
            best = Scores(target, found, noise).draw(num_particles, chunk_size).best()
            shown = torch.stack([own[0], best, *own[1:]])
            scores = Scores(target, shown, noise).draw(num_particles, chunk_size, evidence=True)
    return _gaps(scores, call.sizes(latents))


def _rows(guide: LatentGuide, args: tuple, kwargs: dict[str, Any]) -> tuple[LatentBlock, GuideCall]:
    """Return the group of latents that is measured, and the call with its minibatch."""
    guide.get_ready(args, kwargs)
    if len(guide.groups) > 1:
        shared, local = ([slot.name for slot in latents.slots] for latents in guide.groups)
        raise ValueError(
            f"The rows share the latents {shared}: {local} have no gaps row by row. Fix them with "
            "pyro.poutine.condition."
        )
    with poutine.block():
        call = guide.new_call(args, kwargs)
    if call.absent:
        raise ValueError(f"Sites {sorted(call.absent)} of the guide are observed in this call.")
    return guide.groups[0], call


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


def _check_rows(target: LocalBound, params: Tensor, noise: Noise) -> None:
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
        raise ValueError("A row's density depends on the latents of other rows. Use a joint guide.")


class Moments:
    """The mean of independent terms that come in chunks, ``[s, *any]``, and its standard error."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, terms: Tensor) -> None:
        self.count += len(terms)
        self.first = self.first.to(terms) + terms.sum(0)
        self.second = self.second.to(terms) + terms.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    @property
    def error(self) -> Tensor:
        variance = (self.second / self.count - self.mean.square()).clamp_min(0)
        return (variance / max(1, self.count - 1)).sqrt()


class Scores:
    """Bounds of C candidates ``[C, *batch, P]``, all from the same noise.

    ``elbo`` are their ELBOs, and ``gain`` the differences to that of the first, ``[C, *batch]``.
    """

    def __init__(self, target: LocalBound, candidates: Tensor, noise: Noise) -> None:
        self.target, self.candidates, self.noise = target, candidates, noise
        self.elbo, self.gain, self.weights = Moments(), Moments(), WeightSums()

    def draw(self, total: int, size: int, evidence: bool = False) -> "Scores":
        """Draw ``total`` times, ``size`` at once; for the evidence, too, from the first two."""
        family, keep = self.target.family, self.target.keep
        count, chunk = math.ceil(total / family.parts), max(1, size // family.parts)
        shares = [family.log_weights(params).double() for params in self.candidates]
        for begin in range(0, count, chunk):
            noise = self.noise(self.target, self.candidates[0], min(chunk, count - begin))
            drawn = [family.scored_draw(params, noise, keep) for params in self.candidates]
            log_p = [self.target.log_joint(u).double() for u, _ in drawn]
            log_q = [each.double() for _, each in drawn]
            triples = zip(shares, log_p, log_q, strict=True)
            elbos = torch.stack([(share.exp() * (p - q)).sum(1) for share, p, q in triples], 1)
            self.elbo.add(elbos)
            self.gain.add(elbos - elbos[:, :1])
            if evidence:  # from q and q* in equal parts
                terms = []
                for own in (0, 1):
                    u, rival = drawn[own][0], self.candidates[1 - own]
                    other = family.log_prob(rival, u, keep).double()
                    mixed = torch.logaddexp(log_q[own], other) - math.log(2)
                    terms.append((log_p[own] - mixed + shares[own]).logsumexp(1))
                # The two share their noise, and a draw has one of each part: one term of the mean.
                self.weights.add(torch.logaddexp(*terms) - math.log(2))
        return self

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
    log_marginal, log_marginal_error, ess = scores.weights.evidence()
    bounds = log_marginal, elbo[0], elbo[1], elbo[2] if len(elbo) > 2 else None
    errors = log_marginal_error, error[0], error[1], scores.gain.error[1]
    found = (*bounds, *errors, ess)
    return Gaps._make(None if each is None else each.reshape(rows) for each in found)


def _summary(values: Tensor) -> dict[str, float]:
    values = values.flatten()
    one = values.numel() == 1
    error = values.new_tensor(torch.nan) if one else values.std() / values.numel() ** 0.5
    quantiles = values.nanquantile(values.new_tensor(QUANTILES))
    names = ("mean", "standard error", *(f"{q:.0%}" for q in QUANTILES))
    return dict(zip(names, [values.mean().item(), error.item(), *quantiles.tolist()], strict=True))
