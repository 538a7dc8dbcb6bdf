"""Simulation-based calibration: whether a guide is the posterior, on data whose truth is known.

Latents and data are drawn from the model; the guide is given the data. If it is the posterior, the
true latents are like its own draws: their rank among L of these is uniform on 0 .. L.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_recursive.evaluation.calibration.ranks import RankSums
from pyro_recursive.evaluation.calibration.simulation import Replace, Simulated, simulate
from pyro_recursive.evaluation.calibration.uniformity import FEWEST, Calibration
from pyro_recursive.evaluation.posterior_tables import PosteriorTable
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.isolation import set_torch_state, torch_state
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import independent_plates_of, sites

__all__ = ["calibration", "calibration_by_fits"]


@torch.no_grad()
def calibration(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 127,
    num_rounds: int = 1,
    plate: str | None = None,
    names: Iterable[str] | None = None,
    replace: Replace | None = None,
    **kwargs: Any,
) -> Calibration:
    """Test whether an amortised guide is the posterior, with each row as a data set.

    Latents and data of all rows are drawn from the model at once, in the shapes of the data given,
    whose values do not matter: B rows make B data sets, R rounds of it R B. The simulated data take
    the place of the given ones in the arguments; all else there (covariates, say) stays. Modules
    are used in the mode they are in: call ``.eval()`` first, if they have dropout or batch norm.

    The test is about the model's own posterior: a guide trained on data that the model would not
    produce, or with scaled densities, may fail it. Not to fail is no proof: only what hundreds of
    data sets together show can be seen.

    :param model: its sites are all inside the plate of the rows
    :param guide: an amortised guide, which reads the data from its arguments; trained. Called like
        the model as ``guide(*args, **kwargs)``. A keyword with the name of one here cannot be
        passed on
    :param num_draws: L, the draws of the guide that a true value is ranked among
    :param num_rounds: R
    :param plate: the name of the rows' plate; None is the one around all latents of the guide
    :param names: the latent sites that are ranked; None is all
    :param replace: where the arguments have the data of each observed site: positions or keywords
        by site. None finds the argument that a site has its value from. A function from simulated
        values by site, args and kwargs to new (args, kwargs) may do anything: where the data of
        site ``y`` are the last of three columns,
        ``lambda s, a, k: ((torch.cat([a[0][:, :2], s["y"][:, None]], 1),), k)``

    :raises ValueError: fewer than 20 data sets; a site is outside the rows' plate; it is not clear
        where the data are; the model takes its data as inputs, too; a latent is missing in the
        guide; else as `pyro_recursive.evaluation.information.mutual_information`
    :raises NotImplementedError: a latent site is masked

    Cost: L draws of the guide for R B rows, in chunks.

    Sources: 'Validating Bayesian Inference Algorithms with Simulation-Based Calibration' (Talts et
    al., arXiv 1804.06788); for amortised guides 'Yes, but Did It Work?: Evaluating Variational
    Inference' (Yao et al., arXiv 1802.02538).

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def narrow(x):  # the scale of the posterior is 0.71
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.4))
    >>> print(calibration(model, narrow, torch.zeros(500)).verdict()[:70])
    Not calibrated in 1 of 1 numbers at level 0.01:
    z: the draws are too n
    """
    check_at_least(1, num_draws=num_draws, num_rounds=num_rounds)
    wanted = None if names is None else list(names)
    found: dict[str, list[Tensor]] = {}
    for _ in range(num_rounds):
        simulated = simulate(model, args, kwargs, replace)
        program = Program(model, guide, simulated.args, simulated.kwargs)
        for name, own in _ranks_of_rows(simulated, program, plate, wanted, num_draws).items():
            found.setdefault(name, []).append(own)
    return Calibration({name: torch.cat(own) for name, own in found.items()}, num_draws)


def calibration_by_fits(
    model: Callable,
    fit_guide: Callable[..., Callable],
    *args: Any,
    num_datasets: int = 100,
    num_draws: int = 127,
    names: Iterable[str] | None = None,
    replace: Replace | None = None,
    vectorize_particles: bool = True,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Test whether guides fitted to one data set each are the posterior: N fits.

    Each data set is drawn from the model whole, in the shapes of the data given, and
    ``fit_guide(*args, **kwargs)`` returns a guide for it. What a fit does to Pyro's parameter store
    is undone after it: each starts from what is there now. A fit may set seeds: they do not reach
    the simulation.

    :param fit_guide: trains a new guide on the data in its arguments and returns it; for a guide
        that is amortised over whole data sets, a function that returns this
    :param num_datasets: N, at least 20
    :param vectorize_particles: whether the guide draws in one pass, under one more plate
    :param progress: show a bar, on terminals
    :raises ValueError: as `calibration`, but for rows, as are the other arguments and the sources

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def fit_guide(x):  # "trained" by a formula
    ...     return lambda x: pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> found = calibration_by_fits(model, fit_guide, torch.tensor(0.0), num_datasets=40)
    >>> found.ranks["z"].shape, found.is_calibrated(level=1e-3)
    (torch.Size([40, 1]), True)
    """
    check_at_least(1, num_draws=num_draws)
    check_at_least(FEWEST, num_datasets=num_datasets)
    wanted = None if names is None else list(names)
    found: dict[str, list[Tensor]] = {}
    for _ in tqdm(range(num_datasets), disable=None if progress else True):
        simulated = simulate(model, args, kwargs, replace)
        with _own_fit():
            with _own_seed():
                guide = fit_guide(*simulated.args, **simulated.kwargs)
            program = Program(model, guide, simulated.args, simulated.kwargs)
            own = _ranks_of_data(simulated, program, wanted, num_draws, vectorize_particles)
        for name, rank in own.items():
            found.setdefault(name, []).append(rank)
    return Calibration({name: torch.stack(own) for name, own in found.items()}, num_draws)


def _ranks_of_rows(
    simulated: Simulated,
    program: Program,
    plate: str | None,
    wanted: list[str] | None,
    num_draws: int,
) -> dict[str, Tensor]:
    """Return the ranks of each site in each row, ``[B, dims]``."""
    with poutine.block():
        exchange = _exchange(program, plate)
        frame = exchange.frame
        for site in sites(simulated.trace):
            if frame.name not in independent_plates_of(site):
                raise ValueError(
                    f"Site '{site['name']}' is outside the rows' plate '{frame.name}': its rows "
                    "are no data sets of their own. Use calibration_by_fits, which simulates whole "
                    "data sets, with a function that trains (or just returns) the guide."
                )
        truth = {
            site["name"]: _by_row(site["value"], frame.dim - site["fn"].event_dim)
            for site in _ranked(simulated, wanted)
        }
        sums = {name: RankSums(value) for name, value in truth.items()}
        for draws in exchange.split(num_draws):
            values = exchange.values(draws)
            for name, own in sums.items():
                _add(own, values.get(name), name)
    return {name: own.ranks for name, own in sums.items()}


def _exchange(program: Program, plate: str | None) -> PosteriorTable:
    try:
        return PosteriorTable(program, plate)
    except ValueError as error:
        raise ValueError(
            f"{error} (calibration takes each row for a data set; where latents belong to all rows "
            "together, calibration_by_fits simulates whole data sets.)"
        ) from error


def _by_row(value: Tensor, place: int) -> Tensor:
    """``[*batch, *event]`` to ``[B, dims]``."""
    rows = value.movedim(place, 0)
    return rows.reshape(len(rows), -1)


def _ranks_of_data(
    simulated: Simulated,
    program: Program,
    wanted: list[str] | None,
    num_draws: int,
    vectorize: bool,
) -> dict[str, Tensor]:
    """Return the ranks of each site, ``[dims]``."""
    with poutine.block(), torch.no_grad():
        _, runs = run_particles(program, 1, num_draws, vectorize=vectorize)
    ranks = {}
    for site in _ranked(simulated, wanted):
        name, sums = site["name"], RankSums(site["value"].flatten())
        parts = [run.guide.nodes[name]["value"] for run in runs if name in run.guide.nodes]
        # Runs of one draw each, or one run that has all draws in the dim on the left.
        size = num_draws // len(runs)
        drawn = torch.cat([part.reshape(size, -1) for part in parts]) if parts else None
        _add(sums, drawn, name)
        ranks[name] = sums.ranks
    return ranks


def _ranked(simulated: Simulated, wanted: list[str] | None) -> list[dict[str, Any]]:
    """Return the sites that are ranked."""
    known = {site["name"]: site for site in simulated.latent}
    if wanted is None:
        return [site for site in known.values() if not site["infer"].get("enumerate")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"names= has '{name}'; the model's latent sites are {list(known)}.")
    return [known[name] for name in wanted]


def _add(sums: RankSums, drawn: Tensor | None, name: str) -> None:
    """Count draws ``[S, *]`` of a site."""
    if drawn is None:
        raise ValueError(
            f"The guide does not sample the latent site '{name}'. Leave it out with names=, if "
            "that is right."
        )
    if drawn.shape[1:] != sums.truth.shape:
        raise ValueError(
            f"Site '{name}' has {tuple(drawn.shape[1:])} numbers in the guide and "
            f"{tuple(sums.truth.shape)} in the model."
        )
    sums.add(drawn)


@contextmanager
def _own_fit() -> Iterator[None]:
    """Undo afterwards what is done to Pyro's parameters."""
    store = pyro.get_param_store()
    # The tensors stay the same objects: modules have them, too.
    kept = [(p, p.detach().clone(), p.grad) for _, p in store.named_parameters()]
    with store.scope(store.get_state()):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value, grad in kept:
                    parameter.copy_(value)
                    parameter.grad = grad


@contextmanager
def _own_seed() -> Iterator[None]:
    """Give a block random numbers of its own: what it does with them does not reach ours."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    state = torch_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_torch_state(state)
