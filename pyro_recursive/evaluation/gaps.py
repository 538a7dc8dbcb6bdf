"""What an amortised posterior loses, for each row: by its family, and by its encoder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.evidence import particles_per_chunk
from pyro_recursive.evaluation.scores import Scores
from pyro_recursive.evaluation.search import Noise, Search
from pyro_recursive.guides.base import GuideCall, LatentGuide
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.semi_amortized.guide import SemiAmortizedGuide
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import check_match, check_subsampling
from pyro_recursive.tracing.isolation import Unnoticed, set_torch_state, torch_state
from pyro_recursive.tracing.plates import layout_of
from pyro_recursive.tracing.program import Program, rows_needed
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import plates_of, sites

__all__ = ["Gaps", "gaps"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
        """The approximation gap, log p(x) - L[q*]: what the family cannot do."""
        return self.log_marginal - self.best

    @property
    def amortization(self) -> Tensor:
        """The amortisation gap, L[q*] - L[q]: what the encoder does not find."""
        return self.best - self.elbo

    @property
    def closed(self) -> Tensor | None:
        """The share of the encoder's amortisation gap that refinement closes, None without it.

        ``(L[q] - L[q_0]) / (L[q*] - L[q_0])`` with the encoder's own q_0; wild where that is about
        the best.
        """
        return None if self.start is None else (self.elbo - self.start) / (self.best - self.start)

    @classmethod
    def join(cls, parts: Sequence["Gaps"]) -> "Gaps":
        """Put the gaps of several minibatches together, along the first plate of the rows."""
        columns = zip(*parts, strict=True)
        return cls._make(None if None in column else torch.cat(column) for column in columns)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return mean over the rows, its standard error, and quantiles of each quantity.

        The mean of ``closed`` is that of all rows together, a ratio of means. A single row has no
        standard error (nan).
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

    L is the ELBO, q what the guide has for the row, and q* the best member of the same family for
    it. q* is searched for from the guide's own q and from a normal around zero in unconstrained
    space (for mixtures, from components on several sides of it), all rows at once; draws that
    nothing else is told from choose among q and what was found: L[q*] >= L[q] but for chance.
    Without a plate of rows the whole data set is one datum, and the result a scalar.

    Both ends are from below: L[q*], since a search may miss the best, so that the amortisation gap
    comes out too small and the approximation gap too large; and log p(x), by importance sampling
    from q and q* in equal parts, ``log mean_k p(x, z_k) / (q(z_k) + q*(z_k)) * 2``: below log p(x)
    in expectation, and about as good as the better one of the two.

    Of a mixture, all components and weights are searched for. A flow's networks are the guide's in
    all rows: q* may have any context, location and scale of the affine head. With a
    `SemiAmortizedGuide` q is what refinement returns, and ``start`` the ELBO before it.

    Rows are those of one minibatch, without any subsample scale. Scales and masks of the user stay,
    as in `log_marginal`. No parameter, buffer, gradient or mode of a module changes. Modules are
    used in the mode they are in: call ``.eval()`` first, if they have dropout or batch norm.

    Arguments:
        model: a Pyro model.
        guide: `AmortizedGuide`, `FlowGuide`, `MixtureGuide` or `RecursiveMixtureGuide` of those, or
            `SemiAmortizedGuide`; with rows of its own for all latents, or one joint distribution.
        num_particles: the draws for each of the bounds that are reported.
        chunk_size: how many of them run at once; by default about 5,000 rows of draws.
        search: how q* is searched for; a `pyro_recursive.evaluation.search.Search`.
        args, kwargs: those of the model and the guide.

    Raises:
        NotImplementedError: the model has latents that the guide does not know.
        RuntimeError: torch.inference_mode() is on.
        TypeError: the guide, or a component of it, is not one of this package.
        ValueError: there are global and local latents; rows depend on each other; a number is out
            of range; else as `log_marginal`.

    Cost: some thousand steps of ``search.draws`` draws for all rows; memory is that of one step, so
    pass large data in minibatches, and `Gaps.join` the results.

    Source: `Inference Suboptimality in Variational Autoencoders` (Cremer et al., arXiv 1801.03558).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive import AmortizedGuide
    >>> from pyro_recursive.evaluation.search import Search
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
    >>> encoder = torch.nn.Linear(1, 2)
    >>> with torch.no_grad():  # the exact posterior has location x / 2 and variance 1 / 2
    ...     _ = encoder.weight.zero_()
    ...     _ = encoder.bias.copy_(torch.tensor([0.0, -0.3466]))
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> found = gaps(model, AmortizedGuide(model, encoder), x, search=Search(steps=400, lr=0.1))
    >>> [round(gap, 1) for gap in found.amortization.tolist()]  # (x / 2) ** 2
    [0.0, 1.0]
    >>> bool((found.approximation.abs() < 0.1).all())
    True
    """
    check_at_least(1, num_particles=num_particles, chunk_size=chunk_size)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gaps takes gradients: call it under torch.no_grad() at most")
    _check_guide(guide)
    runs = Unnoticed()
    with guide.rollback_first_call(), rows_needed(args, kwargs), torch.no_grad():
        latents, call = _rows(guide, args, kwargs)
        program = Program(model, guide, args, kwargs)
        outside = runs(lambda: _outside(program, latents))
        size = chunk_size or runs(lambda: particles_per_chunk(program))
        family, own = guide.row_family(latents), _own(guide, latents, call, runs)
        target = LocalBound(model, latents, call, family, guide.nesting, runs=runs)
        noise, search = Noise(own.device), search or Search()
        state = torch_state()  # runs of the model set it back
        _check_rows(target, own[0], noise, outside)
        starts = (own[0], family.start(own.new_zeros(*own.shape[1:-1], latents.size)))
        found = torch.stack([*own, *(search(target, start, noise) for start in starts)])
        best = Scores(target, found, noise).draw(num_particles, size).best()
        shown = torch.stack([own[0], best, *own[1:]])
        scores = Scores(target, shown, noise).draw(num_particles, size, evidence=True)
        set_torch_state(state)
    return _gaps(scores, call.sizes(latents))


def _check_guide(guide: Any) -> None:
    """Raise where a guide is none whose family for one row is known."""
    if not isinstance(guide, LatentGuide):
        name = getattr(guide, "__name__", type(guide).__name__)
        raise TypeError(
            f"gaps needs a guide of this package, whose family for one row it can search, and got "
            f"{name}. Use AmortizedGuide(model, encoder), AmortizedGuide(model, plate=...) for "
            "parameters of each row, or another guide of pyro_recursive."
        )


def _rows(guide: LatentGuide, args: tuple, kwargs: dict[str, Any]) -> tuple[LatentBlock, GuideCall]:
    """Return the group of latents that is measured, and the call with its minibatch."""
    guide.prepare(*args, **kwargs)
    if len(guide.groups) > 1:
        shared, local = ([slot.name for slot in latents.slots] for latents in guide.groups)
        raise ValueError(
            f"The rows share the latents {shared}, so that log p(x) is no sum over rows: the gaps "
            f"of {local} are not defined row by row. Fix the shared latents in the model with "
            "pyro.poutine.condition; or use a guide without an encoder and without plate=, which "
            "has one joint distribution over all latents, and one gap."
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


def _own(guide: LatentGuide, latents: LatentBlock, call: GuideCall, runs: Unnoticed) -> Tensor:
    """Return the guide's numbers, ``[1, *batch, P]``; ``[2, ...]`` with those before refinement."""
    guides = [guide, guide.guide] if isinstance(guide, SemiAmortizedGuide) else [guide]
    # Each from the same random state: the encoder's dropout is the same.
    found = [runs(partial(each.variational_params, latents, call)) for each in guides]
    batch = latents.expand_rows(torch.empty(*call.sizes(latents), 1)).shape[:-1]
    return torch.stack([numbers.detach().expand(*batch, -1) for numbers in found])


def _check_rows(target: LocalBound, numbers: Tensor, noise: Noise, outside: list[str]) -> None:
    """Raise where a row's density depends on another row's latents.

    A weighted sum over rows has weighted derivatives, if each row has its own.
    """
    with torch.enable_grad():  # away from the modes, where there are no derivatives
        u = target.family.draw(numbers, noise(target, numbers, 2)).detach().requires_grad_()
        rows = target.log_joint(u)
        # Powers of 2, by which rows can be multiplied without any rounding.
        number = torch.arange(rows[0, 0].numel(), device=rows.device) % 13
        weights = (2.0**number).to(rows).view_as(rows[0, 0])
        plain = torch.autograd.grad(rows.sum(), u, retain_graph=True)[0]
        weighted = torch.autograd.grad((weights * rows).sum(), u)[0]
    excess = (weighted / weights.unsqueeze(-1) - plain).abs().max()
    if bool(excess > torch.finfo(u.dtype).eps ** 0.5 * plain.abs().max()):
        cause = f" (the sites {outside} are outside of the rows' plates)" if outside else ""
        raise ValueError(
            f"The log-density of a row depends on the latents of other rows{cause}, so that it has "
            "no log p(x) of its own. Put all sites into the plates; call .eval() where a batch "
            "norm mixes rows; or use a guide without an encoder and without plate=, which has one "
            "joint distribution over all latents, and one gap."
        )


def _gaps(scores: Scores, rows: tuple[int, ...]) -> Gaps:
    """Put together what is known of q, q* and, if there is one, the start of a refinement."""
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
