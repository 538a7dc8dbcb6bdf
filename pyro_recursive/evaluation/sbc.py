"""Simulation-based calibration: whether a guide is the posterior, on data whose truth is known.

Latents and data are drawn from the model; the guide is given the data. If it is the posterior, the
rank of a true latent among L draws of the guide is uniform on 0 .. L.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_recursive.evaluation.calls import measurement
from pyro_recursive.evaluation.model_runs import (
    drawing_data,
    enumerated_without,
    is_factor,
    is_latent,
    was_observed,
)
from pyro_recursive.evaluation.posterior_tables import PosteriorTable
from pyro_recursive.evaluation.ranks import FEWEST, Calibration, ranks_of
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import log_prob_of
from pyro_recursive.tracing.isolation import restored_random_state
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import Site, independent_plates_of, sites

# From simulated values by site, the positional and the keyword arguments to new (args, kwargs).
Replace = Callable[[dict[str, Tensor], tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]]


@measurement()
@torch.no_grad()
def calibration(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 127,
    plate: str | None = None,
    names: Sequence[str] | None = None,
    replace: Replace | None = None,
    **kwargs: Any,
) -> Calibration:
    """Test whether an amortised guide is the posterior, with each row as a data set.

    Latents and data of all rows are drawn from the model at once, in the shapes of the data given.
    Modules stay in their mode: call ``.eval()`` first.

    Args:
        model, guide: called with the same arguments; all sites are in the plate of the rows.
        num_draws: L, the draws that a true value is ranked among.
        plate: the name of the rows' plate; None is the one around all latents of the guide.
        names: the latent sites that are ranked; None is all but those that losses sum out.
        replace: from simulated values by site, args and kwargs to new (args, kwargs): for data in
            the last of three columns, ``lambda s, a, k: ((torch.cat([a[0][:, :2], s["y"][:, None]],
            1),), k)``. None puts the values into the arguments that the sites had their data from.

    Raises:
        ValueError: a site is outside the rows' plate; it is not clear where the data are; a latent
            is missing in the guide; else as `Calibration` and `mutual_information`.
        NotImplementedError: a latent site is masked.

    Reference: 'Validating Bayesian Inference Algorithms with Simulation-Based Calibration' (Talts
    et al., arXiv 1804.06788).

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> def narrow(x):  # the scale of the posterior is 0.71
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.4))
    >>> calibration(model, narrow, torch.zeros(500)).is_calibrated()
    False
    """
    check_at_least(1, num_draws=num_draws)
    simulated = simulate(model, args, kwargs, replace)
    with poutine.block():
        try:
            table = PosteriorTable(Program(model, guide, *simulated[:2]), plate)
        except ValueError as error:
            remedy = "Or use calibration_by_fits, which simulates whole data sets."
            raise ValueError(f"{error} {remedy}") from error
        chunks = [table.values(draws) for draws in table.split(num_draws)]
    frame = table.frame
    for site in sites(simulated.trace):
        if frame.name not in independent_plates_of(site):
            raise ValueError(
                f"Site '{site['name']}' is outside plate '{frame.name}'. Use calibration_by_fits."
            )
    ranks = {}
    for site in _ranked(simulated.trace, names, chunks[0]):
        name, rows = site["name"], site["value"].movedim(frame.dim - site["fn"].event_dim, 0)
        drawn = [chunk[name] for chunk in chunks if name in chunk]
        ranks[name] = _checked_ranks(name, rows.reshape(len(rows), -1), drawn)
    return Calibration(ranks, num_draws)


@measurement()
def calibration_by_fits(
    model: Callable,
    fit_guide: Callable[..., Callable],
    *args: Any,
    num_datasets: int = 100,
    num_draws: int = 127,
    names: Sequence[str] | None = None,
    replace: Replace | None = None,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> Calibration:
    """Test whether guides fitted to one simulated data set each are the posterior.

    What a fit does to Pyro's parameter store is undone after it, and the seeds that it sets do not
    reach the simulation.

    Args:
        model: as in `calibration`, but its sites may be anywhere.
        fit_guide: ``fit_guide(*args, **kwargs)`` returns a new guide, trained on these data; or a
            guide that is amortised over whole data sets.
        num_datasets: the number of fits, at least 20.
        num_draws, names, replace: as in `calibration`, as are errors.
        vectorize_particles: whether the guide draws in one pass, under one more plate.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> def fit_guide(x):  # "trained" by a formula
    ...     return lambda x: pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> found = calibration_by_fits(model, fit_guide, torch.tensor(0.0), num_datasets=40)
    >>> found.ranks["z"].shape, found.is_calibrated(level=1e-3)
    (torch.Size([40, 1]), True)
    """
    check_at_least(1, num_draws=num_draws)
    check_at_least(FEWEST, num_datasets=num_datasets)
    ranks: dict[str, list[Tensor]] = {}
    for _ in tqdm(range(num_datasets), disable=None):
        simulated = simulate(model, args, kwargs, replace)
        with _parameters_restored():
            seed = int(torch.randint(2**62, (), device="cpu"))
            with restored_random_state():
                torch.manual_seed(seed)
                guide = fit_guide(*simulated.args, **simulated.kwargs)
            program = Program(model, guide, simulated.args, simulated.kwargs)
            with poutine.block(), torch.no_grad():
                _, runs = run_particles(program, 1, num_draws, vectorize=vectorize_particles)
        size = num_draws // len(runs)  # one draw each, or all draws in the dim on the left
        for site in _ranked(simulated.trace, names, runs[0].guide.nodes):
            name = site["name"]
            found = [run.guide.nodes[name]["value"] for run in runs if name in run.guide.nodes]
            drawn = [value.reshape(size, -1) for value in found]
            own = _checked_ranks(name, site["value"].flatten(), drawn)
            ranks.setdefault(name, []).append(own)
    return Calibration({name: torch.stack(own) for name, own in ranks.items()}, num_draws)


def _checked_ranks(name: str, truth: Tensor, drawn: list[Tensor]) -> Tensor:
    """Return the ranks of a site's true values ``[*any]`` among draws ``[s, *any]``."""
    if not drawn or drawn[0].shape[1:] != truth.shape:
        found = tuple(drawn[0].shape[1:]) if drawn else "no draws"
        raise ValueError(
            f"Latent site '{name}' has shape {tuple(truth.shape)} in the model, {found} in the "
            "guide. Choose sites with names=."
        )
    return ranks_of(truth, torch.cat(drawn))


@contextmanager
def _parameters_restored() -> Iterator[None]:
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


class Simulated(NamedTuple):
    """Arguments with simulated data, and the trace that these are from, which observes nothing."""

    args: tuple
    kwargs: dict[str, Any]
    trace: poutine.Trace


@torch.no_grad()
def simulate(
    model: Callable, args: tuple, kwargs: dict[str, Any], replace: Replace | None = None
) -> Simulated:
    """Draw latents and data from a model, and put the data where its arguments have them."""
    with poutine.block():
        trace = poutine.trace(drawing_data(model)).get_trace(*args, **kwargs)
        observed = {site["name"]: site for site in sites(trace) if was_observed(site)}
        _check_generative(trace, observed)
        if replace is None:
            new_args, new_kwargs = _replaced(observed, args, kwargs)
        else:
            values = {name: site["value"] for name, site in observed.items()}
            new_args, new_kwargs = replace(values, args, dict(kwargs))
        found = Simulated(tuple(new_args), new_kwargs, trace)
        again = poutine.trace(poutine.replay(model, trace=trace))
        _check_same(trace, again.get_trace(*found.args, **found.kwargs))
    return found


def _ranked(trace: poutine.Trace, names: Sequence[str] | None, drawn: Container[str]) -> list[Site]:
    """Return the latent sites that are ranked: all but those that losses sum out."""
    known = {site["name"]: site for site in sites(trace) if is_latent(site)}
    if names is None:
        summed = enumerated_without(trace, drawn)
        return [site for name, site in known.items() if name not in summed]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"names= has {unknown}; the latent sites are {list(known)}.")
    return [known[name] for name in names]


def _check_generative(trace: poutine.Trace, observed: dict[str, Site]) -> None:
    """Raise where a model has no distribution of its data."""
    if not observed:
        raise ValueError("The model observes nothing to simulate.")
    for site in sites(trace):
        if is_factor(site):
            raise ValueError(f"Site '{site['name']}' is a pyro.factor, which draws no data.")
        if isinstance(site["mask"], Tensor) and is_latent(site):
            raise NotImplementedError(
                f"Latent site '{site['name']}' is masked. Pass complete data."
            )


def _replaced(
    observed: dict[str, Site], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments with simulated values, each in the argument that had its site's data."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    new = dict(given)
    for name, site in observed.items():
        data, drawn = site["infer"]["obs"], site["value"]
        keys = [key for key, argument in given.items() if argument is data]
        keys = keys or [key for key, argument in given.items() if _equal(argument, data)]
        if len(keys) != 1 or new[keys[0]] is not given[keys[0]]:
            raise ValueError(
                f"The data of site '{name}' are in arguments {keys}, not in one of their own. "
                "Pass replace=."
            )
        argument = given[keys[0]]
        if isinstance(argument, Tensor):
            drawn = drawn.reshape(argument.shape).to(argument.dtype)
        new[keys[0]] = drawn
    return tuple(new[i] for i in range(len(args))), {key: new[key] for key in kwargs}


def _equal(argument: Any, value: Any) -> bool:
    """Whether an argument has the observed values, in their order."""
    if not isinstance(argument, Tensor) or not isinstance(value, Tensor):
        return False
    same = argument.device == value.device
    return same and torch.equal(argument.flatten().to(value.dtype), value.flatten())


def _check_same(simulated: poutine.Trace, again: poutine.Trace) -> None:
    """Raise where the model on simulated data is not the one that they were simulated from."""
    expected = {site["name"]: site for site in sites(simulated)}
    found = {site["name"]: site for site in sites(again)}
    for name in expected.keys() ^ found.keys():
        raise ValueError(f"Site '{name}' is not there for all data.")
    for name, site in expected.items():
        if not _close(found[name]["value"], site["value"]):
            raise ValueError(f"Site '{name}' does not observe the simulation. Pass replace=.")
        if not _close(*(log_prob_of(s, s["fn"]) for s in (found[name], site))):
            raise ValueError(
                f"The distribution of site '{name}' depends on the data, or is random. Pass inputs "
                "as another argument, and call .eval()."
            )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.numel() != other.numel():
        return False
    one, other = one.flatten().double(), other.flatten().double()
    return torch.allclose(one, other, 1e-4, 1e-5, equal_nan=True)
